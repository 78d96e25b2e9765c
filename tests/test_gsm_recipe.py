"""The recipe from training to the table: end to end on the stand-in, resumed, its choices, refusals, and the batch files."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import run
from analysis import gsm_recipe
from analysis.gsm_recipe import OnlyHybrids, choose, launcher, make_row, plan
from data import arithmetic

TINY = {"model_id": str(ROOT / "backbones/characters"), "model_config": {"n_layer": 1, "n_embd": 32, "n_head": 2}}
TINY |= {"save_path": "runs", "device": "cpu", "wandb": False, "max_new_tokens": 8, "batch_size_training": 16, "lr": 1e-2}
CHANGES = {  # of the stand-in's configs: three epochs of CoT; Coconut over one stage, then fully latent
    "cot": {"num_epochs": 3, "save_only_improve": False},
    "coconut": {"num_epochs": 4, "epochs_per_stage": 1, "max_latent_stage": 1, "resume": 1},
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder with configs `it's 1_<row>.yaml`, small from args/arith_gsm_*, and their data; tests run in it."""
    folder = tmp_path_factory.mktemp("recipe")
    arithmetic.main(["--out", str(folder / "data"), "--sizes", "160", "12", "10"])
    for row, changes in CHANGES.items():
        for tail in ("", "_eval"):
            values = yaml.safe_load((ROOT / f"args/arith_gsm_{row}{tail}.yaml").read_text())
            (folder / f"it's 1_{row}{tail}.yaml").write_text(yaml.safe_dump(values | TINY | changes))
    return folder


def launched(calls: list, codes=()):
    """run.main as the launcher, noting what it was given; `codes` come instead of the first calls."""
    codes = list(codes)

    def launch(arguments: list[str]) -> int:
        calls.append(arguments)
        return codes.pop(0) if codes else run.main(arguments)

    return launch


PREFIX = ["--args-prefix", "./it's 1"]


@pytest.fixture(scope="module")
def finished(stage):
    """The recipe run once to its end: (exit code, calls, folder)."""
    calls, here = [], os.getcwd()
    os.chdir(stage)
    try:
        yield gsm_recipe.main([*PREFIX, "--out", "out"], launched(calls)), calls, stage
    finally:
        os.chdir(here)


# ---------------------------------------------------------------- from end to end


def test_the_recipe_trains_chooses_tests_and_writes_the_table(finished):
    code, calls, folder = finished
    assert code == 0
    files = [call[0] for call in calls]
    assert files == [f"it's 1_{name}.yaml" for name in ("cot", "cot_eval", "coconut", "coconut_eval")]
    metrics = (folder / "runs/arith-gsm-coconut/metrics.jsonl").read_text().splitlines()
    trained = [(e["epoch"], e["stage"], e["n_latents"]) for e in map(json.loads, metrics) if e["event"] == "train_epoch"]
    assert trained == [(1, 1, 2), (2, 2, 2), (3, 3, 2)], "stage 1, then fully latent"

    cot = choose(make_row("./it's 1", "cot", 0, []))
    assert f'load_model_path="{cot.file}"' in calls[2], "Coconut starts from the best of the CoT run"
    chosen = choose(make_row("./it's 1", "coconut", 0, []))
    assert chosen.epochs in (3, 4) and f"resume={chosen.epochs - 1}" in calls[3]
    about = json.loads((folder / "runs/arith-gsm-coconut-eval/eval_arith_gsm_test.json").read_text())
    assert about["checkpoint"] == str(chosen.file) and about["summary"]["n_latents"] == 2
    assert about["summary"]["stage"] == chosen.epochs - 1 and about["data"]["rows"] == 10

    (lines,) = json.loads((folder / "out/table1.json").read_text())["tasks"].values()
    assert [line["name"] for line in lines] == ["CoT", "Coconut"] and [line["n"] for line in lines] == [[10], [10]]
    assert lines[1]["runs"][0]["checkpoint"] == str(chosen.file) and lines[1]["latents"] == 2


def test_the_same_command_finds_all_done_and_a_lost_part_is_done_again(finished, capsys):
    _, _, folder = finished
    calls = []
    assert gsm_recipe.main([*PREFIX, "--out", "out"], launched(calls)) == 0
    assert calls == [] and "Coconut: tested, records in" in capsys.readouterr().out
    (folder / "runs/arith-gsm-coconut-eval/eval_arith_gsm_test.json").unlink()
    assert gsm_recipe.main([*PREFIX, "--out", "out"], launched(calls)) == 0
    assert [call[0] for call in calls] == ["it's 1_coconut_eval.yaml"]


def test_a_dry_run_says_what_is_done_and_starts_nothing(finished, capsys):
    calls = []
    assert gsm_recipe.main([*PREFIX, "--dry-run"], launched(calls)) == 0
    said = capsys.readouterr().out
    assert "CoT: train it's 1_cot.yaml (trained)" in said and "from the best of runs/arith-gsm-cot" in said and calls == []
    assert gsm_recipe.main([*PREFIX, "--dry-run", "--seed", "2"], launched(calls)) == 0
    assert "(0 of 3 epochs)" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "said"), [(75, "was interrupted; the same command goes on"), (2, "failed (exit 2)")])
def test_what_ends_a_run_ends_the_recipe(finished, capsys, code, said):
    calls = []
    assert gsm_recipe.main([*PREFIX, "--seed", "1"], launched(calls, [code])) == code
    assert f"CoT: training {said}" in capsys.readouterr().err and len(calls) == 1
    assert calls[0][1:] == ['name="arith-gsm-cot-s1"', "seed=1"]


# ---------------------------------------------------------------- the choice


@pytest.fixture
def trained(tmp_path):
    """trained(accuracies by epoch, outputs by epoch): the GSM8K Coconut row as its training would leave it, without weights."""

    def make(accuracies: dict[int, float], outputs: dict[int, str] | None = None) -> gsm_recipe.Row:
        row = make_row("gsm", "coconut", 0, [])
        row.train.save_path = str(tmp_path)
        folder = row.train.run_dir
        folder.mkdir()
        events = [{"event": "eval", "epoch": epoch, "eval/acc": acc} for epoch, acc in accuracies.items()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        for epoch in accuracies:
            (folder / f"checkpoint_{epoch + 1}").write_bytes(b"")
            (folder / f"eval_{epoch + 1}.jsonl").write_text(json.dumps({"output": (outputs or {}).get(epoch, "### 2")}) + "\n")
        return row

    return make


def test_an_early_hybrid_is_not_chosen_however_good_it_is(trained):
    row = trained({5: 0.36, 11: 0.35, 12: 0.30, 13: 0.31, 14: 0.31})
    assert choose(row)[1:] == (14, 0.31), "the first of the best from epoch index 12 on"
    (row.train.run_dir / "checkpoint_14").unlink()
    assert choose(row).epochs == 15


def test_a_checkpoint_that_still_writes_steps_is_passed_over(trained):
    assert choose(trained({12: 0.4, 13: 0.3}, {12: "<<1+1=2>>\n### 2"})).epochs == 14


def test_only_hybrids_is_an_end_of_its_own(trained):
    row = trained({12: 0.4, 13: 0.3}, {12: "<<1+1=2>>\n### 2", 13: "so\n### 2"})
    with pytest.raises(OnlyHybrids, match=r"checkpoint_13 least: in 100.0 % .* hybrids, not Coconut"):
        choose(row)


def test_a_run_that_is_not_fully_latent_yet_is_a_mistake(trained):
    with pytest.raises(ValueError, match="holds no checkpoint of the last stage after 2 of 25 epochs"):
        choose(trained({5: 0.36, 11: 0.35}))


def test_hybrids_on_the_test_set_end_with_1_and_are_named(finished, capsys):
    _, _, folder = finished
    file = folder / "runs/arith-gsm-coconut-eval/eval_arith_gsm_test.jsonl"
    kept = file.read_text()
    file.write_text(kept.replace('"output": "', '"output": "<<1+1=2>> '))
    try:
        assert gsm_recipe.main([*PREFIX, "--out", "hybrid"], launched([])) == 1
    finally:
        file.write_text(kept)
    said = capsys.readouterr()
    assert "error: Coconut, hybrid: 100.0 % of outputs write steps" in said.err
    assert "| Coconut, hybrid" in said.out and "| Coconut  " not in said.out


# ---------------------------------------------------------------- mistakes


def test_missing_data_is_named_with_the_command_that_makes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for prefix, command in {"gsm": "bash scripts/get_gsm8k.sh", "arith_gsm": "python data/arithmetic.py"}.items():
        assert gsm_recipe.main(["--args-prefix", prefix], launched([])) == 2
        message = capsys.readouterr().err
        assert f"data/{prefix}_train.json does not exist; make it with: {command}" in message and message.count("\n") == 1
        assert gsm_recipe.main(["--args-prefix", prefix, "--dry-run"], launched([])) == 0
        assert f"missing: data file data/{prefix}_test.json" in capsys.readouterr().out


def test_mistakes_are_one_line(stage, monkeypatch, capsys):
    monkeypatch.chdir(stage)

    def error(*arguments: str) -> str:
        assert gsm_recipe.main(list(arguments), launched([])) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "--rows coconot: no row of Table 1; known: cot, no_cot" in error("--rows", "coconot")
    assert "nothing_cot.yaml" in error("--args-prefix", "nothing")
    assert "val_path: the recipe sets it itself" in error(*PREFIX, "val_path=x.json")
    values = yaml.safe_load((stage / "it's 1_coconut_eval.yaml").read_text())
    for row in ("coconut", "coconut_eval"):
        (stage / f"other_{row}.yaml").write_text(yaml.safe_dump(values | {"c_thought": 1 + (row == "coconut")}))
    assert "other_coconut_eval.yaml: c_thought must be as in other_coconut.yaml" in error(
        "--args-prefix", "./other", "--rows", "coconut", "train_path=data/arith_gsm_train.json"
    )


def test_rows_that_start_from_cot_bring_it_with_them_and_the_study_names_are_known():
    rows = plan("gsm", ["pause_as_thought", "no_cot", "coconut"], seed=3)
    assert [row.name for row in rows] == ["cot", "pause_as_thought", "no_cot", "coconut"]
    assert [row.start and row.start.name for row in rows] == [None, "cot", None, "cot"]
    assert [row.train.run_dir.name for row in rows][0::3] == ["gsm-cot-s3", "gsm-coconut-s3"]
    assert rows[3].records.parts[-2:] == ("gsm-coconut-s3-eval", "eval_gsm_test.jsonl")
    assert rows[3].train_file.name == "gsm_coconut_1gpu.yaml" and rows[3].train.effective_batch_size == 128
    assert [row.train_file.stem for row in plan("prosqa", ["cot", "no_cot", "wo_thought", "coconut"])] == [
        "prosqa_m1_cot", "prosqa_m2_nocot", "prosqa_m0_nothought", "prosqa_coconut_1gpu",
    ]  # fmt: skip


# ---------------------------------------------------------------- processes and batch files


def test_the_launcher_hands_signals_on_and_returns_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(gsm_recipe, "ROOT", tmp_path)  # whose run.py ends as the real one does, without its imports
    (tmp_path / "run.py").write_text(
        "import os, signal, sys, time\n"
        "if sys.argv[1] == 'mistake': sys.exit(2)\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"  # as a scheduler does before the time is up
        "time.sleep(20)\n"
    )
    before = signal.getsignal(signal.SIGUSR1)
    assert [launcher(1)([word]) for word in ("mistake", "warned", "killed")] == [2, 75, 75]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_script_passes_its_arguments_on(cluster):
    code, lines = cluster("../gsm_recipe.sh", "--rows", "cot", 'name=it\'s a "name"', CODE="75")
    assert (code, lines) == (75, ['<-m><analysis.gsm_recipe><--rows><cot><name=it\'s a "name">'])


@pytest.fixture
def cluster(tmp_path):
    """cluster(file, *arguments, **environment): a batch file as SLURM runs it; the interpreter and scontrol take notes."""
    notes = tmp_path / "notes"
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    python = bin_folder / "python"
    python.write_text(
        f'#!/bin/bash\nif [ "$1" = - ]; then exec "{sys.executable}" "$@"; fi\n'
        f'printf "<%s>" "$@" >>"{notes}"; echo >>"{notes}"\n'
        'if [ -n "${WAIT:-}" ]; then trap "exit 75" TERM; kill -USR1 "$PPID"; for i in $(seq 50); do sleep 0.1; done; fi\n'
        'exit "${CODE:-0}"\n'
    )
    scontrol = bin_folder / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "scontrol $*" >>"{notes}"\n')
    for file in (python, scontrol):
        file.chmod(0o755)

    def submit(name: str, *arguments: str, **environment: str) -> tuple[int, list[str]]:
        notes.write_text("")
        given = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77", "PYTHON": str(python), "PYTHONPATH": str(ROOT)}
        given |= {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
        copy = ROOT / "scripts/slurm" / name
        if name.endswith(".sbatch"):  # SLURM runs a copy, from elsewhere
            copy = shutil.copy(copy, tmp_path / "slurm_script")
        done = subprocess.run(["bash", copy, *arguments], env=os.environ | given | environment, cwd=tmp_path, timeout=30)
        return done.returncode, notes.read_text().splitlines()

    return submit


def test_training_jobs_take_their_seed_from_the_array(cluster, tmp_path):
    config = tmp_path / "it's a config.yaml"
    config.write_text(yaml.safe_dump({"save_path": "x", "name": 'a "b" c', "cot": True, "train_path": "t", "val_path": "v"}))
    assert cluster("train.sbatch", str(config), "lr=1e-3") == (0, [f"<run.py><{config}><lr=1e-3>"])
    code, lines = cluster("train.sbatch", str(config), "lr=1e-3", SLURM_ARRAY_TASK_ID="2", SLURM_GPUS_ON_NODE="4")
    launch = "<scripts/torchrun.py><--standalone><--nproc_per_node=4><run.py>"
    assert (code, lines) == (0, [rf'{launch}<{config}><lr=1e-3><seed=2><name="a \"b\" c-s2">'])
    assert cluster("train.sbatch")[0] == 2


def test_a_preempted_job_saves_and_is_queued_again(cluster):
    assert cluster("table1.sbatch", "--rows", "cot", CODE="75") == (
        75, ["<-m><analysis.gsm_recipe><--seed><0><--gpus><1><--rows><cot>", "scontrol requeue 77"],
    )  # fmt: skip
    code, lines = cluster("table1.sbatch", WAIT="1", SLURM_ARRAY_TASK_ID="1")  # SLURM's warning reaches the batch file alone
    assert code == 75 and lines[1:] == ["scontrol requeue 77"] and "<--seed><1>" in lines[0]
    assert cluster("table1.sbatch", CODE="2")[1][1:] == [], "a mistake is not queued again"


def test_noise_jobs_take_type_and_seed_from_the_array(cluster):
    code, lines = cluster("noise.sbatch", "--checkpoint", "runs/x y", SLURM_ARRAY_TASK_ID="7", SLURM_JOB_NAME="n")
    assert (code, lines) == (0, ["<-m><analysis.noise><--checkpoint><runs/x y><--noise-type><snr><--seed><1>"
                                 "<--output-dir><results/noise/n/snr-seed1>"])  # fmt: skip
    assert cluster("noise.sbatch", SLURM_ARRAY_TASK_ID="21")[0] == 2


def test_batch_files_ask_to_be_queued_again_and_pass_shellcheck():
    files = sorted((ROOT / "scripts/slurm").glob("*.sbatch"))
    assert [file.stem for file in files] == ["noise", "table1", "train"]
    for file in files:
        options = [line for line in file.read_text().splitlines() if line.startswith("#SBATCH")]
        for option in ("--requeue", "--signal=B:USR1@", "--open-mode=append", "--output=logs/%x-%A_%a.log"):
            assert any(option in line for line in options), (file, option)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
    scripts = [*map(str, files), str(ROOT / "scripts/slurm/requeue.sh")]
    checked = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
