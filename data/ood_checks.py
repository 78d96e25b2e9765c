"""What must hold of an evaluation set before it is written, and again before it is used.

Every row is a sound problem of the shape that the set asks for; members of a pair stand side by side and differ in what they
should; the whole fits the model's positions; and no rule that ignores the person asked does better, or worse, than a coin.

    check_set(rows, PRESETS["prosqa"].sets["ood_dag"], "ood_dag.json", PRESETS["prosqa"])   # ValueError that says what is wrong
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

if __package__:
    from . import prosqa_graph as pg
    from . import prosqa_rows as pr
    from .edge_pairs import UNBALANCED, EdgePairs, check_edge_pair
    from .ood_sets import EvalSet, OtherPerson, Preset
else:  # imported by a script that was run as `python data/...`
    import prosqa_graph as pg
    import prosqa_rows as pr
    from edge_pairs import UNBALANCED, EdgePairs, check_edge_pair
    from ood_sets import EvalSet, OtherPerson, Preset

FAIR = (45.0, 55.0)  # percent right that a rule blind to the person may reach on rows that are no pairs


def check_set(rows: Sequence[pg.Row], spec: EvalSet, where: str, preset: Preset) -> None:
    """ValueError that names `where` and the row unless the rows are the set `spec`, as `preset` wants it."""
    check_members(rows, spec, where, preset)
    if problem := imbalance(rows, spec):
        raise ValueError(f"{where}: {problem}")


def check_members(rows: Sequence[pg.Row], spec: EvalSet, where: str, preset: Preset) -> None:
    """All of `check_set` that can be said of one row, or of one pair, at a time."""
    if spec.rows is not None and len(rows) != spec.rows:
        raise ValueError(f"{where}: {len(rows)} rows, must be {spec.rows}")
    pr.check_rows(rows, where, counts=spec.counts or False, hops=spec.hops, two_chain=spec.two_chain)
    for i, row in enumerate(rows):
        if error := _shape_error(row, spec) or _length_error(row, preset):
            raise ValueError(f"{where}: row {i}: {error}")
    if spec.pairs:
        check_pairs(rows, spec, where)


def _shape_error(row: pg.Row, spec: EvalSet) -> str | None:
    if spec.shape is None:
        return None
    ends = (row["neg_target"], row["target"]) if row["root"] else (row["target"], row["neg_target"])
    return spec.shape.error(pg.Graph(len(row["idx_to_symbol"]), row["edges"]), ends)


def _length_error(row: pg.Row, preset: Preset) -> str | None:
    most = tokens_at_most(row, preset)
    return None if most < preset.positions else f"up to {most} tokens, must be fewer than {preset.positions}"


def tokens_at_most(row: pg.Row, preset: Preset) -> int:
    """No tokenizer of the preset spells question, thoughts and answer in more tokens than this.

    A name or species counts `pieces`, every other word and every mark one; three are added for the thoughts' markers and the
    end, one for the newline after the question.
    """
    text = re.findall(r"\w+|[^\w\s]", f"{row['question']} ### {row['answer']}")
    known = set(row["idx_to_symbol"])
    return sum(preset.pieces if word in known else 1 for word in text) + preset.thoughts + 4


def imbalance(rows: Sequence[pg.Row], spec: EvalSet) -> str | None:
    """The rule blind to the person that strays farthest from a coin, in words; None if all are as the set asks.

    Pairs must give exactly 50 %, but for the one rule that an edge cannot balance; rows of a given file may give anything.
    """
    if isinstance(spec.generator, OtherPerson):
        return None
    low, high = (50.0, 50.0) if spec.pairs else FAIR
    exempt = {UNBALANCED} if isinstance(spec.generator, EdgePairs) else set()
    found = {name: right for name, right in pr.baselines(rows).items() if name not in exempt and "search" not in name}
    name = max(found, key=lambda name: abs(found[name] - 50))
    if low <= found[name] <= high:
        return None
    return f"{name!r} is right in {found[name]:.1f} %, must be {f'{low:.0f} to {high:.0f}' if low < high else f'{low:.0f}'} %"


# ----------------------------------------------------------------------------------------------------------- pairs


def pairs_of(rows: Sequence[pg.Row]) -> Iterator[tuple[pg.Row, pg.Row]]:
    """(member 0, member 1) of each pair, in the order of the file."""
    return zip(rows[::2], rows[1::2])


def check_pairs(rows: Sequence[pg.Row], spec: EvalSet, where: str) -> None:
    """Numbers and members of all pairs; pair i is rows 2i and 2i + 1."""
    edge = isinstance(spec.generator, EdgePairs)
    for i, row in enumerate(rows):
        found, wanted = (row.get("pair_id"), row.get("member")), (i // 2, i % 2)
        if found != wanted:
            raise ValueError(f"{where}: row {i}: pair_id and member are {found}, must be {wanted}")
    for i, pair in enumerate(pairs_of(rows)):
        try:
            (check_edge_pair if edge else check_swap_pair)(*pair)
        except ValueError as error:
            raise ValueError(f"{where}: pair {i}: {error}") from error
    lengths = Counter(len(row["steps"]) for row in rows[::2])
    shares = [lengths[hops] for hops in range(spec.hops[0], spec.hops[1] + 1)]
    if edge and max(shares) - min(shares) > 1:
        raise ValueError(f"{where}: {shares} pairs of {spec.hops[0]} to {spec.hops[1]} hops; must be as many of each")


def check_swap_pair(first: pg.Row, second: pg.Row) -> None:
    """ValueError unless two sound rows hold the same facts and options and ask one root each."""
    apart = [first["root"], first["target"], first["neg_target"]], [second["root"], second["neg_target"], second["target"]]
    if apart[1] != [1 - apart[0][0], *apart[0][1:]]:
        raise ValueError("root, target: the members must ask one root each, with targets exchanged")
    if first["idx_to_symbol"] != second["idx_to_symbol"]:
        raise ValueError("idx_to_symbol: members of a pair have the same")
    (facts, _, options), (other_facts, _, other_options) = (pg.parse_question(row["question"]) for row in (first, second))
    if facts != other_facts or options != other_options:
        raise ValueError("question: members of a pair have the same facts and options, in the same order")
