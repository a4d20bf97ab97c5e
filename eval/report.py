"""A run's folder -> one self-contained HTML page: no script, no link and no file beside it is needed to read it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from eval.figures import DARK, LIGHT, Palette, heatmap_figure, loss_figure, recall_figure, to_svg
from eval.history import read_history
from eval.pictures import data_uri, retrieved_cards
from eval.redundancy import common_prefix, layer_redundancies
from eval.run_folder import FinishedRun, read_run
from eval.tables import table_rows


def write_report(run_folder: Path) -> Path:
    """Write report.html into a run folder, from the files of that folder alone.

    run.json and metrics.json are needed; a section whose file is missing (config.yaml, log.jsonl, redundancy.json,
    retrieved.json) says so. Everything read from files is escaped. The page is replaced as a whole or not at all.

    Args:
        run_folder: folder of a finished run, as described in `eval.run_folder`.

    Returns:
        The path of report.html.

    Raises:
        FileNotFoundError: if run.json or metrics.json is missing.
        ValueError: if a file is malformed; the message names it.
    """
    folder = Path(run_folder)
    page = _environment().get_template("report.html").render(_content(read_run(folder)))
    report, unfinished = folder / "report.html", folder / "report.html.tmp"
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, report)
    return report


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": format_duration, "count": "{:,}".format, "fixed": lambda x, n: f"{x:.{n}f}"}
    return environment


def _content(folder: FinishedRun) -> dict[str, Any]:
    """What the template shows."""
    history = read_history(folder.log) if folder.log else None
    run, metrics = folder.run, folder.metrics
    return {
        "run": run,
        "metrics": metrics,
        "config": folder.config,
        "rows": table_rows(metrics),
        "percent_trained": 100 * run["trained_parameters"] / run["total_parameters"],
        "redundancy": metrics.get("redundancy"),
        "stages": history.stages if history else [],
        "loss": _in_both_schemes(partial(loss_figure, history)) if history and history.losses else None,
        "recall": _in_both_schemes(partial(recall_figure, history)) if history and history.validation else None,
        "layers": _layers(folder.redundancy) if folder.redundancy else None,
        "k": folder.retrieved["k"] if folder.retrieved else None,
        "cards": retrieved_cards(folder.retrieved, folder.path / "thumbnails") if folder.retrieved else None,
    }


def _layers(redundancy: dict[str, Any]) -> dict[str, Any]:
    """Every layer's mean, and the heat maps of the layer that was the most redundant before."""
    before, after = redundancy["before"], redundancy["after"]
    layers = layer_redundancies(before, after)
    shown = max(layers, key=lambda layer: layer.before)
    greatest = max(max(layer.before, layer.after) for layer in layers)
    return {
        "all": layers,
        "shown": shown,
        "prefix": common_prefix([layer.layer for layer in layers]),
        "scale": max(math.ceil(10 * greatest), 1) / 10,
        "rank": len(before[shown.layer]),
        "heatmap": _in_both_schemes(partial(heatmap_figure, before[shown.layer], after[shown.layer])),
    }


def _in_both_schemes(draw: Callable[[Palette], Figure]) -> dict[str, str]:
    schemes = {"light": LIGHT, "dark": DARK}
    return {scheme: data_uri(to_svg(draw(palette)), "image/svg+xml") for scheme, palette in schemes.items()}


def format_duration(seconds: float) -> str:
    """Seconds for people: "0.8 s", "42 s", "3 min 05 s", "2 h 07 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
