"""Names and settings that a user mistypes are told in a sentence; a bug in what they build keeps its own error."""

from __future__ import annotations

import re

import pytest

from adapters import ADAPTERS
from training import choose


def model(size: int, *, depth: int = 1) -> int:
    return size + depth


def broken(size: int) -> int:
    return len(size)  # type: ignore[arg-type]


def test_a_bug_in_what_is_built_is_not_blamed_on_the_settings() -> None:
    with pytest.raises(TypeError, match="has no len"):
        choose("model", {"broken": broken}, {"name": "broken", "size": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 1, "dept": 2}, "model=model does not take these settings: got an unexpected keyword argument 'dept'"),
        ({"depth": 2}, "model=model does not take these settings: missing a required argument: 'size'"),
    ],
)
def test_a_setting_that_there_is_not(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        choose("model", {"model": model}, {"name": "model"} | settings)
    assert choose("model", {"model": model}, {"name": "model", "size": 1, "depth": 2}) == 3


def test_a_setting_of_another_type() -> None:
    for kind, known, settings, message in (
        ("adapter", ADAPTERS, {"name": "lora", "rank": "four"}, r"adapter\.rank is 'four'; expected a whole number$"),
        ("model", {"model": model}, {"name": "model", "size": 1.5}, r"model\.size is 1\.5; expected a whole number$"),
        ("adapter", ADAPTERS, {"name": "lora", "targets": 3}, r"adapter=lora does not take a setting of this type: .*"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(kind, known, settings)
