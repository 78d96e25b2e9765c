"""Noise on reasoning states: of the size that its kind says, where it is said to go, the same however rows are cut up."""

import json
import shutil

import pytest
import torch

from analysis import experiment as harness
from analysis import psr
from analysis.command import CheckFailed
from analysis.experiment import Task, load_subject
from analysis.interventions import NOWHERE, Patch

KEYS = ("m3", "m1", "m4", "m4b", "m5")  # m3 first: the others take its scale
SIGMAS = ["0.5", "2"]
LAYERS = ["0", "2"]


@pytest.fixture(scope="module")
def argv(small_data):
    shared = ["--data", str(small_data / "prosqa_valid.json"), "--device", "cpu", "--layers", *LAYERS, "--sigmas", *SIGMAS]
    return lambda run, out, *more: ["--checkpoint", str(run), "--output_dir", str(out), *shared, *more]


@pytest.fixture(scope="module")
def out(tiny_runs, argv, tmp_path_factory):
    """An output folder with all models measured."""
    folder = tmp_path_factory.mktemp("psr")
    for key in KEYS:
        assert psr.main(argv(tiny_runs[key], folder)) == 0
    return folder


@pytest.fixture
def task_of(tiny_runs, argv, tmp_path):
    def make(key: str, *more) -> Task:
        args = psr.EXPERIMENT.parser().parse_args(argv(tiny_runs[key], tmp_path, *more))
        subject = load_subject(args.checkpoint[0], args.epoch, args.batch_size, args.device)
        return Task(psr.EXPERIMENT, args, subject, tmp_path / "psr")

    harness.load_subject.cache_clear()
    return make


def read(folder, key: str) -> dict:
    return json.loads((folder / "psr" / f"{key}_psr.json").read_text())


def records(folder, key: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "psr" / f"{key}_psr.jsonl").read_text().splitlines()[1:]]


# ---------------------------------------------------------------- every model, end to end


@pytest.mark.parametrize("key", KEYS)
def test_every_model_runs_end_to_end(out, key):
    found, rows = read(out, key), records(out, key)
    assert found["n"] == sum(r["positions"] > 0 for r in rows) and len(rows) == 11
    for layer in LAYERS:
        for kind in psr.KINDS:
            rates = found["psr"][layer][kind]
            assert (rates is None) == (kind in found["psr_why"][layer])
            for sigma in rates or {}:
                changed = [r["noise"][f"{layer}/{kind}/{sigma}"]["changed"] for r in rows if r["positions"]]
                assert rates[sigma]["n"] == found["n"] and rates[sigma]["correct"] == sum(changed)
    assert found["controls"]["nothing"]["correct"] == 0 and found["chain"] == "recompute"
    assert found["controls"]["question"]["correct"] > 0, "these models read the question"
    assert (out / "zhang_replication" / "results.json").is_file()


@pytest.mark.parametrize("key", ["m4", "m4b", "m5"])
def test_slot_inputs_of_pause_modes_have_no_noise_of_their_own(out, key):
    """One vector in every row: its std over rows is nothing. Noise of m3's scale is there, and own noise at a block."""
    rates, why = read(out, key)["psr"], read(out, key)["psr_why"]
    assert rates["0"]["own"] is None and rates["0"]["orthogonal"] is None and "one vector" in why["0"]["own"]
    assert rates["0"]["absolute"].keys() == {"0.5", "2.0"} and rates["2"]["own"].keys() == {"0.5", "2.0"}
    assert why["2"] == {}


def test_absolute_noise_has_the_scale_of_m3(out):
    scale = read(out, "m3")["scale"]
    assert min(scale.values()) > 0
    for key in KEYS:
        assert read(out, key)["absolute_scale"] == scale
    assert read(out, "m5")["scale"]["0"] == pytest.approx(0, abs=1e-6), "its own would be nothing"


def test_noise_grows_with_sigma_and_orthogonal_is_as_long_as_own(out):
    for key in ("m1", "m3"):
        norms = read(out, key)["mean_relative_norm"]["2"]
        for kind in psr.KINDS:
            assert norms[kind]["2.0"] == pytest.approx(4 * norms[kind]["0.5"], rel=1e-4) and norms[kind]["0.5"] > 0
        assert norms["orthogonal"]["2.0"] == pytest.approx(norms["own"]["2.0"], rel=1e-4)


# ---------------------------------------------------------------- the noise itself


def test_kinds_of_noise():
    draw = torch.Generator().manual_seed(0)
    x, z = torch.randn(400, 2, 64, generator=draw), torch.randn(400, 2, 64, generator=draw)
    own = torch.linspace(0.1, 3, 128).view(2, 64)
    own[1, :5] = 0.0
    ready = {"own": {4: own}, "absolute": {4: 0.7}}
    added = {kind: psr.noise(ready, 4, kind, 0.5, x, z) for kind in psr.KINDS}
    assert torch.allclose(added["own"].std(0), 0.5 * own, rtol=0.15, atol=1e-6)
    assert added["absolute"].std() == pytest.approx(0.35, rel=0.02)
    across = added["orthogonal"]
    cosine = torch.nn.functional.cosine_similarity(across, x, dim=-1)
    assert cosine.abs().max() < 1e-5 < torch.nn.functional.cosine_similarity(added["own"], x, dim=-1).abs().max()
    assert torch.allclose(across.norm(dim=-1), added["own"].norm(dim=-1), rtol=1e-4)
    assert not any(psr.noise(ready, 4, kind, 0.0, x, z).any() for kind in psr.KINDS)


def test_spread_counts_the_rows_that_have_a_position():
    x = torch.tensor([[[1.0], [5.0]], [[3.0], [9.0]], [[8.0], [0.0]]])
    there = torch.tensor([[True, True], [True, True], [False, False]])
    x[2] = 0.0  # as recorded where there is no position
    own, pooled = psr.spread(x, there)
    assert own.flatten().tolist() == [1.0, 2.0]
    assert pooled == pytest.approx(torch.tensor([1.0, 5.0, 3.0, 9.0]).std().item())


def test_own_scale_is_the_std_over_rows(task_of):
    ready = psr.prepare(task_of("m3"))
    thoughts = ready["states"][0]
    assert thoughts.shape[:2] == (11, 2)
    assert torch.allclose(ready["own"][0], thoughts.std(0, correction=0), rtol=1e-4)


# ---------------------------------------------------------------- where it goes


def test_chains_of_thought_align_from_the_end(task_of, monkeypatch):
    task = task_of("m1")
    prompts, where, longer = psr.disturbed(task)
    questions = [len(ids) for ids in task.subject.prompts(task.problems).tokens]
    assert longer == 0
    for ids, start, places in zip(prompts.tokens, questions, where.tolist()):
        there = [place for place in places if place != NOWHERE]
        assert there == list(range(len(ids) - 1, start - 1, -1)), "all own tokens, the last one first, no question token"
        assert places[: len(there)] == there
    monkeypatch.setattr(psr, "LONGEST_COT", 3)
    _, last, longer = psr.disturbed(task)
    assert last.equal(where[:, :3]) and longer == int((where[:, 3:4] != NOWHERE).sum()) > 0


def test_slots_are_disturbed_and_nothing_else(task_of):
    task = task_of("m5")
    prompts, where, _ = psr.disturbed(task)
    for ids, places in zip(prompts.tokens, where.tolist()):
        assert [int(ids[place]) for place in places] == [task.subject.ids.latent] * 2


def test_the_control_meets_every_question_token(task_of, monkeypatch):
    made = []
    monkeypatch.setattr(psr, "shift", lambda *given: made.append(Patch(*given, add=True)) or made[-1])
    task = task_of("m3")
    psr.control(task, [2, 5])
    (edit,) = made
    questions = [task.problems.table.question[i] for i in (2, 5)]
    assert edit.layer == 0 and edit.n_hit == sum(map(len, questions))
    assert [row[row != NOWHERE].tolist() for row in edit.positions_PK] == [list(range(len(q))) for q in questions]


def test_layers_outside_and_negative_sizes_are_refused(tiny_runs, argv, tmp_path, capsys):
    for more, named in [
        (["--layers", "0", "9"], "--layers 9"),
        (["--layers", "-1"], "--layers -1"),
        (["--sigmas", "-1"], "-1"),
    ]:
        assert psr.main([*argv(tiny_runs["m5"], tmp_path), *more]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and named in message and message.count("\n") == 1
    assert not list((tmp_path / "psr").glob("*_psr.json"))


# ---------------------------------------------------------------- checks


def test_noise_of_size_0_that_does_something_fails(tiny_runs, argv, tmp_path, monkeypatch):
    """The instrument adds a little to everything: then no rate means what it says."""
    monkeypatch.setattr(psr, "shift", lambda layer, where, values: Patch(layer, where, values + 0.01, add=True))
    assert psr.main(argv(tiny_runs["m3"], tmp_path)) == 1
    assert not (tmp_path / "psr" / "m3_psr.json").exists()
    assert "size 0" in json.loads((tmp_path / "psr" / "m3_psr.failed.json").read_text())["reason"]


def test_noise_that_meets_nothing_fails(task_of, monkeypatch):
    task = task_of("m3")
    ready = psr.prepare(task)
    monkeypatch.setattr(psr, "shift", lambda layer, where, values: Patch(layer, where * 0 + NOWHERE, values, add=True))
    with pytest.raises(CheckFailed, match="layer 0 met 0 states of 132"):  # 11 rows, 2 slots, 3 kinds, 2 sizes
        psr.measure(task, ready, "test", list(range(11)))


@pytest.mark.parametrize("right, changed, fails", [(95, 51, False), (95, 50, True), (55, 20, False)])
def test_the_question_control_judges_models_that_read_it(right, changed, fails):
    rows = [
        {"changed_by_nothing": False, "changed_by_control": i < changed, "two_choice_correct": i < right} for i in range(100)
    ]
    if fails:
        with pytest.raises(CheckFailed, match="whole question"):
            psr.controls(rows)
    else:
        found = psr.controls(rows)
        assert found["question"]["accuracy"] == changed / 100 and ("note" in found["question"]) == (right == 55)


# ---------------------------------------------------------------- the same however it is run


@pytest.mark.parametrize("key", ["m3", "m1"])
def test_batches_and_chunks_change_nothing(task_of, key):
    found = []
    for size, cuts in [("50", [range(11)]), ("4", [range(3), range(3, 4), range(4, 11)])]:
        harness.load_subject.cache_clear()
        task = task_of(key, "--batch_size", size)
        ready = psr.prepare(task)
        found.append([record for cut in cuts for record in psr.measure(task, ready, "test", list(cut))])
    for one, other in zip(*found, strict=True):
        assert one["noise"].keys() == other["noise"].keys() and one["changed_by_control"] == other["changed_by_control"]
        for name, a in one["noise"].items():
            b = other["noise"][name]
            assert a["changed"] == b["changed"] and a["margin_change"] == pytest.approx(b["margin_change"], abs=1e-3)
            assert a["relative_norm"] == pytest.approx(b["relative_norm"], rel=1e-4)


def test_a_killed_run_comes_to_the_same_result(out, tiny_runs, argv, tmp_path):
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "psr" / "m4_psr.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]) + '{"part": "test", "id')
    (tmp_path / "psr" / "m4_psr.json").unlink()
    assert psr.main(argv(tiny_runs["m4"], tmp_path)) == 0
    whole, again = read(out, "m4"), read(tmp_path, "m4")
    for name in ("psr", "psr_why", "controls", "scale", "clean_accuracy", "n", "n_excluded", "identity"):
        assert again[name] == whole[name]
    assert again["margin_change"]["2"]["own"]["2.0"] == pytest.approx(whole["margin_change"]["2"]["own"]["2.0"], abs=1e-4)
    assert records(tmp_path, "m4")[:4] == records(out, "m4")[:4]


def test_without_m3_absolute_noise_is_null_until_measured_again(tiny_runs, argv, out, tmp_path, monkeypatch):
    """Rows measured before m3 had a scale are not mixed with rows measured after."""
    monkeypatch.setattr(psr.EXPERIMENT, "chunk", 4)
    assert psr.main(argv(tiny_runs["m5"], tmp_path)) == 0
    found = read(tmp_path, "m5")
    assert found["psr"]["0"]["absolute"] is None and "measure m3" in found["psr_why"]["0"]["absolute"]
    shutil.copy(out / "psr" / "m3_psr.json", tmp_path / "psr")
    (tmp_path / "psr" / "m5_psr.json").unlink()
    path = tmp_path / "psr" / "m5_psr.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    assert psr.main(argv(tiny_runs["m5"], tmp_path)) == 0
    found = read(tmp_path, "m5")
    assert found["psr"]["0"]["absolute"] is None and "--force" in found["psr_why"]["0"]["absolute"]
    assert psr.main(argv(tiny_runs["m5"], tmp_path, "--force")) == 0
    assert read(tmp_path, "m5")["psr"]["0"] == read(out, "m5")["psr"]["0"]
