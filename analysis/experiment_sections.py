"""The report's sections of experiments: what is done, the figure, what either hypothesis predicts, the numbers.

    section = experiments(summary)                     # of gathered.gather
    [part.title for part in section.sections]

Captions name the chain and n; what cannot come out otherwise is marked as asserted, and never counted as a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from analysis import gathered
from analysis.accuracy_sections import differences
from analysis.blocks import (
    NOTHING,
    Callout,
    Cell,
    Items,
    Picture,
    Section,
    Table,
    Text,
    interval,
    not_measured,
    number,
    over_seeds,
    p_text,
    signed,
    texts,
    yes_no,
)
from analysis.drawing import rows_text, spread

# ---------------------------------------------------------------- the experiments


KINDS = ("zero", "mean", "resample", "norm_matched", "cross_scale")


def experiments(summary: dict) -> Section:
    """Every experiment: what is done, its figure, what either hypothesis predicts, its numbers."""
    section = Section("experiments", "Experiments")
    for name, (picture, tables) in EXPERIMENTS.items():
        about = texts()[name]
        part = Section(name.replace("_", "-"), about["title"], [Text(about["what"])])
        if picture:
            part.blocks.append(Picture(picture, about["title"], _caption(summary, name)))
        if about["carry"]:
            predictions = [f"If thoughts carry the reasoning: {about['carry']}", f"If they do not: {about['idle']}"]
            part.blocks.append(Items(predictions))
        found = [table for table in tables(summary) if not isinstance(table, Table) or table.rows]
        part.blocks += found
        if not found and not gathered.labels(summary, _source(name)):
            part.blocks.append(not_measured("No results yet.", gathered.make(summary, _source(name))))
        part.blocks.append(Text(about["limits"], "note"))
        section.sections.append(part)
    return section


def _source(name: str) -> str:
    """The experiment whose results a section shows."""
    return "corruption" if name == "transplants" else name


def _caption(summary: dict, name: str) -> str:
    """What a figure shows, and n."""
    found = [summary[_source(name)][label] for label in gathered.labels(summary, _source(name))]
    if not found:
        return "Not measured yet."
    models = gathered.models(summary, _source(name))
    counted = ", ".join(f"{model}\u00a0{len(gathered.repeats(summary, _source(name), model))}" for model in models)
    counts = [r["n"] for r in found if isinstance(r.get("n"), int)]
    rows = f" Rows: {rows_text(counts)}." if counts else ""
    return f"{texts()[name]['caption']}{rows} Seeds: {counted}."


def _of(summary: dict, name: str) -> Iterator[tuple[str, dict]]:
    for label in gathered.labels(summary, name):
        yield label, summary[name][label]


def _by_model(summary: dict, name: str) -> Iterator[tuple[str, list[dict]]]:
    for model in gathered.models(summary, name):
        yield model, gathered.repeats(summary, name, model)


def _head(model: str, found: list[dict], counts: list[int | None] | None = None) -> list:
    """The first cells of a model's row: name, seeds, n."""
    counts = [r.get("n") for r in found] if counts is None else counts
    return [Cell(model, "head"), str(len(found)), rows_text(counts).removeprefix("n = ")]


def _corruption(summary: dict) -> list:
    rows, scales, kinds, fixed = [], [], [], {}
    for model, found in _by_model(summary, "corruption"):
        lost = [[(r.get("all_slots_drop") or {}).get(chain) for r in found] for chain in ("replay", "recompute")]
        rates = ("permutation_flip_rate", "swap_follow_rate", "swap_control_follow_rate")
        cells = [over_seeds([r["clean_accuracy"] for r in found]), *(_points(some) for some in lost)]
        cells += [over_seeds([r.get(key) for r in found]) for key in rates]
        rows.append([*_head(model, found), *cells, _points([r.get("swap_transplant_drop") for r in found], "value")])
        numbers = [[r.get(key) for r in found] for key in ("noise_std", "slot_norm", "replacement_l2_distance")]
        labels = [
            ", ".join(dict.fromkeys(str(r.get(key) or NOTHING) for r in found))
            for key in ("sensitivity", "sensitivity_recompute")
        ]
        scales.append([*_head(model, found), *(_mean(some, 2) for some in numbers), *(x.replace("_", " ") for x in labels)])
        others = [{**(r.get("ablation") or {}), **(r.get("scales") or {})} for r in found]
        levels = {kind: [(x.get(kind) or {}).get("all_slots") for x in others] for kind in KINDS}
        kinds.append([*_head(model, found), *(over_seeds(levels[kind]) for kind in KINDS)])
        fixed |= {str(r.get("model", model)): r["by_construction"] for r in found if r.get("by_construction")}
    columns = [
        "model",
        "seeds",
        "n",
        "clean %",
        "lost, replay",
        "lost, recompute",
        "any order flips %",
        "follows other person %",
    ]
    columns += ["control follows %", "lost, other person"]
    note = (
        "Lost: points of exact match, with noise in all slots or the other person's thoughts. Control: the asked name as well."
    )
    more = ["model", "seeds", "n", "noise std", "slot norm L2", "moved by L2", "sensitivity, replay", "recompute"]
    return [
        Table("Corruption, permutation and swap transplant", columns, rows, note),
        Table("Scales and sensitivity", more, scales, words=(0, 6, 7)),
        Table(
            "Other replacements of all slots (replay), exact match %",
            ["model", "seeds", "n", *(kind.replace("_", " ") for kind in KINDS)],
            [row for row in kinds if set(row[3:]) - {NOTHING}],
        ),
        *_asserted(fixed),
    ]


def _points(found: list[dict | None], key: str = "difference") -> str:
    """Differences in points over seeds: mean with interval; of one seed its own."""
    values = spread([one | {"accuracy": one[key]} for one in found if one and one.get(key) is not None])
    return NOTHING if values is None else f"{signed(values.mean)} ({signed(values.low)} .. {signed(values.high)})"


def _mean(found: list[float | None], digits: int = 1) -> str:
    known = [x for x in found if x is not None]
    return number(sum(known) / len(known), digits) if known else NOTHING


def _asserted(fixed: dict[str, list[str]]) -> list:
    """What is true by construction, and of which runs."""
    by_fields: dict[tuple[str, ...], list[str]] = {}
    for label, fields in fixed.items():
        by_fields.setdefault(tuple(fields), []).append(label)
    lines = [
        f"{', '.join(labels)}: {', '.join(field.replace('_', ' ') for field in fields)}" for fields, labels in by_fields.items()
    ]
    return [Callout("Asserted, not found", [texts()["by_construction"], *lines])] if lines else []


def _transplants(summary: dict) -> list:
    rows = []
    for model, found in _by_model(summary, "corruption"):
        for name, kind in (("cross_transplant", "equal steps"), ("unmatched_transplant", "any steps")):
            some = [r for r in found if r.get(f"{name}_accuracy")]
            if some:
                mark = "asserted no-op" if some[0][f"{name}_accuracy"].get("by_construction") else ""
                levels = [
                    over_seeds([r.get(f"{name}_{key}") for r in some]) for key in ("clean_accuracy", "accuracy", "follow_rate")
                ]
                rows.append([*_head(model, some, [r.get(f"{name}_pairs") for r in some]), kind, *levels, mark])
    columns = ["model", "seeds", "pairs n", "donor", "clean %", "with donor's thoughts %", "follows donor %", ""]
    return [Table("Transplants", columns, rows, words=(0, 3, 7))]


def _tracing(summary: dict) -> list:
    rows = []
    for label, r in _of(summary, "causal_tracing"):
        for name, group in r.get("groups", {}).items():
            total = group.get("total_effect") or {}
            share = (r.get("share_by_group") or {}).get(name)
            effect = group.get("peak_ce")
            peak = f"{number(effect, 2)} ({interval(group['peak_ce_ci95'], digits=2)})" if effect is not None else NOTHING
            where = (
                f"layer {group['peak_layer']}, {group['peak_label']}" if effect is not None else group.get("reason") or NOTHING
            )
            valid = yes_no(group["valid"], no="bad") if group.get("valid") is not None else Cell(NOTHING, "muted")
            total_text = (
                f"{number(total.get('value'), 2)} ({interval(total.get('ci95'), digits=2)})"
                if total.get("value") is not None
                else NOTHING
            )
            cells = [f"{group.get('n_traced', 0):,}", total_text, number(None if share is None else 100 * share), peak]
            rows.append([Cell(label, "head"), name, *cells, where, group.get("chain", NOTHING), valid])
    columns = ["run", "corrupted", "n", "total effect, nats", "share %", "peak effect", "where", "chain", "valid"]
    return [Table("Effects by group of positions", columns, rows, words=(0, 1, 6, 7, 8))]


def _sanity(summary: dict) -> list:
    judged = summary.get("sanity") or {}
    rows = [
        [
            Cell(key.replace("_", " "), "head"),
            _plain(one.get("value")),
            one.get("rule", ""),
            yes_no(one.get("passed"), ("ok", "fails", "not yet"), no="bad"),
        ]
        for key, one in (judged.get("criteria") or {}).items()
    ]
    n = judged.get("n_traced", judged.get("n"))
    return [
        Table(
            f"Gate 5: {'passed' if judged.get('passed') else 'not passed'}, n = {n}",
            ["value", "measured", "rule", "holds"],
            rows,
            words=(0, 2, 3),
        )
    ]


def _plain(value: object) -> str:
    return NOTHING if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _psr(summary: dict) -> list:
    rows, sigmas = [], []
    for model, found in _by_model(summary, "psr"):
        for layer, kinds in found[0]["psr"].items():
            for kind in kinds:
                levels = [(r["psr"].get(layer) or {}).get(kind) for r in found]
                levels = [one for one in levels if one]
                sigmas = list(dict.fromkeys([*sigmas, *(sigma for one in levels for sigma in one)]))
                rows += [([*_head(model, found), layer, kind], levels)] if levels else []
    rows = [[*head, *(over_seeds([one.get(sigma) for one in levels]) for sigma in sigmas)] for head, levels in rows]
    columns = ["model", "seeds", "n", "layer", "noise", *(f"σ = {float(sigma):g}" for sigma in sigmas)]
    return [Table("Answers that change (%)", columns, rows, words=(0, 4))]


def _token_count(summary: dict) -> list:
    rows = []
    for label, r in _of(summary, "token_count"):
        for name, one in (r.get("sets") or {"test": r}).items():
            plateau = ", ".join(f"{h}: {NOTHING if c is None else c}" for h, c in one["plateau_at"].items() if h != "all")
            lost = (one.get("loss_with_fewer_than_hops") or {}).get("exact_match", {}).get("mean")
            n = (lost or {}).get("n", 0)
            rows.append([Cell(label, "head"), name, plateau, f"{n:,}", _points([lost], "value")])
    columns = [
        "run",
        "set",
        "plateau (steps: smallest count within 2 points of the best)",
        "n",
        "lost with fewer thoughts than steps",
    ]
    return [Table("How many thoughts are enough", columns, rows, words=(0, 1, 2))]


def _confidence(summary: dict) -> list:
    found, tables = summary["confidence"].get("verification", {}).get("comparisons", {}), []
    for pair, sets in found.items():
        rows = []
        for name, measures in sets.items():
            one = measures.get("target_logp") or next(iter(measures.values()))
            tested = [
                signed(one["median_diff"], 3),
                signed(one["hodges_lehmann"], 3),
                signed(one["rank_biserial"], 2),
                signed(one["z_score"], 2),
            ]
            cells = [f"{one['n']:,}", *tested, p_text(one["p_bonferroni"]), Cell(one["higher"] or NOTHING, "strong")]
            rows.append([Cell(name, "head"), *cells])
        columns = [
            "set",
            "n",
            "median difference",
            "Hodges–Lehmann",
            "rank-biserial",
            "z",
            "p Bonferroni",
            "surer by rank sums",
        ]
        tables.append(Table(f"{pair}: log P(right species), nats", columns, rows, words=(0, 7)))
    return tables


def _probing(summary: dict) -> list:
    rows = []
    for label, r in _of(summary, "probing"):
        controlled = r.get("controlled_advantage")
        controlled = controlled if isinstance(controlled, dict) else {}
        peak = f"{_share(r.get('peak_accuracy'))} ({r.get('peak_layer')}, {r.get('peak_position')})"
        cells = [
            f"{r['n']:,}",
            peak,
            _mean([None if c is None else 100 * c for c in r.get("chance") or []]),
            f"{r.get('n_significant_cells', NOTHING)} of {r.get('total_cells', NOTHING)}",
        ]
        cells += [_share(r.get(key)) for key in ("max_input_position_acc", "mean_thought_advantage", "mean_selectivity")]
        rows.append([Cell(label, "head"), *cells, _points([controlled], "value"), f"{controlled.get('n') or 0:,}"])
    columns = [
        "run",
        "n",
        "peak % (layer, slot)",
        "mean chance %",
        "significant cells",
        "best input %",
        "slot minus input",
        "selectivity",
    ]
    columns += ["above controls, points", "n of that"]
    return [Table("Linear probes", columns, rows, "Controlled: same rows, the answer left out, best control subtracted.")]


def _share(value: object) -> str:
    """A fraction in percent; of a level its accuracy."""
    value = value.get("accuracy", value.get("value")) if isinstance(value, dict) else value
    return NOTHING if value is None else number(100 * value)


def _curriculum(summary: dict) -> list:
    rows, parted = [], []
    for model, found in _by_model(summary, "curriculum"):
        last = [r["epochs"][-1] for r in found if r.get("epochs")]
        stages = ", ".join(dict.fromkeys(str(e.get("stage")) for e in last))
        cells = [
            ", ".join(dict.fromkeys(str(e["epoch"] + 1) for e in last)),
            stages,
            over_seeds([e.get("accuracy") for e in last]),
        ]
        numbers = [_mean([e.get(key) for e in last], digits) for key, digits in (("train_loss", 3), ("vector_distance", 2))]
        rows.append([*_head(model, found), *cells, *numbers])
    for pair, one in summary["curriculum"].get("verification", {}).get("first_difference", {}).items():
        first, lasting = (NOTHING if one.get(key) is None else str(one[key] + 1) for key in ("epoch", "lasting_epoch"))
        floor = (one.get("noise_floor") or {}).get("value")
        sizes = [NOTHING if x is None else form(100 * x) for form, x in ((signed, one.get("difference")), (number, floor))]
        counts = rows_text([e["n"] for e in one.get("epochs", [])]).removeprefix("n = ")
        parted.append([Cell(pair.replace("-", " − "), "head"), counts, first, lasting, *sizes, one.get("reason") or ""])
    columns = ["model", "seeds", "n", "epochs", "stage", "last validation %", "training loss", "vector moved, L2"]
    more = ["models", "n", "first epoch", "from then on", "difference", "noise floor", ""]
    return [
        Table("Where training ended", columns, rows),
        Table("First epoch with a difference above the noise floor, points", more, parted, words=(0, 6)),
    ]


EXPERIMENTS: dict[str, tuple[str, Callable[[dict], list]]] = {  # the section's figure, its tables
    "ood": ("2_accuracy", differences),
    "corruption": ("3_corruption", _corruption),
    "transplants": ("8_transplants", _transplants),
    "probing": ("1_probes", _probing),
    "causal_sanity": ("", _sanity),
    "causal_tracing": ("4_effects", _tracing),
    "psr": ("5_perturbation", _psr),
    "token_count": ("6_token_counts", _token_count),
    "confidence": ("", _confidence),
    "curriculum": ("7_training", _curriculum),
}
