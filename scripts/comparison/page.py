"""The lines of runs.jsonl -> docs/results.md and its figure. Every number and every word of judgement is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from comparison.execute import Records, chosen_settings
from comparison.plan import BASELINE, MEASURES, METHODS, TASKS, WEIGHTS, Job
from eval.significance import PairedDifference, holm, paired_difference

LEVEL = 0.05
HEAD = """# Does the regularizer help?

Made by `python scripts/compare.py` from `docs/results/runs.jsonl` (one line for each run, with its commit and seconds).
Real encoders on the embedded data: VSE-infinity on 4,000 OpenMoji scenes, CLIP4Clip on 1,500 clips, DINOv2
ViT-S on scikit-learn's digits with all 997 training images, and with 96 of them. They are small data sets: what holds
here need not hold on VTAB-1K, Flickr30K or MSR-VTT.

- Every method trains for the same epochs. "{baseline}" is LoRA for two stages without a penalty; each "+ measure" goes
  on from the same first stage with it. "head only" freezes the backbone; "full" trains all of it (digits: the last 4
  blocks; scenes: the text side's, since the regions were encoded beforehand).
- The weight of each measure was chosen on validation, by the mean over {selection} that are not reported, from
  {weights}; after it, at that weight, the bandwidth of euclidean and nonlinear. On clips the choice of scenes is used.
  The other settings of LoRA, of full fine-tuning and of "head only" were not searched, where penalties have three to
  five tries each, but for these, chosen by hand, on validation: {by_hand}.
- Scores are those of the test split after the last epoch: mean and standard deviation over the seeds.
- "against {baseline}" is the mean difference with the same seed and its 95 % interval (Student's t). p is from the
  paired t-test, corrected by Holm over the {penalties} penalties; a difference is called one only if it is below
  {level}. "detectable" is the smallest true difference that so many seeds find in four of five repetitions after that
  correction, at the spread that was observed.
- Redundancy is the mean |cos| between the activations of two subspaces on validation data, after the first stage and
  at the end. It does not see B, and so not what cosine moves.
"""
BEFORE = ("1e435c1", "694329f", "835fb27", "8be4120", "8bf9d40")
"""Commits of runs of which the following has to be said."""
SINCE_MENDED = """

These runs are of a version in which seeds next to each other shared the order of items, an epoch apart, and in which
the second stage of scenes and clips drew the captions and augmentations of the first once more. Both were so for all
methods alike, and are mended: a run of today has other digits."""
MIXED = """

**Rows of this table are of different versions**: {before} of one in which seeds next to each other shared the order of
items, the others of a later one. A difference between the two is not one between methods."""


def write_page(records: Records, output: Path) -> None:
    """Write `<output>/results.md` and `<output>/results/stage2.svg` from what has been run so far."""
    tasks = [task for task in TASKS if _scores(records, task, BASELINE)]
    parts = [
        HEAD.format(
            baseline=BASELINE,
            level=LEVEL,
            penalties=len(MEASURES),
            weights=", ".join(f"{weight:g}" for weight in WEIGHTS),
            selection=", ".join(
                f"{len(t.selection_seeds)} seed(s) of {n}" for n, t in TASKS.items() if t.selection_seeds
            ),
            by_hand="; ".join(
                f'"{method}" on {name}: {" ".join(overrides)}'
                for name, task in TASKS.items()
                for method, overrides in task.by_method.items()
            ),
        )
    ]
    if tasks:
        stage_two_figure(records, tasks, output / "results" / "stage2.svg")
        parts.append(
            "![Validation score after each epoch of the second stage](results/stage2.svg)\n\n"
            "Validation score after each epoch of the second stage, minus that of the first stage's end; mean over the "
            "seeds (compare the paper's Figure 4).\n"
        )
    for task in TASKS:
        parts.append(_section(records, task) if task in tasks else f"## {task}\n\nNot run yet.\n")
    (output / "results.md").write_text("\n".join(parts), encoding="utf-8")


def _section(records: Records, task: str) -> str:
    settings = chosen_settings(task, records)
    baseline = _scores(records, task, BASELINE)
    rows: list[tuple[str, dict[int, float], PairedDifference | None]] = []
    for method in METHODS:
        scores = _scores(records, task, method, settings.get(method.removeprefix("+ "), {}))
        both = sorted(scores.keys() & baseline.keys()) if method != BASELINE else []
        difference = None
        if len(both) > 1:
            difference = paired_difference(
                [scores[seed] for seed in both], [baseline[seed] for seed in both], comparisons=len(MEASURES)
            )
        if scores:
            rows.append((method, scores, difference))
    penalties = [difference for method, _, difference in rows if difference and method.startswith("+ ")]
    corrected = iter(holm([difference.p for difference in penalties]))
    header = ("method", TASKS[task].unit, f"against {BASELINE}", "p", "detectable", "redundancy", "settings", "trained")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    verdicts = []
    for method, scores, difference in rows:
        chosen = settings.get(method.removeprefix("+ "), {}) if method.startswith("+ ") else {}
        cells = [method, _mean_and_deviation(list(scores.values()))]
        if difference is None:
            cells += ["", "", ""]
        else:
            cells.append(f"{difference.mean:+z.2f} [{difference.low:+z.2f}, {difference.high:+z.2f}]")
            if method.startswith("+ "):
                p = next(corrected)
                cells += [f"{p:.3f}", f"{difference.detectable:.2f}"]
                verdicts.append(_verdict(method, difference, p))
            else:
                cells += ["", ""]
        some = [record for record in _records(records, task, method, chosen)]
        cells += [
            _redundancy(some),
            ", ".join(f"{name} {value:g}" for name, value in chosen.items()),
            f"{some[0]['parameters']:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    counts = {len(scores) for _, scores, _ in rows}
    seeds = f"{counts.pop()} seeds" if len(counts) == 1 else "seeds so far: " + ", ".join(
        f"{method} {len(scores)}" for method, scores, _ in rows
    )  # fmt: skip
    complete = "" if len(rows) == len(METHODS) else " Not all methods have been run yet."
    commits_of = {
        method: {
            (record["git_commit"] or "unknown")[:7]
            for record in _records(records, task, method, settings.get(method.removeprefix("+ "), {}))
        }
        for method, _, _ in rows
    }
    commits = set().union(*commits_of.values())
    if before := [method for method, own in commits_of.items() if own & set(BEFORE)]:
        complete += SINCE_MENDED if commits <= set(BEFORE) else MIXED.format(before=", ".join(before))
    table = "\n".join(lines)
    head = f"## {task}\n\n{seeds}, code of {', '.join(sorted(commits))}.{complete}"
    return f"{head}\n\n{table}\n\n{' '.join(verdicts)}\n"


def _verdict(method: str, difference: PairedDifference, p: float) -> str:
    if p < LEVEL:
        return f"**{method}** is {'better' if difference.mean > 0 else 'worse'} by {abs(difference.mean):.2f}."
    return f"{method}: no difference was found; a true one below {difference.detectable:.2f} may well have been missed."


def _records(records: Records, task: str, method: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    jobs = [Job(task=task, method=method, seed=seed, settings=settings) for seed in TASKS[task].seeds]
    return [record for job in jobs if (record := records.of(job)) is not None]


def _scores(records: Records, task: str, method: str, settings: Mapping[str, Any] | None = None) -> dict[int, float]:
    """Seed -> test score."""
    found = _records(records, task, method, settings or {})
    return {record["seed"]: record["test"][TASKS[task].score] for record in found}


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def _redundancy(found: Sequence[Mapping[str, Any]]) -> str:
    pairs = [record["redundancy"] for record in found if record["redundancy"]]
    if not pairs:
        return ""
    before, after = (np.mean([pair[when] for pair in pairs]) for when in ("before", "after"))
    return f"{before:.2f} → {after:.2f}"


def stage_two_figure(records: Records, tasks: Sequence[str], path: Path) -> None:
    """Like the paper's Figure 4: how the validation score goes on in the second stage, with and without a penalty."""
    with matplotlib.rc_context({"svg.hashsalt": "resora", "font.size": 8, "axes.spines.top": False,
                                "axes.spines.right": False}):  # fmt: skip
        figure = Figure(figsize=(2.4 * len(tasks) + 1.2, 2.6), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(tasks)))
        for axis, task in zip(axes, tasks, strict=True):
            settings = chosen_settings(task, records)
            for number, method in enumerate(m for m in METHODS if m == BASELINE or m.startswith("+ ")):
                found = _records(records, task, method, settings.get(method.removeprefix("+ "), {}))
                if not found:
                    continue
                curves = np.array([record["curve"] for record in found])
                every = found[0]["evaluate_every"]
                first = len(curves[0]) - -(-int(found[0]["epochs"][-1]) // every)  # evaluations of the first stage
                change = (curves[:, first - 1 :] - curves[:, first - 1 : first]).mean(axis=0)
                style = {"color": "black", "linewidth": 2} if method == BASELINE else {"color": f"C{number - 1}"}
                axis.plot(
                    np.minimum(np.arange(len(change)) * every, found[0]["epochs"][-1]),
                    change,
                    marker=".",
                    label=method,
                    **style,
                )
            axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
            axis.set(title=task, xlabel="epoch of the second stage")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_ylabel("change of the validation score")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
