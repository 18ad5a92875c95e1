"""How far each volume's motion is likely to be off."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from keepstill.estimate import Estimate
from keepstill.kernels.small import product

Matrix = NDArray[np.float64]

# Motions are compared by what they do to a ball of this radius, mm (Jenkinson 1999).
_HEAD_RADIUS_MM = 65.0
# The normal distribution is below this number of standard deviations with probability 0.68.
_SIGMAS = 0.46770
# What blocks of points cannot show, since it is alike in all of them: fields that were themselves
# fitted, and what is left of aliasing. Fitted once, to drift, jitter and oblique runs of other
# heads, motion and noise than the benchmark's (docs/benchmark.md).
_UNSEEN = 1.1
# Blocks cannot show less than noise; nor is a run believed to be worse than noise by more.
_LEAST_SEEN, _MOST_INFLATION = 1.0, 100.0


def with_error_bars(estimates: dict[int, Estimate]) -> dict[int, Estimate]:
    """Estimates whose covariance counts more than the noise of single points.

    What blocks of points say of one volume is noisy; their mean over the run, as a multiple of
    what noise alone would make, is not. That multiple goes into every volume's covariance.
    """
    known = [e for e in estimates.values() if np.isfinite(e.covariance).all()]
    if not known:
        return estimates
    noise = sum(mean_square_mm2(e.covariance) for e in known) / len(known)
    if noise <= 0:
        return estimates
    seen = sum(mean_square_mm2(e.covariance_by_blocks) for e in known) / len(known)
    inflation = min(_UNSEEN * max(seen / noise, _LEAST_SEEN), _MOST_INFLATION)
    return {t: replace(e, covariance=e.covariance * inflation) for t, e in estimates.items()}


def with_explained_noise(estimate: Estimate, explained: float) -> Estimate:
    """Estimate of a volume that the run's model was fitted to, its covariances made up for that.

    The model explains a part of the volume's noise: residuals are that much smaller than the
    noise, and that much of what they say about motion is lost.
    """
    factor = 1.0 / (1.0 - explained) ** 2
    return replace(
        estimate,
        covariance=estimate.covariance * factor,
        covariance_by_blocks=estimate.covariance_by_blocks * factor,
    )


def mean_square_mm2(covariance: Matrix) -> float:
    """Mean square displacement over a ball of 65 mm about the centre, mm^2, by a (6, 6) error."""
    turned = 0.4 * _HEAD_RADIUS_MM**2  # of points in a ball: two thirds of the mean square radius
    return float(np.trace(covariance[:3, :3]) + turned * np.trace(covariance[3:, 3:]))


def displacement_form(arms_mm: Matrix) -> Matrix:
    """Mean square displacement of points by a small motion m, as a form: m' form m.

    Parameters
    ----------
    arms_mm : (m, 3) float64
        Points from the centre of the motion.

    Returns
    -------
    form : (6, 6) float64
        For three shifts (mm) and three rotations (rad).
    """
    x, y, z = arms_mm.T
    zero, one = np.zeros_like(x), np.ones_like(x)
    rows = ((one, zero, zero, zero, z, -y), (zero, one, zero, -z, zero, x),
            (zero, zero, one, y, -x, zero))  # fmt: skip
    return np.array([[sum(float((row[a] * row[b]).mean()) for row in rows)
                      for b in range(6)] for a in range(6)])  # fmt: skip


def expected_errors_mm(covariances: Matrix, form: Matrix, reference: int | None) -> Matrix:
    """Displacement (rms over points) that each volume's error is below with probability 0.68.

    Parameters
    ----------
    covariances : (n, 6, 6) float64
        Of each volume's own error.
    form : (6, 6) float64
        From `displacement_form`.
    reference : int or None
        Volume against which motion is expressed: its error is everybody's.

    Returns
    -------
    expected_mm : (n,) float64
        NaN where it is not known.

    Notes
    -----
    The square is a sum of squared normal variables; its quantile is Wilson & Hilferty's (1931,
    PNAS 17:684) for a chi-square distribution of the same mean and variance.
    """
    out = np.full(len(covariances), np.nan)
    for t, covariance in enumerate(covariances):
        if t == reference:
            out[t] = 0.0
            continue
        total = covariance if reference is None else covariance + covariances[reference]
        if np.isfinite(total).all():
            out[t] = _quantile(product(form, np.ascontiguousarray(total)))
    return out


def _quantile(weights: Matrix) -> float:
    """Root of the 0.68 quantile, by a matrix whose eigenvalues are the squares' weights."""
    mean, squares = float(np.trace(weights)), float((weights * weights.T).sum())
    if mean <= 0:
        return 0.0
    freedom = mean**2 / squares
    part = 1 - 2 / (9 * freedom) + _SIGMAS * np.sqrt(2 / (9 * freedom))
    return float(np.sqrt(mean * part**3))
