"""Sets of blobs: scattered, strung along curves, and standing in rows under a folded surface."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]

# Strings of blobs: so many between two given points.
_PER_STRETCH = 7
# A row of equal blobs this many spreads apart is level to 4%.
_ROW_STEP_SPREADS = 1.35
_GOLDEN_ANGLE = np.pi * (3.0 - np.sqrt(5.0))


class BlobSet(NamedTuple):
    """Gaussian blobs, bright * exp(-distance^2 / spread^2) each.

    Attributes
    ----------
    centres : (n, 3) float64
        x, y, z, mm.
    spreads : (n,) float64
        mm.
    brights : (n,) float64
    """

    centres: Numbers
    spreads: Numbers
    brights: Numbers

    def value_at(self, points_mm: Numbers) -> Numbers:
        """Sum of the blobs at (m, 3) points, one by one: slow, and exact."""
        total = np.zeros(len(points_mm))
        for centre, spread, bright in zip(*self, strict=True):
            total += bright * np.exp(-np.sum((points_mm - centre) ** 2, axis=1) / spread**2)
        return total

    def scaled(self, factor: float) -> "BlobSet":
        """The same blobs, `factor` times as bright."""
        return BlobSet(self.centres, self.spreads, self.brights * factor)


def joined(*sets: BlobSet) -> BlobSet:
    """All blobs of several sets."""
    return BlobSet(*(np.concatenate(columns) for columns in zip(*sets, strict=True)))


def blobs(centres: ArrayLike, spreads: ArrayLike, brights: ArrayLike = 1.0) -> BlobSet:
    """Set of given blobs; one number serves for all."""
    points = np.atleast_2d(np.asarray(centres, np.float64))
    n = len(points)
    return BlobSet(points, _filled(spreads, n), _filled(brights, n))


def _filled(values: ArrayLike, n: int) -> Numbers:
    return np.ones(n) * np.asarray(values, np.float64)


def mirrored(given: BlobSet) -> BlobSet:
    """The given blobs, and their images on the other side of x = 0."""
    other = given.centres * (-1.0, 1.0, 1.0)
    return joined(given, BlobSet(other, given.spreads, given.brights))


def string(points_mm: Sequence[Sequence[float]], spreads_mm: Sequence[float]) -> BlobSet:
    """Blobs along a polygon of (n, 3) points, their spreads interpolated between its corners."""
    corners = np.array(points_mm, dtype=np.float64)
    at = np.linspace(0, len(corners) - 1, _PER_STRETCH * (len(corners) - 1) + 1)
    known = np.arange(len(corners))
    centres = np.stack([np.interp(at, known, corners[:, a]) for a in range(3)], axis=1)
    return blobs(centres, np.interp(at, known, spreads_mm))


def scattered(
    rng: np.random.Generator, n: int, half_mm: Sequence[float], spreads_mm: tuple[float, float]
) -> BlobSet:
    """Blobs anywhere in a box about the origin, bright to dark with a mean of zero."""
    half = np.array(half_mm)
    return BlobSet(
        rng.uniform(-half, half, (n, 3)), rng.uniform(*spreads_mm, n), rng.normal(size=n)
    )


def of_unit_spread(given: BlobSet, rng: np.random.Generator) -> BlobSet:
    """The set scaled to a standard deviation of 1 where its blobs are."""
    some = given.centres[rng.choice(len(given.centres), min(400, len(given.centres)), False)]
    return given.scaled(1.0 / float(np.std(given.value_at(some))))


class Surface(NamedTuple):
    """An ellipsoid whose inside is folded.

    Attributes
    ----------
    centre, half : (3,)
        mm.
    pitch_mm : float
        Between ridges, about.
    spread_mm : float
        Of the blobs.
    depth_mm : float
        How deep the folds go.
    """

    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    pitch_mm: float
    spread_mm: float
    depth_mm: float


def folds(surface: Surface, rng: np.random.Generator) -> BlobSet:
    """Random field whose zeros are sheets that stand upright on a surface, as sulci do.

    Short ridges of random sign and direction lie all over the surface, and every blob of a ridge
    is repeated along the surface's inward normal, so that the field hardly changes with depth.
    """
    half, pitch = np.array(surface.half), surface.pitch_mm
    n = int(1.3 * 4 * np.pi * np.mean(half) ** 2 / (3 * pitch**2))
    middle = _even_directions(n) @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    along = np.cross(middle, rng.normal(size=(n, 3)))
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    steps = np.array([-1.0, 0.0, 1.0])[:, None, None] * pitch / np.mean(half)
    direction = middle + steps * along + rng.normal(size=(3, n, 3)) * 0.25 * pitch / np.mean(half)
    direction /= np.linalg.norm(direction, axis=2, keepdims=True)
    normal = direction / half
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    depths = np.arange(-3.0, surface.depth_mm, _ROW_STEP_SPREADS * surface.spread_mm)
    points = (direction * half)[..., None, :] - normal[..., None, :] * depths[:, None]
    signs = np.broadcast_to(rng.choice([-1.0, 1.0], n)[:, None], (3, n, len(depths)))
    centres = points.reshape(-1, 3) + surface.centre
    return blobs(centres, surface.spread_mm, signs.reshape(-1))


def _even_directions(n: int) -> Numbers:
    """(n, 3) unit vectors, evenly spread over the sphere by a spiral."""
    k = np.arange(n) + 0.5
    z = 1.0 - 2.0 * k / n
    radius, angle = np.sqrt(1.0 - z * z), _GOLDEN_ANGLE * k
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)
