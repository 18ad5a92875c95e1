"""Reslicing: voxels a second and error against the noise-free truth, beside scipy's splines."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from keepstill import geometry, phantom
from keepstill.moving import Coefficients, prepare_moving
from keepstill.reslice import reslice_volume

SHAPE, SIZES_MM = (64, 64, 36), (3.4, 3.4, 3.5)
KEEPSTILL_DEGREES, SCIPY_DEGREES = (3, 5), (3, 5)
_HEAD_SEED, _MOTION_SEED, _N_POSES = 1, 3, 8
# Long enough that a clock tick does not show.
_LEAST_S = 1.0

Reslice = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Resliced:
    """A way to reslice.

    Attributes
    ----------
    name : str
    mvoxels_per_s : float
        Of one core, the spline's prefilter included.
    error_percent : dict of str to float
        Rms error over the brain, in percent of its mean, by point spread.
    """

    name: str
    mvoxels_per_s: float
    error_percent: dict[str, float]


def by_keepstill(degree: int) -> Reslice:
    """The engine's own, on one thread."""
    affine = phantom.grid_affine(SHAPE, SIZES_MM)
    space, out = Coefficients(SHAPE[::-1]), np.empty(SHAPE[::-1], np.float32)

    def reslice(volume: np.ndarray, moving_from_reference: np.ndarray) -> np.ndarray:
        moving = prepare_moving(volume, degree, space)
        reslice_volume(out, moving, affine, moving_from_reference, affine)
        return out

    return reslice


def by_scipy(degree: int) -> Reslice:
    """`scipy.ndimage.affine_transform`, float32 in and out."""
    affine = phantom.grid_affine(SHAPE, SIZES_MM)
    backwards = np.eye(4)[[2, 1, 0, 3]]

    def reslice(volume: np.ndarray, moving_from_reference: np.ndarray) -> np.ndarray:
        matrix = geometry.compose(geometry.inverse(affine), moving_from_reference, affine)
        matrix = backwards @ matrix @ backwards  # of z, y, x
        return ndimage.affine_transform(volume, matrix, order=degree, output=np.float32)

    return reslice


def resliced(point_spreads: dict[str, float]) -> list[Resliced]:
    """Every way, on the same noise-free volumes of a drifting head, by their true motion."""
    runs = {name: _run(spread) for name, spread in point_spreads.items()}
    ways = [(f"keepstill, degree {d}", by_keepstill(d)) for d in KEEPSTILL_DEGREES]
    ways += [(f"scipy, order {d}", by_scipy(d)) for d in SCIPY_DEGREES]
    first = next(iter(runs.values()))
    return [
        Resliced(
            name, _rate(way, first), {spread: _error(way, run) for spread, run in runs.items()}
        )
        for name, way in ways
    ]


def _run(point_spread: float) -> phantom.Run:
    scanner = phantom.Scanner(SHAPE, phantom.grid_affine(SHAPE, SIZES_MM), (point_spread,) * 3)
    head = phantom.fine_head(_HEAD_SEED, float(scanner.point_spread_mm.min()))
    poses = phantom.drawn_poses("drift", _N_POSES, _MOTION_SEED)
    return phantom.make_run(head, scanner, poses)


def _rate(way: Reslice, run: phantom.Run) -> float:
    """Mvoxels a second of processor time."""
    volume, matrix = phantom.clean_volume(run, 1), run.truth[1]
    way(volume, matrix)
    began_s, n = time.process_time(), 0
    while time.process_time() - began_s < _LEAST_S:
        way(volume, matrix)
        n += 1
    return n * volume.size / (time.process_time() - began_s) / 1e6


def _error(way: Reslice, run: phantom.Run) -> float:
    """Rms over the brain of a resliced volume less the first one, percent of the brain's mean."""
    truth = phantom.clean_volume(run, 0)
    voxel = geometry.world(geometry.inverse(run.affine), run.brain_mm)
    x, y, z = np.rint(voxel).astype(int).T
    inner = (z > 1) & (z < truth.shape[0] - 2)  # the field's edge comes and goes
    brain = z[inner], y[inner], x[inner]
    squares = [
        np.mean((way(phantom.clean_volume(run, t), run.truth[t])[brain] - truth[brain]) ** 2)
        for t in range(1, len(run))
    ]
    return float(100 * np.sqrt(np.mean(squares)) / truth[brain].mean())
