"""Motion of one volume by ITK: samples of its splines, and normal equations in numpy.

The method is that of `estimate`, since smoothing or plain Gauss-Newton would be several times less
accurate: the reference's derivatives are computed once, the moving volume is sampled, and residuals
are tested against low-passed derivatives. Code and kernels are not shared. Differences: large
motion is found on smoothed images, not by another algorithm; there is no ghost, and no model of
what a run's volumes have in common.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from keepstill.error_bars import directions, mean_square_mm2
from keepstill.estimate import Disagreement, Estimate
from keepstill.itk_bridge import Image, Sampler, lowpassed
from keepstill.itk_engine.points import ItkReference, Level, products
from keepstill.settings import EstimateSettings

Matrix = NDArray[np.float64]

# Points count from so many voxels inside the moving field on, and from lost slices.
_INSET_VOXELS, _FROM_LOST_SLICES = 1.0, 1.5
# After so many steps on a level, points that have left the field stay out, or they might come
# and go for ever.
_STEPS_WITH_FREE_FIELD = 8
# Steps are expected to shrink as the last did, but not by more than this.
_LEAST_SHRINKAGE = 0.02
# A smoothed image needs no more than a cubic spline.
_COARSE_DEGREE = 3
# If smoothed images have more of the variance left than this, turns (rad) about each axis are
# tried; a fit with more than that at its end has found something else than the head.
_POOR, _TURN_RAD = 0.25, 0.45
_MOST_UNEXPLAINED = 0.5
# What leads out of the scanner, or out of any intensity.
_LEAST_OVERLAP, _MOST_STEP_MM, _SCALE_RANGE = 0.1, 1e4, (0.1, 10.0)
_HEAD_RADIUS_MM = 80.0
# How far blocks of points disagree is part of what a volume's error is expected to be.
_N_BLOCKS = 16


@dataclass
class _Fit:
    """State of a fit: the map about the reference's centre, and what the last step found."""

    matrix: Matrix = field(default_factory=lambda: np.eye(4))
    scale: float = 1.0
    next_mm: float = np.inf
    iterations: int = 0
    lost: bool = False
    residuals: Matrix = field(default_factory=lambda: np.zeros(0))
    inside: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))

    @property
    def mean_square(self) -> float:
        """Of the residuals inside the field; infinite for a fit that is lost."""
        n_inside = int(self.inside.sum())
        return np.inf if self.lost or not n_inside else float((self.residuals**2).sum()) / n_inside

    @property
    def overlap(self) -> float:
        """Part of the points inside the field."""
        return float(self.inside.mean()) if self.inside.size else 0.0


@dataclass(frozen=True)
class _Pair:
    """A moving volume and what it is realigned to."""

    moving: Image
    lost_slices: NDArray[np.int64]
    reference: ItkReference
    settings: EstimateSettings

    def in_world(self, matrix: Matrix) -> Matrix:
        """A map about the reference's centre as one of world mm."""
        centre = self.reference.centre_mm
        return _shifted(centre) @ matrix @ _shifted(-centre)


def estimate_by_itk(
    moving: Image,
    lost_slices: NDArray[np.int64],
    reference: ItkReference,
    settings: EstimateSettings,
) -> Estimate:
    """Rigid motion of a volume against the reference.

    Parameters
    ----------
    moving : Image
        Lost slices filled in.
    lost_slices : (m,) int64
        z of slices that have no say.
    reference : ItkReference
    settings : EstimateSettings

    Returns
    -------
    Estimate
        With status ``failed`` where the fit does not converge, leaves the field or does not fit.
    """
    pair, fit = _Pair(moving, lost_slices, reference, settings), _Fit()
    coarse, *finer = reference.levels
    _iterate(pair, coarse, fit)
    if fit.mean_square > _POOR * float(coarse.values.var()):
        fit = _best_start(pair)
        fit.lost = fit.mean_square > _MOST_UNEXPLAINED * float(coarse.values.var())
    for level in finer:
        if not fit.lost:
            _iterate(pair, level, fit)
    return _estimate(pair, fit)


def _best_start(pair: _Pair) -> _Fit:
    """Of fits of the smoothed images from several attitudes, the best."""
    coarse = pair.reference.levels[0]
    fits = [_Fit(matrix=turn) for turn in _turns()]
    for fit in fits:
        _iterate(pair, coarse, fit)
    best = min(fits, key=lambda fit: fit.mean_square)
    return replace(best, iterations=sum(fit.iterations for fit in fits))


def _turns() -> Iterator[Matrix]:
    yield np.eye(4)
    for axis, angle in itertools.product(range(3), (-_TURN_RAD, _TURN_RAD)):
        step = np.zeros(6)
        step[3 + axis] = angle
        yield _rigid(step)


def _iterate(pair: _Pair, level: Level, fit: _Fit) -> None:
    """Take steps on one level, until the next would be small; residuals are those at the end."""
    image, degree = pair.moving, pair.settings.degree
    if any(level.sd_voxels):
        image, degree = lowpassed(image, level.sd_voxels), _COARSE_DEGREE
    sampler = Sampler(image, pair.reference.image, degree, level.steps)
    fit.next_mm, last_mm = np.inf, 0.0
    for n_steps in range(pair.settings.max_iterations + 1):
        inside = _inside(pair, level, fit.matrix)
        fit.inside = inside & fit.inside if n_steps > _STEPS_WITH_FREE_FIELD else inside
        samples = sampler(pair.in_world(fit.matrix)).ravel()[level.where]
        fit.residuals = np.where(fit.inside, fit.scale * samples - level.values, 0.0)
        if fit.next_mm <= level.tolerance_mm or n_steps == pair.settings.max_iterations:
            return
        step = _step(level, fit)
        step_mm = _size_mm(step)
        fit.iterations += 1
        if not step_mm < _MOST_STEP_MM or step[6] < -0.9 or fit.overlap < _LEAST_OVERLAP:
            fit.lost = True
            return
        shrinkage = max(step_mm / last_mm, _LEAST_SHRINKAGE) if last_mm > 0 else 1.0
        fit.next_mm, last_mm = step_mm * shrinkage, step_mm
        fit.scale /= 1.0 + float(step[6])
        fit.matrix = fit.matrix @ np.linalg.inv(_rigid(step))
        if not _SCALE_RANGE[0] < fit.scale < _SCALE_RANGE[1]:
            fit.lost = True
            return


def _inside(pair: _Pair, level: Level, matrix: Matrix) -> NDArray[np.bool_]:
    """Points whose source is inside the moving field, and off lost slices, (n,)."""
    moving = pair.moving
    to_moving = np.linalg.inv(moving.affine) @ pair.in_world(matrix) @ pair.reference.affine
    at = np.einsum("ij,nj->ni", to_moving[:3, :3], level.voxels) + to_moving[:3, 3]
    last = np.array(moving.shape[::-1]) - 1 - _INSET_VOXELS
    inside = ((at >= _INSET_VOXELS) & (at <= last)).all(axis=1)
    for z in pair.lost_slices:
        inside &= np.abs(at[:, 2] - z) > _FROM_LOST_SLICES
    return np.asarray(inside)


def _normal(level: Level, fit: _Fit) -> Matrix:
    """Normal matrix of the points inside the field."""
    out = ~fit.inside
    return level.normal - products(level.test_jacobian[:, out], level.jacobian[:, out])


def _step(level: Level, fit: _Fit) -> Matrix:
    """Gauss-Newton step: shifts (mm), turns (rad), change of intensity; NaN if there is none."""
    right = np.einsum("in,n->i", level.test_jacobian, fit.residuals)
    try:
        return np.linalg.solve(_normal(level, fit), right)
    except np.linalg.LinAlgError:
        return np.full(7, np.nan)


def _estimate(pair: _Pair, fit: _Fit) -> Estimate:
    reference, settings = pair.reference, pair.settings
    good = (
        fit.next_mm <= settings.tolerance_mm
        and fit.mean_square <= _MOST_UNEXPLAINED * reference.variance
        and fit.overlap >= settings.min_overlap
    )
    found = Estimate(
        moving_from_reference=pair.in_world(fit.matrix),
        status="ok" if good else "failed",
        iterations=fit.iterations,
        cost=float(np.sqrt(fit.mean_square)) / reference.mean if not fit.lost else np.nan,
        overlap=fit.overlap,
        scale=fit.scale,
        lost_slices=tuple(pair.lost_slices.tolist()),
    )
    return _with_covariance(found, reference.levels[-1], fit) if good else found


def _with_covariance(found: Estimate, level: Level, fit: _Fit) -> Estimate:
    """An estimate with its covariance, as `last_step.take_last_step` has it."""
    inverse = np.linalg.inv(_normal(level, fit))
    tested = level.test_jacobian * fit.inside
    noise = products(tested, tested) * fit.mean_square
    begins = np.linspace(0, fit.residuals.size, _N_BLOCKS, endpoint=False).astype(np.int64)
    by_block = np.add.reduceat(tested * fit.residuals, begins, axis=1)
    of_noise, of_blocks = (
        (inverse @ part @ inverse.T)[:6, :6] for part in (noise, products(by_block, by_block))
    )
    noise_mm2 = mean_square_mm2(of_noise)
    ratio = mean_square_mm2(of_blocks) / noise_mm2 if noise_mm2 > 0 else 1.0
    freedom = (_N_BLOCKS - 1) * directions(of_noise)
    return replace(found, covariance=of_noise, disagreements=(Disagreement(ratio, freedom),))


def _size_mm(step: Matrix) -> float:
    """Rms displacement of a ball of 80 mm radius (Jenkinson 1999, TR99MJ1)."""
    turned = 0.4 * _HEAD_RADIUS_MM**2
    return float(np.sqrt((step[:3] ** 2).sum() + turned * (step[3:6] ** 2).sum()))


def _rigid(step: Matrix) -> Matrix:
    """(4, 4) map that turns by a rotation vector (rad; Rodrigues) and shifts (mm)."""
    out, angle = np.eye(4), float(np.linalg.norm(step[3:6]))
    if angle > 0:
        x, y, z = step[3:6] / angle
        cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
        out[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
    out[:3, 3] = step[:3]
    return out


def _shifted(shift_mm: Matrix) -> Matrix:
    out = np.eye(4)
    out[:3, 3] = shift_mm
    return out
