from __future__ import annotations

import os
from pathlib import Path

import pytest

import adapters  # noqa: F401  (makes timm importable beside a CPU-only torch, whatever a test imports first)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes a minute or more first, so that no process of pytest-xdist is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_demo.py", "test_benchmark.py", "test_stages.py"))


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where the pretrained encoders are kept between test runs: $RESORA_CACHE, or data/cache in the repository."""
    default = Path(__file__).parents[1] / "data" / "cache"
    folder = Path(os.environ.get("RESORA_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)  # tests link to it, and a link to nothing cannot be filled
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A data folder with a tiny openmoji in it: 24 / 8 / 8 scenes of 64 px, real drawings and real features."""
    from retrieval.data import OpenMojiScenes

    root = tmp_path_factory.mktemp("data")
    OpenMojiScenes.prepare(root, cache, scenes=(24, 8, 8), size=64)
    (root / "cache").symlink_to(cache.resolve())
    return root
