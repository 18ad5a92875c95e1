"""The classic estimate: Gauss-Newton on sampled points, each asked of ITK from Python.

As Friston et al. (1995, Human Brain Mapping 2:165) do it: both images are smoothed, the
reference's gradient is taken once, at points a few voxels apart, and each step samples the moving
volume there.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import InputError
from keepstill.ladder.itk_bridge import Sampled, Volume, sampled
from keepstill.ladder.rungs import FWHM_MM, SAMPLING_STEP_VOXELS, TOLERANCE_MM
from keepstill.ladder.teams import Team

Array = NDArray[np.float64]
Matrix = Array
MAX_STEPS = 64


class Reference(NamedTuple):
    """What is known of the reference.

    Attributes
    ----------
    points_mm : (n, 3) float64
        Sample points, about the centre of the grid.
    values : (n,) float64
    design : (n, 6) float64
        Change of the value by a small shift (a mm) and turn (a rad) of the point.
    centre_mm : (3,) float64
    """

    points_mm: Array
    values: Array
    design: Array
    centre_mm: Array


def value_at(moving: Sampled, point_mm: Array, outside: float) -> float:
    """Value at a point (mm), or another where that lies outside the image."""
    index, last = moving.image.TransformPhysicalPointToContinuousIndex(point_mm), moving.last
    # ITK's IsInsideBuffer takes no such index from Python.
    if 0 <= index[0] <= last[0] and 0 <= index[1] <= last[1] and 0 <= index[2] <= last[2]:
        return float(moving.spline.EvaluateAtContinuousIndex(index))
    return outside


def sampled_smooth(volume: Volume, affine: Matrix) -> Sampled:
    """ITK's spline through a volume (nz, ny, nx) that a Gaussian has smoothed.

    ITK's own Gaussian would do as well, and takes six seconds to import.
    """
    sizes_mm = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
    sigmas = FWHM_MM / np.sqrt(8 * np.log(2)) / sizes_mm
    smooth = volume
    for axis in range(3):
        smooth = np.moveaxis(_smooth(np.moveaxis(smooth, axis, 0), sigmas[axis]), 0, axis)
    return sampled(smooth, affine)


def _smooth(volume: Volume, sigma: float) -> Volume:
    """A volume smoothed along its first axis, its edges repeated; sigma in voxels."""
    n, reach = volume.shape[0], int(np.ceil(4 * sigma))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.pad(volume, [(reach, reach), (0, 0), (0, 0)], "edge")
    out = np.zeros_like(volume)
    for i, tap in enumerate(taps / taps.sum()):
        out += padded[i : i + n] * np.float32(tap)
    return out


def prepare_reference(smooth: Sampled) -> Reference:
    """Sample points of a smoothed reference, its values and its gradient there."""
    axes = [range(SAMPLING_STEP_VOXELS // 2, n + 1, SAMPLING_STEP_VOXELS) for n in smooth.last]
    found = [smooth.image.TransformIndexToPhysicalPoint([x, y, z])
             for z in axes[2] for y in axes[1] for x in axes[0]]  # fmt: skip
    points_mm = np.array([list(point) for point in found])
    values = np.array([value_at(smooth, point, np.nan) for point in points_mm])
    slopes = np.array([list(smooth.spline.EvaluateDerivative(point)) for point in points_mm])
    centre_mm = points_mm.mean(axis=0)
    design = np.hstack([slopes, np.cross(points_mm - centre_mm, slopes)])
    return Reference(points_mm - centre_mm, values, design, centre_mm)


def estimate(moving: Sampled, reference: Reference, team: Team, run: str) -> Matrix:
    """`moving_from_reference`, (4, 4), of a smoothed volume; each of a team samples its points.

    Raises
    ------
    InputError
        If it does not come to rest.
    """
    mine = slice(team.rank, None, team.size)
    points_mm, values, design = (part[mine] for part in reference[:3])
    centred = np.eye(4)
    for _ in range(MAX_STEPS):
        found = _values_at(moving, centred, points_mm, reference.centre_mm)
        inside = np.isfinite(found)
        rows = design[inside]
        right = rows.T @ (found - values)[inside]
        total = team.total(np.column_stack([rows.T @ rows, right]))
        step = np.asarray(np.linalg.solve(total[:, :6], total[:, 6]), np.float64)
        centred = centred @ np.linalg.inv(rigid(step))
        if _size_mm(step, reference.points_mm) < TOLERANCE_MM:
            return about(centred, reference.centre_mm)
    raise InputError(f"{run}: no rest after {MAX_STEPS} steps; simulate a run that moves less")


def _values_at(moving: Sampled, centred: Matrix, points_mm: Array, centre_mm: Array) -> Array:
    rotation, shift = centred[:3, :3], centred[:3, 3] + centre_mm
    return np.array([value_at(moving, rotation @ point + shift, np.nan) for point in points_mm])


def _size_mm(step: Array, points_mm: Array) -> float:
    """Rms displacement of the sample points by a step."""
    moved = step[:3] + np.cross(step[3:], points_mm)
    return float(np.sqrt((moved**2).sum(axis=1).mean()))


def rigid(step: Array) -> Matrix:
    """(4, 4) matrix of a shift (mm) and a rotation vector (rad), by Rodrigues' formula."""
    angle = float(np.linalg.norm(step[3:]))
    x, y, z = step[3:] / angle if angle else np.zeros(3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    out = np.eye(4)
    out[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    out[:3, 3] = step[:3]
    return out


def about(centred: Matrix, centre_mm: Array) -> Matrix:
    """A map about a centre as one about the origin."""
    out = centred.copy()
    out[:3, 3] += centre_mm - centred[:3, :3] @ centre_mm
    return out
