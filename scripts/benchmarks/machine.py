"""The machine that a benchmark ran on, and fresh processes on it."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a new interpreter whose resident memory follows what is in use.

    By default glibc keeps freed memory for later, more or less of it from run to run; others ignore the variable.
    """
    with (
        _environment(MALLOC_MMAP_THRESHOLD_="65536"),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
    ):
        return process.submit(function, *arguments).result()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def described(settings: Any) -> Mapping[str, Any]:
    """The settings but for the place of the results, and the machine and versions that they ran on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    return {
        **{name: value for name, value in asdict(settings).items() if name != "output"},
        "command": f"python {shlex.join(_without_output(sys.argv))}",
        "date": date.today().isoformat(),
        "processor": model or platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def _without_output(arguments: list[str]) -> list[str]:
    """Where the page was written says nothing about its numbers, and may be a place that nobody else has."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--output" and not argument.startswith("--output="):
            kept.append(argument)
        skip = argument == "--output"
    return kept


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
