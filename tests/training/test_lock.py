"""One run is trained by one launch at a time. The oracle is the system's own lock on the file."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from adapters import inject
from training import BaseExperiment, Recipe, RunFolder, Stage
from training.task import Task, run_task

CONFIG = {"root": "data", "data": {"name": "items"}}


class Experiment(BaseExperiment):
    task = "tiny"
    metrics = ("rsum",)


class Tiny(Task[Experiment]):
    """A run of one epoch. `seen` is what the system says of the lock while it is evaluated."""

    to_hold_out = "nothing"
    heads = ("head",)
    objective = staticmethod(lambda output, epoch: {"squares": output.square().mean()})
    sizes: ClassVar = {"images": {"train": 22, "validation": 0, "test": 1}}
    fingerprint, preprocessing = "0" * 64, "none"
    seen: ClassVar[list[bool]] = []

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.items = experiment, tiny.Items()
        self.model: nn.Module = inject(tiny.Model(), experiment.adapter, train=self.heads)
        self.collate = lambda items: {"x": torch.stack(items)}

    @classmethod
    def fingerprint_of(cls, experiment: Experiment) -> str:
        return cls.fingerprint

    def evaluate(self, split: str, precision: str) -> dict[str, float]:
        self.seen.append(is_locked(folder_of(self.experiment)))
        return {"rsum": 1.0}

    def chance(self, split: str) -> dict[str, float]:
        return {"rsum": 0.0}

    def probe(self) -> dict[str, Any]:
        return {}


class NotLoaded(Tiny):
    def __init__(self, experiment: Experiment) -> None:
        raise AssertionError("the data are loaded only to be told that another process trains on them")


def experiment_in(runs: Path) -> Experiment:
    return Experiment(
        data="items", data_options={}, model={"name": "tower"}, adapter=tiny.ADAPTERS["lora"], regularizer=None,
        recipe=Recipe(stages=(Stage(name="adapt", epochs=1),), batch_size=5), threads=1, precision="float32", seed=0,
        start_from=None, root=Path("data"), runs=runs,
    )  # fmt: skip


def folder_of(experiment: Experiment) -> Path:
    return experiment.runs.joinpath(*experiment.levels)


@contextmanager
def other_launch(folder: Path) -> Iterator[None]:
    """What another process that trains the run does."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    try:
        with other_launch(folder):
            return False
    except BlockingIOError:
        return True


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_another_process_trains_is_refused(tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path)
    run = RunFolder(folder_of(experiment))
    run.begin(CONFIG)
    run.write_json("run.json", {"seconds": {"train": 1.0}})
    with other_launch(run.path):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=rf"another process trains {run.path} .*goes on from the last checkpoint"):
            run_task(CONFIG, experiment, NotLoaded)
        assert contents(tmp_path) == before
    run_task(CONFIG, experiment, Tiny)
    assert run.finished, "the file by itself is in nobody's way"


def test_of_two_that_begin_a_run_the_later_one_is_refused(tmp_path: Path) -> None:
    """Both load the data; then the other launch, whose folder this is from then on, is the first to go on."""
    experiment = experiment_in(tmp_path)
    launched = other_launch(folder_of(experiment))

    class Slow(Tiny):
        def __init__(self, experiment: Experiment) -> None:
            super().__init__(experiment)
            launched.__enter__()

    with pytest.raises(ValueError, match="another process trains"):
        run_task(CONFIG, experiment, Slow)
    launched.__exit__(None, None, None)
    assert list(contents(tmp_path)) == [folder_of(experiment) / ".lock"]


def test_a_run_is_held_until_it_is_finished_and_not_longer(tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path)
    Tiny.seen.clear()
    run, task = run_task(CONFIG, experiment, Tiny)
    assert task and run.finished and Tiny.seen == [True] and not is_locked(run.path)
    with other_launch(run.path):
        assert run_task(CONFIG, experiment, NotLoaded)[1] is None, "a finished run needs no lock"


def test_of_several_processes_the_first_one_holds_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")  # as torchrun sets it
    with run.alone():
        assert not run.path.exists()
    monkeypatch.setenv("RANK", "0")
    with run.alone():
        assert is_locked(run.path)
        monkeypatch.setenv("RANK", "1")
        with run.alone():
            pass
        assert is_locked(run.path)
    assert not is_locked(run.path)


def test_a_mistake_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.Items, "__len__", lambda self: 4)
    with pytest.raises(ValueError, match="4 training items make no batch of 5"):
        run_task(CONFIG, experiment_in(tmp_path), Tiny)
    assert not list(tmp_path.iterdir())


def test_a_killed_process_holds_nothing_though_its_workers_live_on(tmp_path: Path) -> None:
    """Processes that load data are forked from the one that trains, and notice its end seconds later."""
    run, (reading, writing) = RunFolder(tmp_path), os.pipe()
    if not (trainer := os.fork()):
        try:
            with run.alone():
                if worker := os.fork():
                    os.write(writing, str(worker).encode())
                time.sleep(60)
        finally:
            os._exit(1)
    worker = int(os.read(reading, 20))
    try:
        assert is_locked(run.path)
        os.kill(trainer, signal.SIGKILL)
        os.waitpid(trainer, 0)
        with run.alone():
            assert is_locked(run.path)
    finally:
        os.kill(worker, signal.SIGKILL)
