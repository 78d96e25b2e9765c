"""Evaluation sets: rows are what the set says, no shortcut is left, no question comes twice, same seed same bytes."""

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from ood_material import FEW, GENERATED, few_rows, spec_of

from data import ood, prosqa_graph, prosqa_rows
from data.ood_checks import check_members, check_set, imbalance
from data.ood_sets import KINDS, PRESETS, SWAP_OFFICIAL
from data.prosqa_graph import Graph, question_key
from data.prosqa_rows import baselines

PROSQA, QUICKSTART = PRESETS["prosqa"], PRESETS["quickstart"]


def splits(folder: Path, sizes=("300", "40", "150")) -> Path:
    """The quickstart's training, validation and test rows, fewer of them."""
    command = [sys.executable, "data/two_chain.py", "--out", str(folder), "--sizes", *sizes]
    subprocess.run([*command, "--hops", "1", "3", "--nodes", "4", "8", "--species", "12"], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data folder with its sets in `ood`: all of the quickstart's, with few edge pairs."""
    folder = splits(tmp_path_factory.mktemp("data"))
    edge = replace(QUICKSTART.sets["edge_pairs"], size=FEW)
    ood.make_sets(replace(QUICKSTART, sets=QUICKSTART.sets | {"edge_pairs": edge}), folder / "ood")
    return folder


# ------------------------------------------------------------------------------------------------------ the sets


@pytest.mark.parametrize(("preset", "name"), GENERATED)
def test_rows_are_what_the_set_says(preset, name):
    spec, rows = spec_of(preset, name), few_rows(preset, name)
    check_members(rows, spec, name, PRESETS[preset])
    assert len(rows) == spec.rows == FEW * (1 + spec.pairs)
    for row in rows:
        graph, n = Graph(len(row["idx_to_symbol"]), row["edges"]), len(row["idx_to_symbol"])
        roots = {row["root"]: row["target"], 1 - row["root"]: row["neg_target"]}
        if name == "ood_dag":
            least = {"prosqa": 4, "quickstart": 2}[preset]
            assert min(graph.shortest_paths(root)[1][end] for root, end in roots.items()) >= least
        if name == "ood_dense":
            assert len(row["edges"]) / n >= {"prosqa": 2.1, "quickstart": 1.375}[preset]
        if name.endswith("hop"):
            assert f"ood_{len(row['steps'])}hop" == name
        if preset == "prosqa":
            assert 17 <= n <= 28 and 22 <= len(row["edges"]) <= 54 and 2 <= len(graph.persons) <= 6
        else:
            assert len(row["edges"]) <= 13, "as many facts as a training row of the quickstart may have, no more"
            assert set(row["idx_to_symbol"]) <= {*prosqa_graph.NAMES, *prosqa_graph.SPECIES[:12]}


def test_kinds_tell_what_goes_beyond_training():
    for preset in PRESETS.values():
        beyond = {name for name, spec in preset.sets.items() if spec.extrapolated}
        assert {name for name in preset.sets if name.startswith("ood_")} == beyond and len(beyond) == 4
        assert {spec.kind for spec in preset.sets.values()} == KINDS.keys()
        assert {name for name, spec in preset.sets.items() if spec.pairs} == {"swap_pairs", "edge_pairs"}
        assert preset.set_of("swap_official_valid") is preset.sets[SWAP_OFFICIAL] and preset.set_of("notes") is None
        deepest = preset.sets["id_matched"].hops[1]
        assert all((spec.hops[0] > deepest) == (spec.kind == "ood_depth") for spec in preset.sets.values())
    assert {name: spec.rows for name, spec in PROSQA.sets.items() if spec.rows != 1000} == {SWAP_OFFICIAL: None}
    assert PROSQA.sets["ood_8hop"].hops == (8, 8) and QUICKSTART.sets["ood_5hop"].hops == (5, 5)


def test_folder_holds_sound_fair_sets_and_no_question_twice(folder):
    seen = Counter()
    for path in sorted(folder.rglob("*.json")):
        if path.name.endswith(".stats.json"):
            continue
        rows = prosqa_rows.read_rows(path)
        seen.update(question_key(row["question"]) for row in rows)
        if path.parent == folder:
            continue
        spec = QUICKSTART.set_of(path.stem)
        spec = replace(spec, size=FEW) if path.stem == "edge_pairs" else spec
        check_set(rows, spec, path.name, QUICKSTART)
        fair = {rule: right for rule, right in baselines(rows).items() if "search" not in rule}
        if spec.pairs:
            assert all(right == 50 for rule, right in fair.items() if rule != "more persons above" or spec.two_chain)
        elif spec.rows:
            assert all(45 <= right <= 55 for right in fair.values()), path
        assert [row.get("member") for row in rows[:4]] == ([0, 1, 0, 1] if spec.pairs else [None] * 4)
    assert len(list((folder / "ood").glob("*.stats.json"))) == len(QUICKSTART.sets)
    assert len(seen) == 300 + 40 + 150 + 6 * 1000 + 2 * FEW + len(prosqa_rows.read_rows(folder / "ood/swap_official_test.json"))
    assert set(seen.values()) == {1}


def test_sidecar_says_what_the_file_is(folder):
    for path in (folder / "ood").glob("*.stats.json"):
        sidecar = json.loads(path.read_text())
        rows = prosqa_rows.read_rows(path.with_name(sidecar["file"]))
        spec = QUICKSTART.set_of(path.name.removesuffix(".stats.json"))
        assert sidecar["kind"] == spec.kind and sidecar["hops"] == list(spec.hops) and sidecar["preset"] == "quickstart"
        assert (sidecar["pairs"], sidecar["two_chain"]) == (spec.pairs, spec.two_chain)
        facts = [len(row["edges"]) for row in rows]
        assert sidecar["facts"] == [min(facts), max(facts)] and sidecar["rows"] == len(rows)
        assert sidecar["parameters"]["seed"] == 0 and sidecar["parameters"]["against"]["prosqa_train.json"] == 300
        if spec.rows:
            assert 0 < sidecar["parameters"]["kept"] <= 1 and sidecar["parameters"]["sub_seed"] >= 0
    dag = json.loads((folder / "ood/ood_dag.stats.json").read_text())["parameters"]
    assert dag["shape"]["paths"] == 2 and dag["lam"] == 2.0 and dag["generator"] == "TwoChain"


# ------------------------------------------------------------------------------------------------- drawing again


def test_unfair_set_is_drawn_again_with_the_next_sub_seed():
    """A hundred rows stray from 45 .. 55 % often enough, and often enough do not."""
    spec = spec_of("quickstart", "id_matched", 100)
    for seed in range(20):
        seen: set[str] = set()
        try:
            drawn = ood.draw_set("id_matched", spec, seed, seen)
        except ValueError:
            continue
        if drawn.record["redraws"]:
            break
    record = drawn.record
    assert record["sub_seed"] == len(record["redraws"]) > 0 and all("must be 45 to 55 %" in r for r in record["redraws"])
    for sub_seed in range(record["sub_seed"] + 1):
        rows, _ = ood.draw_once(f"id_matched {sub_seed}", spec, seed, set())
        assert (imbalance(rows, spec) is None) == (sub_seed == record["sub_seed"])
    assert drawn.rows == rows and seen == {question_key(row["question"]) for row in rows}, "no trace of the others"


def test_five_redraws_are_the_end(monkeypatch):
    tries = []
    monkeypatch.setattr(ood, "imbalance", lambda rows, spec: tries.append(rows) or f"no {len(tries)}")
    seen: set[str] = set()
    with pytest.raises(ValueError, match=r"id_matched: no 6 \(after 5 redraws\); another --seed"):
        ood.draw_set("id_matched", spec_of("quickstart", "id_matched", 3), 0, seen)
    assert len({rows[0]["question"] for rows in tries}) == 6 and not seen


# ---------------------------------------------------------------------------------------------- the other person


def test_swapped_official_rows_turn_the_depth_rules_around(shared_data, tmp_path):
    path = shared_data / "prosqa_valid.json"
    made = ood.make_sets(PROSQA, tmp_path / "ood", names=[SWAP_OFFICIAL], official=[path])
    assert list(made) == ["swap_official_valid"] and made["swap_official_valid"]["kind"] == "swap"
    rows, official = prosqa_rows.read_rows(tmp_path / "ood/swap_official_valid.json"), prosqa_rows.read_rows(path)
    check_set(rows, PROSQA.sets[SWAP_OFFICIAL], "file", PROSQA)
    found = made["swap_official_valid"]["baselines"]
    depth = [rule for rule in prosqa_rows.RULES if rule.startswith(("farther", "farthest", "nearest"))]
    assert len(depth) == 3 and all(4.5 < found[rule] < 8 for rule in depth), found
    assert [row["official_row"] for row in rows] == list(range(300))
    assert {len(row["steps"]) for row in rows} == {1, 2, 3, 4}
    for row, theirs in zip(rows, official):
        words, their_words = row["question"].split(), theirs["question"].split()
        (at,) = (i for i, (one, other) in enumerate(zip(words, their_words, strict=True)) if one != other)
        assert their_words[at] == theirs["idx_to_symbol"][theirs["root"]] and their_words[at - 1] == "Is"
        assert row["answer"] == f"{words[at]} is a {theirs['idx_to_symbol'][theirs['neg_target']]}."


def test_swapped_question_that_is_in_another_file_is_left_out(folder, tmp_path):
    official = prosqa_rows.read_rows(folder / "prosqa_test.json")[:5]
    spec = QUICKSTART.sets[SWAP_OFFICIAL]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(official))
    whole = ood.swap_file(path, spec, 0, set()).rows
    drawn = ood.swap_file(path, spec, 0, {question_key(whole[1]["question"])})
    assert [row["official_row"] for row in drawn.rows] == [0, 2, 3, 4] and drawn.record["in_another_file"] == 1
    with pytest.raises(ValueError, match="every question about the other person is in a file already"):
        ood.swap_file(path, spec, 0, {question_key(row["question"]) for row in whole})


def test_row_without_another_person_to_ask_is_named(folder, tmp_path):
    row = prosqa_rows.read_rows(folder / "prosqa_test.json")[0]
    stranger = next(name for name in prosqa_graph.NAMES if name not in row["idx_to_symbol"])
    other, n = 1 - row["root"], len(row["idx_to_symbol"])
    moved = [[n if edge[0] == other else edge[0], edge[1]] for edge in row["edges"]]  # a third person in its place
    spare = next(word for word in prosqa_graph.SPECIES if word not in row["idx_to_symbol"])
    symbols = [*row["idx_to_symbol"], stranger, spare]
    graph = Graph(n + 2, [*moved, [other, n + 1]])
    facts = [prosqa_graph.sentence(symbols[s], symbols[d]) for s, d in graph.edges]
    asked = row["question"].split(". ")[-1]
    changed = row | {"edges": graph.edges, "idx_to_symbol": symbols, "question": " ".join([*facts, asked])}
    path = tmp_path / "odd.json"
    path.write_text(json.dumps([changed]))
    with pytest.raises(ValueError, match=r"odd.json: row 0: neg_target: \w+ is not below \w+, the root not asked"):
        ood.swap_file(path, PROSQA.sets[SWAP_OFFICIAL], 0, set())


# ----------------------------------------------------------------------------------------------------------- files


def run(*args: str, module: bool = False) -> subprocess.CompletedProcess:
    start = ["-m", "data.ood"] if module else ["data/ood.py"]
    command = [sys.executable, *start, "--preset", "quickstart", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_same_seed_same_bytes_and_a_table(folder, tmp_path):
    for name, seed, module in (("a", "1", False), ("b", "1", True), ("c", "2", False)):
        out = ("--out", str(tmp_path / name / "ood"), "--official", str(folder / "prosqa_test.json"))
        made = run(*out, "--seed", seed, "--sets", "swap_pairs", "swap_official", module=module)
        assert made.returncode == 0, made.stderr
    names = sorted(path.name for path in (tmp_path / "a/ood").iterdir())
    assert names == [f"{s}.{e}" for s in ("swap_official_test", "swap_pairs") for e in ("json", "stats.json")]
    same = [(tmp_path / "a/ood" / n).read_bytes() == (tmp_path / "b/ood" / n).read_bytes() for n in names]
    assert all(same)
    assert (tmp_path / "a/ood/swap_pairs.json").read_text() != (tmp_path / "c/ood/swap_pairs.json").read_text()
    (columns,) = (line.split() for line in made.stdout.splitlines() if line.split()[:1] == ["prosqa_test"])
    assert columns == ["prosqa_test", "swap_official_test", "swap_pairs"]
    (shown,) = (line.split() for line in made.stdout.splitlines() if line.startswith("first option"))
    assert shown[-1] == "50.0" and len(shown) == 5


def test_set_made_alone_is_the_same(folder, tmp_path):
    for split in prosqa_rows.SPLITS:
        (tmp_path / f"prosqa_{split}.json").write_bytes((folder / f"prosqa_{split}.json").read_bytes())
    ood.make_sets(QUICKSTART, tmp_path / "ood", names=["ood_dense"])
    assert (tmp_path / "ood/ood_dense.json").read_bytes() == (folder / "ood/ood_dense.json").read_bytes()


@pytest.mark.parametrize("where", ["prosqa_train.json", "more.json", "ood/ood_4hop.json", "prosqa_test.json"])
def test_question_of_another_file_is_not_drawn(folder, tmp_path, where):
    """A split, a file named with --against, a set that is kept, and what becomes of an official file."""
    theirs = prosqa_rows.read_rows(folder / "ood/ood_dense.json")
    (tmp_path / "ood").mkdir()
    names, rows = ["ood_dense"], theirs
    if where == "prosqa_test.json":
        names, rows = [*names, SWAP_OFFICIAL], [ood.ask_other_person(random.Random(i), row) for i, row in enumerate(theirs)]
    (tmp_path / where).write_text(json.dumps(rows))
    against = [tmp_path / where] if where == "more.json" else []
    made = ood.make_sets(QUICKSTART, tmp_path / "ood", names=names, against=against)
    mine = prosqa_rows.read_rows(tmp_path / "ood/ood_dense.json")
    assert not {question_key(row["question"]) for row in mine} & {question_key(row["question"]) for row in theirs}
    assert made["ood_dense"]["parameters"]["against"] == {Path(where).name: 1000}


def test_existing_sets_are_kept_unless_forced(folder, tmp_path):
    theirs = tmp_path / "ood/swap_pairs.json"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    refused = run("--out", str(theirs.parent), "--sets", "swap_pairs")
    assert refused.returncode == 2 and refused.stderr == f"error: {theirs} exists; choose another --out or add --force\n"
    assert theirs.read_text() == "mine"
    assert run("--out", str(theirs.parent), "--sets", "swap_pairs", "--force").returncode == 0
    assert len(prosqa_rows.read_rows(theirs)) == 1000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sets", "ood_9hop"], "--sets: no set 'ood_9hop' in preset quickstart; it has id_matched, ood_4hop"),
        (["--sets", "swap_official"], "no prosqa_test.json in "),
        (["--official", "no_such.json"], "no_such.json"),
        (["--official", "x/prosqa_a.json", "y/prosqa_a.json"], "two files of one name"),
        (["--preset", "gsm"], "invalid choice: 'gsm'"),
    ],
)
def test_mistakes_give_one_line_and_exit_2(args, message, tmp_path):
    made = run("--out", str(tmp_path / "new/ood"), *args)
    assert made.returncode == 2
    assert made.stderr.startswith("error: ") and message in made.stderr and made.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_when_a_set_fails(folder, tmp_path, monkeypatch):
    def refuse(rows, spec, where, preset):
        if "swap_pairs" in where:
            raise ValueError(f"{where}: no")

    monkeypatch.setattr(ood, "check_members", refuse)
    with pytest.raises(ValueError, match="generated swap_pairs: no"):
        ood.make_sets(QUICKSTART, tmp_path / "ood", names=["ood_4hop", "swap_pairs"])
    assert not (tmp_path / "ood").exists()
