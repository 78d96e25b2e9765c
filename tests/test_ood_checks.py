"""What is checked of an evaluation set: every invariant refuses a broken row, pair or set."""

from dataclasses import replace

import pytest
from conftest import ROOT
from ood_material import FEW, GENERATED, few_rows, spec_of

from data import prosqa_graph, prosqa_rows, two_chain
from data.ood_checks import check_members, check_set, check_swap_pair, imbalance, tokens_at_most
from data.ood_sets import PRESETS, SWAP_OFFICIAL, EvalSet, Shape
from data.prosqa_graph import Graph, parse_question

PROSQA, QUICKSTART = PRESETS["prosqa"], PRESETS["quickstart"]


def refusal(rows, spec, preset=QUICKSTART) -> str:
    with pytest.raises(ValueError) as error:
        check_members(rows, spec, "file", preset)
    return str(error.value)


def test_each_row_is_checked():
    spec, rows = spec_of("quickstart", "ood_4hop"), list(few_rows("quickstart", "ood_4hop"))
    assert refusal(rows[:-1], spec) == f"file: {FEW - 1} rows, must be {FEW}"
    assert "it is that of row 0" in refusal([*rows[:-1], rows[0]], spec)
    assert "row 2: answer:" in refusal([*rows[:2], rows[2] | {"answer": "Tom is a x."}, *rows[3:]], spec)
    deeper = replace(spec, generator=replace(spec.generator, hops=(2, 3)))
    assert "4 hops, allowed are 2 to 3" in refusal(rows, deeper)
    assert "10 nodes, allowed are 4 to 8" in refusal(rows, spec_of("quickstart", "id_matched"))
    tight = replace(QUICKSTART, positions=tokens_at_most(rows[0], QUICKSTART))
    assert "tokens, must be fewer than" in refusal(rows, spec, tight)
    edge = list(few_rows("prosqa", "edge_pairs"))
    two = EvalSet("id", two_chain.TwoChain(hops=(3, 4), accept=Shape()), size=2 * FEW)
    assert "the correct option" in refusal(edge, two, PROSQA) and "reachable from the root not asked" in refusal(
        edge, two, PROSQA
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(paths=4), "shortest paths to an option, must be 4 or more"),
        (Shape(density=2.1), "must be 2.1 a node or more"),
        (Shape({"persons": (2, 2), "nodes": (17, 28), "edges": (22, 26)}), "allowed are"),
    ],
)
def test_rows_of_another_shape_are_refused(shape, message):
    """id_matched as if it were the DAG set, the dense set, a set of narrow graphs."""
    like = PROSQA.sets["id_matched"].generator
    assert message in refusal(list(few_rows("prosqa", "id_matched")), EvalSet("id", replace(like, accept=shape), FEW), PROSQA)


def test_shape_counts_the_paths_of_both_options():
    edges = [(0, 2), (0, 3), (2, 4), (3, 4), (1, 5), (5, 6)]  # two ways to 4, one to 6
    counts = {"persons": (2, 2), "nodes": (7, 7), "edges": (6, 6)}
    assert Shape(counts)(Graph(7, edges), (4, 6))
    assert Shape(counts, paths=2).error(Graph(7, edges), (4, 6)) == "1 shortest paths to an option, must be 2 or more"
    assert Shape(counts, paths=2).error(Graph(7, edges), (6, 4)) == "0 shortest paths to an option, must be 2 or more"
    assert Shape(counts, density=0.86).error(Graph(7, edges), (4, 6)) == "6 edges on 7 nodes, must be 0.86 a node or more"


def test_pairs_stand_together():
    spec, rows = spec_of("quickstart", "swap_pairs"), list(few_rows("quickstart", "swap_pairs"))
    moved = [rows[0], rows[2], rows[1], *rows[3:]]
    assert "row 1: pair_id and member are (1, 0), must be (0, 1)" in refusal(moved, spec)
    bare = [{key: row[key] for key in prosqa_rows.KEYS} for row in rows]
    assert "pair_id and member are (None, None)" in refusal(bare, spec)
    foreign = list(few_rows("quickstart", "id_matched"))
    mixed = [row | {"pair_id": i // 2, "member": i % 2} for i, row in enumerate([rows[0], *foreign, *rows[FEW + 1 :]])]
    assert "pair 0: " in refusal(mixed, spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda first, second: first, "ask one root each"),
        (lambda first, second: second | {"target": second["neg_target"]}, "ask one root each"),
        (lambda first, second: second | {"idx_to_symbol": second["idx_to_symbol"][::-1]}, "idx_to_symbol"),
        (lambda first, second: second | {"question": _turned(second["question"])}, "in the same order"),
        (lambda first, second: second | {"question": _shuffled(second["question"])}, "in the same order"),
    ],
)
def test_broken_swap_pair_is_refused(change, message):
    first, second = list(few_rows("prosqa", "swap_pairs"))[:2]
    check_swap_pair(first, second)
    with pytest.raises(ValueError) as error:
        check_swap_pair(first, change(first, second))
    assert message in str(error.value)


def _turned(question: str) -> str:
    """The options in the other order."""
    _, _, (first, second) = parse_question(question)
    return question.replace(f"{first} or {second}?", f"{second} or {first}?")


def _shuffled(question: str) -> str:
    """The first fact behind the second."""
    first, second, *rest = question.split(". ")
    return ". ".join([second, first, *rest])


def test_edge_pairs_come_in_equal_numbers_of_hops():
    spec, rows = spec_of("quickstart", "edge_pairs"), list(few_rows("quickstart", "edge_pairs"))
    assert [len(row["steps"]) for row in rows[::2]] == [2, 3] * (FEW // 2)
    uneven = [row for row in rows if len(row["steps"]) == 2] + rows[2:4]
    renumbered = [row | {"pair_id": i // 2, "member": i % 2} for i, row in enumerate(uneven)]
    assert "[3, 1] pairs of 2 to 3 hops" in refusal(renumbered, replace(spec, size=4))


# ------------------------------------------------------------------------------------------ rules blind to the person


def test_official_rows_are_betrayed_by_depth(shared_data):
    official = prosqa_rows.read_rows(shared_data / "prosqa_valid.json")
    problem = imbalance(official, PROSQA.sets["id_matched"])
    assert problem == "'farther from the nearer of nodes 0 and 1' is right in 95.2 %, must be 45 to 55 %"
    assert imbalance(official, PROSQA.sets[SWAP_OFFICIAL]) is None, "given rows may give anything"


def test_unfair_set_is_refused():
    rows = list(few_rows("prosqa", "id_matched"))
    unfair = [row for row in rows if row["question"].endswith(f" or {row['idx_to_symbol'][row['target']]}?")]
    spec = spec_of("prosqa", "id_matched", len(unfair))
    check_members(unfair, spec, "file", PROSQA)
    with pytest.raises(ValueError, match=r"^file: '.*' is right in .* %, must be 45 to 55 %"):
        check_set(unfair, spec, "file", PROSQA)


def test_pairs_must_be_exactly_fair():
    swap, edge = list(few_rows("quickstart", "swap_pairs")), list(few_rows("quickstart", "edge_pairs"))
    assert imbalance(swap, spec_of("quickstart", "swap_pairs")) is None
    assert "must be 50 %" in imbalance([*swap[:-1], swap[0]], spec_of("quickstart", "swap_pairs"))
    assert imbalance(edge, spec_of("quickstart", "edge_pairs")) is None
    assert "more persons above" in imbalance(edge, spec_of("quickstart", "swap_pairs")), "allowed in edge pairs only"


# ---------------------------------------------------------------------------------------------------------- length


def test_no_tokenizer_needs_more_tokens_than_the_bound(shared_data):
    from transformers import AutoTokenizer

    for preset, path in ((PROSQA, shared_data / "gpt2_tokenizer"), (QUICKSTART, ROOT / "backbones/prosqa_tiny")):
        tokenizer = AutoTokenizer.from_pretrained(path)
        words = [f" {word}" for word in (*prosqa_graph.NAMES, *prosqa_graph.SPECIES)]
        assert max(len(tokenizer.tokenize(word)) for word in words) == preset.pieces
        for name in (name for of, name in GENERATED if of == preset.name):
            for row in few_rows(preset.name, name):
                text = f"{row['question']}\n### {row['answer']}"
                used = len(tokenizer(text)["input_ids"]) + preset.thoughts + 3
                assert used <= tokens_at_most(row, preset) < preset.positions
