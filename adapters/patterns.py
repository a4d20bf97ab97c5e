"""Regular expressions that mean exactly some of a model's layers."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import TypeVar

from adapters.peft_folder import natural

V = TypeVar("V")


def exact_pattern(names: Collection[str], among: Collection[str]) -> str:
    r"""A regular expression that, out of `among`, matches `names` alone: ``^(?:blocks\.\d+\.attn\.qkv|head)$``.

    Numbers between dots are generalised where that stays exact.
    """
    alike: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        alike[tuple(r"\d+" if part.isdigit() else re.escape(part) for part in parts)].append(parts)
    choices = []
    for general, members in alike.items():
        columns = [sorted(set(column), key=natural) for column in zip(*members, strict=True)]
        listed = (
            f"(?:{'|'.join(map(re.escape, column))})" if len(column) > 1 else re.escape(column[0]) for column in columns
        )
        for choice in (r"\.".join(general), r"\.".join(listed)):
            if sum(re.fullmatch(choice, name) is not None for name in among) == len(members):
                choices.append(choice)
                break
        else:
            choices += [r"\.".join(map(re.escape, parts)) for parts in members]
    return f"^(?:{'|'.join(choices)})$"


def default_and_others(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """The most frequent value, and a pattern for each other one."""
    default = Counter(values.values()).most_common(1)[0][0]
    others = [value for value in dict.fromkeys(values.values()) if value != default]
    return default, {exact_pattern([name for name, v in values.items() if v == o], list(values)): o for o in others}
