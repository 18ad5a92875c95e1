"""What the accuracy benchmark simulates, and what is required of the result."""

import math
from dataclasses import dataclass, field
from typing import Any

from keepstill.phantom import Effects

# Full width at half maximum of the point spread in voxels: one voxel wide, with mild aliasing, and
# sharp, with strong aliasing.
POINT_SPREADS = {"mild": 1.0, "sharp": 0.8}
# An error below this many bounds is no skill: the estimate is drawn towards no motion.
LEAST_BOUNDS = 0.8
# What the error bar of 68% must cover, parts of the volumes.
LEAST_COVERED, MOST_COVERED = 0.60, 0.76


@dataclass(frozen=True)
class Limits:
    """What is required; None requires nothing. Failed volumes are never allowed.

    Attributes
    ----------
    bounds : (mild, sharp)
        Most multiples of the Cramér-Rao bound, of the median raw and gauge-free error.
    median_mm, worst_mm : float
        Most raw error, the median and the worst volume.
    dropped_mm : float
        The worst of the volumes that lost slices, if they are judged apart.
    bent : float
        Most median error by the median distance that the best rigid map leaves.
    """

    bounds: tuple[float, float] | None = None
    median_mm: float | None = None
    worst_mm: float | None = None
    dropped_mm: float | None = None
    bent: float | None = None

    def most_bounds(self, point_spread: str) -> float:
        """Most multiples of the bound with one of `POINT_SPREADS`; infinite where none is set."""
        if self.bounds is None:
            return math.inf
        return self.bounds[list(POINT_SPREADS).index(point_spread)]


@dataclass(frozen=True)
class Case:
    """A kind of run.

    Attributes
    ----------
    name, about : str
        A short name, and a few words for the table.
    limits : Limits
    plan : dict
        What is not default in its `keepstill.simulate.StudyPlan`.
    """

    name: str
    about: str
    limits: Limits
    plan: dict[str, Any] = field(default_factory=dict)


def _nuisance(name: str, about: str, dropped_mm: float | None = None, **effects: float) -> Case:
    """A drift with spikes, and something that throws estimates off."""
    limits = Limits(median_mm=0.012, worst_mm=0.04, dropped_mm=dropped_mm)
    return Case(name, about, limits, {"motion": "spikes", "effects": Effects(**effects)})


ACCURACY = (
    Case("jitter", "jitter of 0.03 mm only", Limits((1.4, 1.5)), {"motion": "still"}),
    Case("drift", "drift to 2 mm, 2°, spikes; 3.4 mm", Limits((1.4, 2.0)), {"motion": "spikes"}),
    Case(
        "drift-2mm",
        "drift to 2 mm, 2°, spikes; 2 mm",
        Limits((1.4, 2.0)),
        {"motion": "spikes", "shape": (104, 104, 72), "voxel_mm": (2.0, 2.0, 2.0)},
    ),
    Case(
        "oblique",
        "oblique, 24 slices of part of the brain",
        Limits((1.4, 2.0)),
        {"motion": "spikes", "shape": (64, 64, 24), "oblique_deg": 20.0},
    ),
    Case(
        "activation",
        "4% task activation, drift, spikes",
        Limits((2.0, 2.5)),
        {"motion": "spikes", "effects": Effects(activation_percent=4.0)},
    ),
    Case("steps", "steps up to 12 mm, 12°", Limits(worst_mm=0.05), {"motion": "steps"}),
)

NUISANCES = (
    _nuisance("shading", "35% shading that stays with the scanner", shading=0.35),
    _nuisance("gain", "5% gain drift", gain_drift=0.05),
    _nuisance(
        "lost-slices",
        "4 slices at a quarter of the signal in some volumes",
        dropped_mm=0.06,
        dropped_slices=4,
    ),
    _nuisance("bright", "first volumes 45% brighter", first_brighter=0.45),
    _nuisance("ghost", "3% ghost that flickers by a third", ghost=0.03),
    Case(
        "inside",
        "motion inside volumes, interleaved slices",
        Limits(bent=1.0),
        {"motion": "spikes", "slice_timing": True},
    ),
)

CASES = {case.name: case for case in (*ACCURACY, *NUISANCES)}
