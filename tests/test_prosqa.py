"""ProsQA generator, invariants, statistics and shortcut rules, against the official validation file."""

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from data import prosqa, prosqa_graph, prosqa_rows
from data.prosqa_graph import Graph
from data.prosqa_rows import baselines, check_row, check_rows, statistics

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def official(shared_data) -> list[dict]:
    return prosqa_rows.read_rows(shared_data / "prosqa_valid.json")


@pytest.fixture(scope="module")
def generated() -> list[dict]:
    return prosqa_rows.draw_rows(prosqa.draw_row, 3000, 0, "train", set())[0]


# ------------------------------------------------------------------------------------------------------ invariants

SYMBOLS = ["Alex", "Tom", "lempus", "rompus", "impus", "gorpus", "zumpus"]
EDGES = [(0, 2), (1, 3), (2, 4), (3, 5), (6, 5), (3, 6)]  # Tom -> rompus -> gorpus, and a detour over zumpus


def row_of(symbols=SYMBOLS, edges=EDGES, root=1, target=5, neg_target=4, path=(1, 3, 5), **changes) -> dict:
    """A row whose text agrees with its graph, then `changes` to finished fields."""

    def fact(source, destination):
        return f"{'' if source < 2 else 'Every '}{symbols[source]} is a {symbols[destination]}."

    facts = " ".join(fact(*edge) for edge in edges)
    return {
        "question": f"{facts} Is {symbols[root]} a {symbols[neg_target]} or {symbols[target]}?",
        "answer": f"{symbols[root]} is a {symbols[target]}.",
        "steps": [fact(*edge) for edge in pairwise(path)],
        "idx_to_symbol": list(symbols),
        "edges": [list(edge) for edge in edges],
        "root": root,
        "target": target,
        "neg_target": neg_target,
    } | changes


def swapped(i: int, word: str) -> list[str]:
    return SYMBOLS[:i] + [word] + SYMBOLS[i + 1 :]


QUESTION = row_of()["question"]
BROKEN = {
    "cycle": (row_of([*SYMBOLS, "felpus"], [*EDGES, (6, 7), (7, 6)]), "cycle"),
    "edge twice": (row_of(edges=[*EDGES, (0, 2)]), "occurs twice"),
    "person with parents": (row_of(swapped(6, "Bob")), "'Bob' must be a species"),
    "species without parents": (row_of(swapped(0, "wumpus")), "'wumpus' must be a person"),
    "unknown species": (row_of(swapped(6, "florpus")), "'florpus' must be a species"),
    "unknown person": (row_of(swapped(0, "Zoe")), "'Zoe' must be a person"),
    "two nodes of one name": (row_of(swapped(6, "rompus")), "rompus names two nodes"),
    "node without edges": (row_of([*SYMBOLS, "wumpus"]), "wumpus has no edge"),
    "edge to no node": (row_of() | {"edges": [[0, 7]]}, "must be nodes 0 to 6"),
    "target is no node": (row_of() | {"target": -1}, "must be nodes 0 to 6"),
    "node 1 has parents": (row_of(["Alex", "felpus", *SYMBOLS[2:]], [*EDGES, (0, 1)], root=0), "nodes 0 and 1 must be"),
    "root is no root": (row_of() | {"root": 2}, "root 2"),
    "missing key": ({k: v for k, v in row_of().items() if k != "steps"}, "no key 'steps'"),
    "step is no edge": (row_of(steps=["Tom is a impus.", "Every impus is a gorpus."]), "not a fact about Tom"),
    "step out of order": (row_of(path=(3, 5)), "not a fact about Tom"),
    "steps stop early": (row_of(path=(1, 3)), "end at rompus, not at the target gorpus"),
    "steps take a detour": (row_of(path=(1, 3, 6, 5)), "3 hops, but the shortest path has 2"),
    "wrong option reachable": (row_of(edges=[*EDGES, (3, 4)]), "impus is reachable from Tom"),
    "target is no sink": (row_of([*SYMBOLS, "felpus"], [*EDGES, (5, 7)]), "without children"),
    "wrong option is no sink": (row_of([*SYMBOLS, "felpus"], [*EDGES, (4, 7)]), "without children"),
    "one option": (row_of(neg_target=5), "two different nodes"),
    "fact missing": (row_of(question=QUESTION.replace("Alex is a lempus. ", "")), "not exactly the edges"),
    "fact twice": (row_of(question="Alex is a lempus. " + QUESTION), "not exactly the edges"),
    "fact altered": (row_of(question=QUESTION.replace("a lempus", "a impus", 1)), "not exactly the edges"),
    "every person": (row_of(question="Every " + QUESTION), "cannot read 'Every Alex"),
    "species without every": (row_of(question=QUESTION.replace("Every rompus", "rompus", 1)), "cannot read 'rompus"),
    "article an": (row_of(question=QUESTION.replace("is a impus", "is an impus")), "cannot read 'Every lempus is an"),
    "second article": (row_of(question=QUESTION.replace("or ", "or a ")), "cannot read 'Is Tom"),
    "other person asked": (row_of(question=QUESTION.replace("Is Tom", "Is Alex")), "must ask about root"),
    "other option": (row_of(question=QUESTION.replace("or gorpus", "or zumpus")), "must ask about root"),
    "other answer": (row_of(answer="Tom is a impus."), "answer: 'Tom is a impus.'"),
}


def test_sound_row_passes():
    check_row(row_of(), hops=(2, 2), two_chain=True)


@pytest.mark.parametrize("broken", BROKEN)
def test_invariant_rejects(broken):
    row, message = BROKEN[broken]
    with pytest.raises(ValueError) as error:
        check_row(row)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("row", "conditions", "message"),
    [
        (row_of(), {"hops": (3, 6)}, "2 hops, allowed are 3 to 6"),
        (row_of(), {"counts": True}, "7 nodes, allowed are 17 to 28"),
        (row_of(edges=[*EDGES, (2, 5)]), {"two_chain": True}, "gorpus is reachable from the root not asked"),
        (
            row_of([*SYMBOLS, "felpus"], [*EDGES[:2], *EDGES[3:], (2, 7), (7, 4)]),
            {"two_chain": True},
            "distances 2 and 3",
        ),
    ],
)
def test_condition_rejects(row, conditions, message):
    check_row(row)
    with pytest.raises(ValueError) as error:
        check_row(row, **conditions)
    assert message in str(error.value)


def test_count_ranges():
    chain = [(i, i + 1) for i in range(1, 20)]  # 21 nodes, persons 0 and 1
    more = [(0, i) for i in range(2, 6)]
    assert Graph(21, chain + more).count_error() is None
    assert "21 edges" in Graph(21, chain + more[:2]).count_error()
    assert "55 edges" in Graph(21, chain + more * 9).count_error()
    assert "7 persons" in Graph(26, chain + more + [(i, 20) for i in range(21, 26)]).count_error()
    assert "16 nodes" in Graph(16, [(0, 2), *chain[:14]]).count_error()


def test_question_twice_is_refused():
    with pytest.raises(ValueError, match=r"f.json: row 1: question: it is that of row 0"):
        check_rows([row_of(), row_of()], "f.json")


# ---------------------------------------------------------------------------------------------------------- graphs


def all_paths(graph: Graph, source: int, target: int) -> list[list[int]]:
    if source == target:
        return [[target]]
    return [[source, *rest] for child in graph.children[source] for rest in all_paths(graph, child, target)]


def test_graph_helpers_agree_with_enumeration_of_all_paths(generated):
    rng = random.Random(0)
    drawn = set()
    for row in generated[:40]:
        graph = Graph(len(row["idx_to_symbol"]), row["edges"])
        target = row["target"]
        paths = {p: all_paths(graph, p, target) for p in range(graph.n)}
        shortest = min(map(len, paths[row["root"]]))
        best = [path for path in paths[row["root"]] if len(path) == shortest]
        distance, count = graph.shortest_paths(row["root"])
        assert (distance[target], count[target]) == (shortest - 1, len(best))
        assert graph.longest_path_to(target) == max(len(path) - 1 for found in paths.values() for path in found)
        assert graph.ancestors(target) == {p for p, found in paths.items() if found} - {target}
        if len(best) == 2:
            drawn |= {best.index(graph.random_shortest_path(rng, row["root"], target)) for _ in range(30)}
    assert drawn == {0, 1}


def test_shortest_path_is_drawn_uniformly():
    graph = Graph(7, [(0, 1), (0, 2), (1, 3), (2, 3), (2, 4), (1, 5), (3, 6), (4, 6)])  # 0-1-3-6, 0-2-3-6, 0-2-4-6
    rng = random.Random(0)
    drawn = [tuple(graph.random_shortest_path(rng, 0, 6)) for _ in range(3000)]
    assert all(abs(drawn.count(path) / 3000 - 1 / 3) < 0.04 for path in [(0, 1, 3, 6), (0, 2, 3, 6), (0, 2, 4, 6)])


def test_question_key_ignores_order_only():
    def key(*facts, asked):
        return prosqa_graph.question_key(" ".join([*facts, asked]))

    a, b, asked = "Tom is a lempus.", "Every lempus is a impus.", "Is Tom a impus or gorpus?"
    assert key(a, b, asked=asked) == key(b, a, asked="Is Tom a gorpus or impus?")
    assert key(a, b, asked=asked) != key(a, b, asked="Is Bob a impus or gorpus?")
    assert key(a, b, asked=asked) != key(a, b.replace("impus", "rompus"), asked=asked)


# ---------------------------------------------------------------------------------------------- official, generated


def test_official_file_passes_and_has_its_statistics(official):
    check_rows(official, "valid", hops=(3, 6))
    found = statistics(official)
    for what, (value, _) in prosqa.OFFICIAL.items():
        decimals = len(str(value).partition(".")[2])
        assert abs(found[what] - value) <= 0.51 * 10**-decimals, what


def test_official_file_has_the_printed_baselines(official):
    found = baselines(official)
    assert {rule: round(found[rule], 1) for rule in prosqa.OFFICIAL_BASELINES} == prosqa.OFFICIAL_BASELINES


def test_generated_rows_have_the_official_statistics(generated):
    found = statistics(generated)
    compared = {what: bounds for what, bounds in prosqa.OFFICIAL.items() if bounds[1] is not None}
    off = {w: (found[w], value) for w, (value, tolerance) in compared.items() if abs(found[w] - value) > tolerance}
    assert len(compared) == 19
    assert not off


@pytest.mark.parametrize("source", ["official", "generated"])
def test_options_hang_under_one_root_and_target_is_deepest(source, request):
    rows = request.getfixturevalue(source)
    check_rows(rows, source, hops=(3, 6))
    for row in rows[:300]:
        graph = Graph(len(row["idx_to_symbol"]), row["edges"])
        depths = {}
        for root in (0, 1):
            below, other = graph.shortest_paths(root)[0], graph.shortest_paths(1 - root)[0]
            depths[root] = {v: d for v, d in below.items() if v not in other and not graph.children[v]}
        root = row["root"]
        assert depths[root][row["target"]] == max(depths[root].values())
        assert row["neg_target"] in depths[1 - root]
        assert max(depths[root].values()) >= max(depths[1 - root].values())
        assert all(source < destination for source, destination in row["edges"])


def test_order_of_facts_and_options_tells_nothing(generated):
    assert 47 < baselines(generated)["first option"] < 53
    places = {"first edge": [], "first in the alphabet": [], "first step": []}
    for row in generated:
        facts, _, _ = prosqa_graph.parse_question(row["question"])
        words = [tuple(row["idx_to_symbol"][v] for v in edge) for edge in row["edges"]]
        path_start = next(edge for edge in words if prosqa_graph.sentence(*edge) == row["steps"][0])
        for what, fact in zip(places, (words[0], min(words), path_start), strict=True):
            places[what].append(facts.index(fact) / (len(facts) - 1))
    means = {what: sum(found) / len(found) for what, found in places.items()}
    assert all(abs(mean - 0.5) < 0.025 for mean in means.values()), means


def test_generated_layout_is_the_official_one(official, generated, shared_data):
    assert list(generated[0]) == list(official[0])
    assert json.dumps(official) == (shared_data / "prosqa_valid.json").read_text()
    destinations = [destination for _, destination in generated[0]["edges"]]
    assert destinations == sorted(destinations)


# ----------------------------------------------------------------------------------------------------------- files


def run(*args: str, module: bool = False) -> subprocess.CompletedProcess:
    start = ["-m", "data.prosqa"] if module else ["data/prosqa.py"]
    return subprocess.run([sys.executable, *start, *args], cwd=ROOT, capture_output=True, text=True, check=False)


def test_same_seed_same_bytes_and_sidecar(tmp_path):
    for folder, seed, module in (("a", "1", False), ("b", "1", True), ("c", "2", False)):
        made = run("--out", str(tmp_path / folder), "--sizes", "40", "5", "6", "--seed", seed, module=module)
        assert made.returncode == 0, made.stderr
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 6 and "prosqa_valid.stats.json" in names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert (tmp_path / "a/prosqa_train.json").read_text() != (tmp_path / "c/prosqa_train.json").read_text()

    files = {split: json.loads((tmp_path / f"a/prosqa_{split}.json").read_text()) for split in prosqa_rows.SPLITS}
    assert [len(files[split]) for split in prosqa_rows.SPLITS] == [40, 5, 6]
    keys = [prosqa_graph.question_key(row["question"]) for rows in files.values() for row in rows]
    assert len(set(keys)) == 51
    sidecar = json.loads((tmp_path / "a/prosqa_test.stats.json").read_text())
    assert (sidecar["rows"], sidecar["parameters"]["seed"], sidecar["parameters"]["split"]) == (6, 1, "test")
    sums = subprocess.run(["sha256sum", tmp_path / "a/prosqa_test.json"], capture_output=True, text=True, check=True)
    assert sums.stdout.split()[0] == sidecar["sha256"]


def test_row_i_does_not_depend_on_sizes(generated):
    few, _ = prosqa_rows.draw_rows(prosqa.draw_row, 5, 0, "train", set())
    assert few == generated[:5]
    other, _ = prosqa_rows.draw_rows(prosqa.draw_row, 5, 0, "valid", set())
    assert all(row not in generated for row in other)


def test_problem_drawn_before_is_drawn_again():
    seen: set[str] = set()
    first, draws = prosqa_rows.draw_rows(prosqa.draw_row, 5, 0, "train", seen)
    second, more = prosqa_rows.draw_rows(prosqa.draw_row, 5, 0, "train", seen)
    assert len(seen) == 10 and more >= draws + 5
    assert all(row not in first for row in second)


def test_list_of_rows_is_kept_or_drawn_again_as_a_whole(generated):
    first, second, third = generated[:3]
    seen = {prosqa_graph.question_key(third["question"])}
    draws = iter([[first, third], [first, first], None, [], [first, second]])  # seen before, twice the same, rejected
    rows, taken = prosqa_rows.draw_rows(lambda rng: next(draws), 1, 0, "train", seen)
    assert rows == [first, second] and taken == 5
    assert seen == {prosqa_graph.question_key(row["question"]) for row in (first, second, third)}


def test_existing_files_are_kept_unless_forced(tmp_path):
    theirs = tmp_path / "prosqa_valid.json"
    theirs.write_text("official")
    sizes = ("--sizes", "2", "2", "2")
    refused = run("--out", str(tmp_path), *sizes)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr == f"error: {theirs} exists and may be the official file; choose another --out or add --force\n"
    assert [path.name for path in tmp_path.iterdir()] == ["prosqa_valid.json"] and theirs.read_text() == "official"
    assert run("--out", str(tmp_path), *sizes, "--force").returncode == 0
    assert len(json.loads(theirs.read_text())) == 2


def test_check_reads_the_official_file_and_names_a_bad_row(shared_data, tmp_path):
    good = run("--check", str(shared_data / "prosqa_valid.json"))
    assert good.returncode == 0 and "300 sound rows" in good.stdout
    (shown,) = (line for line in good.stdout.splitlines() if line.startswith("more ancestors"))
    assert shown.split() == ["more", "ancestors", "69.8", "69.8"]
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([row_of(), row_of(answer="Tom is a impus.")]))
    refused = run("--check", str(bad))
    assert refused.returncode == 2
    assert refused.stderr == f"error: {bad}: row 1: answer: 'Tom is a impus.' is not 'Tom is a gorpus.'\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sizes", "5", "0", "5"], "every split needs at least one row"),
        (["--sizes", "5", "x", "5"], "invalid int value: 'x'"),
        (["--sizes", "5", "5"], "expected 3 arguments"),
        (["--check", "no_such_file.json"], "no_such_file.json"),
    ],
)
def test_mistakes_give_one_line_and_exit_2(args, message, tmp_path):
    made = run("--out", str(tmp_path / "new"), *args)
    assert made.returncode == 2
    assert made.stderr.startswith("error: ") and message in made.stderr and made.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()
