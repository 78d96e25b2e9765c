"""Scores of held-out problems: every condition against one row at a time in float64, hashes of targets, answers, errors."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scoring_material import config, loud, train_runs

import run
from analysis.command import CheckFailed
from analysis.scoring import CONDITIONS, Scores, donors, same_tokens, score, stage_rows, summary, targets_hash
from analysis.subject import Problems, Subject
from coconut import Coconut
from dataset import get_question_latent_dataset
from evaluate import evaluate
from world import World

LAST = 2  # stage


@pytest.fixture(scope="module")
def runs(tmp_path_factory, own_cache):
    return train_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def subject(runs) -> Subject:
    """Continuous thoughts, skipped tokens, a memory; float64."""
    return loud(Subject.load(runs["abc"], batch_size=4))


@pytest.fixture(scope="module")
def problems(runs, subject) -> Problems:
    return Problems.read(runs["data"], subject.tokenizer)


@pytest.fixture(scope="module")
def found(subject, problems) -> dict[str, Scores]:
    """All conditions at the last stage."""
    return {condition: score(subject, problems, LAST, condition) for condition in CONDITIONS}


# ---------------------------------------------------------------- the slow way


def by_hand(subject: Subject, problems: Problems, stage: int) -> list[tuple[list[int], int, int]]:
    """Of each problem its tokens, where the supervised ones begin, and where the answer's."""
    found, encode = [], subject.tokenizer.encode
    for row in problems.rows:
        kept, n = row["steps"][stage:], min(stage, len(row["steps"]))
        ids = encode(row["question"] + "\n") + [subject.ids.start] + [subject.ids.latent] * n + [subject.ids.end]
        steps = [token for step in kept for token in encode(step + "\n")]
        answer = [*encode("### " + row["answer"]), subject.tokenizer.eos_token_id]
        found.append(([*ids, *steps, *answer], len(ids), len(ids) + len(steps)))
    return found


@torch.no_grad()
def filled(subject: Subject, ids: list[int]) -> torch.Tensor:
    """The embeddings [T, D] of one row, thoughts filled by a whole, uncached pass for each."""
    base, embeds_TD = subject.model.base_causallm, subject.model.embedding(torch.tensor(ids)).clone()
    for column in (column for column, token in enumerate(ids) if token == subject.ids.latent):
        out = base(inputs_embeds=embeds_TD[None], use_cache=False, output_hidden_states=True)
        embeds_TD[column] = out.hidden_states[-1][0, column - 1]
    return embeds_TD


def logits(subject: Subject, embeds_TD: torch.Tensor, **options) -> np.ndarray:
    """[T, V] of one row in one uncached pass of the bare backbone."""
    with torch.no_grad():
        return subject.model.base_causallm(inputs_embeds=embeds_TD[None], use_cache=False, **options).logits[0].numpy()


def losses(logits_TV: np.ndarray, ids: list[int], begin: int) -> tuple[list[float], list[bool]]:
    """-log p of each token from `begin` on, given those before it, and whether it is the most likely one."""
    found = []
    for t in range(begin, len(ids)):
        row = logits_TV[t - 1] - logits_TV[t - 1].max()
        found.append((math.log(sum(math.exp(x) for x in row)) - row[ids[t]], int(row.argmax()) == ids[t]))
    return [loss for loss, _ in found], [right for _, right in found]


def holds(record: dict, ids: list[int], begin: int, answer: int, logits_TV: np.ndarray, tolerance: float = 1e-9) -> None:
    loss, right = losses(logits_TV, ids, begin)
    assert (record["n_tokens"], record["answer_tokens"]) == (len(ids) - begin, len(ids) - answer)
    assert record["loss"] == pytest.approx(sum(loss), rel=tolerance)
    assert record["answer_loss"] == pytest.approx(sum(loss[answer - begin :]), rel=tolerance)
    assert (record["n_right"], record["answer_right"]) == (sum(right), sum(right[answer - begin :]))


# ---------------------------------------------------------------- conditions


@pytest.mark.parametrize("stage", [0, 1, LAST])
def test_on_is_the_model_one_row_at_a_time(subject, problems, stage):
    """In batches of rows with other numbers of thoughts, sorted, padded and cached."""
    scores = score(subject, problems, stage, exact_match=False)
    assert [r["idx"] for r in scores.records] == list(range(len(problems)))
    expected = [min(stage, len(row["steps"])) for row in problems.rows]
    assert [r["n_latents"] for r in scores.records] == expected
    for record, (ids, begin, answer) in zip(scores.records, by_hand(subject, problems, stage)):
        holds(record, ids, begin, answer, logits(subject, filled(subject, ids)))


def test_every_condition_is_another_one(found):
    """Else what follows would prove nothing: with these weights each moves the loss."""
    losses = {condition: scores.column("loss").sum() for condition, scores in found.items()}
    values = sorted(losses.values())
    assert min(b - a for a, b in zip(values, values[1:])) > 1e-4 * values[0], losses


def test_inert_is_an_inert_feedback_mode(subject, problems, found):
    ids, base = subject.ids, copy.deepcopy(subject.model.base_causallm)
    inert = Coconut(base, ids.latent, ids.start, ids.end, subject.tokenizer.eos_token_id, "none").eval()
    other = score(dataclasses.replace(subject, model=inert), problems, LAST)
    for a, b in zip(found["inert"].records, other.records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert (a["output"], a["n_right"]) == (b["output"], b["n_right"])


def masked_inputs(subject: Subject, ids: list[int]) -> dict:
    """Slots out of everybody's sight, positions as they were."""
    mask = torch.tensor([[int(token != subject.ids.latent) for token in ids]])
    return {"attention_mask": mask, "position_ids": torch.arange(len(ids))[None]}


def test_hidden_is_a_mask_over_the_slots(subject, problems, found):
    for record, (ids, begin, answer) in zip(found["hidden"].records, by_hand(subject, problems, LAST)):
        embeds_TD = subject.model.embedding(torch.tensor(ids))  # what fills the slots is nobody's business
        holds(record, ids, begin, answer, logits(subject, embeds_TD, **masked_inputs(subject, ids)))


def test_hidden_is_masked_while_decoding_too(subject, problems, found):
    """Greedy, without any cache: the prompt and its own tokens again and again."""
    eos, most = subject.tokenizer.eos_token_id, subject.config.max_new_tokens
    for record, (ids, begin, _) in list(zip(found["hidden"].records, by_hand(subject, problems, LAST)))[:4]:
        ids, said = ids[:begin], []
        while len(said) < most:
            embeds_TD = subject.model.embedding(torch.tensor(ids + said))
            said.append(int(logits(subject, embeds_TD, **masked_inputs(subject, ids + said))[-1].argmax()))
            if said[-1] == eos:
                break
        said = said[:-1] if said[-1] == eos else said
        assert record["output"] == subject.tokenizer.decode(said, skip_special_tokens=True)
        assert record["generated_tokens"] == record["n_latents"] + len(said)


def test_hidden_slots_may_hold_anything(runs, problems):
    """Another vector in the slots changes nothing behind them; without the mask it does."""
    subject = loud(Subject.load(runs["pause"], batch_size=4))
    before = {condition: score(subject, problems, LAST, condition) for condition in ("on", "hidden")}
    subject.model.pause_embedding.data.mul_(-3.0)
    for condition, scores in before.items():
        after = score(subject, problems, LAST, condition)
        same = [a == b for a, b in zip(scores.records, after.records, strict=True)]
        assert all(same) if condition == "hidden" else not any(same)


def test_swapped_takes_the_other_rows_thoughts(subject, problems, found):
    rows = by_hand(subject, problems, LAST)
    donor_P = donors(found["on"].column("n_latents"))
    full = [filled(subject, ids) for ids, *_ in rows]
    for record, (ids, begin, answer), own, donor in zip(found["swapped"].records, rows, full, donor_P):
        embeds_TD, theirs = own.clone(), rows[donor][0]
        slots, donor_slots = (torch.tensor(x) == subject.ids.latent for x in (ids, theirs))
        embeds_TD[slots] = full[donor][donor_slots]
        holds(record, ids, begin, answer, logits(subject, embeds_TD), tolerance=1e-5)  # thoughts are kept in float32


def test_everybody_gets_anothers_thoughts():
    latents_P = np.array([2, 1, 2, 3, 1, 2, 0, 3])
    taken = donors(latents_P, seed=1)
    assert sorted(taken) == list(range(8)) and (latents_P[taken] == latents_P).all()
    assert [i for i in range(8) if taken[i] == i] == [6], "only the one without thoughts keeps to itself"
    assert (donors(latents_P, seed=1) == taken).all()
    many = np.full(50, 2)
    assert (donors(many, seed=1) != donors(many, seed=2)).any()
    with pytest.raises(ValueError, match="row 1 is the only one with 3 thoughts"):
        donors(np.array([2, 3, 2]))


def test_no_slots_closes_up(subject, problems, found):
    assert not found["no_slots"].column("n_latents").any()
    for record, (ids, begin, answer) in zip(found["no_slots"].records, by_hand(subject, problems, LAST)):
        n = ids.count(subject.ids.latent)
        ids = [token for token in ids if token != subject.ids.latent]
        embeds_TD = subject.model.embedding(torch.tensor(ids))
        holds(record, ids, begin - n, answer - n, logits(subject, embeds_TD))


def test_neither_batches_nor_repetition_matter(subject, problems, found):
    for condition in ("on", "swapped"):
        again, alone = (score(subject, problems, LAST, condition, batch_size=n) for n in (None, 1))
        assert again.records == found[condition].records
        assert [r["output"] for r in alone.records] == [r["output"] for r in again.records]
        np.testing.assert_allclose(alone.column("loss"), again.column("loss"), rtol=1e-5)


def test_answers_are_those_of_evaluation(runs):
    """As trained, on evaluation's own prompts."""
    subject = Subject.load(runs["abc"], batch_size=3)
    problems, ids = Problems.read(runs["data"], subject.tokenizer), subject.ids
    prompts = get_question_latent_dataset(LAST, problems.table, subject.config, ids.start, ids.latent, ids.end)
    sizes = 3, subject.config.max_new_tokens
    theirs, _ = evaluate(
        subject.model, prompts, problems.rows, subject.tokenizer, *sizes, World(0, 1, subject.device), quiet=True
    )
    ours = score(subject, problems, LAST).records
    for key in ("correct", "output", "n_latents", "generated_tokens"):
        assert [r[key] for r in ours] == [r[key] for r in theirs], key


def test_what_is_right_counts(tmp_path):
    """A model that says `b`, `### c` to everything, of problems of which every other one asks for that."""
    for name, n, answers in (("train", 16, "c"), ("held_out", 6, "cd")):
        rows = [{"question": "a", "steps": ["b"], "answer": answers[i % len(answers)]} for i in range(n)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    changes = {"max_latent_stage": 1, "num_epochs": 16, "epochs_per_stage": 8, "eval_every": 16, "lr": 1e-2}
    assert run.main([config(tmp_path, "rote", **changes)]) == 0
    subject = Subject.load(tmp_path / "runs/rote")
    problems = Problems.read(tmp_path / "held_out.json", subject.tokenizer)
    said = score(subject, problems, 1)
    assert [record["correct"] for record in said.records] == [True, False] * 3
    assert {record["output"] for record in said.records} == {"### c"}
    assert [record["answer_right"] == 6 for record in said.records] == [True, False] * 3, "`### c<eos>` has six tokens"
    assert summary(said)["exact_match"] == 0.5
    asked = score(subject, problems, 1, exact_match=False)
    assert all(r["correct"] is r["generated_tokens"] is r["output"] is None for r in asked.records)
    assert summary(asked)["exact_match"] is None


# ---------------------------------------------------------------- the same targets


def test_targets_have_one_hash_in_all_conditions(subject, problems, found):
    for scores in found.values():
        same_tokens(found["on"], scores)
        same_tokens(found["on"], scores, "answer")
    earlier = score(subject, problems, 1, exact_match=False)
    assert earlier.sha256 != found["on"].sha256 and earlier.answer_sha256 == found["on"].answer_sha256
    same_tokens(earlier, found["on"], "answer")
    with pytest.raises(CheckFailed, match="not the same supervised targets: abc/checkpoint_3, stage 1, on: 10 problems"):
        same_tokens(earlier, found["on"])


def test_one_other_target_is_another_hash(subject, problems, found):
    rows = stage_rows(subject, problems, LAST)
    assert targets_hash(rows) == found["on"].sha256
    first = int((rows[1]["labels"] != -100).argmax())
    for where, answer_too in ((first, False), (-2, True)):
        changed = copy.deepcopy(rows)
        changed[1]["labels"][where] += 1
        assert targets_hash(changed) != targets_hash(rows)
        assert (targets_hash(changed, True) != targets_hash(rows, True)) == answer_too
        with pytest.raises(CheckFailed):
            same_tokens(found["on"], dataclasses.replace(found["on"], sha256=targets_hash(changed)))
    assert targets_hash(rows[::-1]) != targets_hash(rows), "the order counts"


def test_fewer_tokens_are_not_the_same(found):
    fewer = dataclasses.replace(found["on"], records=found["on"].records[:-1])
    with pytest.raises(CheckFailed, match="10 problems.*9 problems"):
        same_tokens(found["on"], fewer)


def test_plain_chain_of_thought_shares_the_answers(runs, problems, found):
    subject = Subject.load(runs["cot"])
    scores = score(subject, problems, LAST, exact_match=False)
    kept = sum(len(subject.tokenizer.encode(step + "\n")) for row in problems.rows for step in row["steps"])
    assert summary(scores)["n_tokens"] == kept + summary(scores)["answer_n_tokens"], "all steps, whatever the stage"
    same_tokens(found["on"], scores, "answer")
    with pytest.raises(CheckFailed):
        same_tokens(found["on"], scores)


def test_summary_weighs_tokens():
    common = {"answer_tokens": 1, "answer_loss": 3.0, "answer_right": 1, "n_latents": 0, "generated_tokens": 4, "output": ""}
    records = [
        {"idx": 0, "n_tokens": 3, "loss": 6.0, "n_right": 1, "correct": True} | common,
        {"idx": 1, "n_tokens": 1, "loss": 30.0, "n_right": 1, "correct": False} | common,
    ]
    found = summary(Scores("x", 1, "on", records, "", ""))
    assert found["loss"] == 9.0 and found["perplexity"] == pytest.approx(math.exp(9)) and found["n_tokens"] == 4
    assert found["token_accuracy"] == 0.5 and found["exact_match"] == 0.5 and found["n_samples"] == 2
    assert found["answer_loss"] == 3.0 and found["answer_token_accuracy"] == 1.0 and found["answer_n_tokens"] == 2


# ---------------------------------------------------------------- mistakes


def test_what_cannot_be_scored_is_said(runs, subject, problems):
    with pytest.raises(ValueError, match="condition 'off' is unknown; known: on, inert"):
        score(subject, problems, LAST, "off")
    with pytest.raises(ValueError, match="stages begin at 0"):
        score(subject, problems, -1)
    with pytest.raises(ValueError, match="no thoughts to take away"):
        score(Subject.load(runs["cot"]), problems, LAST, "inert")


def test_a_row_that_is_too_long_is_named(runs, subject, tmp_path):
    path = tmp_path / "long.json"
    path.write_text(
        '[{"question": "a", "steps": ["b"], "answer": "c"}, {"question": "%s", "steps": [], "answer": "c"}]' % ("d" * 300)
    )
    with pytest.raises(ValueError, match=r"long.json, row 1: \d+ tokens exceed the 256 positions"):
        score(subject, Problems.read(path, subject.tokenizer), 0)
