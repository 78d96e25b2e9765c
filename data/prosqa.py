"""ProsQA: random graphs with the statistics of the official files, and a check of any file in their format.

The construction follows Hao et al. 2024 (arXiv 2412.06769), appendix A.2. Where the paper leaves points open or prints
constants that do not give the official data, the choices here were fitted to the official validation file.

    python data/prosqa.py --out data --sizes 17886 300 500 --seed 0
    python data/prosqa.py --check data/prosqa_valid.json

The first writes prosqa_{train,valid,test}.json, each with a sidecar prosqa_*.stats.json; the second verifies the rows of a
file and prints its statistics, and how far the shortcut rules get on it, next to those of the official validation file.
"""

import random
from pathlib import Path

if __package__:
    from . import prosqa_graph as pg
    from . import prosqa_rows as pr
else:  # run as `python data/prosqa.py`
    import prosqa_graph as pg
    import prosqa_rows as pr

HOPS = (3, 6)
NODES = 28  # grown; those without edges are dropped
PARENTS = 1.5  # mean of the Poisson number of parents

# The official validation file: value, and how far the mean of 3,000 generated rows may lie off (None: not compared).
OFFICIAL: dict[str, tuple[float, float | None]] = {
    "nodes": (22.8, 0.4),
    "nodes, least": (17, None),
    "nodes, most": (28, None),
    "edges": (36.3, 1.1),
    "edges, least": (22, None),
    "edges, most": (53, None),
    "hops = 3": (0.413, 0.09),
    "hops = 4": (0.443, 0.09),
    "hops = 5": (0.120, 0.06),
    "hops = 6": (0.023, 0.03),
    "shortest paths to the target": (1.61, 0.17),
    "shortest paths to the target = 1": (0.56, None),
    "shortest paths to the target = 2": (0.32, None),
    "shortest paths to the target = 3": (0.07, None),
    "persons": (2.51, 0.14),
    "persons = 2": (0.60, None),
    "persons = 3": (0.31, None),
    "persons = 4": (0.07, None),
    "in-degree of species": (1.79, 0.04),
    "in-degree of species = 1": (0.49, None),
    "in-degree of species = 2": (0.31, None),
    "in-degree of species = 3": (0.14, None),
    "in-degree of species = 4": (0.04, None),
    "nodes under = root 0 only": (0.40, 0.03),
    "nodes under = root 1 only": (0.52, 0.03),
    "nodes under = both": (0.06, 0.01),
    "nodes under = neither": (0.03, 0.01),
    "asked root is node 1": (0.65, 0.09),
    "out-degree of the asked root": (2.92, 0.25),
    "out-degree of the other root": (3.28, 0.25),
    "in-degree of the correct option": (1.50, 0.15),
    "in-degree of the wrong option": (2.09, 0.22),
    "wrong option's distance from the other root": (2.08, 0.15),
    "wrong option's distance from the other root = 1": (0.21, None),
    "wrong option's distance from the other root = 2": (0.53, None),
    "wrong option's distance from the other root = 3": (0.24, None),
}
OFFICIAL_BASELINES = {  # percent right on the official validation file
    "farther from the nearer of nodes 0 and 1": 95.2,
    "farthest person is farther": 94.5,
    "nearest person is farther": 92.5,
    "longer longest incoming path": 71.7,
    "more ancestors": 69.8,
    "fewer incoming facts": 66.7,
    "search 3 hops back": 70.7,
    "search 4 hops back": 92.8,
    "search 5 hops back": 98.8,
}
OFFICIAL_MEANS = {what: value for what, (value, _) in OFFICIAL.items()}


def leaves_alone(graph: pg.Graph, root: int) -> dict[int, int]:
    """Sinks that `root` (0 or 1) reaches and the other root does not, with their distance from `root`."""
    own, other = graph.dist[root], graph.dist[1 - root]
    return {v: depth for v, depth in own.items() if not graph.children[v] and v not in other}


def draw_row(rng: random.Random) -> pg.Row | None:
    """One draw of a row; None if the graph is rejected (about 7 % are).

    The asked root is the one with the deeper leaf of its own, and the target its deepest: this is what betrays the
    answer in the official rows. The wrong option is any leaf of the other root alone.
    """
    growth = pg.Growth()
    while len(growth.parents) < NODES:
        growth.add_free(rng, PARENTS)
    graph, new = growth.finish()
    if 0 not in new or 1 not in new:
        return None
    leaves = leaves_alone(graph, 0), leaves_alone(graph, 1)
    if not leaves[0] or not leaves[1]:
        return None
    deepest = max(leaves[0].values()), max(leaves[1].values())
    root = rng.randrange(2) if deepest[0] == deepest[1] else int(deepest[1] > deepest[0])
    if not HOPS[0] <= deepest[root] <= HOPS[1]:
        return None
    target = rng.choice([v for v, depth in leaves[root].items() if depth == deepest[root]])
    wrong = rng.choice(list(leaves[1 - root]))
    if len(graph.persons) > len(pg.NAMES):
        return None
    symbols, facts = pg.dress(rng, graph)
    return pg.make_row(rng, graph, symbols, facts, root, target, rng.sample((target, wrong), 2))


def check_file(path: Path) -> None:
    """Verify every row (ValueError names the first bad one), then print statistics and shortcut rules."""
    rows = pr.read_rows(path)
    pr.check_rows(rows, str(path))
    print(f"{path}: {len(rows)} sound rows, none twice")
    print(pr.table(pr.statistics(rows), OFFICIAL_MEANS))
    print("\npercent right, ties counting half\n" + pr.table(pr.baselines(rows), OFFICIAL_BASELINES, decimals=1))


def main(argv: list[str] | None = None) -> None:
    parser = pr.parser(__doc__, sizes=(17886, 300, 500), out="data")
    parser.add_argument("--check", type=Path, metavar="FILE", help="verify this file and write nothing")
    args = parser.parse_args(argv)
    if args.check:
        check_file(args.check)
        return
    pr.make_splits(
        Path(args.out),
        draw_row,
        args.sizes,
        args.seed,
        force=args.force,
        conditions={"hops": HOPS},
        parameters={"generator": "prosqa", "hops": HOPS, "nodes": NODES, "lam": PARENTS},
        official=(OFFICIAL_MEANS, OFFICIAL_BASELINES),
    )


if __name__ == "__main__":
    pr.run_cli(main)
