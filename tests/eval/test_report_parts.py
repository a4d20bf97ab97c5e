"""What a report is made of: the stages of a log, redundancy of layers, labels that keep apart, the terminal's table."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from eval import chance_level, render_table
from eval.figures import LIGHT, heatmap_figure, loss_figure, spread, to_svg
from eval.history import StageSpan, read_history
from eval.redundancy import common_prefix, layer_redundancies

LOG = [
    {"stage": "adapt", "epoch": 0.5, "loss": 2.0, "parts": {"info_nce": 2.0}},
    {"stage": "adapt", "epoch": 1.0, "loss": 1.5, "parts": {"info_nce": 1.5}},
    {"stage": "adapt", "epoch": 1.0, "validation": {"rsum": 100.0}},
    {"stage": "regularize", "epoch": 0.5, "loss": 1.6, "parts": {"info_nce": 1.4, "resora_linear": 0.2}},
    {"stage": "regularize", "epoch": 2.0, "validation": {"rsum": 120.0}},
]


def test_stages_follow_one_another_on_one_axis() -> None:
    history = read_history(LOG)
    assert history.stages == [StageSpan("adapt", 0.0, 1.0), StageSpan("regularize", 1.0, 3.0)]
    assert history.losses == {"info_nce": ([0.5, 1.0, 1.5], [2.0, 1.5, 1.4]), "resora_linear": ([1.5], [0.2])}
    assert history.validation == {"rsum": ([1.0, 3.0], [100.0, 120.0])}


def test_a_log_without_parts_shows_the_loss() -> None:
    assert read_history([{"stage": "adapt", "epoch": 1, "loss": 2.0}]).losses == {"loss": ([1.0], [2.0])}


def test_figures_reach_over_all_stages_and_are_reproducible() -> None:
    history = read_history(LOG)
    figure = loss_figure(history, LIGHT)
    assert len(figure.axes) == 2 and figure.axes[0].get_xlim()[1] >= 3
    first, second = to_svg(figure), to_svg(loss_figure(history, LIGHT))
    assert first == second and first.startswith(b"<?xml")


def test_heat_maps_share_a_scale_without_the_diagonal() -> None:
    before, after = [[1.0, 0.4], [0.4, 1.0]], [[1.0, 0.1], [0.1, 1.0]]
    left, right = (axis.images[0] for axis in heatmap_figure(before, after, LIGHT).axes[:2])
    assert left.get_clim() == right.get_clim() == (0, 0.4)
    assert before[0][0] == 1.0
    heatmap_figure([[1.0]], [[1.0]], LIGHT)  # rank 1: nothing off the diagonal, and no division by it


def test_layers_before_and_after_must_agree() -> None:
    one = {"a": np.eye(2).tolist()}
    assert [(layer.layer, layer.before) for layer in layer_redundancies(one, one)] == [("a", 0.0)]
    with pytest.raises(ValueError, match="1 before, 1 after, 0 in common"):
        layer_redundancies(one, {"b": one["a"]})


def test_common_prefix_stops_at_a_dot() -> None:
    assert common_prefix(["encoder.layer.10.q", "encoder.layer.1.q"]) == "encoder.layer."
    assert common_prefix(["a.q", "b.q"]) == common_prefix(["q", "qv"]) == ""


def test_labels_keep_apart_and_below_the_top() -> None:
    assert spread([20, 50, 80], gap=11, top=100) == [20, 50, 80]
    for heights in ([40, 41, 42], [98, 99, 100], [100, 100, 100]):
        placed = spread(heights, gap=11, top=100)
        assert all(b - a >= 11 - 1e-9 for a, b in pairwise(placed)) and placed[-1] <= 100


def test_the_table_for_the_terminal() -> None:
    chance = chance_level(np.repeat(np.arange(100), 5), 100)
    lines = render_table({"test": {**chance, "i2t_R@1": 31.44}, "chance": {"test": chance}}).splitlines()
    assert lines[1].split() == ["R@1", "R@5", "R@10"] * 2 + ["Rsum"]
    assert lines[2].split()[:2] == ["test", "31.4"] and lines[3].split()[0] == "chance"
    assert len({len(line) for line in lines[1:]}) == 1
    with pytest.raises(ValueError, match=r"expected one of train, validation, test.*received \['chance'\]"):
        render_table({"chance": {}})
    with pytest.raises(ValueError, match="no level of chance for 'test'"):
        render_table({"test": chance})
