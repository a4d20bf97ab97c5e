"""Names in a configuration -> the things that they name, or an error that says what there is."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def choose(kind: str, known: Mapping[str, Callable[..., T]], settings: Mapping[str, Any]) -> T:
    """{"name": ..., **settings} -> the named thing with its settings.

    Raises:
        ValueError: for an unknown name (with a suggestion) or setting, or one of a type that a dataclass cannot check.
    """
    settings = dict(settings)
    name = settings.pop("name")
    check_name(kind, name, known)
    build = known[name]
    try:
        inspect.signature(build).bind(**settings)
    except TypeError as error:
        raise ValueError(f"{kind}={name} does not take these settings: {error}") from None
    try:
        return build(**settings)
    except TypeError as error:
        if not is_dataclass(build):
            raise  # a bug in what is built
        raise ValueError(f"{kind}={name} does not take a setting of this type: {error}") from error  # rank="four" < 1


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError, with a suggestion, unless `name` is one of `known`."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise ValueError(f"unknown {kind} {name!r}{hint} choose from {', '.join(known)}")
