"""What tests share."""

from pathlib import Path

import numpy as np
import pytest

import phantom

STUDY = Path(__file__).parent / "data" / "study"


@pytest.fixture(scope="session")
def study() -> Path:
    """The small real study that comes with the project."""
    return STUDY


@pytest.fixture(scope="session")
def head() -> np.ndarray:
    """A fine head; never modified."""
    made = phantom.fine_head(seed=1)
    made.setflags(write=False)
    return made


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded random numbers."""
    return np.random.default_rng(20260101)
