"""Branches on random models: against the slow oracle, independent of company, greedy where nothing is drawn, by chance else."""

from collections import Counter

import numpy as np
import pytest
import torch
from tiny import EOS, build, filled, token_rows, wrap
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from analysis.branching_rollout import Branching, Cell, generate_with_branching
from analysis.branching_sampling import nucleus, uniforms
from analysis.noise_operators import Noise

NEW = 6
NOISY, CHANCE, BOTH, NEITHER = Cell(0.8, 0.0), Cell(0.0, 0.9), Cell(0.8, 0.9), Cell(0.0, 0.0)
IDS = ["one", "two", "three", "four", "five"]


@pytest.fixture(scope="module")
def models():
    """Random wrappers by name: thoughts that read states in two families, and pause tokens."""
    gpt2 = build("gpt2")
    return {"gpt2": wrap(gpt2), "llama": wrap(build("llama")), "pause": wrap(gpt2, "pause_curriculum")}


def prompts(n_latents: list[int], seed: int = 1) -> list[np.ndarray]:
    return [np.array(row) for row in token_rows(n_latents, seed, answer=0)]


def said(model, tokens, cells, k: int = 4, ids=IDS, **options) -> dict:
    """{(place, cell): branches} of `Branching.run`."""
    options = {"noise": Noise(schedule="none"), "max_new_tokens": NEW, "top_p": 0.95} | options
    return {(place, cell): found for place, cell, found in Branching(model, k, **options).run(tokens, ids, cells)}


def texts(found: dict) -> dict:
    return {key: [branch.new_ids for branch in branches] for key, branches in found.items()}


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize(
    ("name", "schedule"), [("llama", "none"), ("pause", "linear"), *(("gpt2", s) for s in ("none", "exponential", "adaptive"))]
)
def test_shared_prefixes_say_what_each_branch_alone_says(models, name, schedule):
    """Questions of several lengths and numbers of thoughts, one of them with fewer than the injection step."""
    tokens, cells = prompts([3, 3, 1, 3, 0]), [NOISY, BOTH, CHANCE]
    noise = Noise(at_step=2, schedule=schedule)
    fast = said(models[name], tokens, cells, noise=noise)
    slow = said(models[name], tokens, cells, noise=noise, one_at_a_time=True)
    assert texts(fast) == texts(slow) and len(fast) == 15
    for key, branches in fast.items():
        for mine, alone in zip(branches, slow[key]):
            assert mine.logprob == pytest.approx(alone.logprob, abs=1e-5)
            assert torch.allclose(mine.fed_SD, alone.fed_SD, atol=1e-6)
    assert len({tuple(t) for branches in texts(fast).values() for t in branches}) > 12


@pytest.mark.parametrize("options", [{"chain": "replay"}, {"noise_layer": 1}], ids=str)
def test_replayed_thoughts_and_other_layers_too(models, options):
    tokens = prompts([3, 3, 3])
    fast = said(models["gpt2"], tokens, [NOISY, BOTH], ids=IDS[:3], **options)
    slow = said(models["gpt2"], tokens, [NOISY, BOTH], ids=IDS[:3], one_at_a_time=True, **options)
    assert texts(fast) == texts(slow) != texts(said(models["gpt2"], tokens, [NOISY, BOTH], ids=IDS[:3]))


def test_greedy_without_noise_is_generate(models):
    """Five equal outputs, those of the wrapper's own decoding."""
    for model in models.values():
        tokens = prompts([3, 2, 0])
        found = texts(said(model, tokens, [NEITHER], k=5, ids=IDS[:3]))
        for place, row in enumerate(tokens):
            expected = model.generate(torch.from_numpy(row)[None], max_new_tokens=NEW)[0, len(row) :].tolist()
            assert found[place, NEITHER] == [[t for t in expected if t != EOS]] * 5


def test_log_probabilities_are_those_of_the_whole_sequence(models):
    """Untempered, of all tokens and the end, from one teacher-forced forward."""
    model, tokens = models["llama"], prompts([2])
    for branch in said(model, tokens, [CHANCE], ids=["q"])[0, CHANCE]:
        new = [*branch.new_ids, *([EOS] if len(branch.new_ids) < NEW else [])]
        embeds = torch.cat([filled(model, tokens[0].tolist()), model.embedding(torch.tensor(new))])
        logits = model.base_causallm(inputs_embeds=embeds[None], use_cache=False).logits[0].log_softmax(-1)
        expected = sum(logits[len(tokens[0]) - 1 + i, token].item() for i, token in enumerate(new))
        assert branch.logprob == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------- draws


def test_noise_is_independent_in_every_branch(models):
    """Temperature 0: what is fed differs between all branches, at the injection by draws that are not alike."""
    model, tokens = models["gpt2"], prompts([3, 3])
    for branches in said(model, tokens, [NOISY], k=5, ids=IDS[:2]).values():
        clean = said(model, tokens, [NEITHER], k=1, ids=IDS[:2])
        fed = torch.stack([branch.fed_SD for branch in branches])
        apart = (fed[:, None] - fed[None]).norm(dim=-1)
        assert apart[~torch.eye(5, dtype=bool)].min() > 1e-3
    drawn = fed[:, 0] - clean[1, NEITHER][0].fed_SD[0]
    cosine = torch.cosine_similarity(drawn[:, None], drawn[None], dim=-1)[~torch.eye(5, dtype=bool)]
    assert cosine.abs().max() < 0.9 and abs(cosine.mean()) < 0.4
    norm = clean[1, NEITHER][0].fed_SD[0].norm()
    assert torch.allclose(drawn.norm(dim=-1), 0.8 * norm, rtol=1e-5)


def test_only_the_seeds_question_and_branch_matter(models):
    """Not how many branches or questions there are, in which order or batches, nor the other cells; only the seeds."""
    model, tokens = models["gpt2"], prompts([3, 2, 3, 3, 3])
    whole = texts(said(model, tokens, [NOISY, BOTH, CHANCE], k=6))
    order = [4, 2, 0]
    few = texts(said(model, [tokens[i] for i in order], [BOTH], k=3, ids=[IDS[i] for i in order], batch_size=2))
    assert few == {(place, BOTH): whole[i, BOTH][:3] for place, i in enumerate(order)}
    assert whole[0, BOTH] != whole[2, BOTH] and len(set(map(tuple, whole[0, CHANCE]))) > 1
    other = texts(said(model, tokens, [NOISY, CHANCE], k=6, sampling_seed=1))
    assert all(other[i, NOISY] == whole[i, NOISY] for i in range(5)) and other[0, CHANCE] != whole[0, CHANCE]
    moved = texts(said(model, tokens, [NOISY, CHANCE], k=6, noise=Noise(schedule="none", seed=1)))
    assert all(moved[i, CHANCE] == whole[i, CHANCE] for i in range(5))
    assert any(moved[i, NOISY] != whole[i, NOISY] for i in range(5))


def test_the_global_generator_is_left_alone(models):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    said(models["gpt2"], prompts([2, 2]), [BOTH], ids=IDS[:2])
    assert torch.equal(torch.get_rng_state(), before)


def test_uniform_numbers_are_told_apart_and_do_not_depend_on_how_many():
    drawn = {(s, q, b): uniforms(s, q, b, 64) for s in (0, 1) for q in ("a", "b") for b in (0, 1)}
    assert len({x[0].item() for x in drawn.values()}) == 8
    assert all(torch.equal(uniforms(*key, 9), x[:9]) for key, x in drawn.items())
    assert abs(torch.cat(list(drawn.values())).mean() - 0.5) < 0.06


@pytest.mark.parametrize("top_p", [0.3, 0.75, 1.0])
def test_tokens_come_as_often_as_the_library_says(top_p):
    """Against the library's temperature and top-p, over a fine grid of uniform numbers."""
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(2)) * 2
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(0.7)(None, logits))[0].softmax(-1)
    grid = (torch.arange(20_000) + 0.5) / 20_000
    chosen = Counter(nucleus((logits / 0.7).expand(len(grid), -1), top_p, grid).tolist())
    assert [chosen[i] / len(grid) for i in range(9)] == pytest.approx(warped.tolist(), abs=2e-4)
    ends = nucleus(logits.expand(2, -1) / 0.7, top_p, torch.tensor([0.0, 1 - 2**-24]))
    assert warped[ends].min() > 0 and ends[0] == logits.argmax()


# ---------------------------------------------------------------- one call


def test_one_call_takes_padded_batches(models):
    model, rows = models["gpt2"], prompts([3, 2, 3])
    width = max(map(len, rows)) + 2
    ids, mask = torch.full((3, width), EOS), torch.zeros(3, width, dtype=torch.long)
    for b, row in enumerate(rows):
        start = (0, 2, width - len(row))[b]
        ids[b, start : start + len(row)], mask[b, start : start + len(row)] = torch.from_numpy(row), 1
    options = {"num_branches": 3, "temperature": 0.9, "top_p": 0.95, "noise_scale": 0.8, "question_ids": IDS[:3]}
    found = generate_with_branching(model, ids, mask, NEW, **options)
    expected = texts(said(model, rows, [BOTH], k=3, ids=IDS[:3]))
    assert found == [expected[place, BOTH] for place in range(3)]
    assert found == generate_with_branching(model, ids, mask, NEW, **options, one_at_a_time=True)


def test_mistakes_are_named(models):
    ids = torch.tensor([[1, 2, 3]])
    for options, message in (
        ({"noise_scale": -1.0}, "neither may be negative"),
        ({"temperature": -0.1}, "neither may be negative"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"num_branches": 0}, "num_branches 0"),
        ({"noise_type": "pink"}, "^Unknown noise_type"),
        ({"schedule": "sudden"}, "Unknown schedule"),
        ({"noise_chain": "both"}, "noise_chain 'both'"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_with_branching(models["gpt2"], ids, None, NEW, **options)


def test_what_fails_alone_is_an_error_of_its_own(models):
    """A prompt longer than the model's positions, among others; and noise beyond what floats hold."""
    model = models["gpt2"]
    tokens = [*prompts([3, 3]), np.concatenate([np.ones(120, dtype=np.int64), prompts([3])[0]])]
    found = said(model, tokens, [BOTH], ids=IDS[:3])
    assert all("exceeds the model's 96 positions" in b.error and b.new_ids is None for b in found[2, BOTH])
    others = texts(said(model, tokens[:2], [BOTH], ids=IDS[:2]))
    assert all(texts(found)[key] == expected for key, expected in others.items())
    huge = Cell(1e308, 0.0)
    lost = said(model, tokens[:2], [huge, NEITHER], noise=Noise("gaussian", schedule="none"), ids=IDS[:2])
    assert all(b.error == "the model's states are not finite" for i in (0, 1) for b in lost[i, huge])
    assert all(b.error is None for i in (0, 1) for b in lost[i, NEITHER])
    with pytest.raises(RuntimeError, match="3 of 3 branches failed"):
        generate_with_branching(model, torch.ones(1, 120, dtype=torch.long), None, NEW, 3)
