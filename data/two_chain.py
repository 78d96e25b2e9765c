"""Two-chain ProsQA: rows that no rule can solve without reading who is asked.

Under each of the two roots hangs a chain of the same length; the options are the two chain ends, and a fair coin chooses
which root is asked. Whatever a rule reads from the graph alone, it is right half of the time. (In the official rows the
correct option is usually the deeper one, which gives it away without following any path.)

    python data/two_chain.py --out data/quickstart --sizes 40000 300 500 --hops 2 3 --nodes 6 8 --species 12

writes prosqa_{train,valid,test}.json in the official row format, each with a sidecar prosqa_*.stats.json.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__:
    from . import prosqa_graph as pg
    from . import prosqa_rows as pr
else:  # run as `python data/two_chain.py`
    import prosqa_graph as pg
    import prosqa_rows as pr


@dataclass(frozen=True)
class TwoChain:
    """Parameters of the generator; ValueError when no graph can satisfy them.

    hops, nodes: inclusive ranges of the chain length and of the nodes grown (roots included, before edgeless nodes are
    dropped); hop_weights: one weight per chain length, uniform if None; lam: mean number of parents; species, names: how
    many words to draw from; accept(graph, ends): an extra condition on the graph and the two chain ends.
    """

    hops: tuple[int, int] = (3, 6)
    hop_weights: tuple[float, ...] | None = None
    nodes: tuple[int, int] = (28, 28)
    lam: float = 1.5
    species: int = len(pg.SPECIES)
    names: int = len(pg.NAMES)
    accept: Callable[[pg.Graph, tuple[int, int]], bool] | None = None

    def __post_init__(self):
        (h_low, h_high), (n_low, n_high) = self.hops, self.nodes
        if not 1 <= h_low <= h_high:
            raise ValueError(f"hops: {h_low} {h_high} is no range; give LOW HIGH with 1 <= LOW <= HIGH")
        if not n_low <= n_high or n_high < 2 * h_high + 2:
            raise ValueError(f"nodes: {n_low} {n_high}; two chains of {h_high} hops need at least {2 * h_high + 2} nodes")
        if not self.lam > 0:
            raise ValueError(f"lambda: {self.lam}; the mean number of parents must be positive")
        if not n_high - 2 <= self.species <= len(pg.SPECIES):
            raise ValueError(f"species: {self.species}; {n_high} nodes need {n_high - 2} to {len(pg.SPECIES)}")
        if not 2 <= self.names <= len(pg.NAMES):
            raise ValueError(f"names: {self.names}; allowed are 2 to {len(pg.NAMES)}")
        weights = self.hop_weights
        if weights is not None and (len(weights) != h_high - h_low + 1 or min(weights) < 0 or not sum(weights) > 0):
            raise ValueError(f"hop-weights: {weights}; give one weight >= 0 for each of {h_low}..{h_high} hops")

    def parameters(self) -> dict:
        """What the sidecar records."""
        return {key: value for key, value in asdict(self).items() if key != "accept"}


def grow(rng: random.Random, hops: int, nodes: int, lam: float) -> tuple[pg.Graph, tuple[int, int]]:
    """A graph with a chain of `hops` edges under each root, and the two chain ends (below root 0, below root 1).

    Each chain node hangs from the one before it and from nodes under the same root alone that are no shallower, so that
    its distance from its root is its place in the chain, and from the other root infinite.
    """
    growth = pg.Growth()
    turns = [0, 1] * hops
    rng.shuffle(turns)
    turn_at = dict(zip(sorted(rng.sample(range(2, nodes), 2 * hops)), turns))
    tip, length = [0, 1], [0, 0]
    for i in range(2, nodes):
        if i not in turn_at:
            growth.add_free(rng, lam, closed=[tip[c] for c in (0, 1) if length[c] == hops])
            continue
        chain = turn_at[i]
        label, depth, before = growth.label[chain], length[chain], tip[chain]
        pool = [v for v in range(i) if growth.label[v] == label and growth.depth[v] >= depth and v != before]
        if rng.random() < 0.2:
            pool += [v for v in range(i) if growth.label[v] == 0]
        more = growth.pick(rng, pool, pg.poisson(rng, lam) - 1)
        length[chain] += 1
        tip[chain] = growth.add([before, *more], depth=length[chain])
    graph, new = growth.finish()
    return graph, (new[tip[0]], new[tip[1]])


def draw_graph(rng: random.Random, spec: TwoChain) -> tuple[pg.Graph, tuple[int, int]] | None:
    """A graph and its chain ends under `spec`; None if the draw does not meet its conditions."""
    lengths = range(spec.hops[0], spec.hops[1] + 1)
    hops = rng.choices(lengths, spec.hop_weights)[0]
    graph, ends = grow(rng, hops, rng.randint(max(spec.nodes[0], 2 * hops + 2), spec.nodes[1]), spec.lam)
    if len(graph.persons) > spec.names or (spec.accept and not spec.accept(graph, ends)):
        return None
    return graph, ends


def draw_row(rng: random.Random, spec: TwoChain) -> pg.Row | None:
    """A row in the official format, a coin having chosen the root; None if the draw does not meet the conditions."""
    drawn = draw_graph(rng, spec)
    if drawn is None:
        return None
    graph, ends = drawn
    symbols, facts = pg.dress(rng, graph, pg.NAMES[: spec.names], pg.SPECIES[: spec.species])
    root = rng.randrange(2)
    return pg.make_row(rng, graph, symbols, facts, root, ends[root], rng.sample(ends, 2))


def draw_pair(rng: random.Random, spec: TwoChain) -> list[pg.Row] | None:
    """Two rows with the same facts and options, each root asked once; None if the draw does not meet the conditions."""
    drawn = draw_graph(rng, spec)
    if drawn is None:
        return None
    graph, ends = drawn
    symbols, facts = pg.dress(rng, graph, pg.NAMES[: spec.names], pg.SPECIES[: spec.species])
    options = rng.sample(ends, 2)
    return [pg.make_row(rng, graph, symbols, facts, root, ends[root], options) for root in rng.sample((0, 1), 2)]


def main(argv: list[str] | None = None) -> None:
    parser = pr.parser(__doc__, sizes=(40000, 300, 500), out="data/quickstart")
    parser.add_argument("--hops", type=int, nargs=2, default=(2, 3), metavar=("LOW", "HIGH"), help="chain lengths")
    parser.add_argument("--hop-weights", type=float, nargs="+", help="one weight per chain length (default: uniform)")
    parser.add_argument("--nodes", type=int, nargs=2, default=(6, 8), metavar=("LOW", "HIGH"), help="nodes grown")
    parser.add_argument("--species", type=int, default=12, help="species words to draw from")
    parser.add_argument("--names", type=int, default=len(pg.NAMES), help="names to draw from")
    parser.add_argument("--lambda", dest="lam", type=float, default=1.5, help="mean number of parents of a node")
    args = parser.parse_args(argv)
    weights = tuple(args.hop_weights) if args.hop_weights else None
    spec = TwoChain(tuple(args.hops), weights, tuple(args.nodes), args.lam, args.species, args.names)
    pr.make_splits(
        Path(args.out),
        lambda rng: draw_row(rng, spec),
        args.sizes,
        args.seed,
        force=args.force,
        conditions={"hops": spec.hops, "two_chain": True},
        parameters={"generator": "two_chain", **spec.parameters()},
    )


if __name__ == "__main__":
    pr.run_cli(main)
