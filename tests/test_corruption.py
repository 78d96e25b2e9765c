"""Corruption finds what was put in: hand-wired models lose their answer where their wiring says so, and nowhere else."""

import json
from dataclasses import replace

import pytest
import torch
from stub_model import HOP, SOLVED, Wiring, stub_subject, task_of, write_problems

from analysis import corruption
from analysis.command import CheckFailed
from analysis.corruption import EXPERIMENT, measure, prepare, summarize
from analysis.findings import Findings
from analysis.levels import CHAINS, FIELDS, label, levels, planned
from analysis.slots import Calibration, Run, answer_runs, replacements
from analysis.subject import Problems, Subject

ROWS = 9
PAUSES = ("frozen", "learned_shared", "pause_curriculum")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("corruption"), ROWS, 2)


def result_of(subject, data, out, experiment=EXPERIMENT, **flags) -> dict:
    return experiment.one(task_of(experiment, subject, data, out, **flags), out)


def without_time(result: dict) -> dict:
    return {key: value for key, value in result.items() if key != "elapsed_seconds"}


def spoiled(wiring: Wiring, slots: tuple[int, ...], chain: str) -> bool:
    """Whether the wiring says that the answer is lost: a thought it reads is replaced, or (recompute) comes from one that is."""
    bad = set(slots)
    for k, source in enumerate(wiring.thoughts):
        before = k - 1 if source == HOP else source
        if chain == "recompute" and before in bad:
            bad.add(k)
    return bool(bad & set(wiring.reads))


@pytest.mark.parametrize(
    "wiring",
    [
        *(Wiring((SOLVED,) * 3, reads=(k,)) for k in range(3)),
        Wiring((SOLVED, 0, None), reads=(1,)),
        Wiring((HOP, HOP, HOP), reads=(2,)),
        Wiring((None, SOLVED, 1, 0), reads=(2,)),
        Wiring((None, SOLVED), reads=(1,), by="index"),
    ],
    ids=str,
)
def test_the_answer_is_lost_exactly_where_the_wiring_says(wiring, data, tmp_path):
    found = result_of(stub_subject(tmp_path, wiring), data, tmp_path)
    assert found["clean_accuracy"]["accuracy"] == 1.0
    drops = 0
    for chain, end in zip(CHAINS, ("", "_recompute")):
        for family, by_level in levels(len(wiring.thoughts)).items():
            for slots, level, margin in zip(by_level, found[FIELDS[family] + end], found[f"margin_{family}{end}"]):
                lost = spoiled(wiring, slots, chain)
                drops += lost
                assert level["slots"] == list(slots) and level["n"] == margin["n"] == ROWS
                assert (level["accuracy"] < 0.5) if lost else (level["accuracy"] == 1.0), (chain, family, slots)
                assert margin["change"]["mean"] < -5 if lost else abs(margin["change"]["mean"]) < 1e-4
    assert drops, "a wiring under test must lose something"
    for kind in ("zero", "mean", "resample"):
        levels_of = found["ablation"][kind]["single_position"]
        assert [x["accuracy"] < 1.0 for x in levels_of] == [spoiled(wiring, (k,), "replay") for k in range(len(levels_of))]


def test_a_model_that_ignores_its_thoughts_gives_flat_curves(data, tmp_path):
    found = result_of(stub_subject(tmp_path, Wiring((SOLVED, 0, HOP))), data, tmp_path)
    names = [name + end for name in FIELDS.values() for end in ("", "_recompute")]
    curves = [found, *found["ablation"].values()]
    accuracies = [level["accuracy"] for curve in curves for name in names for level in curve.get(name, [])]
    accuracies += [level["accuracy"] for level in (found["scales"]["norm_matched"]["all_slots"], found["all_slots"])]
    assert len(accuracies) > 40 and set(accuracies) == {1.0}
    assert found["sensitivity"] == found["sensitivity_recompute"] == "low"
    assert found["all_slots_drop"]["replay"]["difference"] == 0 and found["mean_drop"]["recompute"]["forward"] == 0


def test_rows_are_counted_at_every_level_and_by_hops(data, tmp_path):
    found = result_of(stub_subject(tmp_path, Wiring((SOLVED, 0, None), (1,))), data, tmp_path)
    assert corruption.counts(found) == {ROWS} and found["total_samples"] == found["n"] == ROWS and found["n_excluded"] == {}
    assert {h: x["n"] for h, x in found["by_hops"].items()} == {"1": 3, "2": 3, "3": 3}
    for k, level in enumerate(found["forward_corruption_recompute"]):
        by_hops = [x["forward_corruption_recompute"][k]["correct"] for x in found["by_hops"].values()]
        assert level["correct"] == sum(by_hops)


# ---------------------------------------------------------------- controls


def test_the_zero_corruption_control_is_the_clean_run(data, tmp_path):
    found = result_of(stub_subject(tmp_path, Wiring((SOLVED, 0), (1,))), data, tmp_path)["zero_corruption_control"]
    for chain in CHAINS:
        assert found[chain]["share_of_clean"] == 1.0 and found[chain]["n"] == ROWS
        assert found[chain]["answers_changed"] == 0 and found[chain]["largest_margin_change"] < 1e-4


def test_a_control_that_changes_answers_stops_the_experiment(data, tmp_path):
    """Thoughts recorded of the wrong rows: putting them back is no identity."""
    task = task_of(EXPERIMENT, stub_subject(tmp_path, Wiring((SOLVED, 0), (1,))), data, tmp_path, abbreviated=True)
    ready = prepare(task)
    ready["thoughts"] = ready["thoughts"].roll(1, 0)
    records = measured(task, ready)
    with pytest.raises(CheckFailed, match="zero-corruption control .replay. is not the clean run"):
        summarize(task, ready, records)


def measured(task, ready, part="test") -> list[dict]:
    numbers = list(range(task.experiment.parts(task)[part]))
    return [{"part": part, "idx": i, **r} for i, r in zip(numbers, measure(task, ready, part, numbers))]


@pytest.mark.parametrize("mode", ["continuous", "frozen"])
@pytest.mark.parametrize("shift", [0, -1, 1])
def test_the_position_check_looks_at_the_columns_that_were_edited(mode, shift, data, tmp_path):
    subject = stub_subject(tmp_path, Wiring((SOLVED, 0), (1,)), mode)
    task = task_of(EXPERIMENT, subject, data, tmp_path, abbreviated=True)
    prompts = subject.prompts(task.problems)
    runs = [Run(i, "moved", (slots + shift).tolist(), torch.zeros(2, subject.width)) for i, slots in enumerate(prompts.slots)]
    assert [record["on_target"] for record in answer_runs(subject, prompts, runs)] == [shift == 0] * ROWS
    ready = prepare(task)
    records = measured(task, ready)
    assert summarize(task, ready, records)["position_check_passed"] is True
    records[3]["off_target"] = 1
    with pytest.raises(CheckFailed, match="1 of .* edited runs met other columns"):
        summarize(task, ready, records)


# ---------------------------------------------------------------- draws


def test_calibration_and_replacements(data, tmp_path):
    thoughts = torch.randn(130, 3, 16, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 2.0, 5.0])[:, None] + 1
    held = Calibration.of(thoughts)
    first = thoughts[:100].numpy()
    assert held.n == 100 and held.std == pytest.approx(first.std(), rel=1e-5)
    assert held.norm == pytest.approx(((first**2).sum(-1) ** 0.5).mean(), rel=1e-5)
    assert torch.allclose(held.variance_SD, torch.tensor(first.var(0)), rtol=1e-4)
    rows = [2, 7, 129]
    made = replacements(thoughts, held, 4.0, 0, rows)
    assert torch.allclose(made["norm_matched"].norm(dim=-1), thoughts[rows].norm(dim=-1), rtol=1e-5)
    assert torch.allclose(made["gaussian"] / held.std, made["cross_scale"] / 4.0, atol=1e-5)
    assert made["zero"].abs().sum() == 0 and torch.allclose(made["mean"][1], thoughts[:100].mean(0), atol=1e-5)
    for i, row in enumerate(rows):
        for k in range(3):
            (donor,) = (thoughts[:, k] == made["resample"][i, k]).all(-1).nonzero().flatten().tolist()
            assert donor != row
    assert "cross_scale" not in replacements(thoughts, held, None, 0, rows)


def test_draws_depend_on_seed_row_and_slot_only():
    thoughts = torch.randn(20, 3, 8, generator=torch.Generator().manual_seed(2))
    held = Calibration.of(thoughts)
    everything, some = replacements(thoughts, held, 1.0, 5, list(range(20))), replacements(thoughts, held, 1.0, 5, [11, 4])
    for kind, vectors in some.items():
        assert torch.equal(vectors, everything[kind][[11, 4]]), kind
    other = replacements(thoughts, held, 1.0, 6, [11, 4])
    assert not torch.equal(other["gaussian"], some["gaussian"]) and not torch.equal(other["resample"], some["resample"])


def test_a_slot_gets_the_same_vector_at_all_levels_of_a_row(data, tmp_path, monkeypatch):
    subject, seen = stub_subject(tmp_path, Wiring((SOLVED, 0, None), (1,))), []

    def watched(subject, prompts, runs):
        seen.extend(runs)
        return answer_runs(subject, prompts, runs)

    monkeypatch.setattr(corruption, "answer_runs", watched)
    task = task_of(EXPERIMENT, subject, data, tmp_path)
    measure(task, prepare(task), "test", [1, 2, 5])
    vectors: dict[tuple, list] = {}
    for run in seen:
        kind, slots, chain = run.key.split("/") if run.key.count("/") == 2 else ("", "", "")
        for k in map(int, slots.split(",") if kind == "gaussian" else []):
            held = run.vectors_KD[k if chain == "replay" else list(map(int, slots.split(","))).index(k)]
            vectors.setdefault((run.place, k), []).append(held)
    assert len(vectors) == 9 and all(len(v) >= 3 and all(torch.equal(x, v[0]) for x in v) for v in vectors.values())
    assert len({tuple(v[0].tolist()) for v in vectors.values()}) == 9, "another draw for each row and slot"


def test_batch_and_chunk_size_do_not_change_results(data, tmp_path):
    wiring, results = Wiring((HOP, HOP, HOP), (2,)), []
    for batch_size, chunk in ((100, 50), (3, 2)):
        out = tmp_path / str(chunk)
        subject = stub_subject(tmp_path, wiring, batch_size=batch_size)
        results.append(without_time(result_of(subject, data, out, replace(EXPERIMENT, chunk=chunk))))
        results[-1].pop("gates"), results[-1].pop("test_id_accuracy_reason")
    assert results[0] == results[1]


def test_the_reported_distance_is_between_old_and_new_vectors(data, tmp_path):
    subject = stub_subject(tmp_path, Wiring((SOLVED, 0), (1,)))
    task = task_of(EXPERIMENT, subject, data, tmp_path, abbreviated=True)
    ready = prepare(task)
    found = summarize(task, ready, measured(task, ready))
    clean = subject.thoughts(subject.prompts(task.problems))
    noise = replacements(clean, Calibration.of(clean), None, task.seed, list(range(ROWS)))["gaussian"]
    assert found["replacement_l2_distance"] == pytest.approx(float((noise - clean).norm(dim=-1).mean()), rel=1e-5)
    assert found["noise_std"] == pytest.approx(float(clean.std(correction=0)), rel=1e-5)


# ---------------------------------------------------------------- chains


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_every_run_is_measured_once(n):
    """With kept slots in front only, or pause modes, the chains are one function."""

    class Of:
        n_thoughts, recycles = n, True

    kinds = ("gaussian", "zero", "mean", "resample", "norm_matched", "cross_scale")
    runs = planned(Of, kinds, False)

    def chains(slot: int) -> set[str]:
        return {key.split("/")[2] for key in runs if key.startswith(f"gaussian/{slot}/")}

    assert chains(n - 1) == {"replay"} and (n == 1 or chains(0) == {"replay", "recompute"})
    all_levels = {slots for family in levels(n).values() for slots in family}
    assert len([key for key in runs if key.startswith("gaussian") and key.endswith("replay")]) == len(all_levels)
    assert {key.split("/")[0] for key in planned(Of, kinds, True)} == {"gaussian", "control"}
    Of.recycles = False
    assert [key for key in planned(Of, kinds, False) if key.endswith("recompute")] == ["control/recompute"]


def test_runs_that_share_a_name_give_the_same_numbers(tiny_runs, small_data):
    """A real model: with the last slots replaced, giving the others their clean vectors changes nothing."""
    subject = Subject.load(tiny_runs["m3"])
    problems = Problems.read(small_data / "prosqa_valid.json", subject.tokenizer)
    prompts = subject.prompts(problems)
    clean = subject.thoughts(prompts)
    noisy = clean.clone()
    noisy[:, 1] += 3 * torch.randn(noisy[:, 1].shape, generator=torch.Generator().manual_seed(3))
    given = [Run(i, "replay", slots.tolist(), noisy[i]) for i, slots in enumerate(prompts.slots)]
    followed = [Run(i, "recompute", slots[1:].tolist(), noisy[i, 1:]) for i, slots in enumerate(prompts.slots)]
    before, a, b = subject.answers(prompts), answer_runs(subject, prompts, given), answer_runs(subject, prompts, followed)
    assert max(abs(x["margin"] - y["margin"]) for x, y in zip(a, b)) < 1e-4
    assert max(abs(x["margin"] - y["margin"]) for x, y in zip(a, before)) > 1e-3


@pytest.mark.parametrize("mode", PAUSES)
def test_pause_modes_have_one_chain_and_untouched_means(mode, data, tmp_path):
    subject = stub_subject(tmp_path, Wiring((SOLVED, 0)), mode)
    found = result_of(subject, data, tmp_path)
    for family, name in FIELDS.items():
        assert found[name] == found[f"{name}_recompute"] and found[f"margin_{family}"] == found[f"margin_{family}_recompute"]
    assert found["chains_differ"] is False
    for kind in ("mean", "resample"):
        ablated = found["ablation"][kind]
        assert ablated["by_construction"] and found["replacement_l2_by_kind"][kind] == 0
        assert {x["correct"] for x in ablated["single_position"]} == {found["clean_accuracy"]["correct"]}
    assert "by_construction" not in found["ablation"]["zero"]


# ---------------------------------------------------------------- interrupted, abbreviated, judged


def test_a_killed_and_resumed_run_gives_the_same_result(data, tmp_path):
    subject, calls = stub_subject(tmp_path, Wiring((SOLVED, 0, None), (1,))), []

    def killed(task, ready, part, numbers):
        calls.append((part, numbers))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(task, ready, part, numbers)

    experiment = replace(EXPERIMENT, chunk=4)
    with pytest.raises(KeyboardInterrupt):
        result_of(subject, data, tmp_path / "cut", replace(experiment, measure=killed))
    left = tmp_path / "cut" / "corruption" / "m3_corruption.jsonl"
    assert len(left.read_text().splitlines()) == 9, "the identity and two chunks"
    with open(left, "a") as file:
        file.write('{"part": "test", "idx": 8, "hop')  # torn by the kill
    del calls[:]

    def counting(task, ready, part, numbers):
        calls.append((part, numbers))
        return measure(task, ready, part, numbers)

    resumed = result_of(subject, data, tmp_path / "cut", replace(experiment, measure=counting))
    assert calls[0] == ("test", [8]), "what was measured is kept"
    whole = result_of(subject, data, tmp_path / "whole", experiment)
    for result in (resumed, whole):
        result.pop("test_id_accuracy_reason")  # names the folder
    assert without_time(resumed) == without_time(whole)
    records = [(tmp_path / name / "corruption" / "m3_corruption.jsonl").read_text() for name in ("cut", "whole")]
    assert records[0] == records[1]


@pytest.fixture(scope="module")
def real(tiny_runs, small_data, tmp_path_factory):
    """(folder of results, exit codes) of the command line on real checkpoints: abbreviated, then in full, then abbreviated."""
    out = tmp_path_factory.mktemp("real")
    runs = [str(tiny_runs[key]) for key in ("m3", "m5")]
    # Trained for a few steps, they answer hardly anything: the positive control says nothing, but passes on these rows.
    argv = ["--checkpoint", *runs, "--data", str(small_data / "prosqa_valid.json"), "--output_dir", str(out), "--device", "cpu"]
    read, codes = {}, []
    for name, flags in {"short": ["--abbreviated"], "full": [], "again": ["--abbreviated"]}.items():
        codes.append(EXPERIMENT.main(argv + flags))
        read[name] = {key: json.loads((out / "corruption" / f"{key}_corruption.json").read_text()) for key in ("m3", "m5")}
    return out, codes, read


def test_abbreviated_measures_clean_and_all_slots(real):
    _, codes, read = real
    assert codes == [0, 0, 0]
    short = read["short"]["m3"]
    assert short["abbreviated"] and short["n"] == short["total_samples"] == 11
    for name in ("forward_corruption", "forward_corruption_recompute", "reverse_corruption"):
        assert short[name][:-1] == [None] and short[name][-1]["slots"] == [0, 1]
    assert short["single_position"] == [None, None] and short["sensitivity"] is None and "permutation_flip_rate" not in short
    assert short["forward_corruption"][-1] == read["full"]["m3"]["forward_corruption"][-1], "the same draws"
    assert read["again"] == read["full"], "an abbreviated run does not replace a full one"


def test_m5_is_also_measured_at_the_scale_of_m3(real):
    _, _, read = real
    m3, m5 = (read["full"][key] for key in ("m3", "m5"))
    assert m3["scales"]["cross_scale"] is None and "own scale is the common one" in m3["cross_scale_reason"]
    assert m5["cross_scale_std"] == m3["noise_std"] and m5["scales"]["cross_scale"]["all_slots"]["n"] == 11
    ratio = m5["replacement_l2_by_kind"]["cross_scale"] / m5["replacement_l2_by_kind"]["gaussian"]
    assert ratio > 2, "noise of m3's scale is far larger than m5's own"


def test_without_m3_the_common_scale_is_null_with_a_reason(data, tmp_path):
    subject = stub_subject(tmp_path, Wiring((SOLVED,)), "frozen")
    found = result_of(subject, data, tmp_path)
    assert found["scales"]["cross_scale"] is None and "no finished result of m3" in found["cross_scale_reason"]
    m3 = stub_subject(tmp_path, Wiring((SOLVED,), (0,)))
    result_of(m3, data, tmp_path)
    assert result_of(subject, data, tmp_path)["scales"]["cross_scale"]["all_slots"]["n"] == ROWS, "measured once m3 is there"


def test_findings_read_the_files(real):
    """Gates 4 and 4-id take clean accuracy and drops from here."""
    out, _, read = real
    findings = Findings([out])
    for key in ("m3", "m5"):
        result, drops = read["full"][key], findings.sensitivity(key)
        clean, last = result["clean_accuracy"], result["forward_corruption"][-1]
        assert float(drops["replay"].percent) == pytest.approx(100 * (clean["correct"] - last["correct"]) / 11)
        assert drops["recompute"].n == 11
        assert findings.accuracy(key) is None, "11 rows are not the 500 of the test set"
    result = read["full"]["m3"] | {"clean_accuracy": {"correct": 485, "n": 500, "accuracy": 0.97}, "total_samples": 500}
    (out / "corruption" / "m3-s1_corruption.json").write_text(json.dumps(result))
    assert float(Findings([out]).accuracy("m3", 1).percent) == 97.0
    (out / "corruption" / "m3-s1_corruption.json").unlink()


def test_verification_is_computed_from_the_results(real):
    out, _, read = real
    found = json.loads((out / "corruption" / "results.json").read_text())["verification"]
    m3 = read["full"]["m3"]
    assert found["position_check_passed"] and found["valid"]["n_equal_at_every_level"]
    assert found["replacement_l2_distance"] == m3["replacement_l2_distance"]
    assert found["valid"]["replacement_l2_distance_above_5"] == (m3["replacement_l2_distance"] > 5)
    assert found["m3_test_id_accuracy"] == m3["clean_accuracy"]["accuracy"] and found["m3_test_id_accuracy_delta"] is None
    wrong = m3 | {"single_position": [m3["single_position"][0] | {"n": 10}, m3["single_position"][1]]}
    assert corruption.verify({"m3": wrong})["valid"]["n_equal_at_every_level"] is False


def test_the_clean_accuracy_is_held_against_the_ood_experiment(data, tmp_path):
    subject = stub_subject(tmp_path, Wiring((SOLVED,), (0,)))
    task = task_of(EXPERIMENT, subject, data, tmp_path, abbreviated=True)
    ood = {"checkpoint": {"sha256": subject.sha256}, "sets": {"test": {"data": {"sha256": task.problems.sha256}}}}
    ood["sets"]["test"]["exact_match"] = {"correct": 8, "n": ROWS, "accuracy": 8 / ROWS}
    (tmp_path / "ood").mkdir()
    (tmp_path / "ood" / "m3_ood.json").write_text(json.dumps(ood))
    ready = prepare(task)
    assert summarize(task, ready, measured(task, ready))["test_id_accuracy_delta"] == pytest.approx(1 / ROWS)
    ood["checkpoint"]["sha256"] = "another"
    (tmp_path / "ood" / "m3_ood.json").write_text(json.dumps(ood))
    found = summarize(task, ready, measured(task, ready))
    assert found["test_id_accuracy_delta"] is None and "run analysis.ood first" in found["test_id_accuracy_reason"]


@pytest.mark.parametrize(
    "clean, forward, reverse, wanted",
    [
        (0.099, 0.9, 0.9, "too_low"),
        (0.1, 0.049, 0.049, "low"),
        (0.9, 0.05, 0.049, "high_uniform"),
        (0.9, 0.3, 0.2, "high_uniform"),
        (0.9, 0.301, 0.2, "high_sequential"),
        (0.9, 0.2, 0.301, "reverse_sensitive"),
        (0.9, -0.2, 0.04, "low"),
    ],
)
def test_the_sensitivity_label_on_both_sides_of_its_thresholds(clean, forward, reverse, wanted):
    assert label(clean, forward, reverse) == wanted


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_samples", "1"], "needs at least two rows"),
        (["--num_samples", "0"], "at least one row"),
        (["--data", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_are_one_line(flags, message, tiny_runs, tmp_path, capsys):
    assert EXPERIMENT.main(["--checkpoint", str(tiny_runs["m3"]), "--output_dir", str(tmp_path), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") or "\nerror: " in err
    assert message in err and "Traceback" not in err
    assert EXPERIMENT.main(["--checkpoint", str(tiny_runs["m1"]), "--output_dir", str(tmp_path)]) == 2
    assert "measures m3, m4, m4b, m5" in capsys.readouterr().err
