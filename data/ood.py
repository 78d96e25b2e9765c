"""Evaluation sets for ProsQA: rows on which no rule gets far without reading who is asked, easy and beyond training.

    python data/ood.py --seed 0                              # data/ood, for models trained on the official data
    python data/ood.py --seed 0 --preset quickstart          # data/quickstart/ood, for those of scripts/quickstart.sh
    python data/ood.py --sets ood_dag edge_pairs --force     # some of them again

Each file has a sidecar <file>.stats.json that says what the set is (`kind`: see KINDS in ood_sets.py), how it was made, and how
far the shortcut rules get on it. The official files are read from the folder above --out: no question of theirs comes back,
and swap_official_*.json ask theirs about the other person. Everything is checked (ood_checks.py) before anything is written.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __package__:
    from . import prosqa_graph as pg
    from . import prosqa_rows as pr
    from .edge_pairs import EdgePairs
    from .edge_pairs import draw_pair as draw_edge_pair
    from .ood_checks import check_members, imbalance, tokens_at_most
    from .ood_sets import PRESETS, SWAP_OFFICIAL, EvalSet, Preset
    from .two_chain import draw_pair, draw_row
else:  # run as `python data/ood.py`
    import prosqa_graph as pg
    import prosqa_rows as pr
    from edge_pairs import EdgePairs
    from edge_pairs import draw_pair as draw_edge_pair
    from ood_checks import check_members, imbalance, tokens_at_most
    from ood_sets import PRESETS, SWAP_OFFICIAL, EvalSet, Preset
    from two_chain import draw_pair, draw_row

REDRAWS = 5  # of a set on which a rule strays from a coin


@dataclass
class Drawn:
    """Rows of a set, and how they came about: what the sidecar records beside `EvalSet.facts`."""

    spec: EvalSet
    rows: list[pg.Row]
    record: dict = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------------- drawing


def draw_set(name: str, spec: EvalSet, seed: int, seen: set[str]) -> Drawn:
    """A set that no rule blind to the person solves; its questions are added to `seen` and were not there.

    Rows depend on (seed, name, sub-seed) only, bar questions seen before. The sub-seed is 0, or one more for each set thrown
    away because a rule strayed from a coin; ValueError after REDRAWS of these.
    """
    thrown_away: list[str] = []
    while len(thrown_away) <= REDRAWS:
        sub_seed, fresh = len(thrown_away), set(seen)
        rows, draws = draw_once(f"{name} {sub_seed}", spec, seed, fresh)
        problem = imbalance(rows, spec)
        if problem is None:
            seen |= fresh
            record = {"seed": seed, "sub_seed": sub_seed, "redraws": thrown_away, "draws": draws, "kept": spec.size / draws}
            return Drawn(spec, rows, record)
        thrown_away.append(problem)
    raise ValueError(f"{name}: {thrown_away[-1]} (after {REDRAWS} redraws); another --seed or other parameters may help")


def draw_once(stream: str, spec: EvalSet, seed: int, seen: set[str]) -> tuple[list[pg.Row], int]:
    """The rows of a set from one random stream, fair or not, and the draws they took; `seen` grows."""
    generator = spec.generator
    if isinstance(generator, EdgePairs):
        return _draw_edge_pairs(stream, spec, seed, seen)
    draw = draw_pair if spec.pairs else draw_row
    rows, draws = pr.draw_rows(lambda rng: draw(rng, generator), spec.size, seed, stream, seen)
    return (_numbered(rows) if spec.pairs else rows), draws


def _draw_edge_pairs(stream: str, spec: EvalSet, seed: int, seen: set[str]) -> tuple[list[pg.Row], int]:
    """As many pairs of each number of hops, in turn."""
    low, high = spec.generator.hops
    sizes = {hops: len(range(hops - low, spec.size, high - low + 1)) for hops in range(low, high + 1)}
    piles, draws = {}, 0
    for hops, size in sizes.items():
        rows, more = pr.draw_rows(
            lambda rng, hops=hops: draw_edge_pair(rng, spec.generator, hops), size, seed, f"{stream} {hops} hops", seen
        )
        piles[hops], draws = iter(rows), draws + more
    turns = [low + i % len(sizes) for i in range(spec.size)]
    return _numbered([next(piles[hops]) for hops in turns for _ in range(2)]), draws


def _numbered(rows: Sequence[pg.Row]) -> list[pg.Row]:
    return [row | {"pair_id": i // 2, "member": i % 2} for i, row in enumerate(rows)]


def ask_other_person(rng: random.Random, row: pg.Row) -> pg.Row:
    """The row with the other root asked: the wrong option becomes right, and the path another; facts and options stay.

    ValueError when the other root does not reach the wrong option, as the construction of ProsQA promises.
    """
    symbols, root = row["idx_to_symbol"], 1 - row["root"]
    graph = pg.Graph(len(symbols), row["edges"])
    if row["neg_target"] not in graph.dist[root]:
        raise ValueError(f"neg_target: {symbols[row['neg_target']]} is not below {symbols[root]}, the root not asked")
    facts, _, options = pg.parse_question(row["question"])
    text = [pg.sentence(*fact) for fact in facts]
    return pg.make_row(rng, graph, symbols, text, root, row["neg_target"], [symbols.index(word) for word in options])


def swap_file(path: Path, spec: EvalSet, seed: int, known: set[str]) -> Drawn:
    """All rows of an official file about the other person (`official_row`: which one), but for questions in `known`."""
    official = pr.read_rows(path)
    pr.check_rows(official, str(path), two_chain=spec.two_chain)
    rows = []
    for i, row in enumerate(official):
        try:
            swapped = ask_other_person(random.Random(f"{seed} {swap_name(path)} {i}"), row) | {"official_row": i}
        except ValueError as error:
            raise ValueError(f"{path}: row {i}: {error}") from error
        if pg.question_key(swapped["question"]) not in known:
            rows.append(swapped)
    if not rows:
        raise ValueError(f"{path}: every question about the other person is in a file already")
    record = {"seed": seed, "official": path.name, "official_rows": len(official), "in_another_file": len(official) - len(rows)}
    return Drawn(spec, rows, record)


# ------------------------------------------------------------------------------------------------------------- files


def swap_name(official: Path) -> str:
    """The set made from an official file: prosqa_valid.json gives swap_official_valid."""
    return f"{SWAP_OFFICIAL}_{official.stem.removeprefix('prosqa_')}"


def draw_sets(preset: Preset, names: Sequence[str], seed: int, official: Sequence[Path], known: set[str]) -> dict[str, Drawn]:
    """The sets of these names, checked; no question is in two of them or in `known`, which grows."""
    drawn: dict[str, Drawn] = {}
    if SWAP_OFFICIAL in names:  # first: their questions are given, those of the others can be drawn again
        for path in official:
            drawn[swap_name(path)] = one = swap_file(path, preset.sets[SWAP_OFFICIAL], seed, known)
            known |= {pg.question_key(row["question"]) for row in one.rows}
    for name, spec in preset.sets.items():
        if name in names and name != SWAP_OFFICIAL:
            drawn[name] = draw_set(name, spec, seed, known)
    for name, one in drawn.items():
        check_members(one.rows, one.spec, f"generated {name}", preset)
    return drawn


def write_sets(out: Path, preset: Preset, drawn: dict[str, Drawn], against: dict[str, int]) -> dict[str, dict]:
    """Write files and sidecars; the sidecars by name. against: rows of each file whose questions were avoided."""
    out.mkdir(parents=True, exist_ok=True)
    sidecars = {}
    for name, one in drawn.items():
        facts = [len(row["edges"]) for row in one.rows]
        most = max(tokens_at_most(row, preset) for row in one.rows)
        about = {"preset": preset.name, **one.spec.facts(), "facts": [min(facts), max(facts)], "tokens_at_most": most}
        parameters = one.spec.parameters() | one.record | {"against": against}
        sidecars[name] = pr.write_rows(out / f"{name}.json", one.rows, parameters, **about)
    return sidecars


def make_sets(
    preset: Preset,
    out: Path,
    seed: int = 0,
    *,
    names: Sequence[str] | None = None,
    official: Sequence[Path] | None = None,
    against: Sequence[Path] = (),
    force: bool = False,
) -> dict[str, dict]:
    """Draw, check and write the sets of `preset` (some of them, with `names`) to `out`; the sidecars by file name.

    official: files to ask about the other person (default: those that the preset names, in the folder above `out`). No
    question comes back that is in them, in that folder's splits, in `against`, or in a set in `out` that is not made anew.
    ValueError for an unknown name, for files that are missing, and for one that exists while `force` is off.
    """
    folder = out.parent
    if unknown := sorted(set(names or ()) - preset.sets.keys()):
        raise ValueError(f"--sets: no set {unknown[0]!r} in preset {preset.name}; it has {', '.join(preset.sets)}")
    if official is None:
        official = [path for name in preset.official if (path := folder / name).is_file()]
    if names is None:
        names = [name for name in preset.sets if official or name != SWAP_OFFICIAL]
    elif SWAP_OFFICIAL in names and not official:
        raise ValueError(f"no {' or '.join(preset.official)} in {folder}; name the file with --official")
    swaps = [swap_name(path) for path in official] if SWAP_OFFICIAL in names else []
    if len(set(swaps)) < len(swaps):
        raise ValueError("--official: two files of one name; rename one")

    stems = {name for name in names if name != SWAP_OFFICIAL} | set(swaps)
    present = [path for path in sorted(out.glob("*.json")) if not path.name.endswith(".stats.json")]
    in_the_way = [path for path in present if path.stem in stems]
    if in_the_way and not force:
        raise ValueError(f"{in_the_way[0]} exists; choose another --out or add --force")
    splits = [path for split in pr.SPLITS if (path := folder / f"prosqa_{split}.json").is_file()]
    kept = [path for path in present if path.stem not in stems]
    others = {path.resolve(): pr.read_rows(path) for path in [*splits, *official, *against, *kept]}
    known = {pg.question_key(row["question"]) for rows in others.values() for row in rows}
    drawn = draw_sets(preset, names, seed, official, known)
    return write_sets(out, preset, drawn, {path.name: len(rows) for path, rows in others.items()})


# ------------------------------------------------------------------------------------------------------ command line


def rules_table(columns: dict[str, dict[str, float]]) -> str:
    """One line a rule, one column a file: percent right."""
    rules = list(next(iter(columns.values())))
    width = max(map(len, rules))
    lines = [" ".join([f"{rule:{width}}", *(f"{found[rule]:{len(c)}.1f}" for c, found in columns.items())]) for rule in rules]
    return "\n".join([" ".join([" " * width, *columns]), *lines])


def main(argv: list[str] | None = None) -> None:
    parser = pr.Parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="prosqa", help="the data the models know (default: prosqa)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: data/ood or data/quickstart/ood)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: 0)")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="only these sets")
    parser.add_argument("--official", type=Path, nargs="+", metavar="FILE", help="files to ask about the other person")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="FILE", help="more files whose questions to avoid"
    )
    parser.add_argument("--force", action="store_true", help="overwrite sets that exist")
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    out = args.out or Path(preset.out)
    made = make_sets(preset, out, args.seed, names=args.sets, official=args.official, against=args.against, force=args.force)
    for name, sidecar in made.items():
        parameters = sidecar["parameters"]
        kept = f", {100 * parameters['kept']:.1f} % of the draws kept" if "kept" in parameters else ""
        if parameters.get("in_another_file"):
            kept = f", {parameters['in_another_file']} left out: their questions are in another file"
        again = f", drawn again for {'; '.join(parameters['redraws'])}" if parameters.get("redraws") else ""
        low, high = sidecar["facts"]
        print(f"{out / name}.json: {sidecar['rows']} rows of {low} to {high} facts{kept}{again}")
    if not args.sets and not any(name.startswith(SWAP_OFFICIAL) for name in made):
        print(f"{SWAP_OFFICIAL}: not made, no {' or '.join(preset.official)} in {out.parent} and no --official")
    official = args.official or [path for name in preset.official if (path := out.parent / name).is_file()]
    columns = {path.stem: pr.baselines(pr.read_rows(path)) for path in official}
    print("\npercent right without reading who is asked (`search`: with), ties counting half")
    print(rules_table(columns | {name: sidecar["baselines"] for name, sidecar in made.items()}))


if __name__ == "__main__":
    pr.run_cli(main)
