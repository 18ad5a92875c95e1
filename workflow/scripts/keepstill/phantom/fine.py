"""The head on a fine grid, blurred by the part of the point spread that turns with it."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill.phantom.contrast import PLAIN, Contrast
from keepstill.phantom.head import Grid, Tissue, draw_head, tissues_on
from keepstill.smooth import valid_filtered

FWHM_PER_SD = 2.3548200450309493
# The fine grid is 1 mm or finer, and at most one standard deviation of the blur: what the blur
# leaves at the grid's Nyquist frequency is then below exp(-pi^2 / 2) = 0.7%, and reading between
# its points with a quintic spline is right to about 1e-4 of the contrast.
_WIDEST_MM, _WIDEST_SD = 1.0, 1.0
# The Gaussian is cut at so many standard deviations: 6e-7 of its weight is beyond.
_REACH_SD = 5.0
# What a head fills, neck included, with room for the blur: x, y, z from and to, mm.
_BOX_MM = ((-88.0, 88.0), (-106.0, 108.0), (-124.0, 75.0))
# Planes that are blurred at once.
_SLAB = 24


@dataclass(frozen=True)
class FineHead:
    """A head on a fine grid.

    Attributes
    ----------
    tissue : Tissue
        `signal` and `active` are blurred; `brain` is not.
    grid : Grid
    blur_sd_mm : float
        Standard deviation of the blur, the same in all directions.
    """

    tissue: Tissue
    grid: Grid
    blur_sd_mm: float


def fine_head(seed: int, blur_fwhm_mm: float, contrast: Contrast = PLAIN) -> FineHead:
    """Head of a subject, blurred, in one contrast; see `fine_heads`."""
    return fine_heads(seed, blur_fwhm_mm, (contrast,))[0]


@functools.lru_cache(maxsize=1)  # runs of one subject come one after the other
def fine_heads(
    seed: int, blur_fwhm_mm: float, contrasts: tuple[Contrast, ...]
) -> tuple[FineHead, ...]:
    """Head of a subject, blurred, in each of some contrasts.

    Parameters
    ----------
    seed : int
        Of the subject.
    blur_fwhm_mm : float
        Full width at half maximum of the point spread along the axis where it is narrowest. What
        it has more of along other axes is the scanner's to add, since it does not turn with the
        head.
    contrasts : tuple of Contrast
        Intensity of each tissue.
    """
    sd_mm = blur_fwhm_mm / FWHM_PER_SD
    spacing_mm = min(_WIDEST_MM, _WIDEST_SD * sd_mm)
    grid = covering_grid(_BOX_MM, spacing_mm)
    sharp = tissues_on(draw_head(seed), grid, contrasts)
    return tuple(FineHead(_blurred(tissue, sd_mm / spacing_mm), grid, sd_mm) for tissue in sharp)


def _blurred(sharp: Tissue, sd_voxels: float) -> Tissue:
    """Signal and active cortex blurred, write-protected."""
    signal, active = blurred(sharp.signal, sd_voxels), blurred(sharp.active, sd_voxels)
    tissue = Tissue(signal=signal, brain=sharp.brain, active=active)
    for volume in tissue:
        volume.setflags(write=False)
    return tissue


def covering_grid(box_mm: tuple[tuple[float, float], ...], spacing_mm: float) -> Grid:
    """Grid of a spacing over x, y, z from and to."""
    nx, ny, nz = (math.floor((high - low) / spacing_mm) + 1 for low, high in box_mm)
    x, y, z = (low for low, _ in box_mm)
    return Grid((nx, ny, nz), spacing_mm, (x, y, z))


def blurred(volume: NDArray[np.float32], sd_voxels: float) -> NDArray[np.float32]:
    """Gaussian blur of a (nz, ny, nx) volume with nothing around it."""
    reach = math.ceil(_REACH_SD * sd_voxels)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sd_voxels) ** 2)
    taps = [float(tap) for tap in weights / weights.sum()]
    nz, ny, nx = volume.shape
    padded = np.zeros((nz + 2 * reach, ny, nx), np.float32)
    for low in range(0, nz, _SLAB):  # a slab at a time: its copies stay in the cache
        part = np.pad(volume[low : low + _SLAB], ((0, 0), (reach, reach), (reach, reach)))
        part = valid_filtered(valid_filtered(part, taps, 1), taps, 2)
        padded[reach + low : reach + low + len(part)] = part
    out = np.empty_like(volume)
    for low in range(0, nz, _SLAB):
        n = min(_SLAB, nz - low)
        out[low : low + n] = valid_filtered(padded[low : low + n + 2 * reach], taps, 0)
    return out
