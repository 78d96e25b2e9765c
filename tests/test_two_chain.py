"""Two-chain generator: fair options, the ranges asked for, and no problem in two splits."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data import prosqa_rows, two_chain
from data.prosqa_graph import Graph, question_key
from data.prosqa_rows import baselines, check_rows, draw_rows
from data.two_chain import TwoChain

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = TwoChain(hops=(2, 3), nodes=(6, 8), species=12)


def in_ranges(graph, ends):
    return graph.count_error() is None


def draw(spec: TwoChain, size: int, split: str = "train") -> list[dict]:
    return draw_rows(lambda rng: two_chain.draw_row(rng, spec), size, 0, split, set())[0]


@pytest.mark.parametrize(
    "spec", [QUICKSTART, TwoChain(hop_weights=(0.41, 0.44, 0.12, 0.03), accept=in_ranges)], ids=["quickstart", "full"]
)
def test_no_rule_blind_to_the_person_beats_a_coin(spec):
    rows = draw(spec, 1000)
    check_rows(rows, "rows", hops=spec.hops, two_chain=True, counts=spec.accept is not None)
    found = {rule: value for rule, value in baselines(rows).items() if not rule.startswith("search")}
    assert len(found) == 10
    assert {rule: value for rule, value in found.items() if not 45 <= value <= 55} == {}
    assert 450 <= sum(row["root"] for row in rows) <= 550


def test_chains_grow_in_random_order_with_strangers_above():
    rows = draw(TwoChain(accept=in_ranges), 1000)
    later_under_1 = sum((row["target"] > row["neg_target"]) == (row["root"] == 1) for row in rows)
    assert 450 <= later_under_1 <= 550
    strangers = 0  # rows whose correct option also lies below a person who is no root
    for row in rows:
        graph = Graph(len(row["idx_to_symbol"]), row["edges"])
        strangers += any(row["target"] in graph.dist[p] for p in graph.persons[2:])
    assert 50 <= strangers <= 500


@pytest.mark.parametrize(
    ("hops", "nodes", "lam", "condition"),
    [
        (8, (27, 28), 1.8, lambda graph, ends: True),
        (4, (24, 27), 2.0, lambda graph, ends: all(graph.shortest_paths(r)[1][ends[r]] >= 4 for r in (0, 1))),
        (4, (22, 24), 3.5, lambda graph, ends: len(graph.edges) >= 2.1 * graph.n),
    ],
    ids=["8 hops", "many shortest paths", "dense"],
)
def test_out_of_distribution_settings(hops, nodes, lam, condition):
    spec = TwoChain((hops, hops), None, nodes, lam, accept=lambda g, ends: in_ranges(g, ends) and condition(g, ends))
    rows = draw(spec, 20)
    check_rows(rows, "rows", hops=(hops, hops), two_chain=True, counts=True)
    for row in rows:
        ends = (row["target"], row["neg_target"])
        assert condition(Graph(len(row["idx_to_symbol"]), row["edges"]), ends[::-1] if row["root"] else ends)


def test_pair_asks_each_root_once_in_either_order():
    rows = draw_rows(lambda rng: two_chain.draw_pair(rng, QUICKSTART), 50, 0, "pairs", set())[0]
    check_rows(rows, "rows", hops=(2, 3), two_chain=True)
    assert len(rows) == 100 and {row["root"] for row in rows[::2]} == {0, 1}
    for first, second in zip(rows[::2], rows[1::2]):
        names = [row["idx_to_symbol"][row["root"]] for row in (first, second)]
        assert first["root"] != second["root"] and first["target"] == second["neg_target"]
        assert first["question"].replace(f"Is {names[0]}", f"Is {names[1]}") == second["question"]
    assert {row["question"].endswith(f" {row['idx_to_symbol'][row['target']]}?") for row in rows[::2]} == {True, False}
    impossible = TwoChain((2, 3), None, (6, 8), species=12, accept=lambda graph, ends: False)
    assert two_chain.draw_pair(random.Random(0), impossible) is None


def test_hop_weights_and_vocabulary():
    rows = draw(TwoChain(hops=(2, 4), hop_weights=(1, 0, 3), nodes=(10, 10), species=9, names=3), 400)
    hops = [len(row["steps"]) for row in rows]
    assert set(hops) == {2, 4} and 0.15 < hops.count(2) / 400 < 0.35
    words = {word for row in rows for word in row["idx_to_symbol"]}
    assert len([word for word in words if word[0].isupper()]) == 3 and len(words) == 12
    nodes = {len(row["idx_to_symbol"]) for row in draw(QUICKSTART, 400)}
    assert nodes == {6, 7, 8}


def test_splits_share_no_problem_even_when_there_are_only_four(tmp_path, monkeypatch):
    monkeypatch.setattr(prosqa_rows, "MAX_DRAWS", 500)
    tiny = TwoChain(hops=(1, 1), nodes=(4, 4), species=2, names=2)  # two graphs with named nodes, two persons to ask
    common = {"conditions": {"two_chain": True}, "parameters": {}, "force": True}
    prosqa_rows.make_splits(tmp_path, lambda rng: two_chain.draw_row(rng, tiny), (2, 1, 1), 0, **common)
    rows = [row for split in prosqa_rows.SPLITS for row in json.loads((tmp_path / f"prosqa_{split}.json").read_text())]
    assert len({question_key(row["question"]) for row in rows}) == 4
    with pytest.raises(ValueError, match=r"train row 2: no new row in 500 draws"):
        prosqa_rows.make_splits(tmp_path, lambda rng: two_chain.draw_row(rng, tiny), (3, 1, 1), 0, **common)


def test_small_splits_do_not_depend_on_the_training_size(tmp_path):
    for folder, size in (("a", 50), ("b", 300)):
        prosqa_rows.make_splits(
            tmp_path / folder,
            lambda rng: two_chain.draw_row(rng, QUICKSTART),
            (size, 20, 20),
            0,
            conditions={"two_chain": True},
            parameters={},
        )
    for name in ("prosqa_valid.json", "prosqa_test.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    few, many = (json.loads((tmp_path / f / "prosqa_train.json").read_text()) for f in "ab")
    assert few == many[:50]


def test_command_line(tmp_path):
    sizes = ["--sizes", "30", "4", "5"]
    for folder, start in (("a", ["data/two_chain.py"]), ("b", ["-m", "data.two_chain"])):
        command = [sys.executable, *start, "--out", str(tmp_path / folder), *sizes, "--hops", "2", "2", "--names", "5"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert (tmp_path / "a/prosqa_train.json").read_bytes() == (tmp_path / "b/prosqa_train.json").read_bytes()
    parameters = json.loads((tmp_path / "a/prosqa_train.stats.json").read_text())["parameters"]
    assert (parameters["generator"], parameters["hops"], parameters["names"]) == ("two_chain", [2, 2], 5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hops", "3", "2"], "error: hops: 3 2 is no range"),
        (["--hops", "2", "4"], "error: nodes: 6 8; two chains of 4 hops need at least 10 nodes"),
        (["--species", "5"], "error: species: 5; 8 nodes need 6 to 38"),
        (["--species", "39"], "error: species: 39"),
        (["--names", "1"], "error: names: 1; allowed are 2 to 17"),
        (["--lambda", "0"], "error: lambda: 0.0"),
        (["--hop-weights", "1"], "error: hop-weights: (1.0,); give one weight >= 0 for each of 2..3 hops"),
        (["--sizes", "0", "1", "1"], "error: sizes: 0 1 1"),
    ],
)
def test_mistakes_give_one_line_and_exit_2(args, message, tmp_path):
    command = [sys.executable, "data/two_chain.py", "--out", str(tmp_path / "new"), *args]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert made.stderr.startswith(message) and made.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()
