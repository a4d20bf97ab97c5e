"""A run's configuration, a nested mapping: what another one differs in, and the same with its data elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FREE = (
    "runs",
    "start_from",
    "trainer.workers",
    "trainer.report_to",
    "trainer.save_minutes",
    "data.prepare",
    "data.pictures",
)
"""Settings, and groups of them, that change no result: a run goes on with others of these.

Where a run lies and who hears of it; how often it is saved, and how many processes load its data; how the data were
made, since their fingerprint is compared instead; pictures, which are for the report; and the run whose first stage was
taken over, which `RunFolder.check_source` asks to have been trained as this one would. `root` is free too, see
`differences`.
"""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(
    earlier: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...] = FREE
) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (earlier, now)} of the settings that differ, but for those that are `free` or below them.

    Paths below `root` are compared as seen from there.
    """
    one, other = (flatten(at_root(config, "${root}")) for config in (earlier, now))
    keys = [key for key in sorted(one.keys() | other.keys()) if not f"{key}.".startswith(tuple(f"{k}." for k in free))]
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def at_root(config: Mapping[str, Any], root: str) -> dict[str, Any]:
    """The configuration with other data: `root` in place of its own, also in the paths below that (model.weights)."""
    own = str(config.get("root", "")).rstrip("/")

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: moved(name, inner) for name, inner in value.items()}
        if key == "root":
            return root
        if own and isinstance(value, str) and value.startswith(f"{own}/"):
            return f"{root}/{value.removeprefix(own).lstrip('/')}"
        return value

    return {key: moved(key, value) for key, value in config.items()}
