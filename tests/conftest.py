from __future__ import annotations

import os
from pathlib import Path

import pytest

import adapters  # noqa: F401  (makes timm importable beside a CPU-only torch, whatever a test imports first)


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where the pretrained encoders are kept between test runs: $RESORA_CACHE, or data/cache in the repository."""
    default = Path(__file__).parents[1] / "data" / "cache"
    return Path(os.environ.get("RESORA_CACHE", default))
