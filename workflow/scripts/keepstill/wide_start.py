"""A start for volumes that lie far away, by strongly low-passed images.

A fit from no motion finds a head that turned by 50 degrees more often than not. Where it does not,
or ends at a poor cost, both images are low-passed until what is left is as wide as the motion, and
fitted from several attitudes; the best goes on at narrower widths. It is decided for each volume by
its own cost: nothing is taken from its neighbours.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.estimate import Estimate, Fit, frames_of, iterate
from keepstill.masks import head_mask
from keepstill.moving import Coefficients, prepare_moving
from keepstill.reference import Reference, WideLevel, thinned, wide_level

Matrix = NDArray[np.float64]

# An eighth of a head, and narrower by about 1.6: what is left is less than the next width.
_WIDTHS_MM = (28.0, 17.0, 10.0)
# Simulated heads that turned by 90 degrees about any axis are found from these; by 110, 5 of 6.
_TURN = 2 * (np.sqrt(2.0) - 1)  # of `rigid_step`: 45 degrees
# Rms displacement, mm, that the narrower images take care of.
_TOLERANCE_MM, _MOST_STEPS = 0.1, 40
# Thinned images hold nothing that a higher degree would show.
_DEGREE = 3
# A fit that leaves more of the reference's variance than this may have ended in the wrong place.
# Heads that stay within 5 degrees leave up to 0.05, at a volume's noise of 5% of its mean.
_POOR_UNEXPLAINED = 0.1


def wants_wide_start(estimate: Estimate, reference: Reference) -> bool:
    """Whether a fit that started from no motion has failed or ended at a poor cost."""
    rms = estimate.cost * reference.mean_intensity
    poor = not rms**2 <= _POOR_UNEXPLAINED * reference.sd_intensity**2
    return estimate.status == "failed" or poor


class Wide(NamedTuple):
    """What wide starts go by.

    Attributes
    ----------
    levels : list of WideLevel
        One for each low-pass, widest first.
    centre_mm : (3,) float64
        World point that steps turn about.
    basis : (8, m) float64
        Steps that are allowed, as `Reference.basis`.
    """

    levels: list[WideLevel]
    centre_mm: NDArray[np.float64]
    basis: Matrix


def prepare_wide(
    volume: NDArray[np.float32], affine: Matrix, centre_mm: NDArray[np.float64], basis: Matrix
) -> Wide:
    """What wide starts against a (nz, ny, nx) volume with its (4, 4) affine go by."""
    levels = []
    for width_mm in _WIDTHS_MM:
        low, low_affine = thinned(volume, affine, width_mm)
        rim = round(0.5 * width_mm / float(geometry.voxel_sizes_mm(low_affine).min()))
        levels.append(wide_level((low, low_affine), head_mask(low, rim), centre_mm))
    return Wide(levels, centre_mm, basis)


def wide_start(volume: NDArray[np.float32], moving_affine: Matrix, wide: Wide) -> Fit | None:
    """Where a fit of a volume that is far away may start; None if nothing is found.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
        Finite voxels; never modified.
    moving_affine : (4, 4) float64
        World mm from voxel of the volume.
    wide : Wide
        `prepare_wide` of the reference.
    """
    fits = [Fit(attitude) for attitude in _attitudes(wide.basis)]
    for level, width_mm in zip(wide.levels, _WIDTHS_MM, strict=True):
        low, affine = thinned(volume, moving_affine, width_mm)
        moving = prepare_moving(low, _DEGREE, Coefficients(low.shape))
        frames = *frames_of(affine, level.affine, wide.centre_mm), wide.basis
        for fit in fits:
            iterate(fit, level.level, moving, frames, (_TOLERANCE_MM, _MOST_STEPS))
        kept = [fit for fit in fits if not fit.lost]
        if not kept:
            return None
        fits = [min(kept, key=_badness)]
    return fits[0]


def better(first: Estimate, second: Estimate) -> Estimate:
    """The estimate that is not failed, or else the one with the lower cost."""
    if first.status != second.status:
        return first if second.status == "failed" else second
    return second if second.cost < first.cost else first


def _badness(fit: Fit) -> float:
    """Mean square over the points in the field, by their part: a small overlap is easily filled."""
    return fit.squares / max(fit.n_inside, 1) / max(fit.overlap, 1e-6)


def _attitudes(basis: Matrix) -> list[Matrix]:
    """No motion, and turns either way about each axis that the basis allows."""
    out = [np.eye(4)]
    for axis in basis[3:6].T:
        if axis.any():
            for sign in (1.0, -1.0):
                turn = np.concatenate([np.zeros(3), sign * _TURN * axis])
                out.append(geometry.rigid_step(turn))
    return out
