"""ProsQA rows in bulk: invariants, statistics, rules that ignore the question, files and the generators' command line.

The rules measure how far one gets without following a path from the person asked: in the official validation file,
taking the option that is farther from the nearer root is right in 95 % of the rows.

    rows = json.loads(Path("data/prosqa_valid.json").read_text())
    for row in rows:
        check_row(row)                       # ValueError that says what is wrong
    print(statistics(rows)["nodes"], baselines(rows)["more ancestors"])
"""

import argparse
import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

if __package__:
    from .prosqa_graph import COUNT_RANGES, NAMES, SPECIES, Counts, Graph, Row, parse_question, question_key, sentence
else:  # imported by a script that was run as `python data/...`
    from prosqa_graph import COUNT_RANGES, NAMES, SPECIES, Counts, Graph, Row, parse_question, question_key, sentence

KEYS = ("question", "answer", "steps", "idx_to_symbol", "edges", "root", "target", "neg_target")
SPLITS = ("train", "valid", "test")
MAX_DRAWS = 20_000  # draws of one row before its conditions are called unsatisfiable


# ------------------------------------------------------------------------------------------------------ invariants


def check_row(row: Row, *, counts: bool | Counts = False, hops: tuple[int, int] | None = None, two_chain: bool = False) -> None:
    """ValueError unless the row is a sound ProsQA problem.

    counts: persons, nodes and edges lie in these ranges (True: in COUNT_RANGES); hops: inclusive range of the reasoning
    steps; two_chain: both options are equally far from their own roots and out of reach of the other root.
    """
    missing = [key for key in KEYS if key not in row]
    if missing:
        raise ValueError(f"no key {missing[0]!r}; a row has {', '.join(KEYS)}")
    symbols, root, target, wrong = (row[key] for key in ("idx_to_symbol", "root", "target", "neg_target"))
    n = len(symbols)
    if not all(0 <= v < n for edge in row["edges"] for v in edge) or not all(0 <= v < n for v in (target, wrong)):
        raise ValueError(f"edges, target and neg_target must be nodes 0 to {n - 1}")
    if root not in (0, 1):
        raise ValueError(f"root {root}: only nodes 0 and 1 are asked")
    graph = Graph(n, row["edges"])
    _check_graph(graph, symbols)
    if graph.persons[:2] != [0, 1]:
        raise ValueError("nodes 0 and 1 must be persons, without parents")
    if counts and (error := graph.count_error(COUNT_RANGES if counts is True else counts)):
        raise ValueError(error)
    _check_text(row, graph)
    _check_steps(row, graph, hops)

    if target == wrong or graph.children[target] or graph.children[wrong]:
        raise ValueError("target and neg_target must be two different nodes without children")
    if wrong in graph.dist[root]:
        raise ValueError(f"the wrong option {symbols[wrong]} is reachable from {symbols[root]}, the person asked")
    if two_chain:
        own, other = graph.dist[root], graph.dist[1 - root]
        if target in other:
            raise ValueError(f"the correct option {symbols[target]} is reachable from the root not asked")
        if other.get(wrong) != own[target]:
            raise ValueError(f"options at distances {own[target]} and {other.get(wrong)} from their roots; must be equal")


def check_rows(rows: Sequence[Row], where: str, **conditions) -> None:
    """`check_row` of every row, and no question twice; the ValueError names `where` and the row."""
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        try:
            check_row(row, **conditions)
        except ValueError as error:
            raise ValueError(f"{where}: row {i}: {error}") from error
        if (before := first.setdefault(row["question"], i)) != i:
            raise ValueError(f"{where}: row {i}: question: it is that of row {before}")


def _check_graph(graph: Graph, symbols: list[str]) -> None:
    if len(set(graph.edges)) < len(graph.edges):
        raise ValueError(f"edges: {Counter(graph.edges).most_common(1)[0][0]} occurs twice")
    if not graph.is_acyclic():
        raise ValueError("edges: the graph has a cycle")
    if len(set(symbols)) < len(symbols):
        raise ValueError(f"idx_to_symbol: {Counter(symbols).most_common(1)[0][0]} names two nodes")
    for v, symbol in enumerate(symbols):
        if not graph.parents[v] and not graph.children[v]:
            raise ValueError(f"idx_to_symbol: {symbol} has no edge")
        if symbol not in (SPECIES if graph.parents[v] else NAMES):
            kind = "a species name, since it has" if graph.parents[v] else "a person's name, since it has no"
            raise ValueError(f"idx_to_symbol: {symbol!r} must be {kind} parents")


def _check_text(row: Row, graph: Graph) -> None:
    symbols = row["idx_to_symbol"]
    facts, person, options = parse_question(row["question"])
    if sorted(facts) != sorted((symbols[s], symbols[d]) for s, d in graph.edges):
        raise ValueError("question: the facts are not exactly the edges")
    if person != symbols[row["root"]] or set(options) != {symbols[row["target"]], symbols[row["neg_target"]]}:
        raise ValueError("question: it must ask about root, with target and neg_target as its options")
    if row["answer"] != sentence(person, symbols[row["target"]]):
        raise ValueError(f"answer: {row['answer']!r} is not {sentence(person, symbols[row['target']])!r}")


def _check_steps(row: Row, graph: Graph, hops: tuple[int, int] | None) -> None:
    symbols, steps = row["idx_to_symbol"], row["steps"]
    by_text = {sentence(symbols[s], symbols[d]): (s, d) for s, d in graph.edges}
    at = row["root"]
    for step in steps:
        source, destination = by_text.get(step, (None, None))
        if source != at:
            raise ValueError(f"steps: {step!r} is not a fact about {symbols[at]}")
        at = destination
    if at != row["target"]:
        raise ValueError(f"steps: they end at {symbols[at]}, not at the target {symbols[row['target']]}")
    if len(steps) != graph.dist[row["root"]][at]:
        raise ValueError(f"steps: {len(steps)} hops, but the shortest path has {graph.dist[row['root']][at]}")
    if hops and not hops[0] <= len(steps) <= hops[1]:
        raise ValueError(f"steps: {len(steps)} hops, allowed are {hops[0]} to {hops[1]}")


# ------------------------------------------------------------------------------------------------------ statistics


def statistics(rows: Iterable[Row]) -> dict[str, float]:
    """Means over the rows; `what = value` is a share of the rows, of the species (in-degree) or of the nodes (under)."""
    seen: dict[str, list] = {}

    def note(what: str, *values: float) -> None:
        seen.setdefault(what, []).extend(values)

    for row in rows:
        graph = Graph(len(row["idx_to_symbol"]), row["edges"])
        root, target, wrong = row["root"], row["target"], row["neg_target"]
        other = 1 - root
        below = [set(graph.dist[r]) for r in (0, 1)]
        note("nodes", graph.n)
        note("edges", len(graph.edges))
        note("hops", len(row["steps"]))
        note("shortest paths to the target", graph.shortest_paths(root)[1][target])
        note("persons", len(graph.persons))
        note("in-degree of species", *(len(parents) for parents in graph.parents if parents))
        for v in range(graph.n):
            note("nodes under", ("neither", "root 0 only", "root 1 only", "both")[(v in below[0]) + 2 * (v in below[1])])
        note("asked root is node 1", root == 1)
        note("out-degree of the asked root", len(graph.children[root]))
        note("out-degree of the other root", len(graph.children[other]))
        note("in-degree of the correct option", len(graph.parents[target]))
        note("in-degree of the wrong option", len(graph.parents[wrong]))
        if wrong in below[other]:
            note("wrong option's distance from the other root", graph.dist[other][wrong])

    result: dict[str, float] = {}
    for what, values in seen.items():
        if what != "nodes under":
            result[what] = sum(values) / len(values)
        if what in ("nodes", "edges"):
            result[f"{what}, least"], result[f"{what}, most"] = min(values), max(values)
        elif not what.startswith(("asked", "out-degree", "in-degree of the")):
            result |= {f"{what} = {v}": count / len(values) for v, count in sorted(Counter(values).items())}
    return result


# The larger score is chosen. g: the graph, v: an option, mentions: the words of the facts and the two options, in order.
RULES: dict[str, Callable[[Graph, int], float]] = {
    "farther from the nearer of nodes 0 and 1": lambda g, v: min(g.dist[r].get(v, g.n) for r in (0, 1)),
    "farthest person is farther": lambda g, v: max(below[v] for below in g.dist.values() if v in below),
    "nearest person is farther": lambda g, v: min(below[v] for below in g.dist.values() if v in below),
    "longer longest incoming path": lambda g, v: g.longest_path_to(v),
    "more ancestors": lambda g, v: len(g.ancestors(v)),
    "fewer incoming facts": lambda g, v: -len(g.parents[v]),
    "more persons above": lambda g, v: sum(v in below for below in g.dist.values()),
}
TEXT_RULES: dict[str, Callable[[list[str], tuple[str, str], str], float]] = {
    "first option": lambda words, options, option: -options.index(option),
    "first mentioned": lambda words, options, option: -words.index(option),
    "more mentions": lambda words, options, option: words.count(option),
}


def credit(correct: float, wrong: float) -> float:
    """1 where the rule's score is larger for the correct option, 0 where it is smaller, 0.5 for a tie."""
    return 1.0 if correct > wrong else 0.5 if correct == wrong else 0.0


def baselines(rows: Sequence[Row]) -> dict[str, float]:
    """Percent of the rows that each rule blind to the person asked gets right; a tie counts half.

    `search k hops back` is no such rule: it looks for the right person up to k hops above, else guesses.
    """
    points: Counter[str] = Counter()
    for row in rows:
        symbols, target, wrong = row["idx_to_symbol"], row["target"], row["neg_target"]
        graph = Graph(len(symbols), row["edges"])
        facts, _, options = parse_question(row["question"])
        words = [word for fact in facts for word in fact]
        scores = {name: (rule(graph, target), rule(graph, wrong)) for name, rule in RULES.items()}
        for name, rule in TEXT_RULES.items():
            scores[name] = rule(words, options, symbols[target]), rule(words, options, symbols[wrong])
        for name, pair in scores.items():
            points[name] += credit(*pair)
        for k in (3, 4, 5):
            points[f"search {k} hops back"] += 1.0 if len(row["steps"]) <= k else 0.5
    return {name: 100 * total / len(rows) for name, total in points.items()}


def table(found: dict[str, float], official: dict[str, float] | None = None, decimals: int = 2) -> str:
    """Lines `name  found  official`, a dash for what one of them lacks; other shares that round to zero are left out."""
    official = official or {}
    shown = [name for name, value in found.items() if name in official or round(value, decimals) or " = " not in name]
    names = shown + [name for name in official if name not in found]
    width = max(map(len, names))

    def cell(value: float | None) -> str:
        return f"{'-':>9}" if value is None else f"{value:9.{decimals}f}"

    head = f"{'':{width}}     found" + ("  official" if official else "")
    lines = [f"{n:{width}} {cell(found.get(n))}" + (f" {cell(official.get(n))}" if official else "") for n in names]
    return "\n".join([head, *lines])


# ----------------------------------------------------------------------------------------------------------- files


def draw_rows(
    draw: Callable[[random.Random], Row | list[Row] | None], size: int, seed: int, split: str, seen: set[str]
) -> tuple[list[Row], int]:
    """`size` rows and the number of draws they took. `draw` returns a row or None (rejected).

    Row i depends on (seed, split, i, attempt) only. A problem whose key is in `seen` is drawn again; `seen` grows.
    Where `draw` returns lists (pairs, say), `size` counts lists, and each is kept or drawn again as a whole.
    """
    rows, draws = [], 0
    for i in tqdm(range(size), desc=split, unit="row", disable=not sys.stderr.isatty()):
        for attempt in range(MAX_DRAWS):
            draws += 1
            drawn = draw(random.Random(f"{seed} {split} {i} {attempt}"))
            group = [drawn] if isinstance(drawn, dict) else drawn or []
            keys = {question_key(row["question"]) for row in group}
            if group and len(keys) == len(group) and not keys & seen:
                seen |= keys
                rows += group
                break
        else:
            raise ValueError(f"{split} row {i}: no new row in {MAX_DRAWS} draws; loosen the conditions or ask for fewer")
    return rows, draws


def make_splits(
    out: Path,
    draw: Callable[[random.Random], Row | None],
    sizes: Sequence[int],
    seed: int,
    *,
    conditions: dict,
    parameters: dict,
    force: bool = False,
    official: tuple[dict, dict] = ({}, {}),
) -> None:
    """Draw, check (`conditions`: see check_row) and write prosqa_{train,valid,test}.json and sidecars; print what is in them.

    Test and validation rows are drawn first, so that they stay the same whatever the size of the training split.
    ValueError when a size is not positive, or a file exists and `force` is off.
    """
    paths = {split: out / f"prosqa_{split}.json" for split in SPLITS}
    if min(sizes) < 1:
        raise ValueError(f"sizes: {' '.join(map(str, sizes))}; every split needs at least one row")
    present = [path for path in paths.values() if path.exists()]
    if present and not force:
        raise ValueError(f"{present[0]} exists and may be the official file; choose another --out or add --force")
    seen: set[str] = set()
    drawn = {}
    for split, size in reversed(list(zip(SPLITS, sizes))):
        drawn[split] = draw_rows(draw, size, seed, split, seen)
    for split, (rows, _) in drawn.items():
        check_rows(rows, f"generated {split} rows", **conditions)
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows, draws = drawn[split]
        print(f"{paths[split]}: {len(rows)} rows, {100 * len(rows) / draws:.1f} % of the draws kept")
        sidecar = write_rows(paths[split], rows, parameters | {"seed": seed, "split": split, "draws": draws})
        if split == "train":
            print(table(sidecar["statistics"], official[0]))
            print(table(sidecar["baselines"], official[1], decimals=1))


def write_rows(path: Path, rows: list[Row], parameters: dict, **more) -> dict:
    """Write the rows as one line of JSON, as the official files are, and `<stem>.stats.json`; return the latter.

    The sidecar holds statistics, baselines, the file's SHA-256, the parameters, and `more` at its top level.
    """
    text = json.dumps(rows)
    sidecar = {
        "file": path.name,
        "rows": len(rows),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        **more,
        "parameters": parameters,
        "statistics": statistics(rows),
        "baselines": baselines(rows),
    }
    _write_text(path, text)
    _write_text(path.with_suffix(".stats.json"), json.dumps(sidecar, indent=1) + "\n")
    return sidecar


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a ProsQA file; ValueError when it is no JSON list of objects."""
    try:
        rows = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a JSON list of rows")
    return rows


# ---------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Shows the module's docstring as it stands, and a mistake in one line."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        self.exit(2, f"error: {message}; see --help\n")


def parser(doc: str, sizes: Sequence[int], out: str) -> argparse.ArgumentParser:
    """The options that all generators share, with these defaults."""
    made = Parser(doc)
    made.add_argument("--out", default=out, help=f"folder to write to (default: {out})")
    made.add_argument(
        "--sizes", type=int, nargs=3, default=sizes, metavar=("TRAIN", "VALID", "TEST"), help="rows of the three splits"
    )
    made.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: 0)")
    made.add_argument("--force", action="store_true", help="overwrite files, be they the official ones")
    return made


def run_cli(main: Callable[[], None]) -> None:
    """Run a command; a user's mistake becomes one line on stderr and exit status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
