"""Names in a configuration -> the things that they name, or an error that says what there is."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def choose(kind: str, known: Mapping[str, Callable[..., T]], settings: Mapping[str, Any]) -> T:
    """{"name": ..., **settings} -> the named thing with its settings.

    Raises:
        ValueError: for an unknown name (with a suggestion) or setting.
    """
    settings = dict(settings)
    name = settings.pop("name")
    check_name(kind, name, known)
    try:
        return known[name](**settings)
    except TypeError as error:
        raise ValueError(f"{kind}={name} does not take these settings: {error}") from None


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError, with a suggestion, unless `name` is one of `known`."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise ValueError(f"unknown {kind} {name!r}{hint} choose from {', '.join(known)}")
