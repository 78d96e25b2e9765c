"""What a trained model's thoughts are worth to it: the same weights on the same targets, with thoughts on and off.

    python -m analysis.latent_ablation --checkpoint runs/lahr/lahr-abc --data data/cot_val.json --stage 3 --output ablation.json
    python -m analysis.latent_ablation --checkpoint runs/lahr/lahr-abc runs/lahr/lahr-pause runs/lahr/lahr-cot \\
        --data data/cot_val.json --stage all --output ablation.json

The first checkpoint is scored under every condition of scoring.py: on, and off in four ways. The others were trained otherwise
(with pause_curriculum, as plain chain of thought ...); they are scored as they are, on the same problems, and compared with the
first on the tokens that all of them have: those of the answers. Changes are relative to the first one's "on", positive where it
does better, of the loss and of the perplexity under their own names; intervals resample problems, in pairs. Writes JSON, and a
picture (.svg, .png) beside it. Exit code: 0 done, 1 where targets are not the same, 2 a mistake.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/latent_ablation.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.command import (  # noqa: E402
    command,
    parser_of,
)
from analysis.drawing import LOOKS, MUTED, legend, panel, save, sheet, styled  # noqa: E402
from analysis.scoring import CONDITIONS, SCOPES, Scores, has_slots, same_tokens, score, summary  # noqa: E402
from analysis.stats import mcnemar, ratio_of_means  # noqa: E402
from analysis.subject import Problems, Subject  # noqa: E402
from analysis.tables import change, number, percent, table  # noqa: E402
from checkpoint import versions  # noqa: E402
from files import write_json  # noqa: E402

NOTES = {
    "change": "(other - on) / on, as a fraction: positive where the first checkpoint with its thoughts on is better; of the "
    "loss and of the perplexity these are different numbers",
    "off": "off at test time shows reliance only: what a model that was trained with thoughts loses without them, not what "
    "training with thoughts brings; for that compare with models trained otherwise",
    "inert": "inert slots, like the pause modes, compute the same function in one pass as in many: no number of passes is lost",
    "other_models": "other weights, trained otherwise, each on its own form of the problem, where more or fewer steps may "
    "stand before the answer (plain chain of thought reads all of them); only the answers' tokens are common",
    "ci95": "paired percentile bootstrap over problems: of this checkpoint and these problems, not of training",
}
HEAD = ("condition", "n", "tokens", "loss", "perplexity", "token acc.", "exact match", "loss %", "perplexity %", "McNemar p")

# ---------------------------------------------------------------- comparing


def compared(on: Scores, other: Scores, scopes: Sequence[str] = tuple(SCOPES)) -> dict:
    """{scope: {"loss_change", "perplexity_change"}} relative to `on`, each {"value", "ci95", "n", ...} as fractions, and
    "exact_match" (McNemar of on and other; None where answers were not decoded). Raises CheckFailed for other targets."""
    found = {}
    for scope in scopes:
        same_tokens(on, other, scope)
        prefix = SCOPES[scope]
        before, after, tokens = on.column(f"{prefix}loss"), other.column(f"{prefix}loss"), on.column(f"{prefix or 'n_'}tokens")
        loss, gap = ratio_of_means(after, before), ratio_of_means(after - before, tokens)
        found[scope] = {
            "loss_change": _mapped(loss, lambda ratio: ratio - 1),
            "perplexity_change": _mapped(gap, math.expm1),
        }
    decoded = on.records[0]["correct"] is not None and other.records[0]["correct"] is not None
    pair = [[bool(right) for right in x.column("correct")] for x in (on, other)]
    return found | {"exact_match": mcnemar(*pair) if decoded else None}


def _mapped(found: dict, function) -> dict:
    """A bootstrap's value and interval under a rising function."""
    ci95 = found["ci95"] and [function(bound) for bound in found["ci95"]]
    return found | {"value": None if found["value"] is None else function(found["value"]), "ci95": ci95}


def ablate(first: Subject, others: Sequence[Subject], path: Path, stage: int, n: int | None = None, **options) -> dict:
    """Everything about one stage; `options` go to `scoring.score`. `path`: the data file, of which the first n rows."""
    problems = Problems.read(path, first.tokenizer, n)
    on = score(first, problems, stage, **options)
    with_thoughts = bool(on.column("n_latents").any())
    conditions = {"on": {**summary(on), **_hashes(on)}}
    for condition in CONDITIONS[1:] if with_thoughts else ():
        other = score(first, problems, stage, condition, **options)
        conditions[condition] = {**summary(other), **_hashes(other), "against_on": compared(on, other)}
    models = []
    for subject in others:
        other = score(subject, Problems.read(path, subject.tokenizer, n), stage, **options)
        named = {"name": subject.path.parent.name, "label": "another model, trained otherwise", **about(subject)}
        models.append(named | {**summary(other), **_hashes(other), "against_on": compared(on, other, ["answer"])})
    latents = on.column("n_latents")
    return {
        "stage": stage,
        "thoughts": {"mean": float(latents.mean()), "max": int(latents.max())},
        "note": None if with_thoughts else "no thoughts at this stage: there is nothing to take away",
        "conditions": conditions,
        "other_models": models,
    }


def _hashes(scores: Scores) -> dict:
    return {"sha256": scores.sha256, "answer_sha256": scores.answer_sha256}


def about(subject: Subject) -> dict:
    """Which checkpoint this is."""
    config = subject.config
    mode = subject.model.feedback_mode
    return {
        "checkpoint": str(subject.path),
        "checkpoint_sha256": subject.sha256,
        "model_key": config.model_key,
        "feedback_mode": mode,
        "model_config": config.model_options,
    }


# ---------------------------------------------------------------- the command


def shown(stage: dict) -> str:
    """The two tables of a stage, all supervised tokens and answers alone."""
    parts = [
        f"Stage {stage['stage']}: {stage['thoughts']['mean']:.2f} thoughts" + (f"; {stage['note']}" if stage["note"] else "")
    ]
    models = {f"{model['name']} (other model)": model for model in stage["other_models"]}
    for scope, prefix in SCOPES.items():
        lines = stage["conditions"] | (models if scope == "answer" else {})
        rows = []
        for name, found in lines.items():
            against = found.get("against_on", {})
            changes = [change(against.get(scope, {}).get(f"{what}_change")) for what in ("loss", "perplexity")]
            p = (against.get("exact_match") or {}).get("p_value")
            numbers = [number(found[prefix + key]) for key in ("loss", "perplexity")]
            rates = [percent(found[f"{prefix}token_accuracy"]), percent(found["exact_match"])]
            rows.append(
                [name, str(found["n_samples"]), str(found[f"{prefix}n_tokens"]), *numbers, *rates, *changes, number(p, 2)]
            )
        parts += ["All supervised tokens" if scope == "all" else "Answers alone", table(HEAD, rows)]
    return "\n\n".join(parts)


@styled
def draw(result: dict, path: Path) -> None:
    """Relative changes of the loss with their intervals, by condition and stage: `path`.svg and .png."""
    stages = [stage for stage in result["stages"] if len(stage["conditions"]) + len(stage["other_models"]) > 1]
    figure, axes = sheet(1, 2, height=3.4)
    for panel_axes, scope, title in zip(axes[0], SCOPES, ("All supervised tokens", "Answers alone")):
        names = list(dict.fromkeys(name for stage in reversed(stages) for name in _changes(stage, scope)))
        for i, (stage, look) in enumerate(zip(stages, [look for _ in stages for look in LOOKS.values()])):
            changes = {name: found for name, found in _changes(stage, scope).items() if found["value"] is not None}
            at = [names.index(name) + 0.5 * ((i + 0.5) / len(stages) - 0.5) for name in changes]
            values = [100 * found["value"] for found in changes.values()]
            bounds = [[100 * bound for bound in found["ci95"] or [found["value"]] * 2] for found in changes.values()]
            errors = [[abs(bound[side] - value) for value, bound in zip(values, bounds)] for side in (0, 1)]
            style = {"color": look.colour, "marker": look.marker, "ls": "", "elinewidth": 0.9, "capsize": 2.2}
            panel_axes.errorbar(values, at, xerr=errors if values else None, label=f"stage {stage['stage']}", **style)
        n = f"n = {result['data']['n']}, {result['model']['name']}; 95 % interval over problems"
        panel(panel_axes, title, n, "loss above that with thoughts on (%)")
        panel_axes.axvline(0, color=MUTED, lw=1, ls=":")
        panel_axes.set_yticks(range(len(names)), names)
        panel_axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    legend(figure, axes[0, 0])
    save(figure, path)


def _changes(stage: dict, scope: str) -> dict[str, dict]:
    lines = stage["conditions"] | ({m["name"]: m for m in stage["other_models"]} if scope == "answer" else {})
    return {name: found["against_on"][scope]["loss_change"] for name, found in lines.items() if "against_on" in found}


def stages_of(text: str | None, subject: Subject) -> list[int]:
    """`all`, a number, or None for the last one. ValueError where the curriculum has no such stage."""
    last = subject.config.max_latent_stage
    if text == "all":
        return list(range(last + 1))
    if text is not None and (not text.isdecimal() or int(text) > last):
        raise ValueError(f"--stage {text}: must be all, or a stage of {subject.path}, 0 to {last}")
    return [last if text is None else int(text)]


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, "python -m analysis.latent_ablation")
    parser.add_argument("--checkpoint", nargs="+", type=Path, required=True, help="checkpoint files or run folders")
    parser.add_argument("--data", type=Path, required=True, help="held-out problems (JSON)")
    parser.add_argument("--stage", help="a stage of the curriculum, or all (default: its last)")
    parser.add_argument("--output", type=Path, required=True, help="JSON; the picture has the same name")
    parser.add_argument("--epoch", default="final", help="of run folders: final, best or N for checkpoint_N (default: final)")
    parser.add_argument("--num_samples", type=int, help="first rows of the data (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of whose thoughts are swapped (default: 0)")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no_exact_match", action="store_true", help="losses only: answers are not decoded")
    args = parser.parse_args(argv)
    if args.output.suffix != ".json":
        raise ValueError(f"--output {args.output}: must end in .json; the picture is named after it")
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    load = {"epoch": args.epoch, "batch_size": args.batch_size, "device": args.device}
    first, *others = (Subject.load(path, **load) for path in args.checkpoint)
    if not has_slots(first):
        raise ValueError(f"--checkpoint: {first.path} has no thoughts to take away; name a model with thoughts first")
    options = {"exact_match": not args.no_exact_match, "seed": args.seed}
    stages = stages_of(args.stage, first)
    data = Problems.read(args.data, first.tokenizer, args.num_samples)
    result = {
        "schema_version": 1,
        "data": {"path": str(args.data), "sha256": data.sha256, "n": len(data)},
        "model": {"name": first.path.parent.name, **about(first)},
        "settings": options | {"batch_size": first.batch_size},
        "notes": NOTES,
        "stages": [ablate(first, others, args.data, stage, args.num_samples, **options) for stage in stages],
        "versions": versions(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, result)
    draw(result, args.output.with_suffix(""))
    print("\n".join(shown(stage) for stage in result["stages"]))
    print(f"Off at test time shows reliance only. Written: {args.output}, .svg, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
