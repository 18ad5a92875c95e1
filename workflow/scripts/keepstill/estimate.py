"""Motion of one volume, by inverse-compositional Gauss-Newton.

Baker & Matthews 2004 (Int. J. Comput. Vis. 56:221) for a rigid map and an intensity scale: the
reference's derivatives are computed once, and an iteration samples the moving volume only. Two
things differ from the textbook. The residuals are tested against a low-passed Jacobian, since
the interpolation error of the moving volume lives at high frequencies; the images themselves
are not smoothed. And points that leave the field of view leave the normal matrix too, in every
iteration, or large motion is pulled back towards the identity.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.kernels.bspline import PAD_LOW, PAD_ROW, POLES, fill_coefficients, tap_slots
from keepstill.kernels.small import product, solution
from keepstill.kernels.sums import Moving, step_sums
from keepstill.reference import Level, Reference
from keepstill.settings import EstimateSettings

# The coarse level hands over to the fine one at this step: its own noise is larger.
_COARSE_TOLERANCE_MM = 0.02
# After so many steps on a level, a point that has left the field of view stays out: points that
# come and go with every step, in a run of few slices, can keep a fit from ever settling.
_STEPS_WITH_FREE_FIELD = 8
# A smaller part of the points than this in the field says nothing any more.
_LEAST_OVERLAP = 0.1
# A fit that leaves more of the reference's variance than this unexplained has found something
# else than the head, or a head that moved while it was scanned.
_MOST_UNEXPLAINED = 0.5
# A scan's intensity scale; beyond it the fit has left the head.
_SCALE_RANGE = (0.1, 10.0)


@dataclass(frozen=True)
class Estimate:
    """What is known of one volume's motion.

    Attributes
    ----------
    moving_from_reference : (4, 4) float64
        World mm (RAS+) of the reference -> world mm of the volume.
    status : str
        ``ok``, ``failed`` or ``reference``.
    iterations : int
        Gauss-Newton steps, coarse and fine.
    cost : float
        Rms residual over the sampling points, as a part of the reference's mean there.
    overlap : float
        Part of the sampling points inside the volume's field of view, 0 to 1.
    scale : float
        Factor that brings the volume's intensity to the reference's.
    """

    moving_from_reference: NDArray[np.float64]
    status: str
    iterations: int
    cost: float
    overlap: float
    scale: float


@dataclass
class _Fit:
    """State of a fit: the map about the reference's centre, and what the last step found."""

    matrix: NDArray[np.float64]
    scale: float = 1.0
    step_mm: float = np.inf
    squares: float = np.nan
    n_inside: int = 0
    overlap: float = 0.0
    iterations: int = 0
    lost: bool = False


def new_coefficients(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Room for the padded B-spline coefficients of a (nz, ny, nx) volume."""
    nz, ny, nx = shape
    return np.empty((nz + 2 * PAD_LOW, ny + 2 * PAD_LOW, nx + PAD_LOW + PAD_ROW), np.float32)


def prepare_moving(
    volume: NDArray[np.float32], degree: int, coefficients: NDArray[np.float32]
) -> Moving:
    """B-spline of a volume, ready to be sampled.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
        Finite; never modified.
    degree : int
        1 to 5.
    coefficients : padded float32
        From `new_coefficients`; overwritten, and held by the result.
    """
    fill_coefficients(volume, np.array(POLES[degree], np.float32), coefficients)
    nz, ny, nx = volume.shape
    return Moving(coefficients, (nx, ny, nz), degree, tap_slots(degree))


def estimate_motion(
    moving: Moving,
    moving_affine: NDArray[np.float64],
    reference: Reference,
    settings: EstimateSettings,
) -> Estimate:
    """Rigid motion of a volume against the reference, starting from no motion.

    Parameters
    ----------
    moving : Moving
    moving_affine : (4, 4) float64
        World mm from voxel of the moving volume.
    reference : Reference
    settings : EstimateSettings

    Returns
    -------
    Estimate
        With status ``failed``, and the last map that was still sensible, where the fit does not
        converge, leaves the field of view or finds no signal.
    """
    fit = _Fit(matrix=np.eye(4))
    frames = _frames(moving_affine, reference)
    n_most = settings.max_iterations
    _iterate(fit, reference.coarse, moving, frames, (_COARSE_TOLERANCE_MM, n_most))
    if not fit.lost:
        _iterate(fit, reference.fine, moving, frames, (settings.tolerance_mm, n_most))
    rms = float(np.sqrt(fit.squares / max(fit.n_inside, 1)))
    converged = fit.step_mm <= settings.tolerance_mm and not fit.lost
    fits = rms**2 <= _MOST_UNEXPLAINED * reference.sd_intensity**2
    good = converged and fits and fit.overlap >= settings.min_overlap
    to_centre = geometry.translation(-reference.centre_mm)
    from_centre = geometry.translation(reference.centre_mm)
    return Estimate(
        moving_from_reference=geometry.compose(from_centre, fit.matrix, to_centre),
        status="ok" if good else "failed",
        iterations=fit.iterations,
        cost=rms / reference.mean_intensity,
        overlap=fit.overlap,
        scale=fit.scale,
    )


def _frames(
    moving_affine: NDArray[np.float64], reference: Reference
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Moving voxel <- centred world, centred world <- reference voxel, and the steps' basis."""
    from_centre = geometry.translation(reference.centre_mm)
    to_centre = geometry.translation(-reference.centre_mm)
    return (
        geometry.compose(geometry.inverse(moving_affine), from_centre),
        geometry.compose(to_centre, reference.affine),
        reference.basis,
    )


def _iterate(
    fit: _Fit,
    level: Level,
    moving: Moving,
    frames: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    limits: tuple[float, int],
) -> None:
    """Take steps on one level until they are small (mm), too many, or lead nowhere."""
    tolerance_mm, most_iterations = limits
    basis = frames[2]
    n_points = int(level.points.rows[:, 3].sum())
    spans = np.zeros((len(level.points.rows), 2), np.int64)
    fit.step_mm = np.inf
    for n_steps in range(most_iterations):
        if fit.step_mm <= tolerance_mm:
            return
        if n_steps < _STEPS_WITH_FREE_FIELD:
            spans[:, 0], spans[:, 1] = 0, level.points.rows[:, 3]
        voxel_from_point = geometry.compose(frames[0], fit.matrix, frames[1])
        right, outside, fit.squares, fit.n_inside = step_sums(
            level.points, moving, voxel_from_point, fit.scale, spans
        )
        step, regular = _step(level.normal - outside, right, basis)
        fit.overlap = fit.n_inside / n_points
        fit.iterations += 1
        if not _is_sensible(step, regular, fit.overlap):
            fit.lost = True
            return
        fit.step_mm = geometry.step_size_mm(step[:6, 0])
        fit.scale /= 1.0 + float(step[6, 0])
        fit.matrix = geometry.compose(
            fit.matrix, geometry.inverse(geometry.rigid_step(step[:6, 0]))
        )
        if not _SCALE_RANGE[0] < fit.scale < _SCALE_RANGE[1]:
            fit.lost = True
            return


def _step(
    normal: NDArray[np.float64], right: NDArray[np.float64], basis: NDArray[np.float64]
) -> tuple[NDArray[np.float64], bool]:
    """Step (7, 1) with normal @ step = right, among those that the basis allows."""
    onto = np.ascontiguousarray(basis.T)
    reduced, regular = solution(
        product(onto, product(normal, basis)), product(onto, right.reshape(-1, 1))
    )
    return product(basis, reduced), regular


def _is_sensible(step: NDArray[np.float64], regular: bool, overlap: float) -> bool:
    return (
        regular
        and bool(np.isfinite(step).all())
        and overlap >= _LEAST_OVERLAP
        and step[6, 0] > -0.9  # the scale is divided by 1 + this
    )
