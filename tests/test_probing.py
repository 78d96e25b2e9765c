"""The probing experiment: labels, designs, a planted code, files that resume, and checkpoints through the command line."""

import json

import numpy as np
import pytest
import torch
from evaluate_material import draw

from analysis import experiment as harness
from analysis import probing
from analysis.command import CheckFailed
from analysis.probe_cells import Cell, Cells, Plan, Unit, units
from analysis.probe_fields import Found, mean
from analysis.probing import EXPERIMENT, fields, one_vector, question_positions, read_states, species_of, write_states
from analysis.subject import Problems, Subject

SPECIES = ["brimpus", "chorpus", "dumpus", "felpus"]
N, LAYERS, SLOTS, WIDTH = 160, 3, 3, 12


def random_steps(hops=(2, 3), n: int = N, seed: int = 0) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [list(rng.choice(SPECIES, hops[i % len(hops)])) for i in range(n)]


def noise(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {source: rng.standard_normal((N, LAYERS, SLOTS, WIDTH)) for source in ("slots", "inputs", "untrained")}


def planted(steps: list[list[str]], layer: int, slot: int, step: int, tables=None, source="slots") -> dict[str, np.ndarray]:
    """Noise in which one cell tells one step."""
    tables = tables or noise()
    for i, some in enumerate(steps):
        if len(some) > step:
            tables[source][i, layer, slot, SPECIES.index(some[step])] += 4
    return tables


def found_in(tables, steps, path, min_rows=60, **changes) -> Found:
    options = {"n_shuffles": 300} | changes
    return Found(Plan.of(steps, range(SLOTS), min_rows), Cells(tables, path / "cells.jsonl", "x", **options))


# ---------------------------------------------------------------- labels and rows


def test_labels_are_counted_from_the_start_and_from_the_end():
    row = {"steps": ["Tom is a gerpus.", "Every gerpus is a boompus.", "Every boompus is a yimpus."]}
    assert species_of(row) == ["gerpus", "boompus", "yimpus"]
    with pytest.raises(ValueError, match="row 7.*species"):
        species_of({"steps": ["Tom is a gerpus.", "?!"]}, 7)
    steps = [species_of(row)] * 10 + [["boompus", "impus"]] * 10
    plan = Plan.of(steps, range(3), 5)
    starts, ends = ({t: design.rows.tolist() for t, design in x.items()} for x in (plan.steps, plan.ends))
    assert starts == ends == {0: [*range(20)], 1: [*range(20)], 2: [*range(10)]}
    names = lambda y, words: [sorted(words)[i] for i in (y[0], y[-1])]  # noqa: E731
    assert names(plan.steps[0].y, ["gerpus", "boompus"]) == ["gerpus", "boompus"]
    assert names(plan.steps[1].y, ["boompus", "impus"]) == ["boompus", "impus"]
    assert names(plan.ends[0].y, ["yimpus", "impus"]) == ["yimpus", "impus"], "0 from the end is the answer"
    assert names(plan.ends[1].y, ["boompus"]) == ["boompus"] * 2
    assert plan.answerless[1].rows.tolist() == [*range(10)] and 2 not in plan.answerless
    assert plan.steps[0].label == "step 0" and plan.ends[1].label == "end 1"


def test_steps_are_compared_on_the_same_rows_up_to_the_longest_that_enough_rows_have():
    steps = random_steps((1, 2, 3, 4))  # 40 rows of each
    assert (Plan.of(steps, range(3), 30).most, Plan.of(steps, range(3), 41).most) == (4, 3)
    plan = Plan.of(steps, range(3), 60)
    assert plan.most == 3 and plan.matched.n == 80 and not plan.hops
    assert plan.matched.labels.keys() == {f"{kind} {t}" for kind in ("step", "end") for t in range(3)}
    assert all(len(y) == 80 for y in plan.matched.labels.values())
    lengths = np.array([len(steps[i]) for i in plan.matched.rows])
    assert all((lengths[plan.matched.fold == k] == 3).sum() == 8 for k in range(5))
    assert {h: design.n for h, design in Plan.of(steps, range(3), 40).hops.items()} == {2: 40, 3: 40, 4: 40}
    assert Plan.of(random_steps((1,)), range(2), 30).matched is None


def test_rare_species_are_left_out_and_counted():
    steps = [["brimpus"]] * 30 + [["rompus"]] * 4 + [["dumpus"]] * 9
    plan = Plan.of(steps, [0], 10)
    assert plan.steps[0].n == 39 and plan.steps[0].n_classes() == 2 and plan.steps[0].chance() == 30 / 39
    assert plan.counts["steps", 0] == (43, 4)
    assert probing.excluded(plan)["step 0 from the start: species of fewer than 5 rows"] == 4


def test_question_positions_reach_from_the_first_token_to_the_last():
    assert question_positions(26) == [0, 5, 10, 15, 20, 25]
    assert question_positions(6) == [0, 1, 2, 3, 4, 5] and question_positions(4)[-1] == 3


# ---------------------------------------------------------------- a planted code


def test_a_planted_code_is_found_where_it_is_and_nowhere_else(tmp_path):
    steps = random_steps()
    made = fields(found_in(planted(steps, layer=2, slot=1, step=1), steps, tmp_path), "continuous", "peak")
    assert made["significant_cells"] == [[2, 1]] and made["n_significant_cells"] == 1
    assert (made["peak_layer"], made["peak_position"]) == (2, 1) and made["peak_accuracy"]["accuracy"] > 0.9
    assert made["linear_probe_accuracy"][2][1] == made["peak_accuracy"]["accuracy"]
    assert made["permutation_p_values"][2][1] == 1 / 301 and made["p_threshold"] == 0.05 / 9
    assert 0.2 < made["shuffled_label_accuracy"][2][1] < made["chance"][1] + 0.02
    assert made["selectivity"][2][1] > 0.4 and abs(made["selectivity"][0][1]) < 0.3
    assert made["n_slots_above_controls"] == 1 and made["diagonal_pattern"] is True
    assert made["thought_minus_input_advantage"][1] > 0.4 and made["untrained"]["peak_accuracy"]["accuracy"] < 0.5
    advantage = made["controlled_advantage"]
    assert advantage["step"] == 1 and advantage["slot_cell"] == {"source": "slots", "layer": 2, "column": 1}
    assert advantage["ci95"][0] > 0.3 and advantage["n"] == 80, "rows of three steps: step 1 is not their answer"
    assert (made["nonlinear_peak_layer"], made["nonlinear_peak_position"]) == (2, 1)
    fitted = {(la, k) for la in range(3) for k in range(3) if made["nonlinear_probe_accuracy"][la][k] is not None}
    assert fitted == {(2, 1), (1, 1), (2, 0), (2, 2)} and made["nonlinear_not_converged"] == []
    assert all(len(cell["folds"]) == 5 for cell in made["nonlinear_loss_curves"])
    json.dumps(made, allow_nan=False)


def test_a_slot_that_tells_another_step_is_no_diagonal(tmp_path):
    steps = random_steps()
    made = fields(found_in(planted(steps, layer=1, slot=0, step=2), steps, tmp_path), "continuous")
    (slot,) = [slot for slot in made["diagonal_slots"] if slot["beats_controls"]]
    assert (slot["slot"], slot["own_step"], slot["best_step"], slot["best_step_from_end"]) == (0, 0, 2, 0)
    assert made["diagonal_pattern"] is False and made["selectivity"][1][0] < -0.3
    assert made["max_cross_position_acc"][1][0] > 0.8 and made["significant_cells"] == []
    assert made["from_end"]["n_samples"] == [160, 160, 80]


@pytest.mark.parametrize("source", ["inputs", "untrained"])
def test_what_a_control_tells_as_well_is_no_advantage(tmp_path, source):
    steps = random_steps()
    tables = planted(steps, 1, 0, 0, planted(steps, layer=2, slot=0, step=0), source)
    made = fields(found_in(tables, steps, tmp_path), "continuous")
    advantage = made["controlled_advantage"]
    assert advantage["step"] == 0 and advantage["slot_accuracy"]["accuracy"] > 0.8
    assert advantage["control_cell"]["source"] == source and advantage["value"] < 0.1
    assert [2, 0] in made["significant_cells"] and not made["diagonal_slots"][0]["beats_controls"]


def test_selectivity_refuses_other_rows(tmp_path, monkeypatch):
    """Each step on the rows that have it, as if that were a comparison: not the same rows, so no number."""
    steps = random_steps()
    found = found_in(noise(), steps, tmp_path)
    found.fit()
    found.selectivity()

    def on_own_rows(design, most, cell):
        return [found.cells.score(found.plan.steps[t], Cell("inputs", *cell[1:]), f"step {t}") for t in range(most)]

    monkeypatch.setattr(found, "step_scores", on_own_rows)
    with pytest.raises(AssertionError, match="different rows or folds"):
        found.selectivity()


def test_too_few_rows_are_null_and_never_0(tmp_path):
    steps = random_steps()
    made = fields(found_in(noise(), steps, tmp_path, min_rows=100), "continuous", "all")
    assert made["n_samples_per_position"] == [160, 160, 0] and made["n_classes"][2] is made["chance"][2] is None
    for name in ("linear_probe_accuracy", "permutation_p_values", "nonlinear_probe_accuracy", "shuffled_label_accuracy"):
        assert all(row[2] is None and None not in row[:2] for row in made[name]), name
    assert made["n_measured_cells"] == 6 and made["total_cells"] == 9, "the threshold is that of all cells"
    assert made["diagonal_peak_layers"][2] is None and made["thought_minus_input_advantage"][2] is None
    first = made["thought_minus_input_advantage"][:2]
    assert made["mean_thought_advantage"] == pytest.approx(sum(first) / 2), "a mean over what was measured"
    assert all(row[2] is None for row in made["selectivity"])
    known = [x for row in made["selectivity"] for x in row if x is not None]
    assert len(known) == 6 and made["mean_selectivity"] == pytest.approx(np.mean(known))
    assert mean([None, 0.5, None]) == 0.5 and mean([None, None]) is None


def test_no_rows_at_all_is_a_result_of_nulls(tmp_path):
    made = fields(found_in(noise(), random_steps(), tmp_path, min_rows=1000), "frozen", "peak", grid=True)
    assert made["peak_accuracy"] is made["mean_selectivity"] is made["diagonal_pattern"] is made["diagonal_strength"] is None
    assert made["controlled_advantage"]["value"] is None and "enough rows" in made["controlled_advantage"]["reason"]
    assert made["layer0_at_chance"] == {"passed": None, "slots": []} and made["significant_cells"] == []
    json.dumps(made, allow_nan=False)


def test_states_that_hold_nothing_are_no_result(tmp_path):
    steps = [[SPECIES[i % 4], SPECIES[(i + 1) % 4]] for i in range(N)]
    tables = {source: np.zeros_like(table[:, :, :2]) for source, table in noise().items()}
    found = Found(Plan.of(steps, range(2), 60), Cells(tables, tmp_path / "cells.jsonl", "x", n_shuffles=200))
    with pytest.raises(CheckFailed, match="exactly 1 / classes"):
        fields(found, "continuous")


def test_layer_0_of_a_pause_slot(tmp_path):
    steps = random_steps()
    empty, telling = (found_in(tables, steps, tmp_path) for tables in (noise(), planted(steps, layer=0, slot=1, step=1)))
    for found in (empty, telling):
        found.cells.found.clear()
        cells = [(found.own(k), Cell("slots", 0, k)) for k in range(SLOTS)]
        found.cells.fit([Unit(kind, design, cell) for kind in ("linear", "null") for design, cell in cells])
    assert empty.layer0("frozen")["passed"] is True and "skipped" in empty.layer0("continuous")
    assert [slot["at_chance"] for slot in telling.layer0("pause_curriculum")["slots"]] == [True, False, True]
    assert telling.layer0("pause_curriculum")["passed"] is False
    by_length = np.repeat(np.random.default_rng(0).standard_normal((2, 1, 3, 8)), 5, axis=1).reshape(10, 3, 8)
    assert one_vector(by_length, np.repeat([20, 21], 5)) and not one_vector(by_length, np.full(10, 20))


# ---------------------------------------------------------------- files


def test_a_killed_run_goes_on_cell_by_cell(tmp_path, monkeypatch):
    steps, fitted = random_steps(), []
    plan, path = Plan.of(steps, range(SLOTS), 60), tmp_path / "cells.jsonl"
    measured = Cells._measured
    monkeypatch.setattr(Cells, "_measured", lambda self, unit: (fitted.append(unit.key), measured(self, unit))[1])
    tables = noise()
    wanted = list(units(plan.steps[0], "slots", tables))
    whole = Cells(tables, path, "x")
    whole.fit(wanted)
    assert len(fitted) == LAYERS * SLOTS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:10])  # four cells, and a fifth torn
    fitted.clear()
    again = Cells(tables, path, "x")
    again.fit(wanted)
    assert len(fitted) == LAYERS * SLOTS - 4 and again.found == whole.found
    assert len(path.read_text().splitlines()) == 1 + LAYERS * SLOTS
    assert Cells(tables, path, "of another checkpoint").found == {}


def test_what_was_fitted_before_a_crash_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan, tables, measured, begun = Plan.of(random_steps(), range(SLOTS), 60), noise(), Cells._measured, []

    def crash_at_the_fifth(self, unit):
        begun.append(unit)
        if len(begun) == 5:
            raise MemoryError
        return measured(self, unit)

    monkeypatch.setattr(Cells, "_measured", crash_at_the_fifth)
    with pytest.raises(MemoryError):
        Cells(tables, tmp_path / "cells.jsonl", "x").fit(units(plan.steps[0], "slots", tables))
    kept = Cells(tables, tmp_path / "cells.jsonl", "x").found
    assert kept.keys() >= {unit.key for unit in begun[:4]} and begun[4].key not in kept


def test_states_of_another_checkpoint_or_other_rows_are_not_used(tmp_path):
    path, tables = tmp_path / "states.npz", noise()
    belongs = {"version": 1, "checkpoint": "aa", "data": "bb", "rows": N}
    assert read_states(path, belongs) is None
    write_states(path, belongs, tables)
    held = read_states(path, belongs)
    assert all((held[name] == tables[name]).all() for name in tables)
    for change in ({"checkpoint": "cc"}, {"data": "cc"}, {"rows": N - 1}, {"version": 2}):
        assert read_states(path, belongs | change) is None
    with np.load(path, allow_pickle=False) as file:
        assert file["row_ids"].tolist() == list(range(N)) and str(file["checkpoint_sha256"]) == "aa"
    path.write_bytes(path.read_bytes()[:5000])
    assert read_states(path, belongs) is None, "cut short"


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """150 test rows of two and three steps."""
    path = tmp_path_factory.mktemp("probing") / "prosqa_test.json"
    path.write_text(json.dumps(draw(150)))
    return path


@pytest.fixture
def probe(tiny_runs, data, tmp_path, capsys):
    """probe(key, *flags): exit code, result (None where there is none), and what was printed as an error."""

    def run(key, *flags):
        harness.load_subject.cache_clear()
        argv = ["--checkpoint", str(tiny_runs[key]), "--data", str(data), "--output_dir", str(tmp_path), "--min_rows", "60"]
        code = EXPERIMENT.main([*argv, *(flags or ("--shuffles", "200", "--nonlinear", "none"))])
        path = tmp_path / "probing" / f"{key}_probing.json"
        return code, json.loads(path.read_text()) if path.is_file() else None, capsys.readouterr().err

    return run


@pytest.mark.parametrize("key", ["m3", "m5"])
def test_a_checkpoint_through_the_command_line(probe, tiny_runs, data, tmp_path, key):
    code, made, error = probe(key)
    assert code == 0, error
    layers, slots = made["n_layers"] + 1, made["n_thoughts"]
    for name in ("linear_probe_accuracy", "permutation_p_values", "selectivity", "max_cross_position_acc"):
        assert (len(made[name]), {len(row) for row in made[name]}) == (layers, {slots}), name
    assert {len(row) for row in made["input_position_probe_acc"]} == {6}
    best = max(x for row in made["input_position_probe_acc"] for x in row)
    assert made["max_input_position_acc"] == best == made["max_input_position"]["accuracy"]
    assert made["n_samples_per_position"][0] + made["n_excluded"].get(LEFT_OUT, 0) == 150
    assert made["untrained"]["linear_probe_accuracy"] != made["linear_probe_accuracy"]
    at_chance = made["layer0_at_chance"]
    assert "skipped" in at_chance if key == "m3" else [slot["layer"] for slot in at_chance["slots"]] == [0] * slots
    assert made["controlled_advantage"]["n"] >= 60 and made["probe"]["synthetic_clusters"] > 0.99

    subject = Subject.load(tiny_runs[key])
    problems = Problems.read(data, subject.tokenizer)
    prompts = subject.prompts(problems)
    with np.load(made["states"], allow_pickle=False) as held:
        assert str(held["checkpoint_sha256"]) == subject.sha256
        assert torch.equal(torch.from_numpy(held["slots"]), subject.states(prompts, prompts.slots))
        last = torch.tensor([[len(problems.table.question[i]) - 1] for i in range(150)])
        assert torch.equal(torch.from_numpy(held["inputs"][:, :, 5:]), subject.states(prompts, last))
        assert not np.allclose(held["untrained"], held["slots"])
    records = [json.loads(line) for line in (tmp_path / f"probing/{key}_probing.jsonl").read_text().splitlines()[1:]]
    assert [record["species"][-1] + "." for record in records] == [row["answer"].split()[-1] for row in problems.rows]


LEFT_OUT = "step 0 from the start: species of fewer than 5 rows"


def test_states_of_another_checkpoint_are_computed_again(probe, tiny_runs, tmp_path):
    code, made, _ = probe("m4")
    assert code == 0
    path = tmp_path / "probing/m4_probing.states.npz"
    held = dict(np.load(path, allow_pickle=False))
    belongs = json.loads(str(held["belongs"]))
    tables = {name: np.zeros_like(held[name]) for name in ("slots", "inputs", "untrained")}
    write_states(path, belongs | {"checkpoint": "0" * 64}, tables)
    (tmp_path / "probing/m4_probing.json").unlink()
    code, again, _ = probe("m4")
    assert code == 0 and again["controlled_advantage"] == made["controlled_advantage"], "its best cells are fitted again"
    assert (np.load(path)["slots"] == held["slots"]).all()

    write_states(path, belongs, {**tables, "slots": held["slots"] * np.nan})
    (tmp_path / "probing/m4_probing.json").unlink()
    code, nothing, error = probe("m4")
    assert code == 1 and nothing is None and "not finite" in error
    assert (tmp_path / "probing/m4_probing.failed.json").is_file()


def test_a_pause_slot_that_depends_on_the_row_stops_the_run(probe, monkeypatch):
    extract = probing.extract

    def changed(subject, prompts):
        tables = extract(subject, prompts)
        tables["slots"][3, 0] += 0.1
        return tables

    monkeypatch.setattr(probing, "extract", changed)
    code, made, error = probe("m4b")
    assert code == 1 and made is None and "layer 0 of a pause slot" in error


@pytest.mark.parametrize(("key", "flags", "word"), [("m3", ("--shuffles", "20"), "--shuffles 20"), ("m1", (), "measures m3")])
def test_mistakes_are_one_line(probe, key, flags, word):
    code, made, error = probe(key, *flags)
    assert code == 2 and made is None and error.startswith("error: ") and word in error and error.count("\n") == 1
