"""How far each volume's motion is likely to be off."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from keepstill.estimate import Estimate

Matrix = NDArray[np.float64]

# A motion's displacement is held against the head as a ball of this radius, mm (Jenkinson 1999).
_HEAD_RADIUS_MM = 65.0
# The normal distribution is below this number of standard deviations with probability 0.68.
_SIGMAS = 0.46770
# A block's disagreement cannot show less than noise; the run's mean is kept within these.
_LEAST_INFLATION, _MOST_INFLATION = 1.0, 100.0


def with_error_bars(estimates: dict[int, Estimate]) -> dict[int, Estimate]:
    """Estimates whose covariance counts what blocks of points disagree about, beyond noise.

    What blocks say of one volume is noisy; their mean over the run, as a multiple of what noise
    alone would make, is not. That multiple goes into every volume's covariance.
    """
    known = [e for e in estimates.values() if np.isfinite(e.covariance).all()]
    if not known:
        return estimates
    noise = sum(mean_square_mm2(e.covariance) for e in known)
    seen = sum(mean_square_mm2(e.covariance_by_blocks) for e in known)
    ratio = seen / noise if noise > 0 else 1.0
    inflation = min(max(ratio, _LEAST_INFLATION), _MOST_INFLATION)
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


def expected_errors_mm(covariances: Matrix, reference: int | None) -> Matrix:
    """Displacement that each volume's error is below with probability 0.68, (n,) mm.

    Parameters
    ----------
    covariances : (n, 6, 6) float64
        Of each volume's own error.
    reference : int or None
        Volume against which motion is expressed: its error is everybody's.

    Notes
    -----
    The square is a sum of squared normal variables; its quantile is Wilson & Hilferty's (1931,
    PNAS 17:684) for a chi-square distribution of the same mean and variance.
    """
    scale = np.array([1.0] * 3 + [np.sqrt(0.4) * _HEAD_RADIUS_MM] * 3)
    out = np.full(len(covariances), np.nan)
    for t, covariance in enumerate(covariances):
        total = covariance * np.outer(scale, scale)
        if reference is not None:
            if t == reference:
                out[t] = 0.0
                continue
            total = total + covariances[reference] * np.outer(scale, scale)
        if not np.isfinite(total).all():
            continue
        mean = float(np.trace(total))
        if mean == 0:  # a volume that equals the reference leaves no residual
            out[t] = 0.0
            continue
        freedom = mean**2 / float((total * total).sum())  # sum of squared eigenvalues
        part = 1 - 2 / (9 * freedom) + _SIGMAS * np.sqrt(2 / (9 * freedom))
        out[t] = np.sqrt(mean * part**3)
    return out
