"""The A x B x C study as users start it: the plan, its mistakes, and a tiny one that was cut and goes on to its tables."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT

import run
from analysis import factorial, factorial_scores
from analysis.factorial_plan import Plan, as_yaml, cell_settings, load_factorial
from analysis.factorial_report import gathered, text
from analysis.factorial_stats import CELLS
from analysis.subject import Problems, Subject
from backbones.memory_layers import counting_reads
from checkpoint import build_model
from files import read_json, read_jsonl

SHIPPED = ROOT / "args/lahr_factorial.yaml"
TINY = {
    "model_config": {"size": "tiny", "hidden_size": 32, "num_hidden_layers": 3, "memory_layers": [2], "mod_capacity": 0.5},
    "epochs_per_stage": 1, "max_latent_stage": 1, "num_epochs": 3, "batch_size_training": 8, "eval_batch_size": 8,
    "max_new_tokens": 4, "warmup_steps": 2, "select_by": "loss", "wandb": False,
}  # fmt: skip


@cache
def shipped() -> dict:
    """The trainings of the committed study, by their labels."""
    return {member.label: member for member in Plan(load_factorial(SHIPPED)).members}


def study_yaml(folder: Path, **changes) -> Path:
    """A study of tiny models in a folder whose name wants quoting."""
    values = {
        "name": "it's a study", "results": str(folder / "the results"), "base": str(ROOT / "args/lahr_coconut.yaml"),
        "overrides": TINY, "data": {"n_samples": 24, "val_samples": 8, "test_samples": 12}, "seeds": [0, 1],
        "cells": ["baseline", "ABC"], "processes": 2,
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


# ---------------------------------------------------------------- the plan


def test_the_driver_lists_eight_cells_with_their_flags():
    plan = Plan(load_factorial(SHIPPED))
    design = [m for m in plan.members if m.cell in CELLS]
    assert len(design) == 40 and len({m.folder for m in plan.members}) == len(plan.members) == 60
    for member in design:
        options = member.config.model_options
        assert (member.config.feedback_mode == "continuous") is ("A" in member.cell)
        assert options["use_mod"] is ("B" in member.cell) and options["use_memory"] is ("C" in member.cell)
        assert member.config.seed == member.seed and f"/s{member.seed}/" in member.config.train_path
    told = {m.cell: (m.config.feedback_mode, *(m.config.model_options[f] for f in ("use_mod", "use_memory"))) for m in design}
    assert len(set(told.values())) == 8
    jobs = plan.jobs()
    assert [job.name for job in jobs if job.name.startswith("score")] == [f"score s{seed}" for seed in range(5)]
    first = [job.name for job in jobs[:12]]
    assert first == [f"train {c}-s0" for c in CELLS] + [f"train {c}-s0" for c in plan.study.references], "whole seeds first"
    assert jobs[12].needs == tuple(first)


def test_cells_differ_in_nothing_else():
    """All of a seed have one curriculum, one set of rows, one optimizer."""
    members = [shipped()[f"{cell}-s3"] for cell in CELLS]
    settings = [m.config.model_dump(exclude={"name", "feedback_mode"}) for m in members]
    for options in (s["model_options"] for s in settings):
        del options["use_mod"], options["use_memory"]
    assert len(settings) == 8 and all(s == settings[0] for s in settings)


def test_flags_reach_run_as_written():
    """No boolean comes back from the command line as a string, where "false" would be true."""
    said = dict(part.split("=", 1) for part in shipped()["AB-s0"].command()[3:])
    options = yaml.safe_load(said["model_config"])
    assert options["use_mod"] is True and options["use_memory"] is False and said["feedback_mode"] == "continuous"
    for value in (False, "false", 1e-6, 'it\'s: a "name"', [1], None, {"a": {"b": "no"}}):
        assert yaml.safe_load(as_yaml(value)) == value and "\n" not in as_yaml(value)


def test_false_is_false_and_unknown_keys_are_refused(tmp_path):
    for said, meant in (("false", False), (False, False), ("true", True)):
        assert load_factorial(study_yaml(tmp_path, futility_stop=said)).futility_stop is meant
    mode = {"overrides": {"coconut": "false", "cot": "true", "feedback_mode": "continuous"}}
    plan = Plan(load_factorial(study_yaml(tmp_path, references={"cot": mode})))
    config = next(m.config for m in plan.members if m.cell == "cot")
    assert config.coconut is False and config.cot is True
    for changes, words in (
        ({"use_mod": True}, "use_mod: unknown key"),
        ({"futility_stop": "flase"}, "futility_stop"),
        ({"data": {"n_sample": 1}}, "data.n_sample"),
        ({"quick": {"data": {"n_sample": 1}}}, "quick.data: n_sample"),
        ({"overrides": TINY | {"lerning_rate": 1}}, "lerning_rate: unknown key"),
        ({"overrides": TINY | {"seed": 1}}, "overrides.seed: set by"),
        ({"overrides": {"model_config": {"use_memory": True}}}, "model_config.use_memory: set by the cells"),
        ({"cells": ["baseline", "BA"]}, "'BA' is no cell"),
        ({"references": {"A": {"overrides": {"lr": 1}}}}, "references.A"),
        ({"seeds": [1, 1]}, "twice"),
        ({"name": ".."}, "plain folder name"),
        ({"base": str(ROOT / "args/prosqa_m5_pause.yaml"), "overrides": {}}, "B and C are parts of lahr"),
    ):
        with pytest.raises(ValueError) as error:
            load_factorial(study_yaml(tmp_path, **changes))
        assert words in str(error.value) and "\n" not in str(error.value)


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys):
    path = str(study_yaml(tmp_path))
    for argv, words in (
        ([path, "--cells", "AB"], "--cells: AB"),
        ([path, "--seeds", "7"], "--seeds: 7"),
        ([path, "--seeds", "x"], "whole numbers"),
        ([path, "--processes", "0"], "--processes 0"),
        ([path, "--analyse-only"], "no scores yet"),
        (["nothing.yaml"], "does not exist"),
    ):
        assert factorial.main(argv) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_power_and_plan_are_told_before_anything_happens(tmp_path, capsys):
    path = study_yaml(tmp_path, seeds=[0, 1, 2, 3, 4], cells=list(CELLS), minutes=3.0)
    assert factorial.main([str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.index("14 % paired") < said.index("40 trainings, 40 left: about 60 minutes with 2 at a time")
    assert said.count("| to do |") == 40 and not (tmp_path / "the results").exists()


# ---------------------------------------------------------------- what cells share


@cache
def built(label: str) -> tuple:
    """A shipped cell's model under a seed before training, and its thought tokens."""
    model, _, ids, _ = build_model(shipped()[label].config)
    return model, ids


def weights(label: str) -> dict[str, torch.Tensor]:
    return dict(built(label)[0].named_parameters())


def test_initial_weights_are_shared_by_the_cells_of_a_seed():
    plain, other = weights("baseline-s0"), weights("baseline-s1")
    assert not any(torch.equal(plain[key], other[key]) for key in plain if plain[key].ndim == 2)
    for name in ("A", "B", "C", "ABC"):
        cell = weights(f"{name}-s0")
        shared = plain.keys() & cell.keys()
        assert len(shared) >= len(plain) - 1 and all(torch.equal(plain[key], cell[key]) for key in shared), name
    assert len(weights("ABC-s0")) > len(plain)


def test_the_inert_reference_matches_parameters_and_the_looped_one_passes():
    counts = {name: sum(p.numel() for p in weights(f"{name}-s0").values()) for name in ("baseline", "inert", "ABC")}
    assert abs(counts["inert"] / counts["ABC"] - 1) < 0.005 < counts["ABC"] / counts["baseline"] - 1
    passes = {}
    for name in ("A", "looped", "baseline"):
        model, ids = built(f"{name}-s0")
        row = torch.tensor([[7, 8, ids.start, *[ids.latent] * 4, ids.end, 9]])
        passes[name] = len(model.plan(row).passes)
    assert passes == {"A": 5, "looped": 5, "baseline": 1}


def test_the_splits_of_every_seed_are_disjoint_and_differ(tmp_path, capsys):
    plan = Plan(load_factorial(study_yaml(tmp_path)))
    plan.make_data()
    questions = {}
    for seed in (0, 1):
        folder = plan.out / "data" / f"s{seed}"
        rows = {split: json.loads((folder / f"{split}.json").read_text()) for split in ("train", "val", "test")}
        assert [len(r) for r in rows.values()] == [24, 8, 12] and [r["idx"] for r in rows["test"]] == list(range(12))
        keys = [(r["category"], tuple(sorted(r["question"].split()))) for split in rows.values() for r in split]
        assert len(set(keys)) == 44
        questions[seed] = {r["question"] for r in rows["train"]}
    assert len(questions[0] & questions[1]) < 12
    before = {p: p.stat().st_mtime_ns for p in plan.out.rglob("*.json")}
    plan.make_data()
    assert before == {p: p.stat().st_mtime_ns for p in plan.out.rglob("*.json")}
    with pytest.raises(ValueError, match="delete it, or give the study another name"):
        Plan(load_factorial(study_yaml(tmp_path, data={"n_samples": 25}))).make_data()


# ---------------------------------------------------------------- a real study


def cut_short(member) -> None:
    """Train five updates, and leave the folder as a killed process would: with a snapshot, and without an end."""
    assert run.main([*member.command()[2:], "max_steps=5"]) == 0
    file = member.folder / "metrics.jsonl"
    kept = [r for r in read_jsonl(file) if r["event"] not in ("end", "eval")]
    file.write_text("".join(json.dumps(r) + "\n" for r in kept))
    about = member.folder / "run.json"
    about.write_text(about.read_text().replace('"max_steps": 5', '"max_steps": null'))


@pytest.fixture(scope="module")
def study(tmp_path_factory, own_cache):
    """Two cells x two seeds. All but one are trained here, and that one is cut; the driver does the rest, in processes."""
    folder = tmp_path_factory.mktemp("study")
    path = study_yaml(folder)
    plan = Plan(load_factorial(path))
    plan.make_data()
    first, second, third, fourth = plan.members
    for member in (first, second, fourth):
        assert run.main(member.command()[2:]) == 0
    cut_short(third)
    scored = ["--test", str(first.test), "--out", str(first.scores.parent), str(first.folder), str(second.folder)]
    assert factorial_scores.main(scored) == 0
    held = folder / "held"
    shutil.copytree(first.folder, held)
    assert factorial.main([str(path)]) == 0
    return path, plan, held


def test_a_cut_study_goes_on_and_writes_everything(study):
    path, plan, held = study
    assert all(member.done() and member.scored() for member in plan.members)
    starts = {m.label: sum(r["event"] == "start" for r in read_jsonl(m.folder / "metrics.jsonl")) for m in plan.members}
    assert starts == {"baseline-s0": 1, "ABC-s0": 1, "baseline-s1": 2, "ABC-s1": 1}
    steps = [r["train/step"] for r in read_jsonl(plan.members[2].folder / "metrics.jsonl") if r["event"] == "step"]
    assert sorted(set(steps)) == list(range(9)) and len(steps) < 12, "the cut run went on, and did not begin again"
    for file in held.glob("checkpoint_*"):
        assert file.read_bytes() == (plan.members[0].folder / file.name).read_bytes()
    result = read_json(plan.out / "factorial.json")
    assert list(result["cells"]) == ["baseline", "ABC"] and result["seeds"] == [0, 1] and not result["unfinished"]
    said = (plan.out / "factorial.md").read_text()
    assert "ABC - baseline" in said and "Seeds on one fixed data set understate uncertainty" in said
    assert said.index("Power at 2 seeds") < said.index("## Outcomes")
    svg = (plan.out / "factorial.svg").read_text()
    assert "Paired difference from baseline" in svg and (plan.out / "factorial.png").stat().st_size > 10_000


def test_a_second_start_trains_nothing_again(study, capsys):
    path, plan, _ = study
    before = {p: p.stat().st_mtime_ns for folder in ("runs", "scores", "data") for p in (plan.out / folder).rglob("*.*")}
    assert factorial.main([str(path), "--seeds", "0"]) == 0
    said = capsys.readouterr().out
    assert "2 trainings, 0 left" in said and "started" not in said and "Unfinished" not in said
    assert factorial.main([str(path), "--analyse-only"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_the_tests_are_of_the_scores_on_disk(study):
    _, plan, _ = study
    result = gathered(plan)
    for outcome in ("answer_loss", "exact_match"):
        a, b = ([read_json(plan.out / f"scores/{cell}-s{s}.json")[outcome] for s in (0, 1)] for cell in ("ABC", "baseline"))
        test = result["outcomes"][outcome]["primary"]["ABC - baseline"]
        assert test["differences"] == pytest.approx(np.subtract(a, b)) and test["seeds"] == [0, 1]
    assert result["outcomes"]["answer_loss"]["missing"] == ["ABC - AB", "ABC - AC", "ABC - BC", "the seven contrasts"]
    assert max(len(line) for line in text(result).splitlines() if line.startswith("|")) <= 150


def test_costs_are_counted(study):
    """Passes, routing, slots read and FLOPs, against counting by hand on the trained model."""
    _, plan, _ = study
    plain, full = (read_json(plan.out / f"scores/{cell}-s1.json") for cell in ("baseline", "ABC"))
    assert plain["passes"] == 1 and full["passes"] == 2 and full["parameters"] > plain["parameters"]
    assert plain["routed_fraction"] is None and plain["memory_utilisation"] is None
    assert plain["flops"] == pytest.approx(plain["dense_flops"]) and plain["answer_sha256"] == full["answer_sha256"]
    assert plain["train_flops"] == pytest.approx(plain["train_dense_flops"]) and plain["train_samples"] == 72
    assert 0 < full["routed_fraction"] < 1 and set(full["routed"]) == {"question", "thought", "text"}
    subject = Subject.load(full["checkpoint"]["file"])
    problems = Problems.read(plan.members[3].test, subject.tokenizer)
    rows = factorial_scores.stage_rows(subject, problems, 1)
    taken = total = 0
    with torch.no_grad(), counting_reads(subject.model) as reads:
        for row in rows:  # one at a time: no padding
            columns = subject.model.rollout(torch.from_numpy(row["input_ids"])[None]).columns
            taken, total = taken + int(columns["mod_selected"].sum()), total + columns["mod_selected"].numel()
        read = {layer: int((counts > 0).sum()) / len(counts) for layer, counts in reads.items()}
    assert full["routed_fraction"] == pytest.approx(taken / total, abs=2 / total) and full["tokens"] == total
    assert [full["memory_utilisation"]] == pytest.approx(list(read.values()), abs=1 / 64) and 0 < read[2] <= 1


def test_runs_of_another_design_are_not_mixed_in(study, capsys):
    path, plan, _ = study
    other = Plan(load_factorial(study_yaml(path.parent, overrides=TINY | {"lr": 1e-4})))
    study_yaml(path.parent)
    with pytest.raises(ValueError, match=r"trained with another lr \(0.0003 there\)"):
        gathered(other)
    file = plan.out / "scores/ABC-s0.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"answer_sha256": "other"}))
    try:
        with pytest.raises(ValueError, match="ABC-s0 and baseline-s0 differ in answer_sha256"):
            gathered(plan)
    finally:
        file.write_text(before)


def test_the_checkpoint_is_chosen_on_validation_among_the_last_stage(tmp_path):
    config = {"cot": False, "no_cot": False, "max_latent_stage": 1, "epochs_per_stage": 2, "select_by": "loss"}
    evals = {1: (0.1, 0.9), 3: (0.5, 0.2), 4: (0.4, 0.3), 5: (0.4, 0.6)}  # epoch: loss, accuracy
    records = [{"event": "eval", "epoch": e, "eval/loss": loss, "eval/acc": acc} for e, (loss, acc) in evals.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def chosen(**changes) -> int:
        (tmp_path / "run.json").write_text(json.dumps({"config": config | changes}))
        return factorial_scores.selected(tmp_path)["epoch"]

    with pytest.raises(ValueError, match="keeps no validated checkpoint"):
        chosen()
    for number in (2, 4, 5, 6):
        (tmp_path / f"checkpoint_{number}").touch()
    assert chosen() == 4, "the earlier of two equals; the first stage does not count"
    assert chosen(select_by="accuracy") == 5 and chosen(cot=True) == 1
    (tmp_path / "checkpoint_5").unlink()
    assert chosen() == 5


def test_a_futile_study_stops_after_five_seeds(study, tmp_path):
    """Seeds 5 and 6 are not begun where the first five say nothing; an effect in one outcome is a reason to go on."""
    scored = read_json(study[1].out / "scores/ABC-s0.json")
    plan = Plan(load_factorial(study_yaml(tmp_path, seeds=list(range(7)))))

    def write_scores(effect: float) -> None:
        for member in plan.members[:10]:
            noise = (0.0, 0.1, -0.2, 0.1, 0.0)[member.seed] if member.cell == "ABC" else 0.0
            loss = 1.0 + 0.05 * member.seed + noise + effect * (member.cell == "ABC")
            member.scores.parent.mkdir(parents=True, exist_ok=True)
            member.scores.write_text(json.dumps(scored | {"answer_loss": loss}))

    for member in plan.members[:10]:
        member.folder.mkdir(parents=True)
        (member.folder / "checkpoint_3").touch()
        (member.folder / "metrics.jsonl").write_text('{"event": "end"}\n')
    write_scores(effect=0.0)
    assert factorial.train(plan, 2) == ([], True)
    assert not any(member.folder.exists() for member in plan.members[10:])
    write_scores(effect=-0.5)
    assert not factorial.futile(gathered(plan))


def test_cell_settings_write_every_factor_out():
    assert cell_settings("baseline") == {
        "feedback_mode": "pause_curriculum", "model_config": {"use_mod": False, "use_memory": False}
    }  # fmt: skip
    assert cell_settings("AC")["model_config"] == {"use_mod": False, "use_memory": True}
