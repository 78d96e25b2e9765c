"""Causal tracing (experiment 4): where in the input, and at which layer, lies what the answer is read from?

    python -m analysis.causal_tracing --checkpoint runs/prosqa-coconut --data data/prosqa_test.json --output_dir results

Three groups of positions are corrupted, one at a time, with noise of the standard deviation of their own inputs; then single
states are restored (tracing.py), and effects are ratios of means (effects.py). On rows answered right, --trace_rows at most.

    thoughts   the thought slots; for m1 its own step tokens, teacher-forced
    question   facts on the target's path, other facts, the name asked for: together and as parts
    markers    the markers around the thoughts, and `### Name` in front of the answer

Where thoughts read states (m3), two chains differ. Thoughts are corrupted and restored as `replay`: every slot is given, so a
restored state reaches the answer by attention alone. With all slots given there is no slot left to follow, and `recompute` is
the same run; where only the first slot is corrupted they differ, and both are measured. Question and markers are corrupted as
`recompute`: thoughts follow. Their total effect with the thoughts held at clean values (`replay`) is the part of it that does
not go through the thoughts. In pause modes, and for m1, whose step tokens stay, both chains are one function.

Waits for gate 5 (causal_sanity.py in the same output folder); `--accept REASON` goes on without, and is recorded.
"""

import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/causal_tracing.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

from analysis import effects, tracing  # noqa: E402
from analysis.causal_sanity import RESULT  # noqa: E402
from analysis.experiment import Experiment, Task  # noqa: E402
from analysis.interventions import NOWHERE, Patch, chain  # noqa: E402
from analysis.positions import Places  # noqa: E402
from analysis.subject import Subject  # noqa: E402
from analysis.tracing import Chunk, Group  # noqa: E402

EQUAL = 0.1  # peaks of two models that differ by no more are equal


def arguments(parser) -> None:
    parser.add_argument("--trace_rows", type=int, default=100, help="rows traced at most, the first ones answered right")
    parser.add_argument("--max_positions", type=int, default=20, help="single positions restored in each group")
    parser.add_argument("--accept", metavar="REASON", help="trace although gate 5 has not passed; recorded in the result")


def gate_5(folder: Path) -> dict:
    """What causal sanity left in an output folder: {"passed", "file", "reason"}."""
    path = folder / "causal_sanity" / RESULT
    if not path.is_file():
        return {"passed": False, "file": str(path), "reason": f"{path} is missing; run analysis.causal_sanity on m1 first"}
    found = json.loads(path.read_text())
    failed = [f"{key} is {c['value']}, not {c['rule']}" for key, c in found["criteria"].items() if not c["passed"]]
    return {"passed": found["passed"], "file": str(path), "reason": "; ".join(failed) or None}


# ---------------------------------------------------------------- groups


def groups(subject: Subject, traced: tracing.Traced, max_positions: int) -> list[Group]:
    """The three groups of the rows traced."""
    asked, prompts = traced.asked, traced.asked.prompts
    places = [Places.of(row, subject.tokenizer) for row in prompts.rows]
    slots = [[x for x in row if x != NOWHERE] for row in prompts.slots.tolist()]
    marks = (subject.ids.start, subject.ids.end) if subject.config.markers else ()
    thoughts = {"step token": traced.steps} if subject.key == "m1" else {"slot": slots}
    question = {
        "path": [p.path for p in places],
        "other facts": [p.off_path for p in places],
        "name": [p.person for p in places],
    }
    markers = {
        "markers": [[i for i, token in enumerate(tokens.tolist()) if token in marks] for tokens in prompts.tokens],
        "answer prefix": traced.prefix,
    }
    made = [
        Group.of("thoughts", asked, thoughts, max_positions, extras=first_slot, trial=0),
        Group.of("question", asked, question, max_positions, extras=thoughts_held, trial=1),
        Group.of("markers", asked, markers, max_positions, extras=thoughts_held, trial=2),
    ]
    return [group for group in made if group.names]


def first_slot(chunk: Chunk) -> dict:
    """Only the first thought corrupted: the others clean (`replay`), or following from it (`recompute`)."""
    subject, place_RK = chunk.subject, chunk.group.place_RK
    if not subject.n_thoughts:
        return {}
    first = torch.arange(place_RK.shape[1]) == 0
    inputs_RKD = torch.where(first[:, None], chunk.noise_RKD, chunk.states[0])
    edits = {"first_slot_replay": Patch(0, place_RK, inputs_RKD)}
    if subject.recycles:
        edits["first_slot_recompute"] = chunk.corrupt((place_RK != NOWHERE) & first)
    return edits


def thoughts_held(chunk: Chunk) -> dict:
    """The group corrupted while the thoughts keep their clean values, where they would follow."""
    subject, group = chunk.subject, chunk.group
    if not subject.recycles or not subject.n_thoughts:
        return {}
    held = Patch(0, group.asked.prompts.slots, subject.thoughts(group.asked.prompts))
    return {"thoughts_held": chain(chunk.corrupt(group.place_RK != NOWHERE), held)}


# ---------------------------------------------------------------- the experiment


def prepare(task: Task) -> dict:
    subject, args = task.subject, task.args
    traced = tracing.rows_to_trace(subject, task.problems, args.trace_rows)
    made = groups(subject, traced, args.max_positions)
    for group in made:
        group.noise_std = tracing.own_std(subject, group)
    return {"groups": made, "traced": traced}


def measure(task: Task, ready: dict, part: str, numbers: list[int]) -> list[dict]:
    return tracing.trace_rows(task.subject, ready["groups"], ready["traced"].status, numbers, task.seed)


def summarize(task: Task, ready: dict, records: list[dict]) -> dict:
    traced = [r["groups"] for r in records if r["status"] == "traced"]
    found, gates = {}, {}
    for group in ready["groups"]:
        mine = [record[group.name] for record in traced]
        gates[group.name] = effects.check(group, mine)
        found[group.name] = effects.summary(group, mine) | chains(task.subject, group.name, mine)
    for name in ("thoughts", "question", "markers"):
        found.setdefault(name, {"n_traced": 0, "reason": f"no such positions in {len(traced)} rows traced"})
    m1 = found if task.subject.key == "m1" else (task.result_of("m1") or {}).get("groups", {})
    return {
        **ready["traced"].counts(),
        "groups": found,
        "share_by_group": shares({name: group.get("total_effect") for name, group in found.items()}),
        "m1_cot_ce_above_03_fraction": m1.get("thoughts", {}).get("ce_above_03_fraction"),
        "gate_5": gate_5(task.out.parent) | {"accepted": task.args.accept},
        "tracing_gates": gates,
    }


def chains(subject: Subject, group: str, records: list[dict]) -> dict:
    """Which chain a group's numbers belong to, and the total effects (nats) that tell the two apart."""
    clean = [r["clean"] for r in records]

    def total(name: str) -> dict:
        """Of an extra run, or of the corrupted one where it is the same function and was not run again."""
        return effects.total_effect(clean, [r["extras"].get(name, r["corrupted"]) for r in records])

    if not subject.n_thoughts:
        return {"chain": "teacher-forced: one function"}
    if group != "thoughts":
        chain_ = "recompute" if subject.recycles else "recompute and replay are one function"
        return {"chain": chain_, "total_effect_replay": total("thoughts_held")}
    replay = total("first_slot_replay")
    return {
        "chain": "replay" if subject.recycles else "replay and recompute are one function",
        "total_effect_recompute": total("all slots given"),
        "first_slot_effect": {
            "replay": replay,
            "recompute": total("first_slot_recompute") if subject.recycles else replay,
        },
    }


def shares(totals: dict[str, dict | None]) -> dict[str, float | None]:
    """Each group's part of the sum of total effects, those below 0 counted as 0; None where no group has an effect to trace.

    Effects of groups overlap: a comparison, no partition.
    """
    totals = {name: total for name, total in totals.items() if total and total["value"] is not None}
    nats = {name: max(0.0, total["value"]) for name, total in totals.items()}
    traceable = any(map(effects.has_effect, totals.values()))
    return {name: x / sum(nats.values()) if traceable else None for name, x in nats.items()}


def verify(results: dict[str, dict]) -> dict:
    """m1's share of step positions with an effect above 0.3, and how the peaks at m3's and m5's thoughts compare, by repeat."""
    m1 = {r["repeat"]: r["m1_cot_ce_above_03_fraction"] for r in results.values() if r["model_key"] == "m1"}
    pairs = {}
    for m3 in (r for r in results.values() if r["model_key"] == "m3"):
        for m5 in (r for r in results.values() if r["model_key"] == "m5" and r["repeat"] == m3["repeat"]):
            pairs[m3["repeat"]] = compare(m3["groups"]["thoughts"], m5["groups"]["thoughts"])
    return {"m1_cot_ce_above_03_fraction": m1, "peak_at_thoughts": pairs}


def compare(m3: dict, m5: dict) -> dict:
    """The peaks at the thoughts of m3 and m5, and what they say."""
    peaks = {"m3": m3.get("peak_ce"), "m5": m5.get("peak_ce")}
    if None in peaks.values():
        said = "; ".join(f"{name}: {group['reason']}" for name, group in (("m3", m3), ("m5", m5)) if group["reason"])
    elif abs(peaks["m3"] - peaks["m5"]) <= EQUAL:
        said = "equal"
    else:
        said = "thoughts matter more in m3" if peaks["m3"] > peaks["m5"] else "m5 above m3: look for a bug"
    return peaks | {"reading": said}


class CausalTracing(Experiment):
    """Waits for gate 5."""

    def one(self, task: Task, output_dir: Path) -> dict:
        for name in ("trace_rows", "max_positions"):
            if getattr(task.args, name) < 1:
                raise ValueError(f"--{name} {getattr(task.args, name)}: at least 1")
        gate = gate_5(output_dir)
        if not gate["passed"] and not task.args.accept:
            raise ValueError(f"gate 5 blocks causal tracing: {gate['reason']} (--accept REASON goes on and records the reason)")
        return super().one(task, output_dir)


EXPERIMENT = CausalTracing(
    "causal_tracing",
    ("m1", "m3", "m4", "m4b", "m5"),
    prepare,
    measure,
    summarize,
    __doc__,
    arguments=arguments,
    verify=verify,
)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
