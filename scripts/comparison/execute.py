"""Run the jobs of a plan that have no record yet, a few at a time, and keep one line for each."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from comparison.plan import BANDWIDTHS, MEASURES, TASKS, WEIGHTS, Job, bandwidth_jobs, report_jobs, weight_jobs


class Records:
    """One JSON line for each finished run; the table, the figure and what is left to run are made from them alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.all: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def of(self, job: Job) -> dict[str, Any] | None:
        """The last record of a job, if it was run with the overrides that it has now."""
        found = [record for record in self.all if _key(record) == job.key and record["overrides"] == job.overrides]
        return found[-1] if found else None

    def add(self, record: dict[str, Any]) -> None:
        self.all.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["task"], record["method"], record["seed"], tuple(sorted(record["settings"].items()))


def run_task(task: str, records: Records, runs: Path, jobs: int) -> None:
    """Choose weights and bandwidths on validation, then run what is reported; finished runs are left alone."""
    if TASKS[task].selected_on is None:
        run_jobs(weight_jobs(task), records, runs, jobs)
        run_jobs(bandwidth_jobs(task, best_weights(task, records)), records, runs, jobs)
    run_jobs(report_jobs(task, chosen_settings(task, records)), records, runs, jobs)


def run_jobs(wanted: Iterable[Job], records: Records, runs: Path, jobs: int) -> None:
    """First the runs that others go on from, then the others."""
    missing = [job for job in wanted if records.of(job) is None]
    bases = {base.key: base for job in missing if (base := job.goes_on_from)}
    first = [base for base in bases.values() if not _stage_is_there(base, runs)]
    done_first = {job.key for job in first}
    for batch in (first, [job for job in missing if job.key not in done_first]):
        if not batch:
            continue
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=end_with_parent) as pool:
            futures = {pool.submit(run_job, job, runs): job for job in batch}
            try:
                for future in tqdm(as_completed(futures), total=len(futures), desc=f"{batch[0].task}", unit="run"):
                    record = future.result()
                    if records.of(futures[future]) is None:
                        records.add(record)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # with the runs that have begun; launched again, they are found done
                raise


def end_with_parent() -> None:
    """In a worker: stop when the process that started it was killed, rather than train on for nobody."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_job(job: Job, runs: Path) -> dict[str, Any]:
    """Train and evaluate one run in this process -> its record."""
    from command_line import compose

    command = TASKS[job.task].command
    overrides = [*job.overrides, f"runs={_folder(job, runs)}"]
    if base := job.goes_on_from:
        overrides.append(f"start_from={_run_folder(base, runs)}")
    config = compose(command, overrides)
    if command == "train_retrieval":
        from retrieval.train import train
    else:
        from classification.train import train  # type: ignore[assignment]
    with open("/dev/null", "w", encoding="utf-8") as quiet:
        sys.stderr, stderr = quiet, sys.stderr
        try:
            run = train(config)
        finally:
            sys.stderr = stderr
    metrics, described = run.read_json("metrics.json"), run.read_json("run.json")
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    score = TASKS[job.task].score
    return {
        "task": job.task,
        "method": job.method,
        "seed": job.seed,
        "settings": dict(job.settings),
        "selection": job.selection,
        "validation": metrics["validation"],
        # what is chosen by must not see the test split
        "test": None if job.selection else metrics["test"],
        "redundancy": metrics.get("redundancy"),
        "curve": [line["validation"][score] for line in lines if "validation" in line],
        "evaluate_every": config["trainer"]["evaluate_every"],
        "epochs": [stage["epochs"] for stage in config["trainer"]["stages"].values()],
        "parameters": described["trained_parameters"],
        "seconds": described["seconds"],
        "git_commit": described["git_commit"],
        "overrides": job.overrides,
    }


def _folder(job: Job, runs: Path) -> Path:
    """Where the run folders of a job's kind lie; the regularizer's settings are no level of a run folder."""
    name = job.method.removeprefix("+ ").replace(" ", "-")
    settings = "".join(f"-{key}{value:g}" for key, value in sorted(job.settings.items()))
    return runs / job.task / f"{name}{settings}"


def _run_folder(job: Job, runs: Path) -> Path:
    found = sorted(_folder(job, runs).glob(f"*/*/*/*/*/seed{job.seed}"))
    if len(found) != 1:
        raise FileNotFoundError(f"expected one run folder below {_folder(job, runs)}, found {len(found)}")
    return found[0]


def _stage_is_there(job: Job, runs: Path) -> bool:
    pattern = f"*/*/*/*/*/seed{job.seed}/checkpoints/adapt/history.json"
    return any(_folder(job, runs).glob(pattern))


def best_weights(task: str, records: Records) -> dict[str, float]:
    """For each measure the weight with the best mean validation score over the selection seeds."""
    return {
        measure: max(WEIGHTS, key=lambda weight: _validation(task, records, measure, {"weight": weight}))
        for measure in MEASURES
    }


def chosen_settings(task: str, records: Records) -> dict[str, dict[str, float]]:
    """For each measure the weight and bandwidth that validation chose."""
    task = TASKS[task].selected_on or task
    chosen: dict[str, dict[str, float]] = {}
    for measure, weight in best_weights(task, records).items():
        options: list[dict[str, float]] = [{"weight": weight}]
        if measure in BANDWIDTHS:
            name, values = BANDWIDTHS[measure]
            options += [{"weight": weight, name: value} for value in values[1:]]
        chosen[measure] = max(options, key=lambda settings: _validation(task, records, measure, settings))
    return chosen


def _validation(task: str, records: Records, measure: str, settings: Mapping[str, float]) -> float:
    scores = []
    for seed in TASKS[task].selection_seeds:
        record = records.of(Job(task=task, method=f"+ {measure}", seed=seed, settings=settings))
        if record is None:
            raise FileNotFoundError(f"{measure} with {dict(settings)}, seed {seed}, has not been run on {task} yet")
        scores.append(record["validation"][TASKS[task].score])
    return sum(scores) / len(scores)
