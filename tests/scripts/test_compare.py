"""The comparison: every job is a valid run, no record is made twice, and the page says what the numbers do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from command_line import compose
from comparison import execute, page
from comparison.execute import Records, chosen_settings, run_jobs, run_task
from comparison.plan import (
    BASELINE,
    MEASURES,
    METHODS,
    TASKS,
    Job,
    Task,
    bandwidth_jobs,
    epochs,
    report_jobs,
    weight_jobs,
)

from classification.experiment import Experiment as Classification
from retrieval.experiment import Experiment as Retrieval

DEFAULTS = {measure: {"weight": 1e-2} for measure in MEASURES}


@pytest.mark.parametrize("task", TASKS)
def test_every_job_is_a_valid_run_of_its_own(task: str) -> None:
    jobs = report_jobs(task, DEFAULTS)[: len(METHODS)]
    if TASKS[task].selection_seeds:
        jobs += weight_jobs(task)[:3] + bandwidth_jobs(task, dict.fromkeys(MEASURES, 0.1))[:3]
    kind = Retrieval if TASKS[task].command == "train_retrieval" else Classification
    experiments = [kind.of(compose(TASKS[task].command, job.overrides)) for job in jobs]
    assert len({job.key for job in jobs}) == len(jobs)
    folders = {execute._folder(job, Path("runs")) / Path(*e.levels) for job, e in zip(jobs, experiments, strict=True)}
    assert len(folders) == len(jobs)
    epochs = {sum(stage.epochs for stage in experiment.recipe.stages) for experiment in experiments}
    assert len(epochs) == 1, "methods are compared at equal epochs"


def fake_run(job: Job, runs: Path) -> dict[str, Any]:
    """Scores that are known: euclidean gains 2, linear's best weight is 0.1 on validation (on test it would be 0.001),
    the rest is noise of the seed."""
    gain = {"+ euclidean": 2.0, "+ linear": job.settings.get("weight", 0) * 0.1}.get(job.method, 0.0)
    noise = {"+ euclidean": 0.05, "+ linear": 0.5, "+ cosine": 0.4, "+ nonlinear": 0.2, "+ overlap": 1.0}.get(
        job.method, 0.3
    ) * [
        0.3,
        -0.8,
        0.9,
        -0.5,
        0.1,
    ][job.seed % 5]
    score = 70 + job.seed % 7 + gain + noise
    test = score - 2 * gain if job.method == "+ linear" else score
    return {
        "task": job.task, "method": job.method, "seed": job.seed, "settings": dict(job.settings),
        "selection": job.selection, "validation": {"accuracy": score},
        "test": None if job.selection else {"accuracy": test},
        "redundancy": {"before": 0.5, "after": 0.25} if job.method != "full" else None,
        "curve": [score - 3, score - 2, score - 1, score], "epochs": [2, 2], "evaluate_every": 1, "parameters": 1000,
        "overrides": job.overrides, "git_commit": "0123456789abcdef",
    }  # fmt: skip


def _job(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("task", "method", "seed", "settings", "selection")}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Run no training; note what would be launched, in this process."""
    jobs: list[Job] = []

    def note(job: Job, runs: Path) -> dict[str, Any]:
        jobs.append(job)
        return fake_run(job, runs)

    monkeypatch.setattr(execute, "run_job", note)
    monkeypatch.setattr(execute, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers))
    return jobs


def test_finished_runs_are_not_repeated_and_validation_chooses(tmp_path: Path, launched: list[Job]) -> None:
    records = Records(tmp_path / "runs.jsonl")
    run_task("digits", records, tmp_path, jobs=2)
    task = TASKS["digits"]
    assert len(records.all) == len({execute._key(record) for record in records.all})
    reported = [record for record in records.all if record["seed"] in task.seeds]
    assert len(reported) == len(METHODS) * len(task.seeds)
    assert chosen_settings("digits", records)["linear"] == {"weight": 0.1}
    assert all(record["settings"]["weight"] == 0.1 for record in reported if record["method"] == "+ linear")
    first = launched.copy()
    other = next(record for record in records.all if record["method"] == "+ linear")
    assert records.of(first[0]) is not None and records.of(Job(**_job(other))) is not None
    other["overrides"] = ["data=digits"]
    assert records.of(Job(**_job(other))) is None, "a run with other overrides is another run"
    run_task("digits", Records(tmp_path / "runs.jsonl"), tmp_path, jobs=2)
    again = launched[len(first) :]
    assert all(job.method == BASELINE for job in again), "only stages that others go on from, whose files are not there"


def test_a_penalty_goes_on_from_the_first_stage_of_lora(tmp_path: Path, cache: Path, monkeypatch: Any) -> None:
    """Two real runs, tiny, in this process: a sweep starts fresh ones, which would not know the tiny task."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cache").symlink_to(cache.resolve())
    small = f"root={tmp_path / 'data'} data=digits data.size=28 data.train_images=32 model.frozen_blocks=11"
    tiny = Task(
        command="train_classification",
        overrides=(*small.split(), "trainer.batch_size=16", *epochs(1, 1)),
        score="accuracy",
        unit="accuracy, %",
        seeds=(0,),
    )
    monkeypatch.setitem(TASKS, "digits", tiny)
    monkeypatch.setattr(execute, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers))
    records, runs = Records(tmp_path / "runs.jsonl"), tmp_path / "runs"
    penalised = Job(task="digits", method="+ linear", seed=0, settings={"weight": 0.1})
    run_jobs([penalised], records, runs, jobs=1)
    base, record = records.all
    assert (base["method"], record["method"]) == (BASELINE, "+ linear")
    assert base["redundancy"]["before"] == record["redundancy"]["before"], "both start from one first stage"
    assert record["redundancy"]["after"] < base["redundancy"]["after"]
    assert record["overrides"] == penalised.overrides and len(record["curve"]) == 2 and record["test"]["accuracy"] > 0
    assert base["epochs"] == [1, 1] and base["curve"][0] == record["curve"][0]
    assert not list(runs.rglob("checkpoint-*")), "what a sweep would fill the disk with"


WORK = """
import sys, time
from pathlib import Path
from comparison import execute

def work(job, runs):
    for beat in range(3000):
        (runs / "beats").write_text(str(beat))
        time.sleep(0.1)

if __name__ == "__main__":
    execute.run_job = work
    execute.run_jobs([execute.Job(task="digits", method="full", seed=0)], execute.Records(Path("none")), Path("."), 1)
"""


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    scripts = str(Path(__file__).parents[2] / "scripts")
    parent = subprocess.Popen([sys.executable, "work.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": scripts})
    beats = tmp_path / "beats"
    assert _until(beats.is_file)
    parent.kill()
    parent.wait()

    def still() -> bool:
        before = beats.read_text()
        time.sleep(0.5)
        return beats.read_text() == before

    assert _until(still)


def _until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it comes true in time."""
    limit = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < limit:
        time.sleep(0.05)
    return true


def test_the_page_says_what_the_numbers_do(tmp_path: Path, launched: list[Job]) -> None:
    records = Records(tmp_path / "results" / "runs.jsonl")
    run_task("digits", records, tmp_path, jobs=2)
    page.write_page(records, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "## scenes\n\nNot run yet." in text and "10 seeds, code of 0123456.\n" in text
    assert "**+ euclidean** is better by" in text and "+ overlap: no difference was found" in text

    def scores(method: str) -> list[float]:
        reported = (record for record in records.all if record["method"] == method and not record["selection"])
        found = {record["seed"]: record["test"]["accuracy"] for record in reported}
        return [found[seed] for seed in TASKS["digits"].seeds]

    tests = {measure: stats.ttest_rel(scores(f"+ {measure}"), scores(BASELINE)) for measure in MEASURES}
    p_values = sorted((test.pvalue, measure) for measure, test in tests.items())
    for step, (_, measure) in enumerate(p_values):
        p = min(1.0, max(value * (5 - earlier) for earlier, (value, _) in enumerate(p_values[: step + 1])))
        (row,) = (line for line in text.splitlines() if line.startswith(f"| + {measure} "))
        assert f"| {p:.3f} |" in row
    test = tests["overlap"]
    low, high = test.confidence_interval(0.95)
    (row,) = (line for line in text.splitlines() if line.startswith("| + overlap"))
    mean = sum(scores("+ overlap")) / 10 - sum(scores(BASELINE)) / 10
    assert f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" in row and "0.50 → 0.25" in row
    assert (tmp_path / "results" / "stage2.svg").is_file()

    assert "These runs are of a version" not in text
    (last,) = (record for record in records.all if (record["method"], record["seed"]) == ("full", 9))
    last["git_commit"] = "835fb2712345"
    page.write_page(records, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert (
        "10 seeds, code of 0123456, 835fb27.\n\n**Rows of this table are of different versions**: full of one" in text
    )
    for record in records.all:
        record["git_commit"] = "835fb2712345"
    page.write_page(records, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "10 seeds, code of 835fb27.\n\nThese runs are of a version in which" in text


def test_the_documents_count_the_choices_as_they_are() -> None:
    docs = Path(__file__).parents[2] / "docs"
    records = Records(docs / "results" / "runs.jsonl")
    choices = [chosen_settings(task, records).values() for task in TASKS if TASKS[task].selection_seeds]
    weights = [settings["weight"] for chosen in choices for settings in chosen]
    said = f"in {weights.count(1e-2)} of the {len(weights)} choices of [results.md](results.md) "
    said += f"(1e-1 in {weights.count(1e-1)}, 1e-3 in {weights.count(1e-3)})"
    assert said in (docs / "regularizers.md").read_text(encoding="utf-8")
