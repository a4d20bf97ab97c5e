"""A sweep (--multirun): all its configurations are checked before the first job, and a job that fails ends no other."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from mistakes import MISTAKES, stop


def jobs_of(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a sweep, in Hydra's order: ["seed=0,1"] -> [["seed=0"], ["seed=1"]].

    Raises:
        HydraException: for a kind of sweep that Hydra's own sweeper does not know (an interval).
    """
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    return jobs


def check_jobs(jobs: list[list[str]], check: Callable[[list[str]], Any]) -> None:
    """End with exit code 2 and a line for each job whose configuration is a mistake, before any of them begins."""
    wrong = []
    for overrides in jobs:
        try:
            check(overrides)
        except MISTAKES as error:
            wrong.append(f"{' '.join(overrides)}: {error}")
    if wrong:
        stop(f"error: {len(wrong)} of {len(jobs)} jobs cannot run, so none was begun:\n  " + "\n  ".join(wrong))


class Sweep:
    """Runs the jobs of a sweep, and notes those that fail instead of ending with them.

    A job that a launcher (joblib, submitit) runs in another process prints its error there and fails; when all jobs are
    done Hydra raises the first of these, so that such a sweep ends with exit code 1 and without the list.
    """

    def __init__(self, main: Callable[[Mapping[str, Any]], None]) -> None:
        self.main = main
        self.jobs = 0
        self.failed: list[str] = []
        self._process = os.getpid()

    def run(self, config: Mapping[str, Any]) -> None:
        """One job. What it held is freed: neither the error nor its stack trace, with the model in it, is kept."""
        name = " ".join(HydraConfig.get().overrides.task)
        self.jobs += 1
        try:
            self.main(config)
            return
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code:
                return
            if not isinstance(error, MISTAKES) or os.environ.get("RESORA_TRACEBACK"):
                traceback.print_exception(error)
            message = f"{name}: {error if isinstance(error, MISTAKES) else repr(error)}"
        print(f"error in {message}", file=sys.stderr)
        if os.getpid() != self._process:
            raise ValueError(message)
        self.failed.append(message)

    def finish(self) -> None:
        """End with exit code 2 and a list of the jobs that failed, if one did."""
        if self.failed:
            stop(f"{len(self.failed)} of {self.jobs} jobs failed:\n  " + "\n  ".join(self.failed))
