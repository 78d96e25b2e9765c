"""Every row of the verdict, both sides of every threshold, the noise floor, and what missing numbers do. See verdict_material."""

import itertools
import json
import shutil

import pytest
from verdict_material import write_study

from analysis import verdict as module
from analysis.conditions import Condition, all_of, any_of, at_least, compare, differs, negated, same
from analysis.evidence import collect
from analysis.verdict import decide, first_row, main, render

OOD = ("ood_7hop", "ood_8hop", "ood_dag", "ood_dense")
BETTER = {"ood_7hop": {"m3": 78.0}, "ood_dag": {"m3": 78.0}}  # by 8 points
ROW_1 = BETTER | {"flips": {"m3": 20.0}, "advantage": {"m3": 20.0}, "psr": {"m3": 35.0}}
ROW_4A = {"ood_7hop": {"m3": 78.0}}
CHANCE = {name: {"m3": 50.0, "m4b": 50.5, "m5": 50.0} for name in OOD}
ROW_3 = CHANCE | {"advantage": {"m3": 0.0, "m4b": 0.5, "m5": 0.0}}


def decided(folder, changes=None, **options):
    return decide(collect(write_study(folder, changes, **options)))


def row(folder, changes=None, **options):
    return decided(folder, changes, **options).row


# ---------------------------------------------------------------- every row


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "2"),
        (ROW_1, "1"),
        (ROW_4A, "4a"),
        ({"ood_8hop": {"m3": 78.0}}, "4a"),
        ({"psr": {"m3": 35.0}}, "4b"),
        ({"psr": {"m3": 5.0}}, "4b"),
        ({"advantage": {"m3": 20.0}}, "4b"),
        ({"flips": {"m3": 20.0}}, "4b"),
        ({"swap_drop": {"m3": 20.0}}, "4b"),
        ({"noise_drop": {"m3": 20.0}}, "4b"),
        ({"causal": {"m3": 0.4}}, "4b"),
        ({"causal": {"m5": 0.4, "m4b": 0.4}}, "4b"),
        (ROW_3, "3"),
        ({"ood_dag": {"m3": 78.0}}, "inconclusive"),  # other structure only: no row
        (BETTER, "inconclusive"),  # better, yet no sign of use
        ({"ood_7hop": {"m3": 62.0}}, "inconclusive"),  # m5 better
        (ROW_3 | {"advantage": {"m3": 4.0, "m4b": 4.5, "m5": 0.0}}, "inconclusive"),  # structure in one of both
    ],
)
def test_rows(tmp_path, changes, expected):
    found = decided(tmp_path, changes)
    assert found.row == expected, render(found)
    assert [name for name, rule in found.to_json()["rules"].items() if rule["fired"]] == [expected] * (expected in found.rules)


def test_two_seeds_are_insufficient_whatever_they_say(tmp_path):
    assert row(tmp_path / "a", ROW_1, seeds=2) == "insufficient seeds"
    assert row(tmp_path / "b", ROW_1, seeds={"m5": 2}) == "insufficient seeds"
    assert row(tmp_path / "c", ROW_1, seeds=3) == "1"


def test_next_steps_go_with_rows_2_and_3(tmp_path):
    assert any("slower curriculum" in step for step in decided(tmp_path / "a", ROW_3).next_steps)
    assert "harder tasks" in decided(tmp_path / "b").next_steps
    assert decided(tmp_path / "c", ROW_1).next_steps == []


@pytest.mark.parametrize("m0, alone", [(70.0, True), (67.8, True), (67.6, False), (64.0, False)])  # ± 0.696 around D
def test_curriculum_alone(tmp_path, m0, alone):
    changes = {name: {"m0": m0} for name in ("test", "swap_pairs", "swap_official_test")}
    assert decided(tmp_path, changes).curriculum_alone.holds is alone


def test_curriculum_alone_is_undecided_without_m0(tmp_path):
    found = decided(tmp_path, seeds={"m0": 0})
    assert found.curriculum_alone.holds is None and found.row == "2"


# ---------------------------------------------------------------- thresholds


@pytest.mark.parametrize("m3, fires", [(75.0, True), (74.9, False)])
def test_better_by_5(tmp_path, m3, fires):
    assert (row(tmp_path, {"ood_7hop": {"m3": m3}}) == "4a") is fires


def test_better_needs_an_interval_without_0(tmp_path):
    """6 points, but seeds spread over 12: Welch's interval includes 0."""
    found = decided(tmp_path, {"ood_7hop": {"m3": (70.0, 76.0, 82.0)}})
    condition = differs(compare(found.evidence, "two_choice/ood_7hop"), 5, better=True)
    assert condition.holds is False and condition.open and "includes 0" in condition.why
    assert found.row == "inconclusive" and "two_choice/ood_7hop: m3 above m5 by 5" in [c.name for c in found.undecided]


@pytest.mark.parametrize("m4b, fires", [(78.0, False), (77.9, True), (62.0, False), (62.1, True)])
def test_better_must_exceed_the_noise_floor(tmp_path, m4b, fires):
    """m3 is 8 points above m5: nothing, where two trainings of one function differ by as much in either direction."""
    assert (row(tmp_path, {"ood_7hop": {"m3": 78.0, "m4b": m4b}}) == "4a") is fires


@pytest.mark.parametrize("name, m3, expected", [
    ("test", 72.3, "2"), ("test", 72.4, "inconclusive"), ("swap_pairs", 67.7, "2"), ("swap_pairs", 67.6, "inconclusive"),
    ("ood_dense", 74.3, "2"), ("ood_dense", 74.4, "inconclusive"), ("ood_8hop", 65.7, "2"), ("ood_8hop", 65.6, "inconclusive"),
    ("edge_pairs", 90.0, "2"), ("id_matched", 90.0, "2"),
])  # fmt: skip
def test_same_within_3_in_distribution_and_5_beyond(tmp_path, name, m3, expected):
    """The half-width of the 90 % interval is 0.696; neither edge_pairs nor id_matched belongs to the rules."""
    assert row(tmp_path, {name: {"m3": m3}}) == expected


@pytest.mark.parametrize("model", ["m3", "m4b", "m5"])
def test_near_chance_is_at_most_55(tmp_path, model):
    near = {name: {"m3": 54.9, "m4b": 54.9, "m5": 54.9} for name in OOD}
    flat = {"advantage": ROW_3["advantage"]}
    assert row(tmp_path / "a", near | flat | {"ood_dag": {**near["ood_dag"], model: 55.0}}) == "3"
    assert row(tmp_path / "b", near | flat | {"ood_dag": {**near["ood_dag"], model: 55.1}}) == "inconclusive"


@pytest.mark.parametrize("name", ["flips", "swap_drop"])
@pytest.mark.parametrize("m3, depends", [(5.0, True), (4.9, False)])
def test_dependence_from_5_points(tmp_path, name, m3, depends):
    assert (row(tmp_path, {name: {"m3": m3}}) == "4b") is depends


@pytest.mark.parametrize("m3, depends", [(6.0, True), (5.9, False)])
def test_noise_must_cost_m3_5_points_more_than_m5(tmp_path, m3, depends):
    assert (row(tmp_path, {"noise_drop": {"m3": m3}}) == "4b") is depends


@pytest.mark.parametrize("name, m3, m5, differ", [
    ("psr", 30.0, 20.0, True), ("psr", 29.9, 20.0, False), ("psr", 10.0, 20.0, True), ("psr", 10.1, 20.0, False),
    ("advantage", 15.0, 10.0, True), ("advantage", 14.9, 10.0, False), ("advantage", 5.0, 10.0, True),
    ("causal", 0.1, None, True), ("causal", 0.09, None, False), ("causal", 0.4, 0.3, True), ("causal", 0.4, 0.31, False),
])  # fmt: skip
def test_representation_differs_from(tmp_path, name, m3, m5, differ):
    found = decided(tmp_path, {name: {"m3": m3, "m5": m5, "m4b": m5}})
    assert found.row == ("4b" if differ else "2"), render(found)


TWO_SIGNS = BETTER | {"flips": {"m3": 20.0}, "psr": {"m3": 35.0}}  # PSR is one of two; the other is to be found


@pytest.mark.parametrize("sign, reasons", [
    ({}, False),
    ({"count": {"m3": 5.0}}, True), ({"count": {"m3": 4.9}}, False),
    ({"count": {"m3": 9.0, "m5": 8.0, "m4b": 8.0}}, False),  # m5 loses as well
    ({"count": {"m3": 5.0, "m5": 4.0, "m4b": 5.5}}, False),  # no more than the noise floor
    ({"causal": {"m3": 0.1}}, True), ({"causal": {"m3": 0.09}}, False), ({"causal": {"m5": 0.4}}, False),
    ({"causal": {"m3": 0.4, "m5": 0.4, "m4b": 0.4}}, False),  # an effect, and the same in m5
    ({"advantage": {"m3": 15.0}}, True), ({"advantage": {"m3": 14.9}}, False), ({"advantage": {"m3": 2.0}}, False),
])  # fmt: skip
def test_row_1_needs_two_signs_in_favour_of_m3(tmp_path, sign, reasons):
    assert row(tmp_path, TWO_SIGNS | sign) == ("1" if reasons else "inconclusive")


@pytest.mark.parametrize("change", [{"flips": {"m3": 4.0}}, {"ood_7hop": {"m3": 70.0}}, {"psr": {"m3": 20.0}}])
def test_row_1_needs_all_its_parts(tmp_path, change):
    assert row(tmp_path, ROW_1 | change) != "1"


def test_row_4b_needs_sameness_in_distribution_too(tmp_path):
    assert row(tmp_path, {"psr": {"m3": 35.0}, "swap_pairs": {"m3": 76.0}}) == "inconclusive"


def test_rows_2_and_3_do_not_hold_with_dependence(tmp_path):
    """Row 4b comes first then; they are not to hold beside it either."""
    assert decided(tmp_path / "a", {"flips": {"m3": 20.0}}).rules["2"].holds is False
    assert decided(tmp_path / "b", ROW_3 | {"flips": {"m3": 20.0}}).rules["3"].holds is False


def test_row_1_needs_other_structure(tmp_path):
    both_depths = {"ood_7hop": {"m3": 78.0}, "ood_8hop": {"m3": 78.0}, "ood_dag": {"m3": 70.0}}
    assert row(tmp_path, ROW_1 | both_depths) == "4a"


# ---------------------------------------------------------------- uncertainty, missing pieces


def test_a_negation_on_a_wide_interval_counts_but_is_named(tmp_path):
    """One seed of three depends on the order of its thoughts: mean 10, interval -33 .. 53. The rule reads: no DEP."""
    found = decided(tmp_path, {"flips": {"m3": (0.0, 0.0, 30.0)}})
    assert found.row == "2" and found.to_json()["settled"] is False
    assert [c.name for c in found.rests_on] == ["permutation_flips of m3 at least 5"]
    assert "rests on" in render(found)
    settled = decided(tmp_path / "b")
    assert settled.rests_on == [] and settled.to_json()["settled"] is True


def test_a_missing_experiment_leaves_what_it_could_change_undecided(tmp_path):
    write_study(tmp_path)
    shutil.rmtree(tmp_path / "final/psr")
    found = decide(collect(tmp_path))
    assert found.row == "inconclusive" and found.rules["4b"].holds is None
    assert found.rules["1"].holds is False and found.rules["2"].holds is True, "row 2 holds, but 4b might come before it"
    (condition,) = (c for c in found.undecided)
    assert condition.name == "psr: m3 and m5 differ by 10" and f"python -m analysis.psr --study {tmp_path}" in condition.why


def test_a_missing_experiment_that_could_change_nothing_does_not_matter(tmp_path):
    write_study(tmp_path / "a", ROW_1 | {"causal": {"m3": 0.5}})
    shutil.rmtree(tmp_path / "a/final/psr")
    assert decide(collect(tmp_path / "a")).row == "1", "CAUSAL and PROBE are two already"
    write_study(tmp_path / "b", {"psr": {"m3": 35.0}})
    shutil.rmtree(tmp_path / "b/final/token_count")
    shutil.rmtree(tmp_path / "b/final/probing")
    assert decide(collect(tmp_path / "b")).row == "4b"


@pytest.mark.parametrize("experiment", ["corruption", "probing", "causal_tracing"])
def test_row_2_waits_for_every_experiment_of_4b(tmp_path, experiment):
    write_study(tmp_path)
    shutil.rmtree(tmp_path / "final" / experiment)
    found = decide(collect(tmp_path))
    assert found.row == "inconclusive" and any(experiment in c.why for c in found.undecided)


def test_everywhere_is_not_those_sets_that_happen_to_be_there(tmp_path):
    write_study(tmp_path)
    for path in (tmp_path / "final/ood").glob("*.json"):
        record = json.loads(path.read_text())
        del record["sets"]["ood_dense"]
        path.write_text(json.dumps(record))
    found = decide(collect(tmp_path))
    assert found.row == "inconclusive" and any("ood_structure set 2" in c.name for c in found.undecided)


def test_a_quantity_of_two_seeds_is_undecided(tmp_path):
    write_study(tmp_path, {"psr": {"m3": 35.0}})
    (tmp_path / "final/psr/m3-s2_psr.json").unlink()
    found = decide(collect(tmp_path))
    condition = differs(compare(found.evidence, "psr"), 10)
    assert condition.holds is None and condition.why.startswith("2 of 3 seeds of m3 (m3-s2: not measured")
    assert found.row == "inconclusive"


def test_without_m4b_no_difference_is_claimed(tmp_path):
    found = decided(tmp_path / "a", ROW_4A, seeds={"m4b": 0})
    assert found.row == "inconclusive" and any("no noise floor" in c.why for c in found.undecided)
    assert decided(tmp_path / "b", {"ood_7hop": {"m3": 74.0}}, seeds={"m4b": 0}).rules["4a"].holds is False


def test_one_m4b_seed_is_a_noise_floor_with_its_n(tmp_path):
    found = decided(tmp_path, ROW_4A, seeds={"m4b": 1})
    assert found.row == "4a"
    floor = found.noise_floor["two_choice/ood_7hop"]
    assert floor["value"] == pytest.approx(0.1) and (floor["n_m4b"], floor["n_m5"]) == (1, 3)  # 70.5 - 0.4 against 70
    assert "1 and 3 seeds" in render(found)


def test_m4b_with_the_seeds_of_m5_is_no_noise_floor(tmp_path):
    write_study(tmp_path, ROW_4A)
    for path in (tmp_path / "final").glob("*/m4b*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"train_seed": record["repeat"]}))
    found = decide(collect(tmp_path))
    assert found.row == "inconclusive" and any("seeds of m5" in c.why for c in found.undecided)


def test_m5_above_m3_is_remarked(tmp_path):
    found = decided(tmp_path, {"ood_7hop": {"m3": 62.0}})
    assert found.remarks == ["ood_7hop: m5 above m3 by 8.0 points; look for a bug first"]


def test_both_measures_are_told(tmp_path):
    write_study(tmp_path)
    for path in (tmp_path / "final/ood").glob("m3*.json"):
        record = json.loads(path.read_text())
        exact = record["sets"]["ood_7hop"]["exact_match"]
        exact["correct"] += 80
        path.write_text(json.dumps(record))
    evidence = collect(tmp_path)
    assert (decide(evidence).row, decide(evidence).other) == ("2", "4a")
    assert (decide(evidence, "exact_match").row, decide(evidence, "exact_match").other) == ("4a", "2")


# ---------------------------------------------------------------- logic


def test_undecided_means_that_some_completion_changes_it():
    """Three-valued combinations against all ways to fill in their unknowns."""

    def rule(values):
        a, b, c, d = (Condition(str(i), value) for i, value in enumerate(values))
        return all_of("", [any_of("", [a, b]), at_least(2, "", [b, c, d])]).holds, negated(any_of("", [a, d])).holds

    for values in itertools.product((True, False, None), repeat=4):
        free = [i for i, value in enumerate(values) if value is None]
        filled = []
        for choice in itertools.product((True, False), repeat=len(free)):
            full = list(values)
            for i, value in zip(free, choice):
                full[i] = value
            filled.append(rule(full))
        for known, outcomes in zip(rule(values), zip(*filled)):
            if known is not None:
                assert set(outcomes) == {known}
            elif not free:
                raise AssertionError("nothing is unknown, and yet it is undecided")
    assert rule((None, True, True, False))[0] is True and rule((False, False, None, None))[0] is False
    assert rule((True, None, None, True))[0] is None


def test_the_first_row_that_holds_if_none_before_it_is_undecided():
    assert first_row({"1": False, "4a": True, "4b": None}) == "4a"
    assert first_row({"1": None, "4a": True}) is None
    assert first_row({"1": False, "4a": False}) is None


def test_rows_exclude_each_other_but_for_4b(tmp_path):
    """As verdict.py says: with every number there, no two of 1, 4a, 3, 2 hold, nor 4b with 1 or 4a."""
    worlds = [{}, ROW_1, ROW_4A, ROW_3, BETTER, {"psr": {"m3": 35.0}}, ROW_3 | {"psr": {"m3": 35.0}}]
    for i, changes in enumerate(worlds):
        found = decided(tmp_path / str(i), changes)
        holding = {name for name, rule in found.rules.items() if rule.holds}
        assert len(holding - {"4b"}) <= 1 and not ({"4b"} & holding and {"1", "4a"} & holding)


def test_differs_and_same_exclude_each_other_at_the_threshold(tmp_path):
    exactly = {"ood_7hop": {"m3": (75.0, 75.0, 75.0), "m5": (70.0, 70.0, 70.0)}}
    c = compare(collect(write_study(tmp_path, exactly)), "two_choice/ood_7hop")
    assert differs(c, 5).holds is True and same(c, 5).holds is False and same(c, 5.1).holds is True


# ---------------------------------------------------------------- the command


def test_the_command_prints_and_writes(tmp_path, capsys):
    write_study(tmp_path, ROW_4A)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "VERDICT  row 4a: partial: chain extension" in out and "row 4a  FIRES" in out and "noise floor" in out
    written = json.loads((tmp_path / "final/verdict.json").read_text())
    assert written["verdict"] == "4a" and written["seeds"] == {"m3": 3, "m5": 3, "m4b": 3}
    leaf = written["rules"]["4a"]["condition"]["parts"][0]["parts"][0]
    assert leaf["difference"] == pytest.approx(8) and leaf["ci95"] == pytest.approx([8 - 0.907, 8 + 0.907], abs=1e-3)
    assert leaf["ci90"] == pytest.approx([8 - 0.696, 8 + 0.696], abs=1e-3)
    assert leaf["noise_floor"]["value"] == pytest.approx(0.5) and leaf["threshold"] == 5
    assert leaf["values"]["m3-s1"]["value"] == 78 and leaf["values"]["m3-s1"]["n"] == 1000
    assert leaf["paired"]["n"] == 3


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    write_study(tmp_path)
    (tmp_path / "final/psr/m3_psr.json").write_text("{")
    assert main([str(tmp_path)]) == 2
    assert "m3_psr.json is not JSON" in capsys.readouterr().err and not (tmp_path / "final/verdict.json").exists()


def test_every_row_has_a_meaning():
    assert set(module.MEANINGS) == {"1", "4a", "4b", "3", "2", "inconclusive", "insufficient seeds"}
