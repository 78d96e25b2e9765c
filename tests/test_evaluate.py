"""Loss and greedy records against slow loops over single rows, on one rank and on several."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluate_material import (
    ALONE,
    FORMS,
    N_ROWS,
    Ranks,
    Scripted,
    character_tokenizer,
    prompts_of,
    slow_continuation,
    slow_loss,
)

import backbones
from dataset import MyCollator, get_cot_latent_dataset, get_question_latent_dataset
from evaluate import evaluate_loss, generate_records, shard_batches, summarize
from tokens import TokenTable, get_dataset, question_hash
from world import World

# ---------------------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("n", [0, 1, 2, 7, 24])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 4, 50])
def test_every_row_once_whatever_the_world(n, size, batch):
    sizes = np.random.default_rng(n).integers(0, 5, n)
    shares = [shard_batches(sizes, batch, World(rank, size, torch.device("cpu"))) for rank in range(size)]
    assert sorted(i for share in shares for rows in share for i in rows) == list(range(n))
    assert all(1 <= len(rows) <= batch for share in shares for rows in share)
    whole = shard_batches(sizes, batch, ALONE)
    assert [share[k] for k in range(len(shares[0])) for share in shares if k < len(share)] == whole, "same batches, dealt out"
    assert [sizes[i] for rows in whole for i in rows] == sorted(sizes), "rows of a batch are of like size"


# ---------------------------------------------------------------------------------------------------- loss


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("changes, stage", FORMS)
def test_loss_is_the_mean_over_tokens_of_single_rows(make_run, changes, stage, batch_size):
    run = make_run(**changes)
    rows = run.rows(get_cot_latent_dataset, stage, run.val)
    loss = evaluate_loss(run.model, rows, MyCollator(run.tokenizer, run.ids.latent), batch_size, ALONE)
    assert loss == pytest.approx(slow_loss(run, stage), abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("size", [2, 3])
def test_loss_is_the_same_on_every_rank(make_run, size):
    run = make_run()
    rows, collate = run.rows(get_cot_latent_dataset, 1, run.val), MyCollator(run.tokenizer, run.ids.latent)
    expected = evaluate_loss(run.model, rows, collate, 4, ALONE)
    # batch 50: one batch in all, so that the other ranks have none
    for batch_size in (2, 50):
        losses = Ranks(size).each(lambda world: evaluate_loss(run.model, rows, collate, batch_size, world))  # noqa: B023
        assert losses == [pytest.approx(expected, abs=1e-9)] * size and len(set(losses)) == 1


@torch.no_grad()
def test_edit_reaches_the_loss_with_the_row_numbers(make_run):
    run, seen = make_run(), set()

    def edit(layer, pass_, x):
        seen.update(pass_.row_ids)
        return x * 0 if pass_.slots else None

    rows, collate = run.rows(get_cot_latent_dataset, 2, run.val), MyCollator(run.tokenizer, run.ids.latent)
    changed = evaluate_loss(run.model, rows, collate, 4, ALONE, edit=edit)
    assert seen == set(range(N_ROWS)) and changed != evaluate_loss(run.model, rows, collate, 4, ALONE)


# ---------------------------------------------------------------------------------------------------- greedy records


@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("changes, stage", FORMS)
def test_records_equal_a_loop_over_single_rows(make_run, rows, changes, stage, batch_size):
    run = make_run(**changes)
    prompts = prompts_of(run, stage)
    records = generate_records(run.model, prompts, rows, run.tokenizer, batch_size, 6, ALONE)
    assert [record["idx"] for record in records] == list(range(N_ROWS))
    for row, record in zip(rows, records):
        prompt = prompts[record["idx"]]["input_ids"].tolist()
        new, latents = slow_continuation(run, prompt, 6), prompt.count(run.ids.latent)
        assert record["output"] == run.tokenizer.decode(new, skip_special_tokens=True)
        assert record["n_latents"] == latents and record["generated_tokens"] == latents + len(new)
        assert (record["question_hash"], record["gold"]) == (question_hash(row), row["answer"])
    assert len({record["output"] for record in records}) > 1, "a model that says one thing would prove nothing"


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_all_records(make_run, rows, capsys, size):
    run = make_run()
    prompts = prompts_of(run, 2)

    def records(world, batch_size=2):
        return generate_records(run.model, prompts, rows, run.tokenizer, batch_size, 4, world, two_choice=True)

    expected = records(ALONE)
    capsys.readouterr()
    for got in Ranks(size).each(records):
        assert [r["idx"] for r in got] == list(range(N_ROWS))
        for mine, one in zip(got, expected):
            numbers = [key for key in one if "logp" in key or key in ("margin", "two_choice_ce")]
            assert mine == one | {key: pytest.approx(one[key], abs=1e-9) for key in numbers}
    lines = re.findall(r"^Device (\d+): Cor=(\d+), CoT=(\d+), Total=(\d+)$", capsys.readouterr().out, re.M)
    assert sorted(int(line[0]) for line in lines) == list(range(size))
    assert sum(int(line[3]) for line in lines) == N_ROWS
    assert all(len(got) == N_ROWS for got in Ranks(size).each(lambda world: records(world, 50))), "a rank without rows"


# ---------------------------------------------------------------------------------------------------- scoring


GOLD = {"question": "How many # are there?", "answer": "1,018", "steps": ["<<1000+18=1018>>", "done"]}


@pytest.mark.parametrize(
    "text, prediction, correct, numeric, cot",
    [
        ("<<1000+18=1018>>\ndone\n### 1018", "1018", True, True, True),
        ("<<1000+18=1018>>\ndone\n### 1,018 ", "1018", True, True, True),
        ("<<1000+18=1018>>\ndone\n### 1018.0", "1018.0", False, True, True),
        ("<<1000+18=1018>>\n### 1018", "1018", True, True, False),
        ("### 7\n### 1018", "1018", True, True, False),
        ("### 1018\n### 7", "7", False, False, False),
        ("1018", None, False, False, False),
        ("", None, False, False, False),
        ("### ", "", False, False, False),
        ("### nan", "nan", False, False, False),
    ],
)  # fmt: skip
def test_scoring_of_a_continuation(tmp_path, text, prediction, correct, numeric, cot):
    tokenizer = character_tokenizer()
    ids = backbones.add_thought_tokens(tokenizer)
    (tmp_path / "rows.json").write_text(json.dumps([GOLD]))
    config = SimpleNamespace(c_thought=1, max_latent_stage=3, pad_latent_to_max=True, no_cot=False)
    table = TokenTable(get_dataset(str(tmp_path / "rows.json"), tokenizer))
    prompts = get_question_latent_dataset(2, table, config, ids.start, ids.latent, ids.end)
    (record,) = generate_records(Scripted(tokenizer, [text]), prompts, [GOLD], tokenizer, 4, 99, ALONE)
    assert (record["prediction"], record["correct"], record["numerically_equal"]) == (prediction, correct, numeric)
    assert record["cot_match"] is cot, "markers and question are no part of the reasoning"
    assert record["gold"] == "1018" and record["output"] == text
    assert record["generated_tokens"] == 2 + len(text), "latents and new tokens; no markers, no EOS"


def test_no_steps_match_no_reasoning(tmp_path):
    tokenizer, row = character_tokenizer(), GOLD | {"steps": []}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    config = SimpleNamespace(c_thought=0, max_latent_stage=0, pad_latent_to_max=True, no_cot=True)
    table = TokenTable(get_dataset(str(tmp_path / "rows.json"), tokenizer))
    prompts = get_question_latent_dataset(0, table, config, None, None, None, True)
    (record,) = generate_records(Scripted(tokenizer, ["### 1018"]), prompts, [row], tokenizer, 4, 99, ALONE)
    assert record["cot_match"] is True and record["n_latents"] == 0 and record["generated_tokens"] == 8


def test_summary_counts():
    records = [
        {"correct": c, "cot_match": m, "generated_tokens": g, "numerically_equal": n, "margin": x,
         "two_choice_correct": x > 0, "two_choice_ce": math.log1p(math.exp(-x))}
        for c, m, g, n, x in [(True, False, 5, True, 2.0), (False, False, 8, True, -1.0), (True, True, 2, True, 0.5)]
    ]  # fmt: skip
    summary = summarize(records)
    assert (summary["correct"], summary["total"], summary["eval/acc"]) == (2, 3, 2 / 3)
    assert (summary["cot_matches"], summary["eval/cot_em"]) == (1, 1 / 3)
    assert (summary["eval/gen_tokens"], summary["eval/numeric_acc"], summary["eval/two_choice_acc"]) == (
        5.0,
        1.0,
        2 / 3,
    )
    assert summary["eval/two_choice_ce"] == pytest.approx(np.mean([r["two_choice_ce"] for r in records]))
    bare = summarize(
        [{k: v for k, v in r.items() if k not in ("margin", "two_choice_correct", "two_choice_ce")} for r in records]
    )
    assert bare == {k: v for k, v in summary.items() if "two_choice" not in k}
    assert json.loads(json.dumps(summary)) == summary, "plain Python numbers"
