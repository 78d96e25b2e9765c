"""Llama, Qwen, Mistral, GPT-NeoX and gpt-oss: saved weights in a folder, loaded as a run loads them, against whole passes.

Windows are shorter than the rows here, so that a cache or mask that forgets about them cannot pass.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from tiny import filled, gradients, norms_in_float64
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from backbones import THOUGHT_TOKENS, load_backbone
from checkpoint import build_model, save_whole, stored_weights
from dataset import MyCollator
from generation import Decoding
from recompute import recompute_blocks
from taps import decoder_blocks
from utils import check_config

WORDS, WINDOW, ANSWER = 40, 5, 4
WIDE = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
WIDE |= {"max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 0, "num_key_value_heads": 2}
ALTERNATE = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "attention_dropout": 0.0,
}
FAMILIES = {
    "llama": WIDE | {"model_type": "llama", "tie_word_embeddings": False},
    "llama, tied": WIDE | {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 8, "rope_theta": 500000.0},
    "qwen2": WIDE | {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False},
    "qwen2, windows": WIDE
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": WIDE | {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 8},
    "mistral": WIDE | {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": WINDOW},
    "gpt_neox": {key: value for key, value in WIDE.items() if key != "num_key_value_heads"}
    | {
        "model_type": "gpt_neox",
        "rotary_pct": 0.5,
        "use_parallel_residual": True,
        "hidden_act": "gelu",
        "attention_bias": True,
    },
    "gpt_oss": WIDE | ALTERNATE | {"model_type": "gpt_oss", "tie_word_embeddings": False},
}
WINDOWED = [name for name, config in FAMILIES.items() if config.get("sliding_window")]


def write_folder(folder, config: dict) -> str:
    """A folder as one downloads it: config.json, random weights, and a tokenizer of 40 words, `<<` among them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = load_backbone(str(folder), from_scratch=True, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # attention, norms and sinks that do something
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.save_pretrained(folder)
    vocabulary = {"<eos>": 0, "<<": 1} | {f"w{i}": i for i in range(2, WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def config_of(folder: str, **changes):
    values = {
        "save_path": "runs",
        "name": "x",
        "model_id": folder,
        "coconut": True,
        "train_path": "t.json",
        "val_path": "v.json",
    }
    return check_config(values | changes, "test")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: its folder}."""
    parent = tmp_path_factory.mktemp("families")
    return {name: write_folder(parent / str(i), config) for i, (name, config) in enumerate(FAMILIES.items())}


@pytest.fixture
def load(folders):
    """load(family): (Coconut in float64 as `build_model` makes it, the new rows moved away from `<<`; its tokenizer)."""

    def load(name):
        model, tokenizer, _, _ = build_model(config_of(folders[name]))
        model.double().eval()
        norms_in_float64(model)
        for weight in {model.base_causallm.get_output_embeddings().weight, model.embedding.weight}:
            weight.data[-3:] *= 0.5
        if name == "gpt_oss":
            model.base_causallm.set_experts_implementation("eager")  # the other kernel knows no float64
        return model, tokenizer

    return load


def token_rows(model, n_latents: list[int], seed: int = 3) -> list[list[int]]:
    """Rows of words, some of them far longer than a window, with thoughts between their markers."""
    generator = torch.Generator().manual_seed(seed)
    start, end, latent = model.start_latent_id, model.end_latent_id, model.latent_token_id
    lengths = torch.randint(2, 4 * WINDOW, (len(n_latents),), generator=generator).tolist()
    texts = [torch.randint(1, WORDS, (n + ANSWER,), generator=generator).tolist() for n in lengths]
    return [[*text[:n], start, *[latent] * k, end, *text[n:]] for text, n, k in zip(texts, lengths, n_latents)]


def collate(model, tokenizer, rows, answer: int = ANSWER, left: bool = False) -> dict:
    """The batch that a run makes of these rows."""
    features = [{"input_ids": row, "labels": [*[-100] * (len(row) - answer), *row[len(row) - answer :]]} for row in rows]
    features = features if answer else [{"input_ids": row} for row in rows]
    return dict(MyCollator(tokenizer, model.latent_token_id, left=left)(features))


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def slow_logits(model, row) -> torch.Tensor:
    """[T, V] of one row: a whole pass for each thought, no padding, no cache, the library's own masks."""
    return model.base_causallm(inputs_embeds=filled(model, row)[None], use_cache=False).logits[0]


def greedy(model, prompt: list[int], n: int) -> list[int]:
    row = list(prompt)
    with torch.no_grad():
        while len(row) < len(prompt) + n:
            token = int(slow_logits(model, row)[-1].argmax())
            if token == model.eos_token_id:
                break
            row.append(token)
    return row[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_equal_those_of_whole_passes(family, load):
    model, tokenizer = load(family)
    rows = token_rows(model, [0, 3, 6, 1])
    logits = [slow_logits(model, row) for row in rows]
    losses = [F.cross_entropy(x[-ANSWER - 1 : -1], torch.tensor(row[-ANSWER:])) for x, row in zip(logits, rows)]
    loss = torch.stack(losses).mean()
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    batch = collate(model, tokenizer, rows)
    out = model(**batch, full_logits=True)
    out.loss.backward()
    close(out.loss, loss)
    for b, real in enumerate(batch["attention_mask"].bool()):
        close(out.logits[b, real], logits[b])
    got = gradients(model)
    assert sum(x.abs().max() > 1e-6 for x in got.values()) > 0.8 * len(got)
    for name, gradient in got.items():
        close(gradient, expected[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_uncached(family, load):
    model, tokenizer = load(family)
    rows = [row[:-ANSWER] for row in token_rows(model, [2, 0, 5, 2, 3], seed=4)]
    expected = [greedy(model, row, 9) for row in rows]
    batch = collate(model, tokenizer, rows, answer=0)
    new = model.generate(**batch, max_new_tokens=9)[:, batch["input_ids"].shape[1] :].tolist()
    ends = [row + [model.eos_token_id] * (len(new[0]) - len(row)) for row in expected]
    assert new == ends and sum(map(len, expected)) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing_and_none_needs_no_mask(family, load):
    model, tokenizer = load(family)
    rows = token_rows(model, [2, 2, 4])
    batch = collate(model, tokenizer, rows, left=True)
    more = {key: F.pad(batch[key], (7, 0), value=value) for key, value in zip(batch, (0, 0, 0, -100))}
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids"} and more["attention_mask"][:, 0].sum() == 0
    out, again = model(**batch, full_logits=True), model(**more, full_logits=True)
    real = batch["attention_mask"].bool()
    close(again.logits[:, 7:][real], out.logits[real])
    close(again.loss, out.loss)
    for b, row in enumerate(rows):
        close(model(torch.tensor([row])).logits[0], out.logits[b, real[b]])


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_hides_what_lies_behind_it(family, load):
    """A word out of the reach of all windows moves the last state only where some layers see everything."""
    model, _ = load(family)
    reach = (WINDOW - 1) * model.base_causallm.config.num_hidden_layers
    moved = []
    for n in (reach + 2, reach + 1):
        row = F.pad(torch.arange(1, n + 1), (3, 0))
        mask, other = (row > 0).long(), row.clone()
        other[3] = 39
        last = [model(x[None], mask[None]).logits[0, -1] for x in (row, other)]
        moved.append((last[0] - last[1]).abs().max().item())
    assert (moved[0] > 1e-9) == (family != "mistral") and moved[1] > 1e-9, moved


@pytest.mark.parametrize("family", WINDOWED)
def test_recomputation_parallel_thoughts_and_concatenated_caches_keep_windows(family, load):
    model, tokenizer = load(family)
    batch = collate(model, tokenizer, token_rows(model, [4, 1, 4]))
    model.train()
    loss = model(**batch).loss
    loss.backward()
    expected = gradients(model)

    def check(changed) -> None:
        changed.zero_grad()
        again = changed(**batch).loss
        again.backward()
        close(again, loss)
        for name, gradient in gradients(changed).items():
            close(gradient, expected[name])

    for changes in ({"latent_iterations": 4}, {"compiled": True}):
        changed = copy.deepcopy(model)
        for key, value in changes.items():
            setattr(changed, key, value)
        check(changed)
    recompute_blocks(decoder_blocks(model.base_causallm))
    check(model)


@torch.no_grad()
@pytest.mark.parametrize("family", WINDOWED)
def test_rows_with_windows_leave_join_and_are_asked_behind_hidden_tokens(family, load):
    model, tokenizer = load(family)
    rows = [row[:-ANSWER] for row in token_rows(model, [3, 1, 2, 0], seed=6)]

    def start(numbers: list[int]) -> Decoding:
        batch = collate(model, tokenizer, [rows[i] for i in numbers], answer=0)
        return Decoding.prefill(model, **batch, max_new_tokens=8, row_ids=numbers)[0]

    live = start([0, 1])  # which do not end together
    assert live.movable
    for _ in range(3):
        live.advance()
    live = live.select([1])
    fresh = start([2, 3])
    fresh.join(live)
    fresh.advance()
    tails = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    states = fresh.states_behind(tails, [0, 1, 2])
    for state_CD, row, n, tail in zip(states, fresh.rows, [0, 1, 2], tails):
        whole = filled(model, [*rows[row.row_id], *row.new_ids[:n], *tail])[None]
        slow = model.base_causallm(inputs_embeds=whole, use_cache=False, output_hidden_states=True).hidden_states[-1][0]
        close(state_CD[: len(tail)], slow[-len(tail) :])
    while fresh.going():
        fresh.advance()
    assert [row.new_ids for row in fresh.rows] == [greedy(model, rows[i], 8) for i in (2, 3, 1)]


# ---------------------------------------------------------------- three more tokens, and files


@pytest.mark.parametrize("family", FAMILIES)
def test_three_tokens_are_added_to_tied_and_untied_heads(family, folders):
    model, tokenizer, _, _ = build_model(config_of(folders[family]))
    base, new = model.base_causallm, [tokenizer.convert_tokens_to_ids(token) for token in THOUGHT_TOKENS]
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    size = len(tokenizer)
    assert new == [size - 3, size - 2, size - 1] and base.config.vocab_size == len(embedding) == len(head) == size
    assert (head is embedding) == bool(FAMILIES[family].get("tie_word_embeddings"))
    for weight in (embedding, head):
        assert all(torch.equal(weight[i], weight[1]) for i in new), "the row of <<"
    assert not torch.equal(head[2], embedding[2]) or head is embedding


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_gives_the_same_model_back(family, load, folders, tmp_path):
    model, tokenizer = load(family)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    save_whole(stored_weights(model), tmp_path / "checkpoint_1")
    again = build_model(config_of(folders[family]), tmp_path / "checkpoint_1")[0]
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key].float(), theirs[key]) for key in mine)
