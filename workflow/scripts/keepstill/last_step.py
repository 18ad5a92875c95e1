"""The last step of each volume, once it is known what a run's volumes have in common."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.cuts import Cells, Cut, gathered, total_of
from keepstill.error_bars import directions, mean_square_mm2
from keepstill.estimate import Disagreement, Estimate, allowed_step
from keepstill.kernels.small import product, solution
from keepstill.kernels.sums import (
    N_COLUMNS,
    Points,
    block_sums,
    outside_normals,
    to_residuals,
)
from keepstill.moving import Asked, Moving, fill_values
from keepstill.reference import Level, Reference
from keepstill.run_model import RunModel

Matrix = NDArray[np.float64]

# A volume is registered to a few hundredths of a millimetre by now. Who would go further than
# this has something wrong with it that the model does not know, and stays where it is.
_FURTHEST_MM = 0.3


def residuals_of(
    moving: Moving, to_moving: Matrix, level: Level, scale: float
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Residuals of a volume at the points of a level.

    Parameters
    ----------
    moving : Moving
    to_moving : (4, 4) float64
        Voxel of the reference -> voxel of the volume.
    level : Level
        Of the reference.
    scale : float
        Factor that brings the volume's intensity to the reference's.

    Returns
    -------
    residuals : (n,) float32
        0 outside the spans.
    spans : (n_rows, 2) int64
    """
    rows = level.points.rows
    spans = np.zeros((len(rows), 2), np.int64)
    spans[:, 1] = rows[:, 3]
    out = np.zeros_like(level.points.values)
    fill_values(out, Asked(rows, spans, level.rough, level.inset_voxels), moving, to_moving)
    to_residuals(out, level.points, spans, scale)
    return out, spans


def to_moving_voxel(estimate: Estimate, moving_affine: Matrix, reference: Reference) -> Matrix:
    """Voxel of the reference -> voxel of a volume that was estimated, (4, 4)."""
    return geometry.compose(
        geometry.inverse(moving_affine), estimate.moving_from_reference, reference.affine
    )


def take_last_step(
    moving: Moving,
    moving_affine: Matrix,
    reference: Reference,
    estimate: Estimate,
    model: RunModel,
) -> Estimate:
    """One more Gauss-Newton step, with what the run's model predicts taken off; and its error.

    Parameters
    ----------
    moving : Moving
    moving_affine : (4, 4) float64
        World mm from voxel of the moving volume.
    reference : Reference
    estimate : Estimate
        From `estimate_motion`; a failed one is returned as it is.
    model : RunModel

    Returns
    -------
    Estimate
        With its covariance. That of the reference itself says by how far its own pose is off what
        all volumes agree upon.

    Notes
    -----
    The step is N^-1 T' r for residuals r, Jacobian J, its low-passed twin T and N = T' J. Noise
    of variance s^2 makes its covariance s^2 N^-1 T'T N^-T. If residuals of neighbouring points
    are alike, sums over parts of the head say more: with d_g = T' (r - J step) over part g, it is
    N^-1 (sum of d_g d_g') N^-T, the cluster-robust estimate (Liang & Zeger 1986, Biometrika
    73:13), which for few parts is noisy for one volume and good for the mean over a run. It is
    given over what residuals that have nothing to do with each other would make.
    """
    if estimate.status == "failed":
        return estimate
    # Without fields, aliasing has to be kept out by the wider low-pass.
    level = reference.fine if model.fields is None else reference.last
    to_moving = to_moving_voxel(estimate, moving_affine, reference)
    residuals, spans = residuals_of(moving, to_moving, level, estimate.scale)
    model.take_off(residuals, reference, spans, to_moving)
    sums, outside = _by_cell(level.points, reference.cells, residuals, spans)
    normal, totals = level.normal - total_of(outside), total_of(sums)
    step, regular = allowed_step(normal, totals[:N_COLUMNS], reference.basis)
    if not (regular and geometry.step_size_mm(step[:6, 0]) <= _FURTHEST_MM):  # nor NaN
        return estimate
    n_inside, squares = int(np.diff(spans).sum()), float(totals[N_COLUMNS])
    variance = squares / max(n_inside - N_COLUMNS, 1)
    into_motion = _into_motion(normal, reference.basis)
    return replace(
        estimate,
        moving_from_reference=_moved(estimate, step, reference),
        iterations=estimate.iterations + 1,
        cost=float(np.sqrt(squares / max(n_inside, 1))) / reference.mean_intensity,
        scale=estimate.scale / (1.0 + float(step[6, 0])),
        covariance=_of_motion(into_motion, level.test_normal * variance),
        disagreements=_disagreements(level, (sums, outside, step), into_motion, variance),
        aliasing=model.wave_power / variance if variance > 0 else 0.0,
    )


def _by_cell(
    points: Points, cells: Cells, residuals: NDArray[np.float32], spans: NDArray[np.int64]
) -> tuple[Matrix, Matrix]:
    """Sums (n_cells, 9) of residuals, and normal matrices (n_cells, 8, 8) of points outside."""
    by_strip = block_sums(points.test_jacobian, residuals, cells.strip_ends)
    sums = gathered(by_strip, cells.cell_of_strip, cells.n_cells)
    return sums, outside_normals(points, spans, cells.cell_of_row, cells.n_cells)


def _moved(estimate: Estimate, step: Matrix, reference: Reference) -> Matrix:
    """The estimated map after a step about the reference's centre."""
    turn = geometry.compose(
        geometry.translation(reference.centre_mm),
        geometry.inverse(geometry.rigid_step(step[:6, 0])),
        geometry.translation(-reference.centre_mm),
    )
    return geometry.compose(estimate.moving_from_reference, turn)


def _left(cut: Cut, found: tuple[Matrix, Matrix, Matrix]) -> Matrix:
    """What a step leaves of each part's sums, (n_parts, 8).

    By sums (n_cells, 9), normal matrices of points outside (n_cells, 8, 8), and step (8, 1).
    """
    sums, outside, step = found
    n_parts = len(cut.normals)
    inside = cut.normals - gathered(outside, cut.part_of_cell, n_parts)
    right = gathered(sums, cut.part_of_cell, n_parts)[:, :N_COLUMNS]
    return right - product(inside.reshape(-1, N_COLUMNS), step).reshape(right.shape)


def _disagreements(
    level: Level, found: tuple[Matrix, Matrix, Matrix], into_motion: Matrix, variance: float
) -> tuple[Disagreement, ...]:
    left = ((cut, _left(cut, found)) for cut in level.cuts)
    return tuple(_disagreement(cut, parts, into_motion, variance) for cut, parts in left)


def _disagreement(cut: Cut, left: Matrix, into_motion: Matrix, variance: float) -> Disagreement:
    """How far parts disagree, by what a step leaves of their sums."""
    seen = _of_motion(into_motion, product(np.ascontiguousarray(left.T), left))
    expected = _of_motion(into_motion, cut.spread * variance)
    expected_mm2, freedom = mean_square_mm2(expected), (len(cut.normals) - 1) * directions(expected)
    return Disagreement(mean_square_mm2(seen) / expected_mm2 if expected_mm2 > 0 else 1.0, freedom)


def _into_motion(normal: Matrix, basis: Matrix) -> Matrix:
    """Motion (6, 8) by the right-hand side of a step; NaN if there is none."""
    onto = np.ascontiguousarray(basis.T)
    inverse, regular = solution(product(onto, product(normal, basis)), onto)
    if not regular:
        return np.full((6, N_COLUMNS), np.nan)
    return np.ascontiguousarray(product(basis, inverse)[:6])


def _of_motion(into_motion: Matrix, scatter: Matrix) -> Matrix:
    """Covariance (6, 6) of the motion by a scatter (8, 8) of the right-hand side."""
    return product(product(into_motion, scatter), np.ascontiguousarray(into_motion.T))
