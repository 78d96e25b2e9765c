"""ProsQA graphs and their text: grow a graph, name its nodes, write it as a question, read a question back.

A row asks `Is Tom a lempus or scrompus?` after a shuffled list of facts, one per edge of an acyclic graph. Nodes without
parents are persons, all others species; nodes 0 and 1 are the two roots that may be asked. Row format: github.com/
facebookresearch/coconut; construction: Hao et al. 2024 (arXiv 2412.06769), appendix A.2, with constants refitted.

    growth = Growth()
    while len(growth.parents) < 28:
        growth.add_free(rng, 1.5)
    graph, _ = growth.finish()
    symbols, facts = dress(rng, graph)
    row = make_row(rng, graph, symbols, facts, root=0, target=9, options=(9, 12))
"""

import math
import random
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise

NAMES = [
    "Alex",
    "Bob",
    "Carol",
    "Davis",
    "Eva",
    "Fae",
    "Gabriel",
    "Jack",
    "Max",
    "Oliver",
    "Polly",
    "Rex",
    "Sally",
    "Sam",
    "Stella",
    "Tom",
    "Wren",
]
SPECIES = [
    "bompus",
    "boompus",
    "brimpus",
    "chorpus",
    "dumpus",
    "felpus",
    "fompus",
    "gerpus",
    "gorpus",
    "grimpus",
    "gwompus",
    "hilpus",
    "impus",
    "jelpus",
    "jompus",
    "kerpus",
    "lempus",
    "lorpus",
    "numpus",
    "quimpus",
    "rempus",
    "rompus",
    "rorpus",
    "scrompus",
    "shumpus",
    "sterpus",
    "storpus",
    "terpus",
    "timpus",
    "tumpus",
    "vumpus",
    "worpus",
    "wumpus",
    "yerpus",
    "yimpus",
    "yumpus",
    "zhorpus",
    "zumpus",
]

Row = dict
Counts = dict[str, tuple[int, int]]  # inclusive ranges of "persons", "nodes", "edges"

COUNT_RANGES: Counts = {"persons": (2, 6), "nodes": (17, 28), "edges": (22, 54)}  # keeps prompts as long as in training


# ---------------------------------------------------------------------------------------------------------- graphs


class Graph:
    """An acyclic graph of nodes 0..n-1 with `edges` [(source, destination)]; `dist[p]` = distances below person p."""

    def __init__(self, n: int, edges: Iterable[Sequence[int]]):
        self.n, self.edges = n, [tuple(edge) for edge in edges]
        self.parents: list[list[int]] = [[] for _ in range(n)]
        self.children: list[list[int]] = [[] for _ in range(n)]
        for source, destination in self.edges:
            self.parents[destination].append(source)
            self.children[source].append(destination)
        self.persons = [v for v in range(n) if not self.parents[v]]

    @cached_property
    def dist(self) -> dict[int, dict[int, int]]:
        return {p: self.shortest_paths(p)[0] for p in self.persons}

    def shortest_paths(self, source: int) -> tuple[dict[int, int], dict[int, int]]:
        """Distance from `source` and number of shortest paths, for every node that `source` reaches."""
        distance, count, queue = {source: 0}, {source: 1}, [source]
        for v in queue:
            for child in self.children[v]:
                if child not in distance:
                    distance[child], count[child] = distance[v] + 1, 0
                    queue.append(child)
                if distance[child] == distance[v] + 1:
                    count[child] += count[v]
        return distance, count

    def random_shortest_path(self, rng: random.Random, source: int, target: int) -> list[int]:
        """Nodes of a path drawn uniformly from all shortest paths source -> target."""
        distance, count = self.shortest_paths(source)
        path = [target]
        while path[-1] != source:
            before = [p for p in self.parents[path[-1]] if distance.get(p) == distance[path[-1]] - 1]
            path.append(rng.choices(before, [count[p] for p in before])[0])
        return path[::-1]

    def ancestors(self, v: int) -> set[int]:
        found, queue = set(), [v]
        for u in queue:
            new = set(self.parents[u]) - found
            found |= new
            queue.extend(new)
        return found

    def longest_path_to(self, v: int) -> int:
        """Edges of the longest path that ends in `v`."""
        longest: dict[int, int] = {}
        above = self.ancestors(v) | {v}
        while len(longest) < len(above):
            for u in above - longest.keys():
                if all(p in longest for p in self.parents[u]):
                    longest[u] = max((longest[p] + 1 for p in self.parents[u]), default=0)
        return longest[v]

    def is_acyclic(self) -> bool:
        missing = [len(parents) for parents in self.parents]
        order = list(self.persons)
        for v in order:
            for child in self.children[v]:
                missing[child] -= 1
                if missing[child] == 0:
                    order.append(child)
        return len(order) == self.n

    def count_error(self, ranges: Counts = COUNT_RANGES) -> str | None:
        """What lies outside `ranges`, in words; None if all is well."""
        for what, found in {"persons": len(self.persons), "nodes": self.n, "edges": len(self.edges)}.items():
            low, high = ranges[what]
            if not low <= found <= high:
                return f"{found} {what}, allowed are {low} to {high}"
        return None


class Growth:
    """A graph while it grows: node i has `parents[i]`, `label[i]` (bit mask of the roots above) and `depth[i]`."""

    def __init__(self):
        self.parents: list[list[int]] = [[], []]
        self.label, self.depth = [1, 2], [0, 0]

    def add(self, parents: list[int], depth: int | None = None) -> int:
        label = 0
        for p in parents:
            label |= self.label[p]
        self.parents.append(parents)
        self.label.append(label)
        self.depth.append(min((self.depth[p] + 1 for p in parents), default=0) if depth is None else depth)
        return len(self.parents) - 1

    def add_free(self, rng: random.Random, lam: float, closed: Sequence[int] = (), least: int = 0) -> int:
        """Add a node with Poisson(lam) parents from under root 0 alone (.35), root 1 alone (.45) or anywhere (.20).

        No node of `closed` becomes a parent; with `least` 1 the node has a parent, so that it is no person.
        """
        k, u = max(least, poisson(rng, lam)), rng.random()
        wanted = 1 if u <= 0.35 else 2 if u <= 0.80 else None
        pool = [v for v, label in enumerate(self.label) if wanted in (None, label) and v not in closed]
        return self.add(self.pick(rng, pool, k))

    def pick(self, rng: random.Random, pool: list[int], k: int) -> list[int]:
        """min(k, len(pool)) distinct nodes of `pool`, in the order drawn, with weight 1.5 depth + 1."""
        weights = [1.5 * self.depth[v] + 1 for v in pool]
        picked: list[int] = []
        for _ in range(min(k, len(pool))):
            at = rng.choices(range(len(pool)), weights)[0]
            picked.append(pool[at])
            weights[at] = 0.0
        return picked

    def finish(self) -> tuple[Graph, dict[int, int]]:
        """The graph without its edgeless nodes, renumbered in order, and old node -> new node."""
        linked = {v for v, parents in enumerate(self.parents) if parents}
        linked.update(p for parents in self.parents for p in parents)
        new = {old: i for i, old in enumerate(sorted(linked))}
        return Graph(len(new), [(new[p], new[v]) for v in new for p in self.parents[v]]), new


def poisson(rng: random.Random, lam: float) -> int:
    """A Poisson(lam) draw (Knuth's product of uniforms; lam is small here)."""
    limit, product, k = math.exp(-lam), rng.random(), 0
    while product > limit:
        product *= rng.random()
        k += 1
    return k


# ------------------------------------------------------------------------------------------------------------ text


def sentence(source: str, destination: str) -> str:
    return f"{source} is a {destination}." if source[0].isupper() else f"Every {source} is a {destination}."


def dress(rng: random.Random, graph: Graph, names: Sequence[str] = NAMES, species: Sequence[str] = SPECIES):
    """Distinct words for the nodes and the shuffled facts: (symbols, facts)."""
    persons = iter(rng.sample(names, len(graph.persons)))
    kinds = iter(rng.sample(species, graph.n - len(graph.persons)))
    symbols = [next(kinds) if parents else next(persons) for parents in graph.parents]
    facts = [sentence(symbols[s], symbols[d]) for s, d in graph.edges]
    rng.shuffle(facts)
    return symbols, facts


def make_row(rng, graph: Graph, symbols: list[str], facts: list[str], root: int, target: int, options) -> Row:
    """A row in the official format; `options` = (first, second) node in the question, one of them `target`."""
    first, second = options
    path = graph.random_shortest_path(rng, root, target)
    return {
        "question": f"{' '.join(facts)} Is {symbols[root]} a {symbols[first]} or {symbols[second]}?",
        "answer": sentence(symbols[root], symbols[target]),
        "steps": [sentence(symbols[s], symbols[d]) for s, d in pairwise(path)],
        "idx_to_symbol": symbols,
        "edges": [list(edge) for edge in graph.edges],
        "root": root,
        "target": target,
        "neg_target": second if target == first else first,
    }


def parse_question(question: str) -> tuple[list[tuple[str, str]], str, tuple[str, str]]:
    """(facts as word pairs, person asked, the two options) in the order of the text; ValueError if it is no ProsQA."""
    *facts, asked = re.split(r"(?<=\.) ", question)
    ask = re.fullmatch(r"Is (\w+) a (\w+) or (\w+)\?", asked)
    pairs = [re.fullmatch(r"(?:([A-Z]\w*)|Every ([a-z]\w*)) is a (\w+)\.", fact) for fact in facts]
    if not ask or not all(pairs):
        wrong = asked if not ask else facts[pairs.index(None)]
        raise ValueError(f"question: cannot read {wrong!r}; expected facts, then 'Is X a y or z?'")
    return [(m[1] or m[2], m[3]) for m in pairs], ask[1], (ask[2], ask[3])


def question_key(question: str) -> str:
    """The question up to the order of its facts and of its options: equal keys are the same problem."""
    *facts, asked = question.split(". ")
    return ". ".join(sorted(facts) + sorted(asked.rstrip("?").split()))
