"""Loss, generation and two-choice scores in one go against slow loops over single rows, one question at a time."""

import numpy as np
import pytest
import torch
from evaluate_material import (
    ALONE,
    N_ROWS,
    Scripted,
    prompts_of,
    slow_continuation,
    slow_loss,
)
from test_decoding import sliding
from tiny import FAMILIES, build

import evaluate as evaluation
from coconut import Coconut
from dataset import MyCollator, get_cot_latent_dataset
from evaluate import evaluate, evaluate_loss, generate_records
from generation import Decoding
from two_choice import score_options

ALIKE = [({}, 0), ({}, 2), ({"feedback_mode": "learned_shared"}, 9), ({"coconut": False, "cot": True}, 0)]
UNLIKE = [({"pad_latent_to_max": False}, 3), ({"uniform_prob": 0.5}, 2)]


def told_apart(run, stage: int, base=None):
    """Give the run another model, let a token be EOS that ends its rows at different lengths; (prompts, gold, new tokens)."""
    base = base or build("gpt2", vocab=len(run.tokenizer), positions=160)
    run.model = Coconut(base, run.ids.latent, run.ids.start, run.ids.end, -1, run.model.feedback_mode).eval()
    prompts, gold = prompts_of(run, stage), run.rows(get_cot_latent_dataset, stage, run.val, epoch=3)
    new = [slow_continuation(run, prompt["input_ids"].tolist(), 9) for prompt in prompts]
    ends = {eos: {t.index(eos) if eos in t else len(t) for t in new} for eos in set(sum(new, []))}
    run.model.eos_token_id = eos = max(ends, key=lambda eos: (len(ends[eos]), eos))
    assert len(ends[eos]) >= 2
    return prompts, gold, [t[: t.index(eos)] if eos in t else t for t in new]


def all_questions(run, prompts, gold, rows, batch_size, **options):
    return evaluate(run.model, prompts, rows, run.tokenizer, batch_size, 9, ALONE, gold=gold, two_choice=True, **options)


def assert_same(records, expected, tolerance=1e-12):
    numbers = ("margin", "two_choice_ce", "target_logp", "wrong_logp", "name_logp")
    for mine, one in zip(records, expected):
        assert mine == one | {key: pytest.approx(one[key], abs=tolerance) for key in numbers if one[key] is not None}


@pytest.mark.parametrize("changes, stage", ALIKE + UNLIKE)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_three_questions_at_once_are_three_questions(make_run, rows, family, changes, stage):
    """Loss, tokens and margins of slow loops over single rows, at every batch size; and all prompts are run once."""
    run = make_run(**changes)
    longest = run.rows(get_cot_latent_dataset, stage, run.val, epoch=3).lengths().total.max()
    prompts, gold, new = told_apart(run, stage, build(family, vocab=len(run.tokenizer), positions=int(longest)))
    run.rows = lambda get, *args, **kwargs: gold
    loss, scores = slow_loss(run, stage), score_options(run.model, rows, list(prompts), new, run.tokenizer)
    seen, rollout = [], run.model.rollout

    def spy(*args, plan=None, row_ids=None, **kwargs):
        seen.extend(plan.passes[0].row_ids if plan else row_ids)
        return rollout(*args, plan=plan, row_ids=row_ids, **kwargs)

    run.model.rollout = spy
    first = None
    for batch_size in (1, 3, 7, 64):
        seen.clear()
        records, mean = all_questions(run, prompts, gold, rows, batch_size)
        assert mean == pytest.approx(loss, abs=1e-12)
        unlike = [
            i
            for i, row in enumerate(prompts)
            if gold[i]["input_ids"][: len(row["input_ids"])].tolist() != row["input_ids"].tolist()
        ]
        assert sorted(seen) == sorted([*range(N_ROWS), *unlike]) and bool(unlike) == ((changes, stage) in UNLIKE)
        assert [r["output"] for r in records] == [run.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
        assert [r["generated_tokens"] - r["n_latents"] for r in records] == [len(ids) for ids in new]
        first = first or records
        assert_same(records, [record | score for record, score in zip(first, scores)])


@torch.no_grad()
def test_sliding_windows_are_asked_one_by_one(make_run, rows):
    """Their caches give no column back: every question has its rollouts, and the answers are those of single rows."""
    run = make_run()
    base = sliding(vocab=len(run.tokenizer), positions=160)
    prompts, gold, new = told_apart(run, 2, base)
    loss, scores = slow_loss(run, 2), score_options(run.model, rows, list(prompts), new, run.tokenizer)
    for batch_size in (3, 64):
        records, mean = all_questions(run, prompts, gold, rows, batch_size)
        assert mean == pytest.approx(loss, abs=1e-6)  # the library's norm computes in float32
        assert [r["generated_tokens"] - r["n_latents"] for r in records] == [len(ids) for ids in new]
        assert_same(records, [record | score for record, score in zip(records, scores)], 1e-5)


@torch.no_grad()
def test_an_edit_reaches_all_three_questions(make_run, rows):
    run = make_run()
    prompts, gold, _ = told_apart(run, 2)

    def edit(layer, pass_, x):
        """Another change for every row: of its thoughts, and of all that follows."""
        strength = torch.tensor([0.1 + i % 3 for i in pass_.row_ids], dtype=x.dtype)[:, None, None]
        columns = [slot.column - pass_.start for slot in pass_.slots] or list(range(x.shape[1]))
        if pass_.slots or pass_.start > 0:
            x = x.clone()
            x[:, columns] += strength * torch.linspace(-1, 1, x.shape[2], dtype=x.dtype)
        return x

    def only_thoughts(layer, pass_, x):
        return edit(layer, pass_, x) if pass_.slots else x

    clean, _ = all_questions(run, prompts, gold, rows, 3)
    expected, _ = all_questions(run, prompts, gold, rows, 1, edit=edit)
    assert sum(a["output"] != b["output"] for a, b in zip(clean, expected)) > 2
    for batch_size in (3, 64):
        assert_same(all_questions(run, prompts, gold, rows, batch_size, edit=edit)[0], expected)
    # Margins and loss by separate rollouts over whole rows, where thoughts alone are edited.
    records, mean = all_questions(run, prompts, gold, rows, 4, edit=only_thoughts)
    new = [slow_edited(run, prompts, i, only_thoughts) for i in range(N_ROWS)]
    assert [r["generated_tokens"] - r["n_latents"] for r in records] == [len(ids) for ids in new]
    scores = [
        score_options(run.model, [rows[i]], [prompts[i]], [new[i]], run.tokenizer, only_thoughts)[0] for i in range(N_ROWS)
    ]
    assert_same(records, [record | score for record, score in zip(records, scores)])
    apart = evaluate_loss(run.model, gold, MyCollator(run.tokenizer, run.ids.latent), 4, ALONE, edit=only_thoughts)
    assert mean == pytest.approx(apart, abs=1e-12)
    assert mean != pytest.approx(evaluate_loss(run.model, gold, MyCollator(run.tokenizer, run.ids.latent), 4, ALONE), abs=1e-3)


def slow_edited(run, prompts, i: int, edit) -> list[int]:
    """New tokens of one row whose prompt is edited: whole, uncached rollouts."""
    ids = prompts[i]["input_ids"].tolist()
    n_prompt = len(ids)
    while len(ids) < n_prompt + 9:
        hidden = run.model.rollout(torch.tensor([ids]), edit=edit, row_ids=[i]).hidden_BTD
        token = int(run.model.head(hidden[0, -1]).argmax())
        if token == run.model.eos_token_id:
            break
        ids.append(token)
    return ids[n_prompt:]


def test_progress_counts_rows_and_shows_the_accuracy(make_run, rows, monkeypatch):
    run, bars = make_run(), []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.done, self.shown = total, [], []
            bars.append(self)

        def update(self, n):
            self.done.append(n)

        def set_description(self, text):
            self.shown.append(text)

        def close(self):
            assert sum(self.done) == self.total == N_ROWS

    monkeypatch.setattr(evaluation, "tqdm", Bar)
    run.model = Scripted(run.tokenizer, ["is " * (5 * i) + ("### " + row["answer"]) * (i % 2) for i, row in enumerate(rows)])
    records = generate_records(run.model, prompts_of(run, 2), rows, run.tokenizer, 4, 99, ALONE)
    (bar,) = bars
    assert (
        len(bar.done) > 3 and bar.shown[-1] == f"Test accuracy: {np.mean([r['correct'] for r in records]):.2f}" != bar.shown[0]
    )


def test_prompts_of_one_prefill_have_one_number_of_latents(make_run, rows, monkeypatch):
    run, batches = make_run(pad_latent_to_max=False), []
    prefill = Decoding.prefill
    monkeypatch.setattr(
        Decoding, "prefill", lambda *args, **kwargs: batches.append(kwargs["row_ids"]) or prefill(*args, **kwargs)
    )
    prompts = prompts_of(run, 5)
    generate_records(run.model, prompts, rows, run.tokenizer, 6, 2, ALONE)
    latents = [set(prompts.lengths().latents[batch]) for batch in batches]
    assert all(len(n) == 1 for n in latents) and len(set.union(*latents)) == 2
    assert max(map(len, batches)) > 1 and sorted(sum(batches, [])) == list(range(N_ROWS))
