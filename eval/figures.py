"""Loss and recall curves and redundancy heat maps, as SVG or PNG. No pyplot, so no global state."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eval.history import History
from eval.metrics import DIRECTIONS, RECALL_AT
from regularizers.diagnostics import mean_off_diagonal

WIDTH = 5.4  # inches; a phone shows 10 pt of it as about 9 px
Matrix = Sequence[Sequence[float]]
DIRECTION_NAMES = {"i2t": "image to text", "t2i": "text to image"}


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours of one scheme; lines are told apart by lightness too, and by direct labels."""

    ink: str
    faint: str
    lines: tuple[str, str, str]
    ramp: tuple[str, str, str]  # 0, middle and greatest redundancy


LIGHT = Palette(
    ink="#22272e", faint="#c9d1d9", lines=("#0b3c6f", "#c2500a", "#1d8a6b"), ramp=("#f3f6fa", "#5b9fd0", "#08306b")
)
DARK = Palette(
    ink="#dfe5ec", faint="#3b444f", lines=("#9ccbff", "#f0995a", "#54cfa9"), ramp=("#1b222b", "#3f7fb2", "#dff0ff")
)


def loss_figure(history: History, palette: Palette) -> Figure:
    """One panel for each part of the loss, because a penalty is orders smaller than the task's loss."""
    figure, axes = _panels(list(history.losses), 1.75, history, palette)
    for number, (axis, (epochs, values)) in enumerate(zip(axes, history.losses.values(), strict=True)):
        axis.plot(epochs, values, color=palette.lines[number % len(palette.lines)], linewidth=1.4)
        if min(values) >= 0:
            axis.set_ylim(bottom=0)
    return figure


def recall_figure(history: History, palette: Palette) -> Figure:
    """R@1, R@5 and R@10 on validation in percent, one panel a direction, labelled at the end of each line."""
    figure, axes = _panels([f"{DIRECTION_NAMES[direction]}, %" for direction in DIRECTIONS], 2.2, history, palette)
    for axis, direction in zip(axes, DIRECTIONS, strict=True):
        curves = [history.validation[f"{direction}_R@{k}"] for k in RECALL_AT]
        heights = spread([values[-1] for _, values in curves], gap=11, top=100)
        for k, (epochs, values), height, colour in zip(RECALL_AT, curves, heights, palette.lines, strict=True):
            axis.plot(epochs, values, color=colour, linewidth=1.6, marker="o", markersize=3)
            axis.annotate(
                f"R@{k}", (epochs[-1], height), xytext=(8, 0), textcoords="offset points", color=colour, va="center"
            )
        axis.set_ylim(0, 100)
    return figure


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending heights moved apart to at least gap, none above top, so that labels at them do not cover each other."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    drift = sum(placed) / len(placed) - sum(heights) / len(heights)
    placed = [height - drift for height in placed]
    ceiling = top
    for number in reversed(range(len(placed))):
        placed[number] = min(placed[number], ceiling)
        ceiling = placed[number] - gap
    return placed


def heatmap_figure(before: Matrix, after: Matrix, palette: Palette) -> Figure:
    """Redundancy of one layer, (r, r) in 0..1, before and after on one colour scale; the diagonal (1) is left out."""
    greatest = max(float(np.nanmax(_off_diagonal(matrix), initial=0.0)) for matrix in (before, after)) or 1.0
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, 2)
    for axis, matrix, name in zip(axes, (before, after), ("before", "after"), strict=True):
        image = _heatmap(axis, matrix, palette, greatest)
        axis.patch.set_alpha(0)
        axis.set_title(name, loc="left", color=palette.ink)
        axis.set_xticks([])
        axis.set_yticks([])
    _colour_bar(figure, image, list(axes), palette)
    return figure


def redundancy_figure(heading: str, rows: Sequence[Sequence[tuple[str, Matrix]]], palette: Palette) -> Figure:
    """Figure 1a of the ReSoRA paper: heat maps of redundancy, all on the colour scale 0..1, with their means.

    Args:
        heading: above all of them.
        rows: of panels, each a title and an (r, r) matrix with entries in 0..1; the diagonal (1) is left out. Rows may
            be shorter than the first.
        palette: its colours; the ground is white.
    """
    columns = len(rows[0])
    width, height = max(2.6 * columns + 0.9, 4.6), 3.0 * len(rows) + 0.6  # inches
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(textwrap.fill(heading, int(13 * width)), x=0.02, ha="left", color=palette.ink, fontsize=10)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, panels in zip(axes, rows, strict=True):
        for axis, (title, matrix) in zip(row, panels, strict=False):
            image = _heatmap(axis, matrix, palette, 1.0)
            mean = f"mean {mean_off_diagonal(matrix):.3f}"
            axis.set_title(f"{title}\n{mean}" if title else mean, loc="left", color=palette.ink, fontsize=9)
            for side, name in ((axis.xaxis, "subspace j"), (axis.yaxis, "subspace i")):
                side.set_label_text(name, color=palette.ink)
                side.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
                side.set_major_formatter(FuncFormatter(lambda position, _: f"{position + 1:.0f}"))
            axis.tick_params(colors=palette.ink, length=0, labelsize=8)
        for axis in row[len(panels) :]:
            axis.set_axis_off()
    bar = _colour_bar(figure, image, list(axes.flat), palette, aspect=20 * len(rows))
    bar.set_label("redundancy (0: none, 1: alike)", color=palette.ink)
    return figure


def _off_diagonal(matrix: Matrix) -> np.ndarray:
    """A copy with NaN on the diagonal, which is drawn as the ground."""
    values = np.array(matrix, dtype=np.float64)
    np.fill_diagonal(values, np.nan)
    return values


def _heatmap(axis: Axes, matrix: Matrix, palette: Palette, greatest: float) -> AxesImage:
    colours = LinearSegmentedColormap.from_list("redundancy", palette.ramp).with_extremes(bad=(0, 0, 0, 0))
    for spine in axis.spines.values():
        spine.set_color(palette.faint)
    return axis.imshow(_off_diagonal(matrix), cmap=colours, vmin=0, vmax=greatest)


def _colour_bar(
    figure: Figure, image: AxesImage, axes: Sequence[Axes], palette: Palette, aspect: float = 20
) -> Colorbar:
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.03, aspect=aspect)
    cast(Patch, bar.outline).set_visible(False)
    bar.ax.tick_params(colors=palette.ink, length=0)
    return bar


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, text drawn as paths; the same figure gives the same bytes (no date, no random ids)."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "resora", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as PNG at 150 dots an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _panels(titles: Sequence[str], height: float, history: History, palette: Palette) -> tuple[Figure, list[Axes]]:
    """A column of titled panels over the epochs of the run, on a transparent ground, with the stages marked."""
    several = len(history.stages) > 1
    figure = Figure(figsize=(WIDTH, height * len(titles) + 0.45), layout="constrained")
    figure.patch.set_alpha(0)
    axes = list(figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0])
    for axis, title in zip(axes, titles, strict=True):
        axis.patch.set_alpha(0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(palette.faint)
        axis.grid(axis="y", color=palette.faint, linewidth=0.6)
        axis.tick_params(colors=palette.ink, length=0)
        axis.set_title(title, loc="left", color=palette.ink, pad=20 if several and axis is axes[0] else 6)
        for stage in history.stages[1:]:
            axis.axvline(stage.start, color=palette.ink, linewidth=0.9, linestyle=(0, (4, 3)))
    for stage in history.stages if several else ():
        axes[0].annotate(
            stage.name, (stage.start, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
            textcoords="offset points", va="bottom", color=palette.ink, alpha=0.75, fontsize=9,
        )  # fmt: skip
    axes[0].set_xlim(0, 1.02 * history.stages[-1].end)  # not automatic: a part may be missing from the first stage
    axes[-1].set_xlabel("epochs since the start of the run", color=palette.ink)
    return figure, axes
