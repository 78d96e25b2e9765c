"""Edge pairs: one word apart, answers exchanged, and no rule blind to the person right in both members."""

import random
from itertools import product

import pytest

from data import edge_pairs, prosqa_graph
from data.edge_pairs import UNBALANCED, EdgePairs, check_edge_pair, draw_pair, places
from data.ood_sets import PRESETS
from data.prosqa_graph import Graph
from data.prosqa_rows import RULES, baselines, check_rows, draw_rows

PROSQA = PRESETS["prosqa"].sets["edge_pairs"].generator
QUICKSTART = PRESETS["quickstart"].sets["edge_pairs"].generator


def draw(spec: EdgePairs, hops: int, size: int) -> list[dict]:
    return draw_rows(lambda rng: draw_pair(rng, spec, hops), size, 0, f"edge {hops}", set())[0]


@pytest.fixture(scope="module")
def drawn() -> list[tuple[EdgePairs, int, list[dict]]]:
    sizes = [(PROSQA, 3, 40), (PROSQA, 4, 5), (QUICKSTART, 2, 3), (QUICKSTART, 3, 5)]
    return [(spec, hops, draw(spec, hops, size)) for spec, hops, size in sizes]


def graph_of(row: dict, without=None) -> Graph:
    return Graph(len(row["idx_to_symbol"]), [edge for edge in row["edges"] if edge != without])


def test_members_are_sound_and_one_word_apart(drawn):
    for spec, hops, rows in drawn:
        check_rows(rows, "rows", hops=(hops, hops), counts=spec.counts)
        for first, second in zip(rows[::2], rows[1::2]):
            check_edge_pair(first, second)
            words = first["question"].split(), second["question"].split()
            (apart,) = (i for i, (one, other) in enumerate(zip(*words, strict=True)) if one != other)
            symbols = first["idx_to_symbol"]
            for row, text in zip((first, second), words):
                assert text[apart] == symbols[row["hinge"][1]] + "."
                assert text[apart - 3] == symbols[row["hinge"][0]]
            assert first["answer"] != second["answer"]
            assert {first["target"], second["target"]} == {first["neg_target"], second["neg_target"]}


def test_answer_hangs_on_the_hinge(drawn):
    """Without it the person asked reaches no option; the other root reaches both, with it and without."""
    for _, _, rows in drawn:
        for row in rows:
            fact = prosqa_graph.sentence(*(row["idx_to_symbol"][v] for v in row["hinge"]))
            assert fact in row["steps"]
            options, asked, other = {row["target"], row["neg_target"]}, row["root"], 1 - row["root"]
            without = graph_of(row, row["hinge"])
            assert not options & without.shortest_paths(asked)[0].keys()
            assert options <= without.shortest_paths(other)[0].keys()


def test_each_rule_is_right_in_one_member_or_tied_in_both(drawn):
    for _, _, rows in drawn:
        for i in range(0, len(rows), 2):
            found = baselines(rows[i : i + 2])
            fair = {rule: right for rule, right in found.items() if "search" not in rule and rule != UNBALANCED}
            assert len(fair) == 9 and set(fair.values()) == {50.0}
    assert baselines(drawn[0][2])[UNBALANCED] > 80, "one edge cannot balance it: the table must show so"


def test_either_root_is_asked_and_the_hinge_is_the_first_step_or_later(drawn):
    rows = drawn[0][2]
    assert {row["root"] for row in rows} == {0, 1}
    assert {row["question"].endswith(f" {row['idx_to_symbol'][row['target']]}?") for row in rows[::2]} == {True, False}
    assert {row["hinge"][0] == row["root"] for row in rows} == {True, False}


def test_places_are_all_there_are():
    """Against an enumeration of all nodes by reachability."""
    rng = random.Random(3)
    found = 0
    for _ in range(40):
        growth = prosqa_graph.Growth()
        while len(growth.parents) < 14:
            growth.add_free(rng, 1.2, least=1)
        graph, new = growth.finish()
        if not {0, 1} <= new.keys():
            continue
        reach = [graph.shortest_paths(v)[0] for v in range(graph.n)]
        for a, b, hops in product((0, 1), (0, 1), (2, 3)):
            if a == b:
                continue
            alone = [v for v in range(graph.n) if v in reach[b] and v not in reach[a] and v != b]
            sinks = [v for v in alone if not graph.children[v]]
            legs = [(q, s) for q, s in product(alone, sinks) if q != s and s in reach[q]]
            slow = {
                (x, (q1, s1), (q2, s2))
                for x in range(graph.n)
                if x in reach[a] and x not in reach[b]
                for (q1, s1), (q2, s2) in product(legs, legs)
                if s2 not in reach[q1] and s1 not in reach[q2]
                if reach[a][x] + 1 + reach[q1][s1] == hops == reach[a][x] + 1 + reach[q2][s2]
            }
            fast = list(places(graph, a, b, hops))
            assert len(fast) == len(slow) and set(fast) == slow
            found += len(slow)
    assert found > 100


def test_nodes_with_a_parent_at_least():
    growth, rng = prosqa_graph.Growth(), random.Random(0)
    for _ in range(50):
        growth.add_free(rng, 0.1, least=1)
    assert all(growth.parents[2:]), "least=1: no further persons"


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def pair(drawn) -> tuple[dict, dict]:
    first, second = drawn[0][2][:2]
    return dict(first), dict(second)


def other_word(row: dict) -> str:
    """The question with its first species replaced by one that it lacks."""
    spare = next(word for word in prosqa_graph.SPECIES if word not in row["idx_to_symbol"])
    facts = row["question"].split()
    at = next(i for i, word in enumerate(facts) if word.endswith("us."))
    return " ".join([*facts[:at], spare + ".", *facts[at + 1 :]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {"root": 1 - row["root"]}, "root, idx_to_symbol"),
        (lambda row: {"idx_to_symbol": row["idx_to_symbol"][::-1]}, "root, idx_to_symbol"),
        (lambda row: {"target": row["neg_target"]}, "must be neg_target"),
        (lambda row: {"steps": row["steps"][:-1]}, "3 and 2 hops"),
        (lambda row: {"question": other_word(row)}, "question: "),
        (lambda row: {"question": row["question"] + " Really?"}, "question: "),
        (lambda row: {"hinge": row["hinge"][::-1]}, "is no edge of the row"),
        (lambda row: {"hinge": None}, "hinge: None"),
        (lambda row: {"hinge": next(e for e in row["edges"] if e != row["hinge"])}, "without their hinges"),
    ],
)
def test_broken_pair_is_refused(pair, change, message):
    first, second = pair
    with pytest.raises(ValueError) as error:
        check_edge_pair(first, second | change(second))
    assert message in str(error.value)


def test_the_same_member_twice_is_refused(pair):
    with pytest.raises(ValueError, match="must be neg_target"):
        check_edge_pair(pair[0], pair[0])


def test_other_root_must_reach_both_options(pair):
    first, second = pair
    cut = [edge for edge in first["edges"] if edge[0] != 1 - first["root"]]
    with pytest.raises(ValueError, match="the root not asked must reach both options"):
        check_edge_pair(first | {"edges": cut}, second)


def test_unbalanced_pair_is_neither_drawn_nor_passed(monkeypatch):
    """With no rule looked at, the generator finds pairs that the true rules betray; the check must see each."""
    spec = EdgePairs(hops=(3, 3))
    with monkeypatch.context() as patch:
        patch.setattr(edge_pairs, "_balanced", lambda *_: True)
        rows = draw(spec, 3, 30)
    betrayed = 0
    for first, second in zip(rows[::2], rows[1::2]):
        found = baselines([first, second])
        unfair = any(found[rule] != 50.0 for rule in RULES if rule != UNBALANCED)
        betrayed += unfair
        if unfair:
            with pytest.raises(ValueError, match="right in both members, or in none"):
                check_edge_pair(first, second)
        else:
            check_edge_pair(first, second)
    assert betrayed > 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hops": (1, 3)}, "hops: "),
        ({"hops": (4, 3)}, "hops: "),
        ({"nodes": (5, 9)}, "nodes: "),
        ({"nodes": (9, 8)}, "nodes: "),
    ],
)
def test_impossible_parameters(changes, message):
    with pytest.raises(ValueError, match=message):
        EdgePairs(**changes)
