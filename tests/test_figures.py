"""Figures from made-up results: every one renders with full, partial and no input, says its n, and is the same every time."""

import json
import re
import xml.etree.ElementTree as ET

import matplotlib.pyplot as plt
import numpy as np
import pytest
from report_material import make_study

from analysis import curves, heatmaps
from analysis.drawing import LOOKS, curve, inline, panel, save, sheet, spread, svg
from analysis.figures import PLATES, accuracy_bars
from analysis.gathered import as_json, gather

SVG = "{http://www.w3.org/2000/svg}"


def summary_of(folder, **kwargs) -> dict:
    """As report and figures get it: read back from its JSON."""
    return json.loads(as_json(gather(make_study(folder, **kwargs))))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> dict:
    return summary_of(tmp_path_factory.mktemp("full"), repeats=2)


@pytest.fixture(scope="module")
def partial(tmp_path_factory) -> dict:
    return summary_of(tmp_path_factory.mktemp("partial"), models=("m3",), repeats=1)


@pytest.fixture(scope="module")
def nothing(tmp_path_factory) -> dict:
    return summary_of(tmp_path_factory.mktemp("nothing"), models=("m3", "m5"), repeats=1, experiments=())


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def texts(axes) -> str:
    return " ".join(text.get_text() for text in [*axes.texts, axes.title]).replace("\n", " ")


@pytest.mark.parametrize("plate", PLATES, ids=lambda plate: plate.name)
def test_every_panel_of_a_full_study_says_its_n(plate, full):
    figure = plate.draw(full)
    panels = [axes for axes in figure.axes if axes.axison]
    assert panels and all("n = " in texts(axes) for axes in panels), [texts(axes) for axes in panels]
    root = ET.fromstring(svg(figure))
    assert len(root.findall(f".//{SVG}text")) > 10 and not root.findall(f".//{SVG}image")


@pytest.mark.parametrize("plate", PLATES, ids=lambda plate: plate.name)
def test_a_panel_without_results_names_its_command(plate, nothing):
    figure = plate.draw(nothing)
    for axes in [axes for axes in figure.axes if axes.axison]:
        if plate.name == "9_evidence":
            assert "not measured" in texts(axes)
        else:
            said = re.sub(r"\s+", " ", texts(axes))
            assert f"python -m analysis.{plate.experiment} --study {nothing['folder']}" in said, said


@pytest.mark.parametrize("plate", PLATES[:-1], ids=lambda plate: plate.name)
def test_with_one_model_its_panels_are_drawn_and_the_others_are_empty(plate, partial):
    said = [texts(axes) for axes in plate.draw(partial).axes if axes.axison]
    assert any("n = " in text for text in said)
    by_model = plate.name in ("1_probes", "4_effects", "6_token_counts", "8_transplants")
    assert by_model == any("--models m5" in text for text in said)


@pytest.mark.parametrize("name", ["1_probes", "3_corruption"])
def test_the_same_results_give_the_same_bytes(name, partial, tmp_path):
    plate = next(plate for plate in PLATES if plate.name == name)
    first, second = (save(plate.draw(partial), tmp_path / folder / "figure") for folder in ("a", "b"))
    assert first == second and "<dc:date>" not in first
    for suffix in (".svg", ".png"):
        assert (tmp_path / f"a/figure{suffix}").read_bytes() == (tmp_path / f"b/figure{suffix}").read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["figure.png", "figure.svg"]


# ---------------------------------------------------------------- what is drawn is what was measured


def test_bars_are_means_over_seeds_in_percent(full):
    axes = accuracy_bars(full).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    of_m3 = [full["ood"][label]["sets"]["test"]["two_choice"]["accuracy"] for label in ("m3", "m3-s1")]
    assert len(heights) == 7 * 8
    assert heights[2] == pytest.approx(50 * sum(of_m3)) and heights[2] > 80  # the third bar of the first group


def test_corruption_starts_at_the_clean_accuracy(partial):
    axes = curves.corruption(partial).axes[0]
    result = partial["corruption"]["m3"]
    y = axes.lines[0].get_ydata() if len(axes.lines[0].get_ydata()) == 4 else axes.containers[0][0].get_ydata()
    levels = [result["clean_accuracy"], *result["forward_corruption"]]
    assert list(y) == pytest.approx([100 * level["accuracy"] for level in levels])


def test_a_cell_without_rows_is_no_zero(partial):
    axes = heatmaps.probes(partial).axes[0]
    cells = {(int(t.get_position()[0]), int(t.get_position()[1])): t.get_text() for t in axes.texts if t.get_text().isdigit()}
    table = partial["probing"]["m3"]["linear_probe_accuracy"]
    assert (2, 0) not in cells and table[0][2] is None
    assert cells[0, 1] == f"{100 * table[1][0]:.0f}" and len(cells) == 4 * 3 - 1
    tables = [np.array([[0.2, np.nan]]), np.array([[0.4, np.nan]])]
    assert heatmaps.mean_table(tables)[0, 0] == pytest.approx(0.3) and np.isnan(heatmaps.mean_table(tables)[0, 1])


def test_no_effect_is_said_with_its_number(full):
    said = texts(heatmaps.effects(full).axes[3])
    assert said.startswith("no effect to trace: total effect 0.01 nats (−0.03") and "n = 100" in said


def test_only_seeds_with_an_effect_are_in_its_map_and_counted(full):
    changed = json.loads(json.dumps(full))
    changed["causal_tracing"]["m3-s1"]["groups"]["thoughts"] = changed["causal_tracing"]["m5"]["groups"]["thoughts"]
    axes = heatmaps.effects(changed).axes[1]
    table = full["causal_tracing"]["m3"]["groups"]["thoughts"]["mean_ce"]
    assert "n = 100, 1 seed; no effect in 1 more" in texts(axes)
    assert f"{table[0][0]:.2f}" == axes.texts[0].get_text()


def test_published_numbers_are_drawn_only_where_they_compare(full, tmp_path):
    official = summary_of(tmp_path, models=("m3",), repeats=1, official=True, experiments=("ood", "corruption"))
    assert official["incomparable"] == [] and len(full["incomparable"]) > 2
    assert "arXiv 2412.06769" in svg(accuracy_bars(official)) and "arXiv" not in svg(accuracy_bars(full))
    assert "recounted" in svg(curves.corruption(official)) and "recounted" not in svg(curves.corruption(full))


def test_verdict_inputs_have_intervals_and_thresholds(tmp_path):
    summary = summary_of(tmp_path, models=("m3", "m4b", "m5"), repeats=3, experiments=("ood",))
    found = {f.quantity: f for f in curves.evidence_of(summary["verdict"]) if len(f.n_seeds) == 2}
    dag = found["two_choice/ood_dag"]
    assert dag.thresholds == (5.0,) and dag.n_seeds == {"m3": 3, "m5": 3}
    assert dag.ci95[0] < dag.ci90[0] < dag.value < dag.ci90[1] < dag.ci95[1] and dag.floor is not None
    assert found["psr"].value is None


def test_intervals_are_over_seeds_where_there_are_several():
    alone = spread([{"accuracy": 0.5, "ci95": [0.4, 0.6]}])
    assert (alone.mean, alone.low, alone.high, alone.values) == (50, 40, 60, (50,))
    seeds = spread([{"accuracy": x, "ci95": [0, 1]} for x in (0.5, 0.6, 0.7)])
    assert seeds.mean == pytest.approx(60) and seeds.high == pytest.approx(60 + 4.302653 * 10 / 3**0.5)
    assert spread([None, {"accuracy": None}]) is None


# ---------------------------------------------------------------- looks


def test_models_differ_without_colour():
    assert len({(str(look.line), look.marker) for look in LOOKS.values()}) == len(LOOKS)
    assert len({look.hatch for look in LOOKS.values()}) == len(LOOKS)


def test_inline_figures_follow_the_theme_and_do_not_share_ids():
    figure, axes = sheet(1, 1)
    panel(axes[0, 0], "<Title> & more", "n = 5")
    curve(axes[0, 0], "m3", [0, 1], [spread([0.5]), spread([0.6])])
    body = inline(svg(figure), "f3")
    root = ET.fromstring(body)
    assert root.get("width") is None and root.get("viewBox")
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert ids and all(name.startswith("f3-") for name in ids)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    assert used and used <= set(ids)
    assert LOOKS["m3"].colour not in body and "var(--m3)" in body and "var(--ink)" in body
    assert "var(--sans)" in body and "DejaVu" not in body and "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", body)
