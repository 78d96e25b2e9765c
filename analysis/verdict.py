"""What a study may claim: fixed rules on intervals over seeds, read in order, with every number that decided them. No torch.

    python -m analysis.verdict results/study [--epoch final|best] [--measure two_choice|exact_match]

Prints the rules and writes FOLDER/EPOCH/verdict.json. D(x) is the mean over seeds of m3 minus that of m5.

    differs(x, d)   abs(D) >= d, Welch's 95 % interval without 0, abs(D) > abs(m4b - m5), the noise floor
    same(x, d)      90 % interval of D inside ±d
    DEP             m3's answers depend on its thoughts: order, another question's thoughts, or noise change them
    CAUSAL, PROBE, PSR, COUNT      tracing, probes beyond their controls, perturbation, fewer thoughts than hops

In-distribution sets are the test and the swap sets; OOD are all sets of more hops or other structure. Sets are compared by the
two-choice answer (all models then answer all rows); the outcome by exact match is printed beside it.

How an outcome is found. A condition without its numbers, or with fewer than 3 seeds, is undecided, and makes a rule undecided
if it could still change it (three-valued logic, conditions.py). Rows are read in the order 1, 4a, 4b, 3, 2; the first that holds
is the outcome if every row before it fails. Behind an undecided row nothing is an outcome: it might be that row. (Rows exclude
each other but for 4b before 3 and 2: rows 4b, 3, 2 ask for sameness on every OOD set, which no difference of 1 and 4a
survives, and 3 denies the probe structure that 2 asks for. So the waiting matters in one place: an undecided 4b.)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/verdict.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis import conditions as on  # noqa: E402
from analysis.command import command, parser_of  # noqa: E402
from analysis.conditions import SEEDS, Condition, all_of, any_of, at_least, negated  # noqa: E402
from analysis.evidence import NEEDED, Evidence, collect  # noqa: E402
from files import write_json  # noqa: E402

MEASURES = ("two_choice", "exact_match")
SET_COUNTS = {"ood_depth": 2, "ood_structure": 2, "swap": 1}  # kinds of sets without which nothing is "everywhere"
ID_MARGIN, OOD_MARGIN = 3, 5  # points
BETTER, DEP, CAUSAL, PROBE, PSR, COUNT = 5, 5, 0.1, 5, 10, 5  # points; CAUSAL a ratio
NEAR_CHANCE = 55  # two-choice; a coin has 50
MEANINGS = {
    "1": "continuous thoughts reason",
    "4a": "partial: chain extension",
    "4b": "representation differs, behaviour does not",
    "3": "nothing reasons: buffering",
    "2": "curriculum + compute suffice (stated beforehand as most likely)",
    "inconclusive": "no rule decides",
    "insufficient seeds": f"fewer than {SEEDS} seeds of m3 or m5",
}
NEXT_STEPS = {
    "3": [
        "a probe loss on the thoughts",
        "a slower curriculum, 5 to 8 epochs a stage",
        "distinct positions for the thoughts",
        "several vectors per thought",
        "a larger model",
    ],
    "2": ["harder tasks", "the curriculum for CoT"],
}


@dataclass(frozen=True)
class Verdict:
    """The outcome (`row`: a row of the plan, `inconclusive` or `insufficient seeds`), and everything it came from.

    `rules`: {row: condition} in order; `undecided`: conditions behind an open outcome; `rests_on`: open conditions that could
    change an outcome that was found; `other`: the row by the other measure.
    """

    row: str
    rules: dict[str, Condition]
    undecided: list[Condition]
    rests_on: list[Condition]
    remarks: list[str]
    curriculum_alone: Condition
    noise_floor: dict[str, dict]
    seeds: dict[str, int]
    measure: str
    other: str
    evidence: Evidence

    @property
    def next_steps(self) -> list[str]:
        return NEXT_STEPS.get(self.row, [])

    def to_json(self) -> dict:
        return {
            "schema_version": 1,
            "study": str(self.evidence.folder),
            "epoch": self.evidence.epoch,
            "verdict": self.row,
            "meaning": MEANINGS[self.row],
            "settled": self.row in self.rules and not self.rests_on,
            "measure": self.measure,
            "by_other_measure": self.other,
            "curriculum_alone": self.curriculum_alone.to_json(),
            "seeds": self.seeds,
            "rules": {
                row: {"meaning": MEANINGS[row], "fired": row == self.row, "condition": rule.to_json()}
                for row, rule in self.rules.items()
            },
            "undecided": [{"name": c.name, "why": c.why, "open": c.open} for c in self.undecided],
            "rests_on": [{"name": c.name, "why": c.why} for c in self.rests_on],
            "remarks": self.remarks,
            "next_steps": self.next_steps,
            "noise_floor": self.noise_floor,
            "evidence": self.evidence.to_json(),
        }


# ---------------------------------------------------------------- the rules


def expected(evidence: Evidence, *kinds: str) -> list[str]:
    """The sets of these kinds; a name for each that must exist and was not evaluated, so that it is missed."""
    names = []
    for kind in kinds:
        found = evidence.sets_of(kind)
        names += found + [f"{kind} set {i + 1}" for i in range(len(found), SET_COUNTS[kind])]
    return names


def rules_of(evidence: Evidence, measure: str) -> dict[str, Condition]:
    """{row: its condition} in the order in which rows are read."""
    depth, structure = expected(evidence, "ood_depth"), expected(evidence, "ood_structure")
    ood = {name: on.compare(evidence, f"{measure}/{name}") for name in [*depth, *structure]}
    id_sets = [on.compare(evidence, f"{measure}/{name}") for name in ["test", *expected(evidence, "swap")]]
    better = {name: on.differs(c, BETTER, better=True) for name, c in ood.items()}
    on_structure = any_of("m3 better on an OOD set of other structure", [better[name] for name in structure])
    same_id = all_of("the same in distribution", [on.same(c, ID_MARGIN) for c in id_sets])
    same_ood = all_of("the same on every OOD set", [on.same(c, OOD_MARGIN) for c in ood.values()])

    corruption, peak = on.compare(evidence, "corruption_drop"), on.compare(evidence, "causal_peak")
    probe, psr, loss = (on.compare(evidence, name) for name in ("controlled_advantage", "psr", "count_loss"))
    dep = any_of(
        "DEP: m3's answers depend on its thoughts",
        [
            on.reaches(evidence, "permutation_flips", "m3", DEP),
            on.reaches(evidence, "swap_transplant_drop", "m3", DEP),
            on.differs(corruption, DEP, better=True),
        ],
    )
    m3_effect, m5_effect = (on.mean_at_least(evidence, "causal_peak", model, CAUSAL) for model in ("m3", "m5"))
    for_m3 = [
        all_of("CAUSAL for m3", [m3_effect, on.differs(peak, CAUSAL, better=True)]),
        on.differs(probe, PROBE, better=True),
        on.differs(psr, PSR, better=True),
        all_of(
            "COUNT: m3 needs as many thoughts as hops, m5 does not",
            [
                on.reaches(evidence, "count_loss", "m3", COUNT),
                negated(on.reaches(evidence, "count_loss", "m5", COUNT)),
                on.above_floor(loss),
            ],
        ),
    ]
    either_way = [
        dep,
        all_of("CAUSAL differs", [any_of("an effect at thoughts", [m3_effect, m5_effect]), on.differs(peak, CAUSAL)]),
        on.differs(probe, PROBE),
        on.differs(psr, PSR),
    ]
    structured = [on.above_zero(evidence, "controlled_advantage", model, PROBE) for model in ("m3", "m5")]
    at_chance = [
        on.mean_at_most(evidence, f"two_choice/{name}", model, NEAR_CHANCE, 1 if model == "m4b" else SEEDS)
        for name in ood
        for model in ("m3", "m4b", "m5")
    ]
    return {
        "1": all_of(
            "row 1",
            [
                at_least(2, "m3 better on 2 OOD sets", list(better.values())),
                on_structure,
                dep,
                at_least(2, "2 of CAUSAL, PROBE, PSR, COUNT for m3", for_m3),
            ],
        ),
        "4a": all_of("row 4a", [any_of("m3 better on more hops", [better[name] for name in depth]), negated(on_structure)]),
        "4b": all_of("row 4b", [same_id, same_ood, any_of("DEP, CAUSAL, PROBE or PSR differs", either_way)]),
        "3": all_of(
            "row 3",
            [same_id, same_ood, all_of("all near chance on every OOD set", at_chance), negated(dep), *map(negated, structured)],
        ),
        "2": all_of("row 2", [same_id, same_ood, negated(dep), *structured]),
    }


def first_row(values: dict[str, bool | None]) -> str | None:
    """The first row that holds, if every row before it fails; None where an undecided one comes first, or none holds."""
    for row, holds in values.items():
        if holds is not False:
            return row if holds else None
    return None


def decide(evidence: Evidence, measure: str = "two_choice") -> Verdict:
    """The verdict on a study's evidence; sets are compared by `measure`."""
    rules = rules_of(evidence, measure)
    seeds = {key: len(evidence.repeats(key)) for key in NEEDED}
    enough = min(seeds["m3"], seeds["m5"]) >= SEEDS
    other = MEASURES[1 - MEASURES.index(measure)]
    row = outcome(rules) if enough else "insufficient seeds"
    other_row = outcome(rules_of(evidence, other)) if enough else row
    unsettled = {c.name: c for rule in _up_to(rules, row) for c in rule.unsettled()}
    id_sets = ["test", *expected(evidence, "swap")]
    alone = [on.same(on.compare(evidence, f"{measure}/{name}", "m0", "m5"), ID_MARGIN) for name in id_sets]
    used = sorted({c.measured["quantity"] for rule in rules.values() for c in rule.leaves()})
    found = row in rules
    return Verdict(
        row=row,
        rules=rules,
        undecided=list(unsettled.values()) if row == "inconclusive" else [],
        rests_on=list(unsettled.values()) if found else [],
        remarks=remarks(evidence, measure),
        curriculum_alone=all_of("curriculum alone", alone),
        noise_floor={name: noise(evidence, name) for name in used},
        seeds=seeds,
        measure=measure,
        other=other_row,
        evidence=evidence,
    )


def outcome(rules: dict[str, Condition]) -> str:
    """The row that fires, or `inconclusive`."""
    return first_row({row: rule.holds for row, rule in rules.items()}) or "inconclusive"


def _up_to(rules: dict[str, Condition], row: str) -> list[Condition]:
    """The rules that bear on an outcome: those before it and its own; all where there is none."""
    names = list(rules)
    return [rules[name] for name in (names[: names.index(row) + 1] if row in rules else names)]


def noise(evidence: Evidence, name: str) -> dict:
    """abs(m4b - m5) of a quantity with its seeds, or None with the reason."""
    floor, why = on.floor_of(evidence, name)
    return floor or {"value": None, "reason": why}


def remarks(evidence: Evidence, measure: str) -> list[str]:
    """What no row covers and a reader must know."""
    found, ood = [], expected(evidence, "ood_depth", "ood_structure")
    for name in ["test", *expected(evidence, "swap"), *ood]:
        c = on.compare(evidence, f"{measure}/{name}")
        margin = OOD_MARGIN if name in ood else ID_MARGIN
        if not c.why and c.difference < 0 and on.differs(c, margin).holds:
            found.append(f"{name}: m5 above m3 by {-c.difference:.1f} points; look for a bug first")
    peak = on.compare(evidence, "causal_peak")
    if not peak.why and peak.difference < 0 and on.differs(peak, CAUSAL).holds:
        found.append("causal_peak: m5 above m3; look for a bug first")
    return found


# ---------------------------------------------------------------- for the reader


def render(verdict: Verdict) -> str:
    """The verdict as text: the outcome, every rule with its numbers, the noise floor, what is missing."""
    seeds = ", ".join(f"{key} {n}" for key, n in verdict.seeds.items())
    title = f"row {verdict.row}" if verdict.row in verdict.rules else verdict.row
    lines = [f"VERDICT  {title}: {MEANINGS[verdict.row]}", f"         {verdict.evidence.epoch} checkpoints; seeds: {seeds}"]
    other = f"row {verdict.other}" if verdict.other in verdict.rules else verdict.other
    agreement = "the same" if verdict.other == verdict.row else other
    lines.append(f"         sets compared by {verdict.measure}; by the other measure: {agreement}")
    alone = {True: "yes, m0 and m5 are the same within 3", False: "no", None: "undecided"}[verdict.curriculum_alone.holds]
    lines += [f"         curriculum alone: {alone}"] + [f"         next: {step}" for step in verdict.next_steps]
    lines += [f"         note: {remark}" for remark in verdict.remarks]
    if verdict.row == "inconclusive" and not verdict.undecided:
        lines.append("         no row describes these numbers, and more seeds would hardly change that")
    for heading, found in (("undecided", verdict.undecided), ("rests on", verdict.rests_on)):
        lines += ["", f"{heading}:"] if found else []
        lines += [f"  {c.name}: {c.why or 'the 90 % interval admits both'}" for c in found]
    shown: set[str] = set()
    for row, rule in verdict.rules.items():
        fired = "FIRES" if row == verdict.row else _word(rule.holds)
        lines += ["", f"row {row}  {fired}  {MEANINGS[row]}", *_tree(rule.parts, 1, shown)]
    lines += [
        "",
        "curriculum alone  " + _word(verdict.curriculum_alone.holds),
        *_tree(verdict.curriculum_alone.parts, 1, shown),
    ]
    lines += ["", "noise floor, abs(m4b - m5):"]
    for name, floor in verdict.noise_floor.items():
        counts = f"{floor['n_m4b']} and {floor['n_m5']} seeds" if floor["value"] is not None else floor["reason"]
        lines.append(f"  {name:<32} {'-' if floor['value'] is None else format(floor['value'], '.3g'):>6}  {counts}")
    return "\n".join(lines)


def _word(holds: bool | None) -> str:
    return {True: "holds", False: "no", None: "undecided"}[holds]


def _tree(parts: Sequence[Condition], depth: int, shown: set[str]) -> list[str]:
    """A line a condition, parts below; what was shown before is not shown again."""
    lines = []
    for part in parts:
        inner = part.parts[0] if part.least is None and part.parts else part  # of a negation
        text = f"{'  ' * depth}{_word(part.holds):<10}{part.name}"
        if inner.name in shown:
            lines.append(f"{text} (above)")
            continue
        shown.add(inner.name)
        lines.append(text if inner.parts else f"{text}: {_numbers(inner)}")
        lines += _tree(inner.parts, depth + 1, shown)
    return lines


def _numbers(c: Condition) -> str:
    """The numbers of one condition in a line, and why it is undecided or open."""
    m = c.measured
    value = m.get("difference", m.get("mean"))
    texts = [] if value is None else [f"{'D' if 'difference' in m else 'mean'} {value:+.3g} {m['unit']}"]
    texts += [f"{key[2:]} % {m[key][0]:+.3g} .. {m[key][1]:+.3g}" for key in ("ci95", "ci90") if m.get(key)]
    floor = (m.get("noise_floor") or {}).get("value")
    texts += [] if floor is None else [f"floor {floor:.2g}"]
    texts += ["seeds " + "/".join(map(str, m["n_seeds"].values()))]
    why = f"; {c.why or 'the 90 % interval admits both'}" if c.holds is None or c.open else ""
    return ", ".join(texts) + why + (" (open)" if c.open else "")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """0: a verdict was printed and written, whatever it is; 2: a mistake in the command or the files."""
    parser = parser_of(__doc__, "python -m analysis.verdict")
    parser.add_argument("study", type=Path, help="a study's result folder")
    parser.add_argument("--epoch", default="final", help="which checkpoints: final or best (default: final)")
    parser.add_argument("--measure", choices=MEASURES, default="two_choice", help="of accuracy on a set (default: two_choice)")
    args = parser.parse_args(argv)
    verdict = decide(collect(args.study, args.epoch), args.measure)
    target = args.study / args.epoch / "verdict.json"
    write_json(target, verdict.to_json(), allow_nan=False)
    print(render(verdict))
    print(f"\nWritten: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
