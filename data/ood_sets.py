"""What the evaluation sets are: one `EvalSet` a file, gathered in a `Preset` for the kind of data a model was trained on.

`prosqa` goes with the official data (three to six hops), `quickstart` with the small task of scripts/quickstart.sh (one to
three). Whoever trains on something else fills a `Preset` of their own; nothing but these values knows about hops and sizes.

    for name, spec in PRESETS["prosqa"].sets.items():
        print(name, spec.kind, spec.hops, spec.two_chain, spec.pairs)
"""

from dataclasses import asdict, dataclass, field

if __package__:
    from . import prosqa_graph as pg
    from .edge_pairs import EdgePairs
    from .two_chain import TwoChain
else:  # imported by a script that was run as `python data/...`
    import prosqa_graph as pg
    from edge_pairs import EdgePairs
    from two_chain import TwoChain

KINDS = {  # of a set: what it is to the model
    "id": "new rows as hard as the training rows",
    "ood_depth": "more hops than in training",
    "ood_structure": "hops of training, another kind of graph",
    "swap": "the same facts, the other person asked",
    "edge": "two questions one word apart",
}
SWAP_OFFICIAL = "swap_official"  # one file per official file: swap_official_valid, swap_official_test


@dataclass(frozen=True)
class Shape:
    """What a two-chain graph must be like; called with (graph, chain ends), it says whether it is.

    counts: inclusive ranges of persons, nodes and edges; paths: shortest paths from each root to its end, at least; density:
    edges per node, at least.
    """

    counts: pg.Counts = field(default_factory=lambda: dict(pg.COUNT_RANGES))
    paths: int = 1
    density: float = 0.0

    def error(self, graph: pg.Graph, ends: tuple[int, int]) -> str | None:
        """What is wrong with a graph whose chain ends lie below root 0 and below root 1, in words."""
        if found := graph.count_error(self.counts):
            return found
        if len(graph.edges) < self.density * graph.n:
            return f"{len(graph.edges)} edges on {graph.n} nodes, must be {self.density} a node or more"
        fewest = min(graph.shortest_paths(root)[1].get(ends[root], 0) for root in (0, 1)) if self.paths > 1 else 1
        if fewest < self.paths:
            return f"{fewest} shortest paths to an option, must be {self.paths} or more"
        return None

    def __call__(self, graph: pg.Graph, ends: tuple[int, int]) -> bool:
        return self.error(graph, ends) is None


@dataclass(frozen=True)
class OtherPerson:
    """Parameters of rows made from a file's own by asking the other root.

    hops: inclusive range that the new paths may have; two_chain: whether the file's rows hang from two equal chains.
    """

    hops: tuple[int, int]
    two_chain: bool = False

    def parameters(self) -> dict:
        """What the sidecar records."""
        return asdict(self)


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set: its kind (see KINDS), how its rows are made, and how many rows or pairs; OtherPerson takes all."""

    kind: str
    generator: TwoChain | EdgePairs | OtherPerson
    size: int = 1000
    pairs: bool = False

    @property
    def rows(self) -> int | None:
        """Rows of the file; None: as many as the file it is made from."""
        return None if isinstance(self.generator, OtherPerson) else self.size * (2 if self.pairs else 1)

    @property
    def hops(self) -> tuple[int, int]:
        return self.generator.hops

    @property
    def two_chain(self) -> bool:
        return isinstance(self.generator, TwoChain) or getattr(self.generator, "two_chain", False)

    @property
    def extrapolated(self) -> bool:
        """Whether a model has to go beyond its training to solve it."""
        return self.kind.startswith("ood_")

    @property
    def shape(self) -> Shape | None:
        return getattr(self.generator, "accept", None)

    @property
    def counts(self) -> pg.Counts | None:
        return self.shape.counts if self.shape else getattr(self.generator, "counts", None)

    def facts(self) -> dict:
        """What a reader of the sidecar needs to know about the set."""
        return {
            "kind": self.kind,
            "extrapolated": self.extrapolated,
            "pairs": self.pairs,
            "two_chain": self.two_chain,
            "hops": list(self.hops),
        }

    def parameters(self) -> dict:
        shape = {"shape": asdict(self.shape)} if self.shape else {}
        return {"generator": type(self.generator).__name__, **self.generator.parameters(), **shape}


@dataclass(frozen=True)
class Preset:
    """The evaluation sets that belong to one training distribution.

    out: folder to write to; official: files beside it that are asked about the other person; pieces: tokens that a name or
    species has at most in the model's tokenizer; thoughts: latent tokens in a prompt; positions: that the model has.
    """

    name: str
    out: str
    sets: dict[str, EvalSet]
    official: tuple[str, ...]
    pieces: int
    thoughts: int
    positions: int

    def set_of(self, file_stem: str) -> EvalSet | None:
        """The set that a file of this name holds; None for a name that the preset does not know."""
        return self.sets.get(SWAP_OFFICIAL if file_stem.startswith(SWAP_OFFICIAL) else file_stem)


# ---------------------------------------------------------------------------------------------- official data: 3 to 6 hops

VALID_HOPS = (0.413, 0.443, 0.120, 0.023)  # shares of 3 to 6 hops in the official validation file
LIKE_VALID = TwoChain(hops=(3, 6), hop_weights=VALID_HOPS, nodes=(28, 28), lam=1.5, accept=Shape())


def beyond(hops: int) -> TwoChain:
    """A depth that training lacks, in graphs of the size of training."""
    return TwoChain(hops=(hops, hops), nodes=(27, 28), lam=1.8, accept=Shape())


PROSQA = Preset(
    name="prosqa",
    out="data/ood",
    sets={
        "id_matched": EvalSet("id", LIKE_VALID),
        "ood_7hop": EvalSet("ood_depth", beyond(7)),
        "ood_8hop": EvalSet("ood_depth", beyond(8)),
        "ood_dag": EvalSet("ood_structure", TwoChain(hops=(4, 4), nodes=(24, 27), lam=2.0, accept=Shape(paths=4))),
        "ood_dense": EvalSet("ood_structure", TwoChain(hops=(4, 4), nodes=(22, 24), lam=3.5, accept=Shape(density=2.1))),
        "swap_pairs": EvalSet("swap", LIKE_VALID, 500, pairs=True),
        SWAP_OFFICIAL: EvalSet("swap", OtherPerson(hops=(1, 6))),
        "edge_pairs": EvalSet("edge", EdgePairs(hops=(3, 4), nodes=(28, 28), lam=1.5), 500, pairs=True),
    },
    official=("prosqa_valid.json", "prosqa_test.json"),
    pieces=4,  # GPT-2 spells zhorpus in four
    thoughts=6,
    positions=1024,
)

# --------------------------------------------------------------------------------------------------- quickstart: 1 to 3 hops

WORDS = 12  # species
SMALL = {"persons": (2, 5), "nodes": (4, 8), "edges": (2, 13)}  # all that the quickstart's training rows have
LIKE_QUICKSTART = TwoChain(hops=(1, 3), nodes=(4, 8), lam=1.5, species=WORDS, accept=Shape(SMALL))


def bare(hops: int) -> TwoChain:
    """A depth that training lacks, in the fewest nodes that hold two such chains: positions stay those of training."""
    nodes = 2 * hops + 2
    counts = SMALL | {"nodes": (nodes, nodes)}
    return TwoChain(hops=(hops, hops), nodes=(nodes, nodes), lam=1.5, species=WORDS, accept=Shape(counts))


QUICKSTART = Preset(
    name="quickstart",
    out="data/quickstart/ood",
    sets={
        "id_matched": EvalSet("id", LIKE_QUICKSTART),
        "ood_4hop": EvalSet("ood_depth", bare(4)),
        "ood_5hop": EvalSet("ood_depth", bare(5)),
        "ood_dag": EvalSet(  # one training row in forty has two shortest paths to its target
            "ood_structure",
            TwoChain(hops=(2, 2), nodes=(8, 8), lam=2.0, species=WORDS, accept=Shape(SMALL | {"edges": (8, 10)}, paths=2)),
        ),
        "ood_dense": EvalSet(  # one training row in four hundred is as dense
            "ood_structure",
            TwoChain(hops=(2, 2), nodes=(8, 8), lam=3.5, species=WORDS, accept=Shape(SMALL, density=1.375)),
        ),
        "swap_pairs": EvalSet("swap", LIKE_QUICKSTART, 500, pairs=True),
        SWAP_OFFICIAL: EvalSet("swap", OtherPerson(hops=(1, 3), two_chain=True)),
        "edge_pairs": EvalSet(
            "edge",
            EdgePairs((2, 3), (11, 11), 0.5, 1, species=WORDS, counts=SMALL | {"nodes": (9, 11), "edges": (9, 11)}),
            500,
            pairs=True,
        ),
    },
    official=("prosqa_test.json",),
    pieces=1,  # backbones/prosqa_tiny has a token for each word
    thoughts=3,
    positions=256,
)
PRESETS = {preset.name: preset for preset in (PROSQA, QUICKSTART)}
