"""Two-choice scores against a slow computation, and what a validation prints and returns."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from evaluate_material import (
    ALONE,
    FORMS,
    N_ROWS,
    Scripted,
    character_tokenizer,
    encoded,
    prompts_of,
    slow_continuation,
    slow_logits,
    slow_loss,
)
from transformers import GPT2Config, GPT2LMHeadModel

import backbones
from coconut import Coconut
from dataset import get_question_latent_dataset
from evaluate import generate_records, validate
from files import read_jsonl
from tokens import TokenTable, get_dataset
from two_choice import has_options, score_options

# ---------------------------------------------------------------------------------------------------- two choices


@torch.no_grad()
def slow_margin(model: Coconut, row: dict, prompt: list[int], steps: list[int], tokenizer) -> float:
    """log P(target) - log P(wrong) from the log-probabilities of all pieces of both whole answers."""
    scores = []
    for option in ("target", "neg_target"):
        symbols = row["idx_to_symbol"]
        text = f"### {symbols[row['root']]} is a {symbols[row[option]]}."
        answer = tokenizer.encode(text, add_special_tokens=False)
        ids = [*prompt, *steps, *answer]
        logp = slow_logits(model, ids, len(prompt)).log_softmax(-1)
        scores.append(sum(logp[len(ids) - len(answer) + j - 1, token].item() for j, token in enumerate(answer)))
    return scores[0] - scores[1]


@pytest.mark.parametrize("changes, stage", FORMS)
def test_margins_equal_a_slow_computation(make_run, rows, changes, stage):
    """Own steps stand in front: all of them up to the `#`, part, none, and an output without any `#`."""
    run = make_run(**changes)
    texts = ["{0}\n{1}\n### {2}", "{0}\n### Tom is", "### {2}", "{0}\n{1}", "{1}\n###", ""]
    texts = [texts[i % len(texts)].format(*row["steps"][:2], row["answer"]) for i, row in enumerate(rows)]
    prompts = list(prompts_of(run, stage))
    new_ids = [encoded(run.tokenizer, text) for text in texts]
    scores = score_options(run.model, rows, prompts, new_ids, run.tokenizer)
    for row, prompt, text, score in zip(rows, prompts, texts, scores):
        steps = text.split("#")[0] if "#" in text else text + "\n" if text else ""
        margin = slow_margin(run.model, row, prompt["input_ids"].tolist(), encoded(run.tokenizer, steps), run.tokenizer)
        assert score["margin"] == pytest.approx(margin, abs=1e-9)
        assert score["two_choice_correct"] is (margin > 0)
        assert score["two_choice_ce"] == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-9)
    assert len({score["two_choice_correct"] for score in scores}) == 2, "both outcomes occur"


def toy(tokenizer, n_positions: int = 128) -> Coconut:
    torch.manual_seed(1)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": n_positions}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.4, **shape)).double().eval()
    ids = backbones.ThoughtIds(*(tokenizer.convert_tokens_to_ids(t) for t in backbones.THOUGHT_TOKENS))
    return Coconut(base, ids.latent, ids.start, ids.end, tokenizer.eos_token_id).eval()


def test_options_that_begin_alike_and_differ_in_length():
    """Pieces of the species count beyond the first, and the stop too; what is shared cancels."""
    tokenizer = character_tokenizer()
    ids = backbones.add_thought_tokens(tokenizer)
    model = toy(tokenizer)
    rows = [
        {"idx_to_symbol": ["Tom", *pair], "root": 0, "target": target, "neg_target": 3 - target}
        for pair in [("terpus", "tempus"), ("lempus", "lempuses"), ("a", "zumpus")]
        for target in (1, 2)
    ]
    prompt = [*encoded(tokenizer, "Is Tom?\n"), ids.start, ids.latent, ids.latent, ids.end]
    prompts = [{"input_ids": np.array(prompt), "idx": i} for i in range(len(rows))]
    steps = encoded(tokenizer, "Tom is.\n")
    scores = score_options(model, rows, prompts, [steps + encoded(tokenizer, "### T")] * len(rows), tokenizer)
    for i, (row, score) in enumerate(zip(rows, scores)):
        assert score["margin"] == pytest.approx(slow_margin(model, row, prompt, steps, tokenizer), abs=1e-9)
        other = scores[i + 1 if i % 2 == 0 else i - 1]
        assert score["margin"] == pytest.approx(-other["margin"], abs=1e-9), "exchanging the options turns the sign"


def test_a_thought_token_that_was_said_is_a_token(make_run, rows):
    """An untrained model may write the latent token; among own steps it is text."""
    run, prompts = make_run(), prompts_of(make_run(), 2)
    steps = [*encoded(run.tokenizer, rows[0]["steps"][0]), run.ids.latent, *encoded(run.tokenizer, "\n")]
    (score,) = score_options(run.model, rows[:1], [prompts[0]], [steps + encoded(run.tokenizer, "###")], run.tokenizer)
    margin = slow_margin(run.model, rows[0], prompts[0]["input_ids"].tolist(), steps, run.tokenizer)
    assert score["margin"] == pytest.approx(margin, abs=1e-9)


@pytest.mark.parametrize("liked, sign", [("target", 1), ("neg_target", -1)])
def test_a_model_that_likes_an_option_is_read_so(make_run, rows, liked, sign):
    run, row = make_run(), rows[0]
    head, bias = run.model.head, torch.zeros(len(run.tokenizer), dtype=torch.float64)
    bias[encoded(run.tokenizer, row["idx_to_symbol"][row[liked]])] = 200.0
    run.model.head = lambda hidden: head(hidden) + bias
    (score,) = score_options(run.model, [row], [prompts_of(run, 1)[0]], [[]], run.tokenizer)
    assert score["margin"] * sign > 10 and score["two_choice_correct"] is (sign > 0)
    assert (score["two_choice_ce"] < 1e-3) == (sign > 0)


def test_records_carry_the_scores_after_their_own_steps(make_run, rows):
    run = make_run()
    prompts = prompts_of(run, 2)
    records = generate_records(run.model, prompts, rows, run.tokenizer, 4, 6, ALONE, two_choice=True)
    for row, record in zip(rows, records):
        prompt = prompts[record["idx"]]["input_ids"].tolist()
        new = slow_continuation(run, prompt, 6)
        hashes = [i for i, token in enumerate(new) if "#" in run.tokenizer.decode([token])]
        steps = new[: hashes[0]] if hashes else [*new, *encoded(run.tokenizer, "\n")] if new else []
        assert record["margin"] == pytest.approx(slow_margin(run.model, row, prompt, steps, run.tokenizer), abs=1e-9)


def test_two_choice_at_the_end_of_the_positions(rows, tmp_path):
    """A row whose continuation runs to the last position has no room for the options; the evaluation must go on."""
    tokenizer = backbones.load_tokenizer(str(ROOT / "backbones" / "prosqa_words"))
    ids = backbones.add_thought_tokens(tokenizer)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    table = TokenTable(get_dataset(str(tmp_path / "rows.json"), tokenizer))
    config = SimpleNamespace(c_thought=1, max_latent_stage=3, pad_latent_to_max=True, no_cot=False)
    prompts = get_question_latent_dataset(3, table, config, ids.start, ids.latent, ids.end)
    model = toy(tokenizer, n_positions=int(prompts.lengths().total.max()) + 4)
    never = torch.zeros(len(tokenizer), dtype=torch.float64).index_fill_(0, torch.tensor([tokenizer.eos_token_id]), -1e9)
    head = model.head
    model.head = lambda hidden: head(hidden) + never
    records = generate_records(model, prompts, rows, tokenizer, 4, 64, ALONE, two_choice=True)
    assert len(records) == N_ROWS


def test_rows_with_options():
    row = {"idx_to_symbol": [], "root": 0, "target": 1, "neg_target": 2}
    assert has_options(row) and not has_options({key: row[key] for key in row if key != "neg_target"})


# ---------------------------------------------------------------------------------------------------- a validation


def test_validation_prints_the_stock_lines(make_run, rows, capsys):
    run = make_run(epochs_per_stage=2)
    run.model.train()
    capsys.readouterr()
    summary = validate(run, 4, "eval_5.jsonl", with_loss=True)
    out = capsys.readouterr().out
    assert run.model.training, "left as it was"
    assert (summary["stage"], summary["n_latents"]) == (2, 2)
    assert summary["eval/samples_per_s"] == pytest.approx(N_ROWS / summary["seconds"])

    records = read_jsonl(run.folder.path / "eval_5.jsonl")
    assert len(records) == N_ROWS and sum(r["correct"] for r in records) == summary["correct"]
    ratio = r"(\d+(?:\.\d+)?(?:e-\d+)?)"
    (loss,) = re.findall(rf"^eval loss {ratio}$", out, re.M)
    run.model.eval()
    with torch.no_grad():
        assert float(loss) == summary["eval/loss"] == pytest.approx(slow_loss(run, 2), abs=1e-9)
    assert re.findall(r"^Device (\d+): Cor=(\d+), CoT=(\d+), Total=(\d+)$", out, re.M) == [("0", "0", "0", str(N_ROWS))]
    ((correct, total, accuracy),) = re.findall(rf"^Accuracy on validation set: (\d+) / (\d+) = {ratio}$", out, re.M)
    assert (int(correct), int(total), float(accuracy)) == (summary["correct"], N_ROWS, summary["eval/acc"])
    ((matches, total, ratio_),) = re.findall(rf"^CoT match on validation set: (\d+) / (\d+) = {ratio}$", out, re.M)
    assert (int(matches), int(total), float(ratio_)) == (summary["cot_matches"], N_ROWS, summary["eval/cot_em"])
    tokens = re.search(rf"^CoT match.*\nGenerated tokens per question: {ratio}$", out, re.M)
    assert float(tokens[1]) == np.mean([r["generated_tokens"] for r in records])

    questions = re.findall(
        r"^Question (\d+): Answer = '(.*?)' CoT = '(.*?)'\nFull output: '(.*?)'\nExtracted Output: '(.*?)'$",
        out,
        re.M | re.S,
    )
    prompts = prompts_of(run, 2)
    assert [int(found[0]) for found in questions] == [0, 1, 2, 3, 4]
    for (_, gold, steps, full, extracted), row, record in zip(questions, rows, records):
        assert (gold, steps) == (row["answer"], "\n".join(row["steps"]))
        prompt = run.tokenizer.decode(prompts[record["idx"]]["input_ids"])
        assert full == prompt + record["output"]
        assert "<|start-latent|>" in full and full.count("<|latent|>") == 2 and "<|endoftext|>" not in full
        assert extracted == (record["prediction"] or "")


def test_accuracy_of_a_model_that_is_right(make_run, rows, capsys):
    """Right answers for some rows, right steps for some: counts and ratios come out as they should."""
    run = make_run(two_choice=False)
    whole = ["".join(step + "\n" for step in row["steps"]) + "### " + row["answer"] for row in rows]
    texts = [whole[i] if i < 6 else "### " + row["answer"] if i < 8 else "" for i, row in enumerate(rows)]
    run.model, run.config = Scripted(run.tokenizer, texts), run.config.model_copy(update={"max_new_tokens": 100})
    summary = validate(run, 3, None)
    out = capsys.readouterr().out
    assert f"Accuracy on validation set: 8 / 11 = {8 / 11}\nCoT match on validation set: 6 / 11 = {6 / 11}\n" in out
    assert "Device 0: Cor=8, CoT=6, Total=11\n" in out and f"Extracted Output: '{rows[0]['answer']}'\n" in out
    assert (summary["eval/acc"], summary["eval/cot_em"]) == (8 / 11, 6 / 11)
    assert "eval/loss" not in summary and "eval/two_choice_acc" not in summary and "eval loss" not in out
    assert list(run.folder.path.iterdir()) == [], "no records were asked for"


def test_prompt_latents_and_two_choice_follow_the_config(make_run, rows):
    assert validate(make_run(), 0, None)["n_latents"] == 0
    assert validate(make_run(c_thought=2), 9, None)["n_latents"] == 6, "capped"
    assert validate(make_run(coconut=False, cot=True), 9, None)["n_latents"] == 0
    assert "eval/two_choice_acc" in validate(make_run(), 1, None), "automatic where rows name options"
    bare = [{key: row[key] for key in ("question", "answer", "steps")} for row in rows]
    assert "eval/two_choice_acc" not in validate(make_run(val_rows=bare), 1, None)
    assert "eval/two_choice_acc" not in validate(make_run(two_choice=False), 1, None)


def test_two_choice_without_options_is_the_users_mistake(make_run, rows):
    bare = [{key: row[key] for key in ("question", "answer", "steps")} for row in rows]
    with pytest.raises(ValueError, match="two_choice"):
        validate(make_run(val_rows=bare, two_choice=True), 1, None)


@pytest.mark.parametrize(
    "path, changes, expected",
    [("valid.json", {}, 128), ("gsm_valid.json", {}, 64), ("gsm_valid.json", {"max_new_tokens": 7}, 7)],
)
def test_how_many_tokens_are_generated(make_run, path, changes, expected):
    run = make_run(path=path, two_choice=False, **({"max_new_tokens": None} | changes))
    run.model = Scripted(run.tokenizer, ["is " * 200] * N_ROWS)
    summary = validate(run, 1, None)
    assert summary["eval/gen_tokens"] - summary["n_latents"] == expected
