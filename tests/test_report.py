"""The report: everything a reader needs in one offline page, from JSON alone, the same bytes for the same results."""

import inspect
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_material import N, make_study, write

from analysis import report
from analysis.blocks import level_text, number, p_text, signed
from analysis.comparisons import by_rows, read_units
from analysis.flags import leaves, verdict_flags
from analysis.gathered import gather, sets_of

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "br", "hr", "img", "link", "input"}
NO_PICTURES = {plate.name: '<svg viewBox="0 0 1 1"/>' for plate in report.PLATES}
STUDY = {"models": ("m1", "m3", "m4b", "m5", "m0"), "repeats": 3, "name": "tiny <b>study</b> & more"}


class Page(HTMLParser):
    """A page's elements; fails on tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, key: str) -> list[str]:
        return [attrs[key] for _, attrs in self.elements if attrs.get(key)]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(folder, summary, page, Markdown) of a study of all experiments."""
    folder = make_study(tmp_path_factory.mktemp("study") / "results", **STUDY)
    report.write(folder, "final")
    summary = json.loads((folder / "final/results_summary.json").read_text())
    return folder, summary, (folder / "report.html").read_text(), (folder / "report.md").read_text()


# ---------------------------------------------------------------- the page


def test_the_page_is_well_formed_offline_and_small(reported):
    folder, _, text, _ = reported
    page = Page(text)
    assert (folder / "report.html").stat().st_size <= 3_000_000
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    links = page.all("href") + page.all("xlink:href")
    inner = {link[1:] for link in links if link.startswith("#")}
    assert inner <= set(ids) and {"shortcuts", "verdict", "gates", "accuracy", "missing"} <= inner
    citations = [attrs["href"] for tag, attrs in page.elements if tag == "a" and attrs["href"].startswith("http")]
    assert {link for link in links if not link.startswith("#")} == set(citations) != set()
    assert not page.all("src") and not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
    assert "@import" not in text and "url(http" not in text


def test_figures_stand_in_the_page(reported):
    _, _, text, _ = reported
    found = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(found) == 9
    for document in found:
        ET.fromstring(document)
        assert "n = " in document


def test_light_dark_and_print(reported):
    text = reported[2]
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "tabular-nums" in text
    assert text.count('class="scroll" tabindex="0"') == text.count("<table>") > 20


def test_shortcuts_come_first_and_the_verdict_second(reported):
    _, summary, text, markdown = reported
    titles = re.findall(r'<h2 id="[^"]*"><span class="number">(\d)</span> ([^<]*)</h2>', text)
    assert [title for _, title in titles][:3] == ["What the data give away", "Verdict", "Gates and red flags"]
    lead = titles_text(text, "shortcuts")
    assert "is right in 50.3 % without reading who is asked, a coin's share" in lead and "91 to 95 %" in lead
    meaning = summary["verdict"]["meaning"]
    assert summary["verdict"]["verdict"] == "2" and f"Row 2: {meaning}" in titles_text(text, "verdict")
    assert f"Row 2: {meaning}" in markdown
    rules = re.findall(r"<p class=\"list-title\">Row (\w+):", text)
    assert rules == ["1", "4a", "4b", "3", "2"]  # the order in which rows are read


def titles_text(text: str, anchor: str) -> str:
    """The text of a section, to the next one."""
    start = text.index(f'<section id="{anchor}"')
    return "".join(Page(text[start : text.index("<table", start)].split("<div")[0] + "</section>").words)


def test_every_condition_has_its_numbers(reported):
    text = reported[2]
    numbers = re.findall(r'<span class="numbers">([^<]*)</span>', text)
    assert len(numbers) > 30
    assert all("seeds " in line for line in numbers)
    measured = [line for line in numbers if line.startswith(("D ", "mean "))]
    assert measured and all("95 %" in line and "n = " in line for line in measured)


def test_tables_state_their_n(reported):
    markdown = reported[3]
    part = markdown[markdown.index("## 4. ") : markdown.index("## 6. ")]
    heads = [before for before, line in zip(part.split("\n"), part.split("\n")[1:]) if line.startswith("| ---")]
    assert len(heads) > 25
    without = [head for head in heads if not re.search(r"\| (pairs )?n |seeds", head)]
    assert without == []


def test_percent_with_one_decimal_and_interval(reported):
    _, summary, _, markdown = reported
    level = summary["causal_tracing"]["m3"]  # a result that is read as it stands
    assert f"| {level['groups']['thoughts']['n_traced']} | 1.40 (1.36 .. 1.44) |" in markdown
    assert level_text({"accuracy": 0.97, "n": 500, "ci95": [0.951, 0.982]}) == "97.0 (95.1 .. 98.2)"
    assert (number(-0.004, 2), number(-1.25), number(None)) == ("0.00", "−1.2", "–")
    assert (signed(-0.04), signed(-1.25, 2), p_text(3.0e-7), p_text(0.0451)) == ("0.0", "−1.25", "3.0e-7", "0.045")


def test_users_text_is_escaped(reported):
    _, _, text, markdown = reported
    assert "<b>study" not in text and "tiny &lt;b&gt;study&lt;/b&gt; &amp; more" in text
    assert "seed &lt;1&gt; diverged &amp; was kept" in text
    assert "<b>" not in markdown and "seed &lt;1&gt; diverged &amp; was kept" in markdown
    assert report.as_markdown("a|b_c*d") == r"a\|b\_c\*d"


def test_only_the_last_record_of_a_gate_counts(reported):
    _, summary, text, _ = reported
    assert [g["status"] for g in summary["gates"] if g["gate"] == "3"] == ["PASS"]
    words = " ".join(Page(text).words)
    assert words.count("m1, m3: trains a tiny backbone") == 2  # beside the gates and beside the published numbers
    assert "PASS, uncalibrated" in words and "NOT APPLICABLE" in words and "RAISED" in words and "NOT YET" not in words


def test_what_cannot_be_otherwise_is_no_finding(reported):
    _, summary, text, _ = reported
    callout = text[text.index("Asserted, not found") :]
    callout = callout[: callout.index("</aside>")]
    assert "m4b, m4b-s1" in callout and "permutation flip rate" in callout and "m3" not in callout
    assert text.count(">asserted no-op<") == 4  # m4b and m5, donors of equal and of any steps


def test_provenance_names_every_checkpoint(reported):
    _, summary, text, markdown = reported
    for label in ("m1", "m3", "m4b-s2", "m0-s1"):
        sha = summary["ood"][label]["checkpoint"]["sha256"]
        assert sha in text and sha in markdown
    assert "python -m analysis.corruption --checkpoint runs/m5-s1" in text and "torch 2.13.0" in text


def test_markdown_has_the_same_tables_and_its_figures(reported):
    folder, _, text, markdown = reported
    assert markdown.count("\n| ---") == text.count("<table>")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", markdown)
    assert len(pictures) == 9 and all((folder / path).read_bytes().startswith(b"\x89PNG") for path in pictures)
    rows = [line for line in markdown.split("\n") if line.startswith("|")]
    assert rows and all(line.endswith("|") for line in rows)


def test_flags_that_follow_from_the_verdict(reported):
    verdict = json.loads(json.dumps(reported[1]["verdict"]))
    seen = {flag["gate"]: flag["status"] for flag in verdict_flags(verdict)}
    assert seen == {"flag one-family": "CLEAR", "flag unused": "CLEAR", "flag unordered": "RAISED"}
    assert "not sequential reasoning" in reported[2]

    def change(name, holds):
        for rule in verdict["rules"].values():
            for leaf in leaves(rule["condition"]):
                if leaf["name"].startswith(name):
                    leaf["holds"] = holds

    change("permutation_flips of m3", True)
    change("causal_peak of m3", False)
    seen = {flag["gate"]: flag["status"] for flag in verdict_flags(verdict)}
    assert seen == {"flag one-family": "CLEAR", "flag unused": "RAISED", "flag unordered": "CLEAR"}
    change("controlled_advantage of m3", None)
    verdict["rules"]["1"]["condition"]["parts"][2]["holds"] = True
    seen = {flag["gate"]: flag["status"] for flag in verdict_flags(verdict)}
    assert seen["flag unused"] == "NOT YET" and seen["flag one-family"] == "RAISED"


# ---------------------------------------------------------------- from JSON alone, always the same


def test_from_json_alone_with_the_same_bytes_and_without_torch(tmp_path, monkeypatch):
    for place in ("a", "b"):
        make_study(tmp_path / place / "results", models=("m3",), repeats=1, experiments=("ood", "probing"))
    monkeypatch.chdir(tmp_path / "a")
    assert report.main(["results"]) == 0
    program = """
        import sys
        from analysis import report
        sys.exit(report.main(["results"]) + 4 * ("torch" in sys.modules))
    """
    command, env = [sys.executable, "-c", inspect.cleandoc(program)], {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path / "b", env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    written = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert Path("results/report.html") in written and not [p for p in written if p.name.startswith(".tmp")]
    for path in written:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_missing_experiments_come_with_their_commands(tmp_path):
    folder = make_study(tmp_path / "results", models=("m3", "m5"), repeats=1, experiments=("ood",))
    write(folder / "final/psr/m5_psr.failed.json", {"schema_version": 1, "reason": "noise of size 0 changed <answers>"})
    summary = json.loads(json.dumps(gather(folder)))
    gaps = {(gap["experiment"], gap["label"]): gap["command"] for gap in summary["missing"]}
    assert gaps["probing", "m5"] == f"python -m analysis.probing --study {folder} --models m5"
    assert ("ood", "m3") not in gaps and ("causal_sanity", "m3") not in gaps
    text, markdown = report.render(summary, NO_PICTURES)
    Page(text)
    assert f"python -m analysis.corruption --study {folder} --models m3,m5" in markdown
    assert "noise of size 0 changed &lt;answers&gt;" in text
    assert "Insufficient seeds" in text


def test_final_and_best_never_meet(tmp_path):
    few = {"models": ("m3",), "repeats": 1, "experiments": ("ood",)}
    folder = make_study(tmp_path / "results", epoch="best", **few)
    record = json.loads((folder / "best/ood/m3_ood.json").read_text())
    write(folder / "best/ood/m3_ood.json", record | {"checkpoint": record["checkpoint"] | {"sha256": "be" * 32}})
    make_study(folder, **few)
    write(folder / "study.json", json.loads((folder / "study.json").read_text()) | {"checkpoints": ["final", "best"]})
    assert report.measured(folder) == ["final", "best"]
    assert report.main([str(folder), "--epoch", "best"]) == 0
    assert not (folder / "report.html").exists() and not (folder / "final/results_summary.json").exists()
    best = (folder / "report-best.html").read_text()
    final, _ = report.render(gather(folder, "final"), NO_PICTURES, ["best"])
    assert "be" * 32 in best and "be" * 32 not in final
    assert 'href="report-best.html"' in final and 'href="report.html"' in best
    assert "--epoch best" in best and "--epoch best" not in final
    assert (folder / "figures-best/2_accuracy.svg").is_file() and (folder / "best/results_summary.json").is_file()


def test_errors_name_the_remedy(tmp_path, capsys):
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "python -m analysis.measure --study" in capsys.readouterr().err
    folder = make_study(tmp_path / "results", models=("m3",), repeats=1, experiments=("ood",))
    (folder / "final/ood/m3_ood.json").write_text("{")
    assert report.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert "m3_ood.json is not JSON" in error and error.count("\n") == 1
    assert not (folder / "report.html").exists()


# ---------------------------------------------------------------- comparisons


def test_rows_are_compared_with_mcnemar_and_pairs_count_once(tmp_path):
    units = {}
    for label, right in (("m3", [1, 1, 1, 0, 0, 1]), ("m5", [1, 0, 1, 1, 0, 1])):
        lines = [{"identity": "x"}]
        for part in ("test", "swap_pairs", "test@2"):
            lines += [{"part": part, "idx": i, "two_choice_correct": bool(x)} for i, x in enumerate(right)]
        lines.append({"part": "test", "idx": 9, "two_choice_correct": None})
        path = tmp_path / f"{label}_ood.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"part": "te')
        units[label] = read_units(path, {"sets": {"test": {"n": 6}, "swap_pairs": {"n": 6, "n_pairs": 3}}})
    assert set(units["m3"]) == {"test", "swap_pairs"}
    test = by_rows(units, "m3", "m5", "test")["0"]
    assert (test["b"], test["c"], test["n"]) == (1, 1, 6)
    pairs = by_rows(units, "m3", "m5", "swap_pairs")["0"]
    assert (pairs["b"], pairs["c"], pairs["n"]) == (1, 1, 3)  # pair 0: m3 alone, 1: m5 alone, 2: neither


def test_comparisons_across_seeds(reported):
    _, summary, text, _ = reported
    found = summary["comparisons"]["m3 - m5"]["sets"]
    assert list(found) == list(summary["comparisons"]["m1 - m3"]["sets"]) and set(found) == set(sets_of(summary))
    test = found["test"]
    assert test["margin"] == 3 and found["ood_dag"]["margin"] == 5
    assert test["seeds"]["n_seeds"] == {"m3": 3, "m5": 3} and test["seeds"]["equivalent"] is True
    assert list(test["rows"]) == ["0", "1", "2"] and test["rows"]["0"]["n"] == N
    assert found["swap_pairs"]["rows"]["0"]["n"] == N // 2
    m1 = summary["comparisons"]["m1 - m3"]["sets"]["test"]["seeds"]
    assert m1["difference"] < -8 and m1["p_value"] < m1["p_holm"] < 0.05
    assert summary["comparisons"]["m5 - m4b"]["sets"]["test"]["seeds"]["noise_floor"]["value"] == pytest.approx(
        abs(summary["comparisons"]["m5 - m4b"]["sets"]["test"]["seeds"]["difference"])
    )


def test_detailed_outputs_are_no_results(tmp_path):
    folder = make_study(tmp_path / "results", models=("m3",), repeats=1, experiments=("ood",))
    shutil.copy(folder / "final/ood/m3_ood.json", folder / "final/ood/m3_keep.json")
    write(folder / "final/ood/m3_detailed_outputs.json", {"experiment": "ood", "model": "m3", "sets": {"test": []}})
    assert gather(folder)["ood"]["m3"]["sets"]["test"]["n"] == N
