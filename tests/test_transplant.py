"""Exchanged thoughts: what a hand-wired model must do with them, and that pause modes can do nothing."""

import json
from collections import Counter
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluate_material import character_tokenizer
from stub_model import HOP, SOLVED, Wiring, stub_subject, task_of, write_problems

from analysis import transplant
from analysis.command import CheckFailed
from analysis.corruption import EXPERIMENT, measure, prepare
from analysis.subject import Problems
from coconut import PauseCurriculum

ROWS, N_PAIRS = 10, 4
READS = Wiring((SOLVED, 0, None), reads=(1,))
PAUSES = ("frozen", "learned_shared", "pause_curriculum")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("transplant"), ROWS, N_PAIRS)


def result_of(subject, data, out, **flags) -> dict:
    return EXPERIMENT.one(task_of(EXPERIMENT, subject, data, out, **flags), out)


def measured(task, ready, part) -> list[dict]:
    numbers = list(range(EXPERIMENT.parts(task)[part]))
    return [{"part": part, "idx": i, **r} for i, r in zip(numbers, measure(task, ready, part, numbers))]


@pytest.fixture(scope="module")
def reading(data, tmp_path_factory):
    """Result and records of a model that reads thought 1, a copy of thought 0; thought 2 is empty."""
    out = tmp_path_factory.mktemp("reading")
    result = result_of(stub_subject(out, READS), data, out)
    lines = (out / "corruption" / "m3_corruption.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines[1:]]


# ---------------------------------------------------------------- permutation


def test_answers_flip_under_the_orders_that_move_the_thought_that_is_read(reading):
    """Of the five other orders of three thoughts, two put the empty one in slot 1."""
    found, records = reading
    assert found["permutations_per_row"] == 5 and found["permutation_total_samples"] == 5 * ROWS
    assert found["permutation_flip_rate"] | {"ci95": None} == {"correct": ROWS, "n": ROWS, "accuracy": 1.0, "ci95": None}
    assert (
        found["mean_permutation_flip_rate"]["value"] == pytest.approx(2 / 5)
        and found["mean_permutation_flip_rate"]["n"] == ROWS
    )
    assert found["partial_permutation_flip_rate"]["correct"] == 0 and found["partial_permutation_total_samples"] == ROWS
    assert found["mean_abs_margin_change"] > 1
    for record in records[:ROWS]:
        flips = {key: run["changed"] for key, run in record["runs"].items() if key.startswith("permutation/")}
        orders = [order for order in permutations(range(3)) if order != (0, 1, 2)]
        assert flips == {f"permutation/{','.join(map(str, order))}": order[1] == 2 for order in orders}


def test_thoughts_that_are_found_by_what_they_carry_may_stand_anywhere(data, tmp_path):
    found = result_of(stub_subject(tmp_path, Wiring((None, SOLVED, None), (1,), by="index")), data, tmp_path)
    assert found["permutation_flip_rate"]["correct"] == 0 and found["mean_permutation_flip_rate"]["value"] == 0
    assert found["permutation_flip_rate"]["ci95"][1] > 0.2, "10 rows without a flip bound little, however many orders each has"
    assert "by_construction" not in found["permutation_flip_rate"]


def test_neighbours_and_orders():
    assert transplant.neighbours_exchanged(6) == [(1, 0, 2, 3, 4, 5), (0, 1, 3, 2, 4, 5), (0, 1, 2, 3, 5, 4)]
    assert transplant.neighbours_exchanged(3) == [(1, 0, 2)] and transplant.neighbours_exchanged(1) == []
    assert len(transplant.random_orders(0, 4, 6)) == 10 and transplant.random_orders(0, 4, 2) == [(1, 0)]
    assert transplant.random_orders(0, 4, 6) == transplant.random_orders(0, 4, 6) != transplant.random_orders(0, 5, 6)


def test_a_single_thought_has_no_other_order(data, tmp_path):
    found = result_of(stub_subject(tmp_path, Wiring((SOLVED,), (0,))), data, tmp_path)
    assert found["permutation_total_samples"] == 0 and found["permutation_flip_rate"]["accuracy"] is None
    assert found["mean_permutation_flip_rate"] is None and found["partial_permutation_total_samples"] == 0


# ---------------------------------------------------------------- matched and unmatched


def test_pairs_match_hops_and_use_no_row_twice():
    hops = np.array([3] * 251 + [4] * 150 + [5] * 98 + [6])
    for matched in (True, False):
        pairs = transplant.drawn_pairs(0, hops, matched)
        assert len(pairs) == 200 and max(Counter(i for pair in pairs for i in pair).values()) == 1
        assert pairs == transplant.drawn_pairs(0, hops, matched) != transplant.drawn_pairs(1, hops, matched)
        same = [hops[a] == hops[b] for a, b in pairs]
        assert all(same) if matched else 0.2 < np.mean(same) < 0.6
    assert len(transplant.drawn_pairs(0, hops[:7], False)) == 3, "few rows make few pairs"


def test_an_answer_read_from_thoughts_becomes_the_donors(reading):
    found, records = reading
    for part, name in (("matched", "cross_transplant"), ("unmatched", "unmatched_transplant")):
        some = [r for r in records if r["part"] == part]
        assert found[f"{name}_pairs"] == len(some) == found[f"{name}_accuracy"]["n"] >= 4
        assert found[f"{name}_clean_accuracy"]["accuracy"] == 1.0
        for r in some:
            assert {"source_hops", "target_hops", "correct", "margin_change", "follows_donor"} <= r.keys()
            assert r["follows_donor"] != r["correct"], "a donor with the recipient's own answer leaves it right"
            assert r["margin_change"] < -5 or r["correct"]
        assert found[f"{name}_follow_rate"]["correct"] == sum(not r["correct"] for r in some) > 0
        assert all(r["source_hops"] == r["target_hops"] for r in some) or part == "unmatched"
    cells = [cell for row in found["transplant_by_hops"].values() for cell in row.values()]
    assert sum(cell["n"] for cell in cells) == found["cross_transplant_pairs"] + found["unmatched_transplant_pairs"]


# ---------------------------------------------------------------- swap


def test_with_the_partners_thoughts_the_answer_moves_to_the_other_option(reading):
    found, records = reading
    assert found["swap_follow_rate"]["accuracy"] == 1.0 and found["swap_follow_rate"]["n"] == 2 * N_PAIRS
    assert found["swap_transplant_clean_accuracy"]["accuracy"] == 1.0 and found["swap_transplant_accuracy"]["correct"] == 0
    assert found["swap_transplant_drop"]["value"] == 1.0 and found["swap_transplant_drop"]["n_clusters"] == N_PAIRS
    assert found["swap_margin_change"]["value"] == pytest.approx(-40, abs=1), "from sure of one option to sure of the other"
    assert found["swap_control_follow_rate"]["accuracy"] == 1.0 and found["swap_control_equal"]["accuracy"] == 1.0
    assert found["swap_name_only_follow_rate"]["correct"] == 0, "this model looks at its thoughts alone"
    assert found["swap_pairs_measured"] == N_PAIRS and found["by_construction"] == []
    swapped = [r for r in records if r["part"] == "swap_pairs"]
    assert [(r["source"], r["target"]) for r in swapped[:2]] == [(1, 0), (0, 1)]


def test_a_model_that_does_not_read_thoughts_follows_the_name_alone(data, tmp_path):
    found = result_of(stub_subject(tmp_path, Wiring((SOLVED, HOP))), data, tmp_path)
    assert found["swap_follow_rate"]["correct"] == 0 and found["swap_transplant_drop"]["value"] == 0
    assert found["swap_name_only_follow_rate"]["accuracy"] == found["swap_control_follow_rate"]["accuracy"] == 1.0
    assert found["cross_transplant_accuracy"]["accuracy"] == 1.0 and found["cross_transplant_follow_rate"]["correct"] == 0


def test_a_control_that_does_not_give_the_partners_answer_stops_the_experiment(data, tmp_path):
    task = task_of(EXPERIMENT, stub_subject(tmp_path, READS), data, tmp_path)
    ready = prepare(task)
    ready["swap_thoughts"] = ready["swap_thoughts"].roll(2, 0)  # of other pairs
    with pytest.raises(CheckFailed, match="with the partner's name and thoughts"):
        transplant.swap_fields(task.subject, measured(task, ready, "swap_pairs"))


def test_a_row_whose_partner_was_not_read_is_excluded_and_counted(data, tmp_path):
    found = result_of(stub_subject(tmp_path, READS), data, tmp_path, num_samples=5)
    assert found["n"] == 5 and found["swap_follow_rate"]["n"] == 4 and found["swap_pairs_measured"] == 2
    assert found["n_excluded"] == {"swap: partner beyond the rows read": 1}


def test_names_of_different_lengths_cannot_be_exchanged(data):
    tokenizer = character_tokenizer()
    problems = Problems.read(data / "ood" / "swap_pairs.json", tokenizer)
    weight = np.eye(len(tokenizer), dtype=np.float32)
    subject = SimpleNamespace(
        tokenizer=tokenizer, model=SimpleNamespace(embedding=SimpleNamespace(weight=torch.tensor(weight)))
    )
    seen = set()
    for a, b in transplant.partners(problems).items():
        names = [problems.rows[i]["idx_to_symbol"][problems.rows[i]["root"]] for i in (a, b)]
        found = transplant.exchanged_name(subject, problems, a, b)
        seen.add(found is None)
        assert (found is None) == (len(names[0]) != len(names[1]))
        if found:
            question = problems.rows[a]["question"]
            assert "".join(question[i] for i in found[0]) == names[0] and found[0][-1] > question.index("Is ")
            assert tokenizer.decode(found[1].argmax(-1)) == names[1]
    assert seen == {True, False}, "the rows of this test must have both"


def test_without_the_set_the_fields_are_null_and_name_the_command(tmp_path):
    data = write_problems(tmp_path, 4)
    found = result_of(stub_subject(tmp_path, READS), data, tmp_path)
    assert found["swap_follow_rate"] is None and found["swap_transplant_accuracy"] is None
    assert "python data/ood.py" in found["swap_reason"]


@pytest.mark.parametrize("change, message", [({"pair_id": None}, "no pair_id"), ({"neg_target": 0}, "no swap pair")])
def test_rows_that_are_no_pairs_are_refused(change, message, data, tmp_path):
    rows = json.loads((data / "ood" / "swap_pairs.json").read_text())
    rows[3] |= change
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        transplant.partners(Problems.read(path, character_tokenizer()))


# ---------------------------------------------------------------- pause modes


@pytest.mark.parametrize("mode", PAUSES)
def test_exchanged_thoughts_are_exact_no_ops_in_pause_modes(mode, data, tmp_path):
    found = result_of(stub_subject(tmp_path, Wiring((SOLVED, 0, None)), mode), data, tmp_path)
    assert found["clean_accuracy"]["accuracy"] == 1.0
    assert found["permutation_flip_rate"]["correct"] == 0 and found["permutation_flip_rate"]["by_construction"] is True
    assert found["swap_follow_rate"]["correct"] == 0 and found["swap_transplant_drop"]["value"] == 0
    assert found["cross_transplant_accuracy"]["correct"] == found["cross_transplant_clean_accuracy"]["correct"]
    for name in ("permutation_flip_rate", "cross_transplant_accuracy", "unmatched_transplant_accuracy", "swap_follow_rate"):
        assert name in found["by_construction"]
    assert "swap_control_follow_rate" not in found["by_construction"], "the name is no thought"


class Leaky(PauseCurriculum):
    """A pause mode that recycles states after all."""

    def forward(self, k, h_BD):
        return super().forward(k, None) if h_BD is None else h_BD


def test_a_pause_mode_whose_thoughts_differ_is_caught(data, tmp_path):
    subject = stub_subject(tmp_path, READS, "pause_curriculum")
    task = task_of(EXPERIMENT, subject, data, tmp_path)
    assert prepare(task)["thoughts"].shape[:2] == (ROWS, 3)
    subject.model.feedback = Leaky(subject.model.pause_embedding.data)
    subject.model.force_multipass = True
    assert not subject.recycles
    with pytest.raises(CheckFailed, match="thoughts of a pause mode differ"):
        prepare(task)


@pytest.mark.parametrize("part", ["test", "matched", "unmatched", "swap_pairs"])
def test_an_exchange_that_changes_an_answer_of_a_pause_mode_is_caught(part, data, tmp_path):
    """Vectors that differ between rows, as those of m3 do, in a pause mode: each part asserts on its own answers."""
    ready = prepare(task_of(EXPERIMENT, stub_subject(tmp_path, READS), data, tmp_path))
    subject = stub_subject(tmp_path, READS, "frozen")
    task = task_of(EXPERIMENT, subject, data, tmp_path)
    records = measured(task, ready, part)
    fields = {
        "test": lambda: transplant.permutation_fields(subject, task.seed, records),
        "swap_pairs": lambda: transplant.swap_fields(subject, records),
    }
    if part == "swap_pairs":  # hand-made thoughts are no partner's own, so its control would complain first
        for record in records:
            for key in ("name", "both"):
                del record["runs"][key]
    with pytest.raises(CheckFailed, match="must be an exact no-op, but [1-9]"):
        fields.get(part, lambda: transplant.transplant_fields(subject, records))()
