"""A run is a folder: what was asked, what ran, what came out. Tables and figures are made from these folders alone."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from training.configuration import FREE, at_root, differences
from training.hardware import process_count

PACKAGES = ("torch", "transformers", "timm", "open_clip_torch", "faiss-cpu", "numpy", "decord", "av", "scikit-learn")
CONFIG = "config.yaml"
WEIGHTS = "adapter.safetensors"
FINISHED = "metrics.json"
LOCK = ".lock"


class Unrestorable(ValueError):
    """A run that cannot be put together again here: another version wrote it, or the data are others."""


class RunFolder:
    """The folder of one run, `<root>/<task>/<data>/<model>/<adapter>/<regularizer>/seed<k>`.

    Files are written atomically, `metrics.json` when all that was trained is on the disk: where it is, the run is
    finished, and only what people look at (the report with its pictures) may come later. Starting a run in a folder
    that another configuration began is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, root: Path, *levels: str) -> RunFolder:
        """Raises ValueError if a level is not a plain name: no run leaves its root."""
        for level in levels:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*", level):
                raise ValueError(f"{level!r} cannot name a folder of a run: use letters, digits and . _ = , + -")
        return cls(root.joinpath(*levels))

    @property
    def finished(self) -> bool:
        return (self.path / FINISHED).is_file()

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError if the folder was begun with a configuration that gives other results; says what differs."""
        path = self.path / CONFIG
        if path.is_file() and (different := differences(yaml.safe_load(path.read_text()), config)):
            changes = ", ".join(f"{key}: {then!r} then, {now!r} now" for key, (then, now) in different.items())
            raise ValueError(
                f"{self.path} was begun with another configuration ({changes}); give this run another place with "
                "runs=FOLDER, or delete the old folder"
            )

    def check_data(self, fingerprint: str) -> None:
        """Raise `Unrestorable` if the run was trained on data with another fingerprint."""
        before = ((self.read_json("run.json") or {}).get("data") or {}).get("fingerprint", fingerprint)
        if before != fingerprint:
            raise Unrestorable(
                f"{self.path} was trained on other data (fingerprint {before[:12]} then, {fingerprint[:12]} now); give "
                "it the same with root=FOLDER, or train another run on these in another place, runs=FOLDER"
            )

    def asked_for_these_data(self, config: Mapping[str, Any]) -> bool:
        """Whether the run was begun with data of the same place, made in the same way: if not, they may be others."""
        earlier = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        same_place = earlier["root"] == config["root"]
        return same_place and earlier["data"].get("prepare") == config["data"].get("prepare")

    def finished_config(self, root: str | Path | None = None) -> dict[str, Any]:
        """The configuration of a run that has finished; its data are below `root`, if they are not where they were.

        Raises:
            FileNotFoundError: if this is no folder of a finished run.
        """
        for name in (CONFIG, WEIGHTS):
            if not (self.path / name).is_file():
                raise FileNotFoundError(
                    f"{self.path} holds no {name}: expected the folder of a run that training has finished"
                )
        config = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        return at_root(config, str(root)) if root else dict(config)

    @property
    def begun(self) -> bool:
        return (self.path / CONFIG).is_file()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the run for this process, which trains it; of several that train it together, for the first one.

        The folder is made if it is not there. The system lets go of the lock of a process that ends, however it does;
        the file `LOCK` stays and means nothing by itself.

        Raises:
            ValueError: if another process holds it; nothing of the run has changed then.
        """
        if not is_first_process():
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another process trains {self.path} at this moment, and two would delete each other's checkpoints; "
                "wait until it has finished, or end it and launch this again: it goes on from the last checkpoint"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def begin(self, config: Mapping[str, Any]) -> None:
        """Check the configuration and write it down."""
        self.check(config)
        self.write_text(CONFIG, yaml.safe_dump(dict(config), sort_keys=False))

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json and let go of what the run would have gone on from."""
        self.write_json(FINISHED, metrics)
        self.drop_checkpoints()

    def drop_checkpoints(self) -> None:
        """Delete the epochs' checkpoints, three times what trains in size; what each stage ended with stays."""
        if is_first_process():
            for checkpoint in self.path.glob("checkpoints/*/checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)

    def has_trained(self, stage: str) -> bool:
        """Whether a stage is complete here."""
        return (self.path / "checkpoints" / stage / "history.json").is_file()

    def check_source(self, stage: str, source: Path, config: Mapping[str, Any]) -> None:
        """Raise unless `adopt_stage` can take over a stage; nothing is asked where this run has trained it already.

        Args:
            stage: the first stage, which does not regularize.
            source: folder of the other run, which asked for the same up to there: all but the regularizer and later
                stages has to be equal.
            config: of this run.

        Raises:
            FileNotFoundError: if the other run has not finished the stage.
            ValueError: if the two runs differ in more than what comes after it.
        """
        if self.has_trained(stage):
            return
        if not RunFolder(source).has_trained(stage):
            raise FileNotFoundError(f"start_from={source}: expected a run folder that has finished its stage {stage!r}")
        later = (f"trainer.stages.{name}" for name in config["trainer"]["stages"] if name != stage)
        earlier = yaml.safe_load((source / CONFIG).read_text())
        if different := differences(earlier, config, free=(*FREE, "regularizer", *later)):
            changes = ", ".join(f"{key}: {then!r} there, {now!r} here" for key, (then, now) in different.items())
            raise ValueError(f"start_from={source} was trained in another way ({changes})")
        described = RunFolder(source).read_json("run.json") or {}
        if (there := described.get("processes", process_count())) != process_count():
            raise ValueError(
                f"start_from={source} was trained by {there} processes, that is, with other batches than the "
                f"{process_count()} here would; launch with `torchrun --nproc_per_node {there}` (python for 1)"
            )
        if config["trainer"]["stages"][stage]["regularize"]:
            raise ValueError(f"start_from needs a first stage without the regularizer; stage {stage!r} regularizes")

    def adopt_stage(self, stage: str, source: Path) -> None:
        """Take over a stage of another run that has passed `check_source`; nothing happens where this run has it."""
        if self.has_trained(stage):
            return
        folder, theirs = self.path / "checkpoints" / stage, source / "checkpoints" / stage
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*theirs.glob("*.safetensors"), theirs / "history.json"):  # the history says that it is complete
            partial = folder / f"{path.name}.{os.getpid()}.partial"  # every process of a training may come here
            shutil.copyfile(path, partial)
            _put_in_place(partial, folder / path.name)

    def write_text(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # every process of a training may write it
        partial.write_text(text, encoding="utf-8")
        _put_in_place(partial, path)
        return path

    def write_json(self, name: str, content: Any) -> Path:
        return self.write_text(name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the run, or None where it has not been written; ValueError if it is damaged."""
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError as error:
            raise ValueError(
                f"{path} is not JSON ({error}): it was cut off, or changed by hand; put a copy of it back or, in a run "
                "that has not finished, delete it and launch the run again, which writes it anew"
            ) from error

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> Path:
        return self.write_text(name, "".join(json.dumps(record) + "\n" for record in records))


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename a file that is complete, once it is on the disk: a power cut leaves the old file or the new one."""
    with partial.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def is_first_process() -> bool:
    """Whether this is the process that writes what is written once; torchrun numbers them before they are connected."""
    return int(os.environ.get("RANK", "0")) == 0


def environment() -> dict[str, Any]:
    """What a run depends on besides its configuration: command, versions, processor, git commit."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"command": " ".join(sys.argv), "versions": versions, "machine": platform.machine(), "git_commit": _commit()}


def _commit() -> str | None:
    """The commit, with "-dirty" where the tree outside docs/ differs or has new code; None outside a git checkout."""
    git = functools.partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    try:
        commit = git(["git", "rev-parse", "HEAD"], check=True).stdout.strip()
        code = [":(top)*.py", ":(top)*.yaml", ":(top,exclude)docs"]
        differs = git(["git", "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)docs"]).returncode != 0
        differs |= bool(git(["git", "ls-files", "--others", "--exclude-standard", "--", *code], check=True).stdout)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if differs else commit
