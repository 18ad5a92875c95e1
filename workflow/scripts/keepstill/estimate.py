"""Motion of one volume against the reference, by inverse-compositional Gauss-Newton.

Baker & Matthews 2004 (Int. J. Comput. Vis. 56:221) for a rigid map and an intensity scale: the
reference's derivatives are computed once, and an iteration samples the moving volume only. Two
things differ from the textbook. The residuals are tested against a low-passed Jacobian, since
the interpolation error of the moving volume lives at high frequencies; the images themselves
are not smoothed. And points that leave the field of view leave the normal matrix too, in every
iteration, or large motion is pulled back towards the identity.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.kernels.small import product, solution
from keepstill.kernels.sums import N_COLUMNS, block_sums, outside_normal, to_residuals
from keepstill.moving import Asked, Moving, fill_values
from keepstill.reference import Level, Reference
from keepstill.settings import EstimateSettings

# Steps shrink by a factor that falls, while the fit comes closer, to 0.01 or 0.02 at a signal to
# noise ratio of 60; a luckier one is not believed.
_LEAST_SHRINKAGE = 0.02
# After so many steps on a level, a point that has left the field of view stays out: points that
# come and go with every step, in a run of few slices, can keep a fit from ever settling.
_STEPS_WITH_FREE_FIELD = 8
# A step longer than this, in mm or rad, leads out of any scanner: voxels of 1e20 and the like.
_MOST_STEP = 1e4
# A smaller part of the points than this in the field says nothing any more.
_LEAST_OVERLAP = 0.1
# A fit that leaves more of the reference's variance than this unexplained has found something
# else than the head, or a head that moved while it was scanned.
_MOST_UNEXPLAINED = 0.5
# A scan's intensity scale; beyond it the fit has left the head.
_SCALE_RANGE = (0.1, 10.0)


def _no_motion() -> NDArray[np.float64]:
    return np.eye(4)


def _unknown() -> NDArray[np.float64]:
    return np.full((6, 6), np.nan)


class Disagreement(NamedTuple):
    """How far parts of a head disagree about a volume's motion.

    Attributes
    ----------
    ratio : float
        Mean square displacement by which they do, over what noise of single points would make; 1
        on average if there is nothing else.
    freedom : float
        Degrees of freedom of the ratio: noise alone scatters it by a variance of 2 / freedom.
    """

    ratio: float
    freedom: float


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
    lost_slices : tuple of int
        Slices (z) that were left out, since they have lost their signal.
    covariance : (6, 6) float64
        Of the error of three shifts (mm) and three rotations (rad) about the reference's centre,
        by the residuals' variance as if they were noise.
    disagreements : tuple of Disagreement
        How far parts of the head disagree, for each way to cut it.
    aliasing : float
        Power of the run's fields of aliasing over that of what is left in the volume's residuals.
    """

    moving_from_reference: NDArray[np.float64]
    status: str
    iterations: int
    cost: float
    overlap: float
    scale: float
    lost_slices: tuple[int, ...] = ()
    covariance: NDArray[np.float64] = field(default_factory=_unknown)
    disagreements: tuple[Disagreement, ...] = ()
    aliasing: float = 0.0


@dataclass
class Fit:
    """State of a fit: the map about the reference's centre, and what the last step found.

    `shrinkage` is the last ratio of two steps on one level, and `next_mm` the step that is to be
    expected by it: what the fit is still away from its end.
    """

    matrix: NDArray[np.float64] = field(default_factory=_no_motion)
    scale: float = 1.0
    next_mm: float = np.inf
    shrinkage: float = 1.0
    squares: float = np.nan
    n_inside: int = 0
    overlap: float = 0.0
    iterations: int = 0
    lost: bool = False


def estimate_motion(
    moving: Moving,
    moving_affine: NDArray[np.float64],
    reference: Reference,
    settings: EstimateSettings,
    start: Fit | None = None,
) -> Estimate:
    """Rigid motion of a volume against the reference.

    Parameters
    ----------
    moving : Moving
    moving_affine : (4, 4) float64
        World mm from voxel of the moving volume.
    reference : Reference
    settings : EstimateSettings
    start : Fit, optional
        Where to start from, and how many iterations led there; no motion by default.

    Returns
    -------
    Estimate
        With status ``failed``, and the last map that was still sensible, where the fit does not
        converge, leaves the field of view or finds no signal.
    """
    fit = Fit() if start is None else Fit(start.matrix, start.scale, iterations=start.iterations)
    frames = *frames_of(moving_affine, reference.affine, reference.centre_mm), reference.basis
    n_most = settings.max_iterations
    for level in (reference.coarse, reference.fine):
        if not fit.lost:
            iterate(fit, level, moving, frames, (settings.tolerance_mm, n_most))
    rms = float(np.sqrt(fit.squares / max(fit.n_inside, 1)))
    converged = fit.next_mm <= settings.tolerance_mm and not fit.lost
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
        lost_slices=tuple(moving.lost_slices.tolist()),
    )


def frames_of(
    moving_affine: NDArray[np.float64],
    affine: NDArray[np.float64],
    centre_mm: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Moving voxel <- centred world, and centred world <- reference voxel."""
    return (
        geometry.compose(geometry.inverse(moving_affine), geometry.translation(centre_mm)),
        geometry.compose(geometry.translation(-centre_mm), affine),
    )


def iterate(
    fit: Fit,
    level: Level,
    moving: Moving,
    frames: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    limits: tuple[float, int],
) -> None:
    """Take steps on one level until the next would be small (mm), or they lead nowhere.

    Parameters
    ----------
    fit : Fit
        Changed in place.
    level : Level
    moving : Moving
    frames : tuple of (4, 4) float64, (4, 4) float64, (8, m) float64
        As `frames_of` gives them, and the steps that are allowed.
    limits : tuple of float and int
        Size of the next step, mm, and number of steps.
    """
    tolerance_mm, most_iterations = limits
    basis = frames[2]
    n_points = int(level.points.rows[:, 3].sum())
    rows = level.points.rows
    values, spans = np.zeros_like(level.points.values), np.zeros((len(rows), 2), np.int64)
    asked = Asked(rows, spans, level.rough, level.inset_voxels)
    last_mm = 0.0
    fit.next_mm = np.inf
    everything = np.array([0, len(values)], np.int64)
    for n_steps in range(most_iterations):
        if fit.next_mm <= tolerance_mm:
            return
        if n_steps < _STEPS_WITH_FREE_FIELD:
            spans[:, 0], spans[:, 1] = 0, rows[:, 3]
        voxel_from_point = geometry.compose(frames[0], fit.matrix, frames[1])
        fit.n_inside = fill_values(values, asked, moving, voxel_from_point)
        to_residuals(values, level.points, spans, fit.scale)
        sums = block_sums(level.points.test_jacobian, values, everything)[0]
        normal = level.normal - outside_normal(level.points, spans)
        step, regular = allowed_step(normal, sums[:N_COLUMNS], basis)
        fit.squares, fit.overlap = float(sums[N_COLUMNS]), fit.n_inside / n_points
        fit.iterations += 1
        if not _is_sensible(step, regular, fit.overlap):
            fit.lost = True
            return
        step_mm = geometry.step_size_mm(step[:6, 0])
        if last_mm > 0:
            fit.shrinkage = max(step_mm / last_mm, _LEAST_SHRINKAGE)
        fit.next_mm, last_mm = step_mm * fit.shrinkage, step_mm
        fit.scale /= 1.0 + float(step[6, 0])
        fit.matrix = geometry.compose(
            fit.matrix, geometry.inverse(geometry.rigid_step(step[:6, 0]))
        )
        if not _SCALE_RANGE[0] < fit.scale < _SCALE_RANGE[1]:
            fit.lost = True
            return


def allowed_step(
    normal: NDArray[np.float64], right: NDArray[np.float64], basis: NDArray[np.float64]
) -> tuple[NDArray[np.float64], bool]:
    """Step (8, 1) with normal @ step = right, among those that the basis allows."""
    onto = np.ascontiguousarray(basis.T)
    reduced, regular = solution(
        product(onto, product(normal, basis)), product(onto, right.reshape(-1, 1))
    )
    return product(basis, reduced), regular


def _is_sensible(step: NDArray[np.float64], regular: bool, overlap: float) -> bool:
    return (
        regular
        and bool(np.isfinite(step).all())
        and bool(np.abs(step[:6, 0]).max() < _MOST_STEP)
        and overlap >= _LEAST_OVERLAP
        and step[6, 0] > -0.9  # the scale is divided by 1 + this
    )
