"""Edge pairs: two questions that differ in one word, and in their answer.

Under root B alone hang two inner nodes, q1 above sink s1 and q2 above sink s2. Root A is asked, with the options s1 and s2.
The first member of a pair holds the fact x -> q1, where x is A or lies under A alone; the second holds x -> q2 at the same
place of the same list. Whoever answers both has followed that edge. B reaches both options in both members.

    pair = draw_pair(random.Random(0), EdgePairs(hops=(3, 4)), hops=3)   # two rows, or None
    check_edge_pair(*pair)                                               # ValueError that says what is wrong
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

if __package__:
    from . import prosqa_graph as pg
    from . import prosqa_rows as pr
else:  # imported by a script that was run as `python data/...`
    import prosqa_graph as pg
    import prosqa_rows as pr

UNBALANCED = "more persons above"  # one edge cannot balance it: the option that A reaches has a person more above it
Place = tuple[int, tuple[int, int], tuple[int, int]]  # x, (q1, s1), (q2, s2)


@dataclass(frozen=True)
class EdgePairs:
    """Parameters of the generator.

    hops: inclusive range of the number of facts from A to the option it reaches; nodes: inclusive range of the nodes grown;
    lam: mean number of parents; least: parents that a node other than the roots has at least (1 keeps small graphs in one
    piece); species, names: how many words to draw from; counts: what the finished graph may hold.
    """

    hops: tuple[int, int] = (3, 4)
    nodes: tuple[int, int] = (28, 28)
    lam: float = 1.5
    least: int = 0
    species: int = len(pg.SPECIES)
    names: int = len(pg.NAMES)
    counts: pg.Counts = field(default_factory=lambda: dict(pg.COUNT_RANGES))

    def __post_init__(self):
        if not 2 <= self.hops[0] <= self.hops[1]:
            raise ValueError(f"hops: {self.hops}; edge pairs need a range of at least 2 (x -> q and q -> s)")
        if not 6 <= self.nodes[0] <= self.nodes[1]:
            raise ValueError(f"nodes: {self.nodes}; edge pairs need a range of at least 6")

    def parameters(self) -> dict:
        """What the sidecar records."""
        return asdict(self)


def draw_pair(rng: random.Random, spec: EdgePairs, hops: int) -> list[pg.Row] | None:
    """Two rows with a `hinge` each, [x, q], the edge that the other lacks; None if the graph has no place for it."""
    growth, size = pg.Growth(), rng.randint(*spec.nodes)
    while len(growth.parents) < size:
        growth.add_free(rng, spec.lam, least=spec.least)
    graph, new = growth.finish()
    if 0 not in new or 1 not in new or len(graph.persons) > spec.names or graph.n - len(graph.persons) > spec.species:
        return None
    a, b = rng.sample((0, 1), 2)
    found = list(places(graph, a, b, hops))
    for x, (q1, s1), (q2, s2) in rng.sample(found, len(found)):
        members = _with_edge(graph, x, q1), _with_edge(graph, x, q2)
        if all(m.count_error(spec.counts) is None for m in members) and _balanced(members, s1, s2):
            break
    else:
        return None

    symbols, facts = pg.dress(rng, members[0], pg.NAMES[: spec.names], pg.SPECIES[: spec.species])
    at = facts.index(pg.sentence(symbols[x], symbols[q1]))
    other_facts = [*facts[:at], pg.sentence(symbols[x], symbols[q2]), *facts[at + 1 :]]
    options = rng.sample((s1, s2), 2)
    return [
        pg.make_row(rng, members[0], symbols, facts, a, s1, options) | {"hinge": [x, q1]},
        pg.make_row(rng, members[1], symbols, other_facts, a, s2, options) | {"hinge": [x, q2]},
    ]


def places(graph: pg.Graph, a: int, b: int, hops: int) -> Iterator[Place]:
    """All (x, (q1, s1), (q2, s2)) such that x -> q1 puts s1 `hops` facts below A, and x -> q2 puts s2 there."""
    under_a = [x for x in graph.dist[a] if x not in graph.dist[b]]
    under_b = {v for v in graph.dist[b] if v not in graph.dist[a]}  # b itself is no q: it reaches every s
    below = {q: graph.shortest_paths(q)[0] for q in sorted(under_b) if graph.children[q]}
    legs: dict[int, list[tuple[int, int]]] = {}  # length: inner node and sink that far below it
    for q in below:
        for s, length in below[q].items():
            if s in under_b and not graph.children[s]:
                legs.setdefault(length, []).append((q, s))
    for x in under_a:
        fitting = legs.get(hops - 1 - graph.dist[a][x], [])
        for q1, s1 in fitting:
            for q2, s2 in fitting:
                if s2 not in below[q1] and s1 not in below[q2]:
                    yield x, (q1, s1), (q2, s2)


def _with_edge(graph: pg.Graph, source: int, destination: int) -> pg.Graph:
    return pg.Graph(graph.n, sorted([*graph.edges, (source, destination)], key=lambda edge: edge[1]))


def _balanced(members: tuple[pg.Graph, pg.Graph], s1: int, s2: int) -> bool:
    """Whether each rule blind to the person asked is right in one member only, or tied in both."""
    first, second = members
    return all(
        pr.credit(rule(first, s1), rule(first, s2)) + pr.credit(rule(second, s2), rule(second, s1)) == 1.0
        for name, rule in pr.RULES.items()
        if name != UNBALANCED
    )


def check_edge_pair(first: pg.Row, second: pg.Row) -> None:
    """ValueError unless these sound rows are an edge pair: one word apart, options exchanged, rules balanced."""
    if first["root"] != second["root"] or first["idx_to_symbol"] != second["idx_to_symbol"]:
        raise ValueError("root, idx_to_symbol: members of a pair have the same")
    if (first["target"], first["neg_target"]) != (second["neg_target"], second["target"]):
        raise ValueError("target: the other member's must be neg_target")
    if len(first["steps"]) != len(second["steps"]):
        raise ValueError(f"steps: {len(first['steps'])} and {len(second['steps'])} hops; members of a pair have the same")
    words = first["question"].split(), second["question"].split()
    apart = sum(one != other for one, other in zip(*words))
    if len(words[0]) != len(words[1]) or apart != 1:
        raise ValueError(f"question: {apart} words differ between the members, must be one")
    rest = []
    for row in (first, second):
        if row.get("hinge") not in row["edges"]:
            raise ValueError(f"hinge: {row.get('hinge')} is no edge of the row")
        rest.append(sorted(edge for edge in row["edges"] if edge != row["hinge"]))
        graph = pg.Graph(len(row["idx_to_symbol"]), row["edges"])
        if not {row["target"], row["neg_target"]} <= graph.dist[1 - row["root"]].keys():
            raise ValueError("neg_target: the root not asked must reach both options")
    if rest[0] != rest[1]:
        raise ValueError("edges: without their hinges the members must be the same graph")
    graphs = tuple(pg.Graph(len(row["idx_to_symbol"]), row["edges"]) for row in (first, second))
    if not _balanced(graphs, first["target"], second["target"]):
        raise ValueError("a rule blind to the person asked is right in both members, or in none")
