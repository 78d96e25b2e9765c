"""The benchmarks: that both sides of a ratio do the same work, how rounds become results, and that the pieces run and resume."""

import json
import math
import os
import subprocess
import sys
import time

import datasets
import pytest
import torch
from conftest import ROOT

import backbones
from benchmarks import bench, bench_gpu, ratios, start_and_batches, table, timing, whole_runs
from benchmarks.gpu_pieces import Piece, pieces
from benchmarks.material import SHAPES, WORDS, Material, Source, environment, filled_tokenizer, generate_data, without_plan
from benchmarks.timing import Budget, alternate, ratio, result

CPU = torch.device("cpu")
PIECES = [piece.name for piece in pieces(whole=False)]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """The benchmarks set a few variables for the runs they start; here they are put back."""
    for name, value in environment(tmp_path / "cache").items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    generate_data(tmp_path / "data", (4, 12, 4))
    return Source(tmp_path / "data/prosqa_valid.json", "generated rows", WORDS, "words")


@pytest.fixture
def material(source):
    return Material("tiny 2x64", source, CPU)


# ---------------------------------------------------------------- both sides do the same work


def test_the_plain_model_is_the_library_s_and_computes_the_same(material):
    cot, plain, same = material.ours("none"), material.plain(), material.same_kernels()
    (batch,) = material.batches(cot, 1, 4)
    library = without_plan(batch)
    losses = [cot.model(**batch).loss, plain(**library, use_cache=False).loss, same(**library, use_cache=False).loss]
    torch.testing.assert_close(losses, losses[:1] * 3, rtol=1e-5, atol=1e-5)
    kinds = [{type(m).__name__ for m in model.modules() if "GELU" in type(m).__name__} for model in (plain, same)]
    assert kinds == [{"NewGELUActivation"}, {"GELU"}]
    dropouts = [m.p for m in plain.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and not any(dropouts) and plain.training


def test_the_oracle_computes_our_loss(material):
    m3, plain = material.ours("continuous"), material.plain()
    for batch in material.batches(m3, 2, 3):
        assert len(batch["plan"].passes) == 7
        loss = m3.model(**batch).loss
        torch.testing.assert_close(ratios.oracle_loss(m3, plain, without_plan(batch)), loss, rtol=1e-5, atol=1e-5)
        pause = material.ours("pause_curriculum").model(**without_plan(batch)).loss
        assert not torch.isclose(loss, pause, rtol=1e-5), "thoughts must matter for this to say anything"


def test_uncached_generation_writes_the_same_tokens_and_may_leave_some_out(material):
    m3 = material.ours("continuous")
    m3.model.eval()
    m3.model.eos_token_id = ratios.NO_TOKEN
    prompt = material.prompt_batch([5])
    expected = m3.model.generate(**prompt, max_new_tokens=6)
    assert torch.equal(ratios.uncached_tokens(m3, prompt["input_ids"], 6), expected)
    calls, rollout = [], m3.model.rollout
    m3.model.rollout = lambda ids_BT: calls.append(ids_BT.shape[1]) or rollout(ids_BT)
    sampled = ratios.uncached_tokens(m3, prompt["input_ids"], 6, every=3)
    assert sampled.shape == expected.shape
    assert calls == [prompt["input_ids"].shape[1], prompt["input_ids"].shape[1] + 3]


def test_a_smaller_vocabulary_keeps_the_rows_and_their_thoughts(source, material, monkeypatch):
    monkeypatch.setitem(SHAPES, "small", SHAPES["tiny 2x64"]._replace(vocabulary=40))
    small = Material("small", source, CPU)
    run = small.ours("continuous")
    (batch,), (whole,) = small.batches(run, 1, 4), material.batches(material.ours("continuous"), 1, 4)
    ids, real = batch["input_ids"], batch["attention_mask"] == 1
    assert torch.equal(batch["attention_mask"], whole["attention_mask"]) and int(ids[real].max()) == 39
    assert torch.equal(ids == small.ids.latent, whole["input_ids"] == material.ids.latent)
    assert torch.equal(batch["labels"] == -100, whole["labels"] == -100)
    assert math.isfinite(run.model(**batch).loss.item())


def test_the_shortest_rows_and_the_middle_prompt(material):
    lengths = material.rows.lengths().total
    assert lengths[material.numbers(0, 3, shortest=True)].max() <= lengths[material.numbers(1, 3, shortest=True)].min()
    assert material.numbers(4, 5).tolist() == [8, 9, 10, 11, 0], "after the last row comes the first"
    prompts = material.prompts.lengths().total
    assert ratios.middle_prompt(material, 0, 11).shape == (1, sorted(prompts[:11])[5])


def test_the_least_ratio_is_that_of_the_operations(material):
    m3 = material.ours("continuous")
    (batch,) = material.batches(m3, 1, 2)
    (B, T), labelled = batch["labels"].shape, int((batch["labels"] != -100).sum())
    blocks, V = 2 * 12 * 64 * 64 * B * T + 2 * 64 * B * T * T, len(material.tokenizer)
    assert ratios.least(m3, [batch]) == pytest.approx((blocks + 64 * V * labelled) / (blocks + 64 * V * B * T))


def test_words_stay_what_they_are_among_unused_ones(tmp_path):
    filled, words = (backbones.load_tokenizer(str(folder)) for folder in (filled_tokenizer(tmp_path / "filled"), WORDS))
    text = "Every shumpus is a yumpus. Is Alex a shumpus or zumpus?"
    assert len(filled) == 50257 and filled.encode(text) == words.encode(text)
    assert max(backbones.add_thought_tokens(filled)) == 50259


# ---------------------------------------------------------------- rounds become results


def test_works_take_turns_after_a_warm_up():
    calls = []
    works = {name: lambda i, name=name: calls.append(f"{name}{i}") for name in "abc"}
    taken = alternate(works, 4, CPU, warm_up=1)
    assert " ".join(calls) == "a0 b0 c0 a0 b0 c0 b1 c1 a1 c2 a2 b2 a3 b3 c3"
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 4, "b": 4, "c": 4}


def test_no_round_is_begun_when_time_is_up_but_never_fewer_than_seven():
    spent = alternate({"a": lambda i: time.sleep(0.001)}, 50, CPU, at_most=1e-9)
    assert len(spent["a"]) == timing.ROUNDS == 7
    assert len(alternate({"a": lambda i: None}, 9, CPU, at_most=60)["a"]) == 9


def test_the_ratio_is_the_median_of_ratios_not_the_ratio_of_medians():
    taken = {"ours": [1.0, 2.0, 9.0], "plain": [1.0, 4.0, 3.0]}
    found = ratio(taken, "ours", "plain", scale=2)
    assert (found["value"], found["min"], found["max"], found["rounds"]) == (2.0, 1.0, 6.0, 3)
    assert found["seconds"] == {"ours": 2.0, "plain": 3.0}


def test_lengths_are_like_those_of_gsm():
    lengths = start_and_batches.gsm_lengths(40_000)
    first, last = lengths["stage 0"], lengths["last stage"]
    assert (first.prefix - 1).mean() == pytest.approx(58, abs=1) and (first.prefix - 1).max() == 183
    assert (first.labelled - 3).mean() == pytest.approx(28, abs=1) and (first.labelled - 3).max() == 89
    assert last.total.mean() == pytest.approx(69, abs=1.5) and set(last.latents) == {6}


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize(
    "where, measure, shape, value, expected",
    [
        ("cpu", "P1", "GPT-2 124M", 0.80, "met"),
        ("cpu", "P1", "GPT-2 124M", 0.8001, "missed"),
        ("cpu", "P1", "words 2x128", 1.05, "met"),
        ("cpu", "P1 same kernels", "words 2x128", 9.0, ""),
        ("cpu", "P4", "GPT-2 124M", 39.9, "missed"),
        ("cpu", "P4", "GPT-2 124M", 40, "met"),
        ("gpu", "P4", "GPT-2 124M, bf16", 40, "missed"),
        ("gpu", "P1", "GPT-2 124M, fp32", 0.99, "met"),
        ("gpu", "P3", "GPT-2 124M, fp32", 4.1, "missed"),
        ("gpu", "evaluation", "16 new tokens, 500 questions", 1.9, "met"),
        ("gpu", "evaluation", "128 new tokens, 500 questions", 9.0, ""),
        ("gpu", "P5", "compiled, 50 epochs", 15.1, "missed"),
        ("cpu", "ref", "GPT-2 124M", 6.0, ""),
        ("tiny", "P1", "tiny 2x64", 9.0, ""),
    ],
)
def test_targets_are_met_or_missed(where, measure, shape, value, expected):
    assert table.verdict(result(measure, shape, value), where) == expected


def test_a_target_within_the_interval_of_the_median_is_a_tie():
    ratios = [0.97, 0.98, 1.0, 1.004, 1.01, 1.02, 1.03]
    measured = timing.spread(ratios)
    assert measured["value"] == 1.004 and measured["ci95"] == [0.97, 1.03] and "ci95" not in timing.spread(ratios[:6])
    assert table.verdict(result("P2", "words 2x128", **measured), "cpu") == "tie"
    above = timing.spread([x + 0.05 for x in ratios])
    assert table.verdict(result("P2", "words 2x128", **above), "cpu") == "missed"


def test_the_markdown_says_all(tmp_path):
    phases = {"prefix": {"median_ms": 12.34}, "backward": {"median_ms": 50.0}}
    results = [
        result("P1", "GPT-2 124M", 0.75, batch_size=4, min=0.7, max=0.9, rounds=7, floor=0.7012, note="quiet"),
        result("P7", "tokens cached", 12.5, "s", note=None),
        result("P5 update", "compiled, stage 6", 62.5, "ms", phases=phases),
    ]
    table.write(tmp_path, "cpu", {"device": "CPU, 2 threads"}, results, "cpu")
    lines = (tmp_path / "cpu.md").read_text().splitlines()
    assert "- device: CPU, 2 threads" in lines and "- targets: 1 met, 1 missed" in lines
    assert "| P1 | GPT-2 124M | 4 | 0.750 | 0.700 .. 0.900, 7 rounds | <= 0.8 | met | least possible 0.70; quiet |" in lines
    assert "| P7 | tokens cached |  | 12.50 s |  | <= 8 s | missed |  |" in lines
    assert lines[-3::2] == ["| ms per update | prefix | backward | together |", "| compiled, stage 6 | 12.3 | 50.0 | 62.5 |"]
    written = json.loads((tmp_path / "cpu.json").read_text())
    assert written["results"] == results and written["schema_version"] == 1


# ---------------------------------------------------------------- real runs


def short_run() -> list[dict]:
    """Records of a run over all stages, with 4 updates in each: the first takes 0.5 s longer, evaluation (30 rows) 0.2 s."""
    records, now = [{"event": "start", "time": 1020.0}], 1020.0
    for stage in range(7):
        for i in range(4):
            seconds = 0.1 * (stage + 1) + 0.5 * (i == 0)
            phases = {"prefix": 0.25 * seconds, "backward": 0.75 * seconds}
            phases |= {"saving": 2.0, "evaluation": 0.2} if i == 0 and stage else {}
            records.append({
                "event": "speed", "epoch": stage, "stage": stage, "updates": 1, "phases": phases, "seconds": seconds,
                "tokens_per_s": 1000 / seconds, "samples_per_s": 128 / seconds, "padded_share": 0.2,
                "supervised_share": 0.05, "flops": 1e12, "tflops_per_s": 1 / seconds, "mfu": 0.01 / seconds, "time": now,
            })  # fmt: skip
        records.append({"event": "train_epoch", "epoch": stage, "stage": stage, "n_latents": stage})
        records.append({"event": "eval", "epoch": stage, "stage": stage, "seconds": 0.2, "total": 30})
    return records


def test_fifty_epochs_from_measured_stages():
    results = whole_runs.variant_results("compiled", short_run(), warm_up=1, begun=1000.0, micro=128, notes=["not so"])
    found = {r["measure"]: r for r in results}
    updates = 140 * (5 * (0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 0.6) + 20 * 0.7)
    parts = {"start": 20.0, "training": updates, "first updates": 7 * 0.5, "evaluation": 50 * 2.0, "saving": 50 * 2.0}
    assert found["P5"]["parts"] == pytest.approx(parts)
    assert found["P5"]["value"] == pytest.approx(sum(parts.values()) / 60) and "not so" in found["P5"]["note"]
    assert found["P6 padding"]["value"] == pytest.approx(80)
    n = 140 * 50  # every update needs 0.01 of a peak second
    assert found["P6 MFU"]["value"] == pytest.approx(100 * 0.01 * n / updates)
    assert found["P5 update"]["shape"] == "compiled, stage 6" and found["P5 update"]["value"] == pytest.approx(700)
    assert (found["P5 update"]["rounds"], found["P5 update"]["batch_size"]) == (3, 128)


def test_without_a_known_peak_there_is_no_mfu():
    records = [{key: value for key, value in r.items() if key != "mfu"} for r in short_run()]
    assert "P6 MFU" not in {r["measure"] for r in whole_runs.variant_results("eager", records, 1, 1000.0)}


FAKE_RUN = """
import json, sys, time
from pathlib import Path
keys = dict(word.split("=", 1) for word in sys.argv[2:])
folder = Path(keys["save_path"]) / keys["name"]
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "metrics.jsonl", "a") as file:
    first = file.tell() == 0
    now = 0 if first else 500
    events = [{"event": "start", "time": now}]
    events += [{"event": "train_epoch", "epoch": 0 if first else 1, "seconds": 8, "mfu": 0.5, "time": now + 10}]
    events += [] if first else [{"event": "eval", "epoch": 1, "eval/acc": 0.75, "time": now + 20}]
    file.writelines(json.dumps(event) + "\\n" for event in events)
if first:
    time.sleep(60)
if keys.get("seed") == "13":
    print("error: seed: unlucky")
    sys.exit(2)
"""


@pytest.fixture
def fake_place(tmp_path, monkeypatch):
    (tmp_path / "run.py").write_text(FAKE_RUN)
    monkeypatch.setattr(whole_runs, "ROOT", tmp_path)
    return whole_runs.Place(tmp_path, tmp_path, tmp_path, tmp_path / "valid.json")


def test_a_whole_run_is_ended_by_its_time_and_goes_on(fake_place, tmp_path):
    begun = time.monotonic()
    assert whole_runs.whole_run("m3", fake_place, Budget(1.0)) is None
    assert time.monotonic() - begun < 30, "the run sleeps for a minute"
    found = {r["measure"]: r for r in whole_runs.whole_run("m3", fake_place, Budget(60))}
    assert found["P5 whole run"]["value"] == pytest.approx((10 + 20) / 60), "the pause between the two starts does not count"
    assert found["P5 whole run"]["note"] == "starts: 2; accuracy 75.0 %" and found["P5 whole run"]["shape"] == "m3, 2 epochs"
    assert found["P6 MFU"]["value"] == pytest.approx(50)
    with pytest.raises(ValueError, match="run.py ended with 2: seed: unlucky"):
        whole_runs.run_py("x.yaml", [f"save_path={tmp_path}/whole", "name=whole-m3", "seed=13"], tmp_path / "log", 60)


# ---------------------------------------------------------------- the commands


def run_pieces(monkeypatch, tmp_path, works: dict, *arguments: str) -> int:
    found = [Piece(name, 1, name, work) for name, work in works.items()]
    monkeypatch.setattr(bench_gpu, "pieces", lambda whole: found)
    return bench_gpu.main(["--tiny", "--out", str(tmp_path / "out"), *arguments])


def test_a_failing_piece_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    def out_of_memory(session):
        raise torch.OutOfMemoryError("CUDA out of memory,\nand so on")

    good = [result("P1", "tiny", 0.5)]
    assert run_pieces(monkeypatch, tmp_path, {"bad": out_of_memory, "good": lambda session: good}) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "error: bad: OutOfMemoryError: CUDA out of memory, and so on"
    assert "Left: bad." in printed.out
    assert json.loads((tmp_path / "out/good.json").read_text())["results"] == good
    assert run_pieces(monkeypatch, tmp_path, {"bad": lambda session: good, "good": out_of_memory}) == 0, "only what is left"


def test_a_piece_is_ended_with_the_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_gpu, "TINY_SECONDS", 0.1)
    monkeypatch.setattr(bench_gpu, "GRACE", 0)

    def hangs_and_shrugs(session):
        try:
            time.sleep(60)
        except Exception:  # what must not hold up the end
            return []

    assert run_pieces(monkeypatch, tmp_path, {"slow": hangs_and_shrugs}, "--seconds", "0.5") == 3
    assert "slow: the time is up" in capsys.readouterr().out and not (tmp_path / "out/slow.json").exists()


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--only", "nothing"], "--only: nothing is no piece; there are ceilings, "),
        (["--only", "whole-m3"], "whole runs need --full"),
        ([], "no CUDA device"),
    ],
)
def test_mistakes_are_one_line(arguments, told, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1


def test_missing_rows_are_told(tmp_path, capsys):
    assert bench.main(["--data", str(tmp_path / "gone.json")]) == 2
    assert "gone.json does not exist; say with --data where it is" in capsys.readouterr().err


def numbers_in(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(inner)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.slow
def test_every_piece_runs_once_and_is_not_done_again(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["bash", "scripts/bench_gpu.sh", "--tiny", "--out", str(out), "--data", str(tmp_path / "absent.json")]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measures, written = set(), {}
    for name in PIECES:
        written[name] = json.loads((out / f"{name}.json").read_text())
        assert written[name]["piece"] == name and written[name]["where"] == "tiny" and written[name]["seconds"] > 0
        assert written[name]["about"]["rows"] == "generated validation rows"
        assert all(map(math.isfinite, numbers_in(written[name]))) and written[name]["results"]
        assert all(r["value"] > 0 for r in written[name]["results"]), name
        measures |= {r["measure"] for r in written[name]["results"]}
    assert measures == {
        "matmul", "copy", "P1", "P1 same kernels", "cache", "P2", "ref", "P3", "P4", "P4 evaluation", "evaluation",
        "P5", "P5 update", "P6 padding", "P6 MFU", "P7",
    }  # fmt: skip
    compiled = written["steps-bf16-compiled"]["results"]
    assert all(r["note"] is None for r in compiled if r["measure"].startswith("P")), "the passes were compiled"
    gathered = json.loads((out / "gpu.json").read_text())
    assert gathered["results"] == [r for piece in written.values() for r in piece["results"]]
    assert "| compiled, stage 6 |" in (out / "gpu.md").read_text() and "no targets apply" in (out / "gpu.md").read_text()
    assert not [p for p in (out / "work").iterdir() if p.name.startswith(("run-", "start-"))], "no run folder is left"

    capsys.readouterr()
    arguments = ["--tiny", "--out", str(out), "--seconds", "0"]
    assert bench_gpu.main(arguments) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == [f"{name}: done before" for name in PIECES]
    assert {name: json.loads((out / f"{name}.json").read_text()) for name in PIECES} == written
    assert bench_gpu.main([*arguments, "--full"]) == 3
    printed = capsys.readouterr().out
    assert "whole-m3: may take 20 s, and 0 s are left" in printed and "Left: whole-m3, whole-m5. Go on" in printed
    assert bench_gpu.main([*arguments, "--full", "--seconds", "90", "--only", "whole-m3", "--data", str(tmp_path / "no")]) == 0
    whole = json.loads((out / "whole-m3.json").read_text())["results"][0]
    assert whole["shape"] == "m3, 2 epochs" and set(whole["accuracy"]) == {"0", "1"}
    capsys.readouterr()
    assert bench_gpu.main(["--list", "--full", "--out", str(out)]) == 0
    listed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["whole-m3", "done"] in listed and ["whole-m5", "120"] in listed and len(listed) == len(PIECES) + 2


def test_results_of_another_kind_are_not_mixed(monkeypatch, tmp_path, capsys):
    (tmp_path / "ceilings.json").write_text(json.dumps({"where": "gpu", "results": []}))
    assert bench_gpu.main(["--tiny", "--out", str(tmp_path)]) == 2
    assert "ceilings.json is of a gpu run; give another --out" in capsys.readouterr().err


def test_the_cpu_benchmark_runs(shared_data, tmp_path):
    assert bench.main(["--quick", "--only", "P1", "--only", "P4", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "cpu.json").read_text())
    found = [r["measure"] for r in written["results"]]
    assert found == ["P1", "P1 same kernels", "cache", "P2", "ref", "P4", "P4 evaluation"]
    assert written["about"]["rows"] == "official validation rows" and (tmp_path / "cpu.md").is_file()
