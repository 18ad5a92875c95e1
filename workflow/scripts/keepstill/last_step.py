"""The last step of each volume, once it is known what a run's volumes have in common."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.error_bars import mean_square_mm2
from keepstill.estimate import Estimate, allowed_step
from keepstill.kernels.small import product, solution
from keepstill.kernels.sums import N_COLUMNS, block_sums, outside_normal, to_residuals
from keepstill.moving import Asked, Moving, fill_values
from keepstill.reference import Level, Reference, total_over_blocks
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
        With covariances. That of the reference itself says by how far its own pose is off what
        all volumes agree upon.

    Notes
    -----
    The step is N^-1 T' r for residuals r, Jacobian J, its low-passed twin T and N = T' J. Noise
    of variance s^2 makes its covariance s^2 N^-1 T'T N^-T. If residuals of neighbouring points
    are alike, sums over blocks of points say more: with d_g = T' (r - J step) over block g, it is
    N^-1 (sum of d_g d_g') N^-T, the cluster-robust estimate (Liang & Zeger 1986, Biometrika
    73:13), which for few blocks is noisy for one volume and good for the mean over a run. It is
    given as a multiple of what residuals that have nothing to do with each other would make.
    """
    if estimate.status == "failed":
        return estimate
    # Without fields, aliasing has to be kept out by the wider low-pass.
    level = reference.fine if model.fields is None else reference.last
    to_moving = to_moving_voxel(estimate, moving_affine, reference)
    residuals, spans = residuals_of(moving, to_moving, level, estimate.scale)
    model.take_off(residuals, reference, spans, to_moving)
    sums = block_sums(level.points.test_jacobian, residuals, reference.block_ends)
    normal = level.normal - outside_normal(level.points, spans)
    totals = total_over_blocks(sums)
    step, regular = allowed_step(normal, totals[:N_COLUMNS], reference.basis)
    if not regular or geometry.step_size_mm(step[:6, 0]) > _FURTHEST_MM:
        return estimate
    n_inside, squares = int(np.diff(spans).sum()), float(totals[N_COLUMNS])
    left = sums[:, :N_COLUMNS] - _predicted(level.block_normals, step)
    variance = squares / max(n_inside - N_COLUMNS, 1)
    noise, by_blocks = _errors(level, (normal, reference.basis), left, variance)
    return replace(
        estimate,
        moving_from_reference=_moved(estimate, step, reference),
        iterations=estimate.iterations + 1,
        cost=float(np.sqrt(squares / max(n_inside, 1))) / reference.mean_intensity,
        scale=estimate.scale / (1.0 + float(step[6, 0])),
        covariance=noise,
        covariance_by_blocks=by_blocks,
    )


def _moved(estimate: Estimate, step: Matrix, reference: Reference) -> Matrix:
    """The estimated map after a step about the reference's centre."""
    turn = geometry.compose(
        geometry.translation(reference.centre_mm),
        geometry.inverse(geometry.rigid_step(step[:6, 0])),
        geometry.translation(-reference.centre_mm),
    )
    return geometry.compose(estimate.moving_from_reference, turn)


def _predicted(block_normals: Matrix, step: Matrix) -> Matrix:
    n_blocks, n, _ = block_normals.shape
    return product(block_normals.reshape(-1, n), step).reshape(n_blocks, n)


def _errors(
    level: Level, normal_and_basis: tuple[Matrix, Matrix], left: Matrix, variance: float
) -> tuple[Matrix, Matrix]:
    """Covariances (6, 6) of the motion by the residuals' variance, and by blocks of points."""
    scatters = (
        level.test_normal * variance,
        product(np.ascontiguousarray(left.T), left),
        level.block_spread * variance,
    )
    noise, seen, unrelated = _covariances(*normal_and_basis, scatters)
    return noise, _as_multiple(seen, unrelated, noise)


def _covariances(normal: Matrix, basis: Matrix, scatters: tuple[Matrix, ...]) -> list[Matrix]:
    """Covariances (6, 6) of the motion by each of some scatters of the right-hand side."""
    onto = np.ascontiguousarray(basis.T)
    inverse, regular = solution(product(onto, product(normal, basis)), onto)
    if not regular:
        return [np.full((6, 6), np.nan)] * len(scatters)
    inverse = np.ascontiguousarray(product(basis, inverse)[:6])
    back = np.ascontiguousarray(inverse.T)
    return [product(product(inverse, scatter), back) for scatter in scatters]


def _as_multiple(seen: Matrix, unrelated: Matrix, noise: Matrix) -> Matrix:
    """What blocks show, as if a fit took nothing off them: noise alone makes it that of noise."""
    expected = mean_square_mm2(unrelated)
    return seen * (mean_square_mm2(noise) / expected) if expected > 0 else seen
