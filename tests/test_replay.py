"""Replaying an update that was not finite: real runs that stop, and what is said of rows, modules and weights."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from run_material import write_config

import run
from analysis import replay
from checkpoint import read_whole
from coconut import Coconut
from files import whole_file
from utils import Config, micro_seed

EMBEDDING, FIRST_NORM = "base_causallm.transformer.wte.weight", "base_causallm.transformer.h.0.ln_1"


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_data, own_cache) -> Path:
    """A folder with a backbone that has dropout and a head of its own, and `good`: a run of one epoch on it."""
    folder = tmp_path_factory.mktemp("replayed")
    shutil.copytree(ROOT / "backbones/prosqa_tiny", folder / "backbone")
    changes = {"tie_word_embeddings": False, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    about = json.loads((folder / "backbone/config.json").read_text())
    (folder / "backbone/config.json").write_text(json.dumps(about | changes))
    assert run.main([config_of(folder, small_data, "good", num_epochs=1)]) == 0
    return folder


def config_of(place: Path, data: Path, name: str, **changes) -> str:
    return write_config(place, data, name, model_id=str(place / "backbone"), **changes)


def stopped(place: Path, name: str, weights) -> Path:
    """The file of a run that stopped; what run.py may not write itself, seeds and weights, is added: `weights()` are a dict."""
    folder = place / "runs" / name
    file = folder / "nonfinite_batch_rank0"
    saved = read_whole(file)
    if "seeds" not in saved:
        config = Config(json.loads((folder / "run.json").read_text())["config"])
        first = saved["step"] * config.gradient_accumulation_steps
        seeds = [micro_seed(config.seed, saved["epoch"], first + i) for i in range(len(saved["batches"]))]
        save(saved | {"seeds": seeds}, file)
    if not (folder / "nonfinite_weights").is_file():
        torch.save(weights(), folder / "nonfinite_weights")
    return file


def save(value, path: Path) -> None:
    """torch.save to a new file in the place of one that may still be mapped into memory."""
    with whole_file(path, "wb") as file:
        torch.save(value, file)


def after_updates(config: str, place: Path, n: int):
    """The weights of a run after its first n updates, when they are asked for."""

    def weights() -> dict:
        name = f"{Path(config).stem}-cut"
        assert run.main([config, f"name={name}", f"max_steps={n}", "max_val_samples=1"]) == 0
        return read_whole(place / f"runs/{name}/last_state")["model"]

    return weights


def replayed(file: Path, capsys, *options: str) -> tuple[int, dict, str]:
    """(exit code, JSON, last line) of the command."""
    capsys.readouterr()
    code = replay.main([str(file), "--json", str(file.with_name("replay.json")), *options])
    out = capsys.readouterr().out
    result = json.loads(file.with_name("replay.json").read_text(), parse_constant=pytest.fail)
    assert out.endswith(f"\n{result['conclusion']}\n") and result["finite"] is (code == 0)
    return code, result, out


def poison(place: Path, data: Path, name: str, value: float, **changes) -> tuple[Path, set[int], set[int]]:
    """A run started from `good` with `value` as the embedding of a word that few rows have: (file, rows with it, all rows)."""
    weights = torch.load(place / "runs/good/checkpoint_1", weights_only=True)
    rows = json.loads((data / "prosqa_train.json").read_text())
    tokenizer = replay.rebuild(place / "runs/good", place / "runs/good/checkpoint_1", "cpu")[1]
    ids = [set(tokenizer(row["question"])["input_ids"]) for row in rows]
    counts = {token: sum(token in row for row in ids) for token in set().union(*ids)}
    token = min(counts, key=lambda token: (abs(counts[token] - len(rows) // 4), token))
    weights[EMBEDDING][token] = value
    torch.save(weights, place / f"poisoned-{name}")
    start = [f"load_model_path={place / f'poisoned-{name}'}", "resume=1"]
    assert run.main([config_of(place, data, name, **changes), *start]) == 1
    file = stopped(place, name, lambda: weights)
    batches = read_whole(file)["batches"]
    hit = (batch["idx"][((batch["input_ids"] == token) & (batch["attention_mask"] == 1)).any(1)] for batch in batches)
    return file, set(torch.cat(list(hit)).tolist()), {i for batch in batches for i in batch["idx"].tolist()}


def test_a_run_that_diverges(place, small_data, capsys):
    """Plain gradient descent with an absurd rate: huge, finite weights after one update, and no row survives the next."""
    config = config_of(place, small_data, "diverged", optimizer="sgd", lr=1e30)
    assert run.main([config]) == 1
    file = stopped(place, "diverged", after_updates(config, place, 1))
    code, result, out = replayed(file, capsys)
    assert code == 1 and result["step"] == 1 and len(result["rows"]) == 8
    assert not any(row["finite"] for row in result["rows"]) and result["batch"]["loss"] in ("nan", "inf")
    largest = result["parameters"]["largest"]
    weights = read_whole(file.with_name("nonfinite_weights"))
    assert largest["value"] == max(float(x.abs().max()) for x in weights.values()) > 1e25
    assert not result["parameters"]["not_finite"] and result["batch"]["first_module"].startswith("base_causallm.transformer")
    assert result["conclusion"].startswith("every row of the batch (8) gives a loss of ") and largest["name"] in out


def test_a_broken_embedding_is_named_with_the_rows_that_meet_it(place, small_data, capsys):
    """Thoughts (stage 1), two micro-batches."""
    file, hit, every = poison(place, small_data, "broken", math.inf, gradient_accumulation_steps=2)
    code, result, out = replayed(file, capsys)
    assert code == 1 and result["epoch"] == 1 and 0 < len(hit) < len(every) == 16
    assert {row["idx"] for row in result["rows"] if not row["finite"]} == hit
    assert [row["idx"] for row in result["rows"] if row["micro_batch"] == 1] == read_whole(file)["batches"][1]["idx"].tolist()
    assert {row["first_module"] for row in result["rows"]} == {None, EMBEDDING.removesuffix(".weight")}
    assert result["batch"]["first_module"] == EMBEDDING.removesuffix(".weight")
    (weight,) = result["parameters"]["not_finite"]
    assert weight == {"name": EMBEDDING, "values": 128, "of": weight["of"]} and weight["of"] % 128 == 0
    assert result["conclusion"].startswith(f"the weights themselves are not finite: {EMBEDDING} (128 of")
    assert all(str(idx) in result["conclusion"] for idx in hit) and out.count("NOT FINITE") == len(hit)
    questions = [row["question"] for row in json.loads((small_data / "prosqa_train.json").read_text())]
    for row in result["rows"]:
        assert row["text"][:40] == questions[row["idx"]][:40] and len(row["text"]) <= 100


def test_one_row_with_finite_weights(place, small_data, capsys):
    file, hit, every = poison(place, small_data, "huge", 3e38, batch_size_training=4)
    code, result, _ = replayed(file, capsys)
    bad = [row for row in result["rows"] if not row["finite"]]
    assert code == 1 and {row["idx"] for row in bad} == hit and not result["parameters"]["not_finite"]
    assert 0 < len(hit) < len(every) == 4 and all(row["first_module"] == FIRST_NORM for row in bad)
    rows = ", ".join(str(row["idx"]) for row in bad)
    start = f"row{'s' * (len(bad) > 1)} {rows} of {small_data / 'prosqa_train.json'} give{'s' * (len(bad) == 1)} a loss of nan"
    assert result["conclusion"] == f"{start} with finite weights, first in {FIRST_NORM}"
    code, result, _ = replayed(file, capsys, "--weights", str(place / "runs/good/checkpoint_1"))
    assert code == 0 and result["conclusion"].startswith("all is finite here: the cause was not in weights or batch")


@pytest.mark.parametrize("bf16", [False, True])
def test_a_finite_replay_is_the_update_to_the_last_digit(place, small_data, capsys, monkeypatch, bf16):
    """A fault that was not in the numbers (dropout, two micro-batches): the same loss as in a run without the fault."""
    changes = {"gradient_accumulation_steps": 2, "accumulation_norm": "tokens", "num_epochs": 1, "bf16": bf16}
    config = config_of(place, small_data, f"fault-{bf16}", **changes)
    assert run.main([config, f"name=whole-{bf16}"]) == 0
    forward, calls = Coconut.forward, []

    def faulty(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        calls.append(out)
        return out._replace(loss=out.loss * math.nan) if len(calls) == 4 else out

    with monkeypatch.context() as patch:
        patch.setattr(Coconut, "forward", faulty)
        assert run.main([config]) == 1
    file = stopped(place, f"fault-{bf16}", after_updates(config, place, 1))
    code, result, _ = replayed(file, capsys)
    records = map(json.loads, (place / f"runs/whole-{bf16}/metrics.jsonl").read_text().splitlines())
    logged = next(r for r in records if r["event"] == "step" and r["train/step"] == 1)
    assert code == 0 and result["step"] == 1
    assert result["batch"]["loss"] == pytest.approx(logged["train/loss"], rel=1e-12)
    assert result["batch"]["gradient_norm"] == pytest.approx(logged["train/grad_norm"], rel=1e-6)
    assert result["conclusion"].startswith("all is finite here: the cause was not in weights or batch (a hardware fault")

    save({key: value for key, value in read_whole(file).items() if key != "seeds"}, file)
    shutil.copy(file, file.with_name("nonfinite_batch_rank1"))
    code, result, out = replayed(file, capsys)
    assert code == 0 and "has no seeds" in out and result["conclusion"].endswith("replay nonfinite_batch_rank1, too")
    assert abs(result["batch"]["loss"] - logged["train/loss"]) > 1e-6, "other seeds drop something else"


def test_padding_is_not_taken_for_the_cause(place, small_data):
    """Left padding attends to nothing; no module may give out anything that is not finite there."""
    model = replay.rebuild(place / "runs/good", place / "runs/good/checkpoint_1", "cpu")[0]
    ids, mask = torch.randint(10, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ids[:, 5], mask[1, :3], mask[0, -1:] = model.latent_token_id, 0, 0
    labels = torch.where(torch.arange(9) > 6, ids, -100)
    with replay.watched(model) as seen:
        model(ids, mask, labels).loss.backward()
    assert seen.first is None and seen.largest["value"] > 0
    with torch.no_grad():
        model.base_causallm.transformer.h[1].mlp.c_proj.bias[0] = math.nan
    with replay.watched(model) as seen:
        model(ids, mask, labels)
    assert seen.first == "base_causallm.transformer.h.1.mlp.c_proj"
    assert not any(module._forward_hooks for module in model.modules())


def test_words_for_what_no_run_here_does():
    """Conclusions of a gradient that overflows, of a sum that does, and of weights that no row meets."""
    fine = {"loss": 1.0, "gradient_norm": 2.0, "finite": True, "first_module": None}
    steep = fine | {"gradient_norm": math.inf, "finite": False}
    weights = {"not_finite": [], "largest": {"name": "w", "value": 3.0}}
    result = {"rows": [{"idx": 7} | fine, {"idx": 9} | steep], "batch": steep, "parameters": weights, "finite": False}
    result["train_path"] = "rows.json"
    expected = "row 9 of rows.json gives a loss of 1 and a gradient norm of inf with finite weights, first in the backward pass"
    assert replay.conclusion(result, []) == expected
    assert replay.conclusion(result | {"rows": [fine, fine]}, []).startswith(
        "the rows together give a loss of 1 and a gradient"
    )
    broken = weights | {"not_finite": [{"name": "w", "values": 2, "of": 5}]}
    said = replay.conclusion(result | {"rows": [fine], "batch": fine, "finite": True, "parameters": broken}, [])
    assert said == "all is finite here although weights are not: w (2 of 5 values); no row of this batch meets them"


def test_a_process_that_had_no_rows_says_so(place, tmp_path, capsys):
    shutil.copytree(place / "runs/good", tmp_path / "run")
    for rank in (2, 3):
        file = tmp_path / f"run/nonfinite_batch_rank{rank}"
        torch.save({"epoch": 0, "step": 5, "batches": [], "seeds": []}, file)
    code, result, _ = replayed(file, capsys, "--weights", str(tmp_path / "run/checkpoint_1"))
    said = "this process had no rows in that update; other processes had other rows: replay nonfinite_batch_rank2, too"
    assert code == 0 and result["conclusion"] == said and result["rows"] == []


def test_mistakes_are_one_line(place, tmp_path, capsys):
    good = place / "runs/good"
    batch = {key: torch.ones(1, 4, dtype=torch.long) for key in ("input_ids", "attention_mask", "position_ids", "labels")}
    alone, beside = tmp_path / "nonfinite_batch_rank0", tmp_path / "run/nonfinite_batch_rank0"
    shutil.copytree(good, tmp_path / "run")
    for file in (alone, beside):
        torch.save({"epoch": 0, "step": 0, "batches": [batch | {"idx": torch.tensor([3])}]}, file)
    other = torch.load(good / "checkpoint_1", weights_only=True)
    other[EMBEDDING] = torch.zeros(9, 128)
    torch.save(other, tmp_path / "other")
    cases = [
        ([good / "nonfinite_batch_rank0"], ["no file", "writes nonfinite_batch_rank0"]),
        ([good / "checkpoint_1"], ["does not hold the micro-batches"]),
        ([good / "run.json"], ["run.json", "not a readable"]),
        ([alone], ["has no run.json"]),
        ([beside], ["no weights at", "nonfinite_weights", "--weights"]),
        ([beside, "--weights", tmp_path / "other"], ["another architecture or vocabulary"]),
    ]
    if not torch.cuda.is_available():
        cases.append(([beside, "--weights", good / "checkpoint_1", "--device", "cuda"], ["no CUDA device"]))
    for arguments, words in cases:
        assert replay.main([str(argument) for argument in arguments]) == 2
        out, error = capsys.readouterr()
        assert error.startswith("error: ") and error.count("\n") == 1 and "\nwhole batch" not in out, error
        assert all(word in error for word in words), error
