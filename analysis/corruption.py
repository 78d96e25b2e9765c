"""What becomes of the answers when thoughts are replaced: by noise, by other rows' thoughts, by their mean, by nothing.

    python -m analysis.corruption --checkpoint runs/quickstart/m3_coconut --output_dir results
    python -m analysis.corruption --study results/study-quickstart --models m3,m5 --abbreviated

Levels, for k = 0 .. N-1: forward_corruption[k] replaces slots 0..k, reverse_corruption[k] the last k+1, single_position[k]
slot k alone; every level has every row. In `replay` the other slots keep their clean vectors; in `recompute` (fields ending
in _recompute) thoughts behind a replaced one follow from it. The two differ only where a kept slot stands behind a replaced one
and thoughts read states; elsewhere they are one run, measured once. A level that was not measured is null.

Replacements: `gaussian`, N(0, std²) with the std of all entries of the model's own thoughts (main); `cross_scale`, the same draw
at m3's std; `norm_matched`, the same direction at the norm of the thought it replaces; `resample`, the same slot of another
row; `mean` of that slot; `zero`. Draws depend on (seed, row, slot) only, so a slot gets one vector at all levels.

Controls: putting every thought back, and replacing none, must give the clean answers (else nothing is written); all edited
columns must hold thoughts. Permutations and transplants (analysis/transplant.py) are parts of this experiment.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/corruption.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json  # noqa: E402

import numpy as np  # noqa: E402

from analysis import transplant  # noqa: E402
from analysis.command import CheckFailed  # noqa: E402
from analysis.experiment import Experiment, Task, share  # noqa: E402
from analysis.levels import ABLATIONS, CHAINS, FIELDS, NO_OPS, SCALES, Levels, mean, planned, sensitivities  # noqa: E402
from analysis.self_checks import TOLERANCE  # noqa: E402
from analysis.slots import Calibration, Run, aim_of, answer_runs, compared, margin_of, marked, replacements  # noqa: E402
from analysis.subject import Subject  # noqa: E402
from analysis.transplant import MATCHED, SWAP, UNMATCHED  # noqa: E402

ABBREVIATED_ROWS = 100

# ---------------------------------------------------------------- measuring


def prepare(task: Task) -> dict:
    """Thoughts of all rows, their calibration, and the pairs of the transplants."""
    subject, problems = task.subject, task.problems
    if not subject.n_thoughts:
        raise ValueError(f"{subject.path}: a checkpoint without thoughts has none to replace")
    if len(problems) < 2:
        raise ValueError("--num_samples 1: a thought of another row needs at least two rows")
    thoughts_RSD = subject.thoughts(subject.prompts(problems))
    ready = {"thoughts": thoughts_RSD, "calibration": Calibration.of(thoughts_RSD), "m3_std": m3_std(task)}
    if not subject.recycles and bool((thoughts_RSD != thoughts_RSD[0, 0]).any()):
        raise CheckFailed(
            f"{subject.label} ({subject.model.feedback_mode}): thoughts of a pause mode differ between rows or slots"
        )
    if not task.args.abbreviated:
        ready |= {MATCHED: pairs(task, True), UNMATCHED: pairs(task, False)}
    if SWAP in parts(task):
        swap = task.sets[SWAP]
        ready |= {"partners": transplant.partners(swap), "swap_thoughts": subject.thoughts(subject.prompts(swap))}
    return ready


def pairs(task: Task, matched: bool) -> list[tuple[int, int]]:
    return transplant.drawn_pairs(task.seed, task.problems.hops, matched)


def m3_std(task: Task) -> float | None:
    """The scale of m3's thoughts, from its result of the same repeat; None where there is none, or where it is not used."""
    found = None if task.subject.key == "m3" or task.args.abbreviated else task.result_of("m3")
    return found and found.get("noise_std")


def parts(task: Task) -> dict[str, int]:
    """The test rows; unless abbreviated also the transplants' pairs and the swap pairs' rows."""
    if task.args.abbreviated:
        return {"test": len(task.problems)}
    swap = {SWAP: len(task.sets[SWAP])} if SWAP in task.sets else {}
    return {"test": len(task.problems), MATCHED: len(pairs(task, True)), UNMATCHED: len(pairs(task, False))} | swap


def measure(task: Task, ready: dict, part: str, numbers: list[int]) -> list[dict]:
    """Records of rows of the test set, or of pairs: see analysis/transplant.py."""
    if part == SWAP:
        return transplant.measure_swap(task, ready["swap_thoughts"], ready["partners"], numbers)
    if part in (MATCHED, UNMATCHED):
        return transplant.measure_pairs(task, ready["thoughts"], [ready[part][i] for i in numbers])
    return measure_rows(task, ready, numbers)


def measure_rows(task: Task, ready: dict, numbers: list[int]) -> list[dict]:
    """A record for each row: clean answer, and what each run gives, all runs of all rows in one batched call."""
    subject, calibration, abbreviated = task.subject, ready["calibration"], task.args.abbreviated
    thoughts_RSD, prompts = ready["thoughts"], subject.prompts(task.problems, numbers)
    made = replacements(thoughts_RSD, calibration, ready["m3_std"], task.seed, numbers)
    plan, runs = planned(subject, list(made), abbreviated), []
    for place, row in enumerate(numbers):
        slots, clean_SD = prompts.slots[place].tolist(), thoughts_RSD[row]
        for key, (kind, replaced, _) in plan.items():
            replaced, vectors_SD = list(replaced), clean_SD.clone()
            if replaced:
                vectors_SD[replaced] = made[kind][place, replaced]
            # A run that is the same in both chains is planned under either; its key says which it is.
            given = list(range(len(slots))) if key.endswith("/replay") else replaced
            runs.append(Run(place, key, [slots[k] for k in given], vectors_SD[given]))
        if not abbreviated:
            runs += transplant.permutation_runs(task.seed, row, place, slots, clean_SD)
    clean, answers = subject.answers(prompts), answer_runs(subject, prompts, runs)
    by_place: list[dict[str, dict]] = [{} for _ in numbers]
    for run, record in zip(runs, answers):
        by_place[run.place][run.key] = record
    return [
        {
            "hops": int(task.problems.hops[row]),
            "clean": {"correct": c["correct"], "margin": margin_of(c), "output": c["output"]},
            "l2": {kind: float((x[i] - thoughts_RSD[row]).norm(dim=-1).mean()) for kind, x in made.items()},
            **aim_of(by_place[i].values()),
            "runs": {key: compared(record, c) for key, record in by_place[i].items()},
        }
        for i, (row, c) in enumerate(zip(numbers, clean))
    ]


# ---------------------------------------------------------------- results


def summarize(task: Task, ready: dict, records: list[dict]) -> dict:
    """The fields of the result. Raises CheckFailed where a control fails or an edit met another column than a thought's."""
    subject, calibration, abbreviated = task.subject, ready["calibration"], task.args.abbreviated
    by_part: dict[str, list[dict]] = {part: [] for part in parts(task)}
    for record in records:
        by_part[record["part"]].append(record)
    rows = by_part["test"]
    of = Levels(subject, rows)
    distances = {kind: float(np.mean([r["l2"][kind] for r in rows])) for kind in rows[0]["l2"]}
    fields = {
        "abbreviated": abbreviated,
        "total_samples": len(rows),
        "clean_margin": mean([r["clean"]["margin"] for r in rows]),
        "clean_two_choice": share(r["clean"]["margin"] > 0 for r in rows if r["clean"]["margin"] is not None),
        **of.accuracies(),
        **of.margins("gaussian"),
        **of.margins("gaussian", "recompute"),
        "all_slots": of.level("gaussian", of.everything),
        "all_slots_drop": {chain: of.drop(of.everything, chain) for chain in CHAINS},
        "chains_differ": subject.recycles,
        **sensitivities(of),
        "noise_std": calibration.std,
        "slot_norm": calibration.norm,
        "slot_covariance_diagonal": [[float(f"{x:.6g}") for x in slot] for slot in calibration.variance_SD.tolist()],
        "calibration_rows": calibration.n,
        "replacement_l2_distance": distances["gaussian"],
        "replacement_l2_by_kind": distances,
        "zero_corruption_control": {chain: control(subject, rows, chain) for chain in CHAINS},
        **position_check(subject, records),
        **against_ood(task, rows),
        "by_hops": {str(h): of.only(lambda r, h=h: r["hops"] == h).accuracies() for h in sorted({r["hops"] for r in rows})},
    }
    excluded = {"no two-choice margin: the options do not fit": sum(r["clean"]["margin"] is None for r in rows)}
    if not abbreviated:
        everywhere = {kind: {"all_slots": of.level(kind, of.everything)} for kind in ABLATIONS}
        ablated = {kind: level | of.curves(kind) | of.margins(kind) for kind, level in everywhere.items()}
        fields["ablation"] = ablated | marked({kind: ablated[kind] for kind in NO_OPS}, not subject.recycles)
        fields["scales"] = {kind: of.all_and_single(kind) for kind in SCALES if kind in distances}
        fields["cross_scale_std"] = ready["m3_std"]
        if ready["m3_std"] is None:
            own = "m3 itself: its own scale is the common one, see forward_corruption"
            none = f"no finished result of m3 of this repeat in {task.out}: run it on m3 first, then here again"
            fields["scales"]["cross_scale"] = None
            fields["cross_scale_reason"] = own if subject.key == "m3" else none
        fields |= transplant.permutation_fields(subject, task.seed, rows)
        fields |= transplant.transplant_fields(subject, records)
        swap, not_swapped = no_swap(task), {}
        if SWAP in by_part:
            swap, not_swapped = transplant.swap_fields(subject, by_part[SWAP])
        fields, excluded = fields | swap, excluded | not_swapped
    by_construction = [name for name, value in fields.items() if isinstance(value, dict) and value.get("by_construction")]
    return fields | {"by_construction": by_construction, "n_excluded": {k: n for k, n in excluded.items() if n}}


def control(subject: Subject, rows: list[dict], chain: str) -> dict:
    """Answers with no slot replaced: `replay` puts every thought back, `recompute` gives none. All must be the clean ones."""
    runs = [row["runs"][f"control/{chain}"] for row in rows]
    both = [(run["margin"], row["clean"]["margin"]) for run, row in zip(runs, rows) if run["margin"] is not None]
    correct, clean = (sum(x["correct"] for x in some) for some in (runs, [row["clean"] for row in rows]))
    changed, moved = sum(run["changed"] for run in runs), max((abs(a - b) for a, b in both), default=0.0)
    found = {
        "n": len(rows),
        "correct": correct,
        "clean_correct": clean,
        "share_of_clean": correct / clean if clean else None,
        "answers_changed": changed,
        "largest_margin_change": moved,
    }
    if correct != clean or changed or moved > TOLERANCE:
        raise CheckFailed(f"{subject.path}: zero-corruption control ({chain}) is not the clean run: {found}")
    return found


def position_check(subject: Subject, records: list[dict]) -> dict:
    """Whether every run put its vectors into the columns it meant, thoughts into columns with the thought token."""
    runs, missed = (sum(record[name] for record in records) for name in ("edited_runs", "off_target"))
    if missed:
        raise CheckFailed(f"{subject.path}: {missed} of {runs} edited runs met other columns than the thoughts they meant")
    return {"position_check_passed": missed == 0, "position_check_runs": runs}


def against_ood(task: Task, rows: list[dict]) -> dict:
    """How far the clean accuracy is from the one that the experiment `ood` measured on the same rows; null where it did not."""
    path = task.out.parent / "ood" / f"{task.subject.label}_ood.json"
    held = json.loads(path.read_text()) if path.is_file() else {}
    found, accuracy = held.get("sets", {}).get("test", {}), sum(r["clean"]["correct"] for r in rows) / len(rows)
    other = found.get("exact_match") or {}
    same = held.get("checkpoint", {}).get("sha256") == task.subject.sha256 and other.get("n") == len(rows)
    if same and found.get("data", {}).get("sha256") == task.problems.sha256:
        return {"test_id_accuracy": accuracy, "test_id_accuracy_delta": abs(accuracy - other["accuracy"])}
    reason = f"{path} has no such rows of this checkpoint: run analysis.ood first with as many --num_samples"
    return {"test_id_accuracy": accuracy, "test_id_accuracy_delta": None, "test_id_accuracy_reason": reason}


def no_swap(task: Task) -> dict:
    reason = f"no {SWAP}.json in {task.data_dir} or its ood folder; make it with: {transplant.SWAP_COMMAND}"
    return dict.fromkeys(transplant.SWAP_FIELDS) | {"swap_reason": reason}


def verify(results: dict[str, dict]) -> dict:
    """What must hold for the results to be valid: of all models, and in m3's own numbers (null before m3 is measured)."""
    m3 = results.get("m3", {})
    distance, delta = m3.get("replacement_l2_distance"), m3.get("test_id_accuracy_delta")
    return {
        "replacement_l2_distance": distance,
        "m3_test_id_accuracy": m3.get("test_id_accuracy"),
        "m3_test_id_accuracy_delta": delta,
        "position_check_passed": all(result["position_check_passed"] for result in results.values()),
        "valid": {
            "n_equal_at_every_level": all(len(counts(result)) == 1 for result in results.values()),
            "replacement_l2_distance_above_5": None if distance is None else distance > 5,
            "m3_test_id_accuracy_delta_below_0.02": None if delta is None else delta < 0.02,
        },
    }


def counts(result: dict) -> set[int]:
    """The numbers of rows behind a result's levels, the clean one included."""
    names = [name + end for name in FIELDS.values() for end in ("", "_recompute")]
    return {result["clean_accuracy"]["n"]} | {level["n"] for name in names for level in result[name] if level}


# ---------------------------------------------------------------- the experiment


class Corruption(Experiment):
    """`Experiment`, which also knows that a full result serves for an abbreviated one, and depends on m3's."""

    def run(self, args) -> int:
        if args.abbreviated:
            args.num_samples = min(args.num_samples, ABBREVIATED_ROWS)
        return super().run(args)

    def identity(self, task: Task) -> str:
        return f"{super().identity(task)}-{m3_std(task)}"

    def one(self, task: Task, output_dir: Path) -> dict:
        target = task.out / f"{task.subject.label}_{self.name}.json"
        if task.args.abbreviated and target.is_file() and not task.args.force:
            held = json.loads(target.read_text())
            if not held["abbreviated"] and held["checkpoint"]["sha256"] == task.subject.sha256:
                print(f"{target}: measured in full before")
                return held
        return super().one(task, output_dir)


def arguments(parser) -> None:
    """Add --abbreviated."""
    what = f"{ABBREVIATED_ROWS} rows, clean and with all slots replaced by own-scale noise: what gate 4 reads"
    parser.add_argument("--abbreviated", action="store_true", help=what)


MODELS = ("m3", "m4", "m4b", "m5")
EXPERIMENT = Corruption(
    "corruption", MODELS, prepare, measure, summarize, __doc__, parts=parts, arguments=arguments, verify=verify
)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
