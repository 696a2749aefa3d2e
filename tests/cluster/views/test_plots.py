"""The curves of a run: which are drawn, on which scale, and that no point is lost."""

import re
from xml.etree import ElementTree

from align.metrics import GLOSSARY
from cluster.views.panels import FURTHER_PANELS, PANELS, Panel, non_positive, present
from cluster.views.plots import SERIES_COLORS, draw_panel, draw_picture


def texts_of(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_every_metric_that_a_panel_draws_is_in_the_glossary() -> None:
    drawn = {name for panel in (*PANELS, *FURTHER_PANELS) for name, _ in panel.curves}
    assert drawn - GLOSSARY.keys() == set()
    assert all(len(panel.curves) <= len(SERIES_COLORS) for panel in PANELS)


def test_the_picture_has_one_titled_plot_for_each_panel_that_has_metrics() -> None:
    series = {
        "kl/behavior_reference": {1: 0.5},
        "eval/heldout/kl_per_token": {0: 0.7},
        "eval/heldout/grammatical": {0: 0.1},
    }
    panels = present(PANELS, series)
    assert [panel.title for panel in panels] == ["KL to the reference", "Judged grammatical"]
    texts = texts_of(draw_picture(panels, series, target=0.9))
    assert {panel.title for panel in PANELS} & set(texts) == {panel.title for panel in panels}
    assert {"held-out", "rollouts", "reference"} <= set(texts)
    assert "train" not in texts


def test_a_run_of_one_step_shows_its_only_point() -> None:
    panel = Panel("One", "", (("a/b", "b"),))
    svg = draw_panel(panel, {"a/b": {1: 0.5}})
    assert svg.count("<use ") == 1
    assert texts_of(svg)[:3] == ["0", "1", "2"], "steps are whole numbers"


def test_the_reference_is_a_dashed_line_where_it_was_judged_and_nowhere_else() -> None:
    dashed = []
    for panel in PANELS:
        series = {panel.curves[0][0]: {0: 0.25, 1: 0.5}}
        if "stroke-dasharray" in draw_panel(panel, series, target=0.9):
            dashed.append(panel.title)
    assert dashed == ["Judged grammatical"]


def test_a_log_panel_without_a_positive_value_is_drawn_on_a_plain_scale() -> None:
    series = {"kl/behavior_reference": {0: -0.5, 1: -0.25}}
    assert non_positive(PANELS[0], series) == 0
    assert ">-0.5<" in draw_panel(PANELS[0], series)


def test_a_drawing_for_the_page_has_only_colours_that_follow_the_colour_scheme() -> None:
    svg = draw_panel(PANELS[1], {"eval/train/grammatical": {0: 0.25, 1: 0.5}}, target=0.9)
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
    assert set(re.findall(r"var\((--c\d)\)", svg)) == {"--c1", "--c5", "--c6"}
