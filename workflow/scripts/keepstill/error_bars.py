"""How far each volume's motion is likely to be off."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from keepstill.estimate import Disagreement, Estimate
from keepstill.kernels.small import product

Matrix = NDArray[np.float64]

# Motions are compared by what they do to a ball of this radius, mm (Jenkinson 1999).
_HEAD_RADIUS_MM = 65.0
# The normal distribution is below this number of standard deviations with probability 0.68.
_SIGMAS = 0.46770
# What parts of the head cannot show, since it is alike in neighbours, or in all of them. That they
# disagree by more than noise counts so many times; and the more aliasing was taken off, the more of
# it is left. Both were fitted once, to other heads, motions and noises than the benchmark's
# (docs/benchmark.md).
_ALIKE_IN_NEIGHBOURS, _ALIASING_LEFT = 1.05, 0.025
# No volume is believed to be worse than noise by more.
_MOST_INFLATION = 100.0


def with_error_bars(estimates: dict[int, Estimate]) -> dict[int, Estimate]:
    """Estimates whose covariance counts more than the noise of single points.

    How far parts of the head disagree multiplies it: of the ways to cut the head, the one that
    shows most. What one volume says of itself is noisy; as far as volumes differ by no more than
    that noise makes them, it is the run's mean that counts. To that comes what is left of
    aliasing, by the square of its power over that of noise.
    """
    known = {
        t: estimate
        for t, estimate in estimates.items()
        if estimate.disagreements and np.isfinite(estimate.covariance).all()
    }
    by_cut = zip(*(estimate.disagreements for estimate in known.values()), strict=True)
    seen = np.max([np.ones(len(known)), *map(_credible, by_cut)], axis=0)
    left = _ALIASING_LEFT * np.array([estimate.aliasing for estimate in known.values()]) ** 2
    most = np.minimum(1.0 + _ALIKE_IN_NEIGHBOURS * (seen - 1.0) + left, _MOST_INFLATION)
    factors = dict(zip(known, most, strict=True))
    return {
        t: replace(estimate, covariance=estimate.covariance * factors.get(t, 1.0))
        for t, estimate in estimates.items()
    }


def _credible(volumes: Sequence[Disagreement]) -> Matrix:
    """Each volume's ratio as far as it can be believed, else the run's mean, (n,).

    Notes
    -----
    Linear credibility (Buhlmann 1967, ASTIN Bull 4:199): ratios are q = s c, c of mean 1 and
    variance v = 2 / freedom, so that var(q) / mean(q)^2 = (1 + v) (1 + w) - 1 for volumes whose s
    scatter by w. The best linear guess of s is mean + (q - mean) w mean^2 / var(q).
    """
    ratios = np.array([volume.ratio for volume in volumes])
    mean = ratios.mean()
    noise = 2.0 / float(np.mean([volume.freedom for volume in volumes]))
    scatter = ratios.var() / mean**2 if mean > 0 else 0.0
    apart = max((1 + scatter) / (1 + noise) - 1, 0.0)
    believed = apart / ((1 + apart) * (1 + noise) - 1)
    return np.asarray(mean + believed * (ratios - mean))


def with_explained_noise(estimate: Estimate, explained: float) -> Estimate:
    """Estimate of a volume that the run's model was fitted to, its covariance made up for that.

    The model explains a part of the volume's noise: residuals are that much smaller than the
    noise, and that much of what they say about motion is lost.
    """
    return replace(estimate, covariance=estimate.covariance / (1.0 - explained) ** 2)


def mean_square_mm2(covariance: Matrix) -> float:
    """Mean square displacement over a ball of 65 mm about the centre, mm^2, by a (6, 6) error."""
    turned = 0.4 * _HEAD_RADIUS_MM**2  # of points in a ball: two thirds of the mean square radius
    return float(np.trace(covariance[:3, :3]) + turned * np.trace(covariance[3:, 3:]))


def directions(covariance: Matrix) -> float:
    """In how many directions a (6, 6) error moves a ball of 65 mm about as much: 1 to 6."""
    weight = np.array([1.0] * 3 + [np.sqrt(0.4) * _HEAD_RADIUS_MM] * 3)
    moved = covariance * weight * weight[:, None]
    squares = float((moved * moved.T).sum())
    return float(np.trace(moved)) ** 2 / squares if squares > 0 else 1.0


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
