"""Names in a configuration -> the things that they name, or an error that says what there is."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")
PLAIN = {str: "a word", bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}


def choose(kind: str, known: Mapping[str, Callable[..., T]], settings: Mapping[str, Any]) -> T:
    """{"name": ..., **settings} -> the named thing with its settings.

    Raises:
        ValueError: for an unknown name (with a suggestion) or setting, or one of a type that a dataclass cannot check.
    """
    settings = dict(settings)
    name = settings.pop("name")
    check_name(kind, name, known)
    return build(kind, name, known[name], settings)


def build(kind: str, name: str, of: Callable[..., T], settings: Mapping[str, Any]) -> T:
    """`of`, which a configuration calls `<kind>=<name>`, with these settings.

    Raises:
        ValueError: for a setting that it does not have, or one of a type that a dataclass cannot check.
    """
    try:
        inspect.signature(of).bind(**settings)
    except TypeError as error:
        raise ValueError(f"{kind}={name} does not take these settings: {error}") from None
    check_types(f"{kind}.", of, settings)
    try:
        return of(**settings)
    except TypeError as error:
        if not is_dataclass(of):
            raise  # a bug in what is built
        raise ValueError(f"{kind}={name} does not take a setting of this type: {error}") from error  # rank="four" < 1


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError, with a suggestion, unless `name` is one of `known`."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise ValueError(f"unknown {kind} {name!r}{hint} choose from {', '.join(known)}")


def check_types(prefix: str, of: Any, settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless each setting has the type that `of`, a dataclass, class or function, declares for it.

    Only `PLAIN` types are checked. A whole number is a number, too; true is none.
    """
    has_constructor = inspect.isclass(of) and not is_dataclass(of)  # a dataclass declares its settings itself
    declared = get_type_hints(of.__init__ if has_constructor else of)
    for name, value in settings.items():
        kind = declared.get(name)
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if not fits and PLAIN.keys() >= set(kinds):
            raise ValueError(f"{prefix}{name} is {value!r}; expected {' or '.join(PLAIN[kind] for kind in kinds)}")
