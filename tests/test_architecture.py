"""The arrows of the design: scripts -> tasks -> {training, eval} -> {adapters, regularizers} -> torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "adapters": set(),
    "regularizers": set(),
    "eval": {"adapters", "regularizers"},
    "training": {"adapters", "regularizers"},
    "retrieval": {"training", "eval", "adapters", "regularizers"},
    "classification": {"training", "eval", "adapters", "regularizers"},
}
ONLY_IN = {"faiss": "eval/index.py", "hydra": "scripts/", "omegaconf": "scripts/", "sklearn": "classification/data/"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("package", [name for name in BELOW if (ROOT / name).is_dir()])
def test_arrows_point_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        sideways = imported(path) & (set(BELOW) | {"scripts", "tests"}) - BELOW[package] - {package}
        assert not sideways, f"{path.relative_to(ROOT)} imports {sideways}"


@pytest.mark.parametrize(("library", "place"), ONLY_IN.items())
def test_a_library_is_imported_in_its_place_only(library: str, place: str) -> None:
    users = [str(p.relative_to(ROOT)) for folder in [*BELOW, "scripts"] for p in (ROOT / folder).rglob("*.py") if
             library in imported(p)]  # fmt: skip
    assert users and all(user.startswith(place) for user in users), users
