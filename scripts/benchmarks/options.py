"""What a benchmark can be told: one dataclass a subject, from which its command line is made."""

from __future__ import annotations

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A field of `Options`: a number, a text, a path, a switch (default False) or a tuple of numbers or texts."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every subject has; a subject's own class adds to it. Whole numbers have to be 1 at least."""

    threads: int = option(torch.get_num_threads(), "compute threads")
    output: Path = field(default=DOCS, metadata={"help": "folder for the page and the raw numbers"})

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is int and value < 1:
                raise ValueError(f"{each.name} is {value}; expected at least 1")

    def write(self, subject: str, page: str, numbers: Mapping[str, Any] | None) -> None:
        """Write the page of a subject, and its raw numbers beside it."""
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / f"{subject}.md").write_text(page, encoding="utf-8")
        if numbers is not None:
            (self.output / f"{subject}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


Of = TypeVar("Of", bound=Options)


def from_command_line(options: type[Of], program: str, description: str | None, arguments: Sequence[str]) -> Of:
    """Parse the command line of a subject.

    Raises:
        ValueError: for a number that is out of range.
    """
    parser = ArgumentParser(prog=program, description=description, formatter_class=ArgumentDefaultsHelpFormatter)
    for each in fields(options):
        flag, default, described = f"--{each.name.replace('_', '-')}", each.default, each.metadata["help"]
        if default is False:
            parser.add_argument(flag, action="store_true", help=described)
        elif isinstance(default, tuple):
            kind = type(default[0]) if default else str
            choices = each.metadata["choices"]
            parser.add_argument(flag, type=kind, nargs="+", default=default, choices=choices, help=described)
        else:
            parser.add_argument(flag, type=type(default), default=default, help=described)
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(arguments)).items()
    }
    return options(**given)
