"""What tests share."""

from pathlib import Path

import numpy as np
import pytest

import runs
from keepstill import phantom

STUDY = Path(__file__).parent / "data" / "study"


@pytest.fixture(scope="session")
def study() -> Path:
    """The small real study that comes with the project."""
    return STUDY


@pytest.fixture(scope="session")
def head() -> phantom.FineHead:
    """A fine head, write-protected."""
    return phantom.fine_head(1, runs.POINT_SPREAD_MM)


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded random numbers."""
    return np.random.default_rng(20260101)
