"""One volume of a run against an image of another contrast, grid and pose, once a run.

A single-band reference or a file is brighter, has another contrast, or lies somewhere else. A fit
of intensities is then off by about a millimetre, for every volume in a way of its own. So one
volume of the run is placed in the image, and all others go by that volume: motion within the run
does not know of the image, and all of it has one error in the image's space.

Both images are normalised first: each voxel as its difference from the mean around it, in standard
deviations around it. That takes contrast, shading and gain to first order; what is left to fit is
the local correlation (as in Cachier et al. 2003, CVIU 89:272, by squares of normalised images).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.errors import EmptyVolumeError
from keepstill.estimate import Fit, frames_of, iterate
from keepstill.masks import clip_level, head_mask
from keepstill.moving import Coefficients, prepare_moving
from keepstill.reference import WideLevel, thinned, wide_level
from keepstill.smooth import lowpass
from keepstill.wide_start import prepare_wide, wide_start

Matrix = NDArray[np.float64]
Volume = NDArray[np.float32]

# Low-passes of both images, and what counts as around a voxel: in simulated heads whose contrast
# follows powers of 0.5 to 2, shaded by 40%, that errs by 0.05 to 0.09 mm; 30 mm around, by 0.2.
_WIDTHS_MM, _AROUND_MM = (10.0, 6.0, 4.0), 14.0
# Points keep this away from the borders of both fields, where they have room for it: what is around
# a voxel there is another thing for a head that lies elsewhere. Without, heads that are 7 mm apart
# are off by 0.04 mm at voxels of 3.4 mm, and by 0.5 at 6.5; with it, by 0.02 and 0.2.
_MARGIN_MM, _MOST_MARGIN = 10.0, 1 / 6
# Variation below this part of the level of tissue is noise.
_NOISE_PART = 0.2
_TOLERANCE_MM, _MOST_STEPS, _DEGREE = 0.01, 60, 3
_HEAD_FWHM_MM = 10.0


@dataclass(frozen=True)
class Placement:
    """Where a volume lies in an image.

    Attributes
    ----------
    volume_from_image : (4, 4) float64
        World mm (RAS+) of the image -> world mm of the volume.
    overlap : float
        Part of the image's head that the volume shows, 0 to 1.
    correlation : float
        Of the normalised images, 0 to 1; 0 where no fit was found.
    on_own_grid : float
        Part of the head that both show which, where it lies in the image's world, the volume's grid
        holds, 0 to 1.
    """

    volume_from_image: Matrix
    overlap: float
    correlation: float
    on_own_grid: float


def place_volume(
    source: tuple[Volume, Matrix], image: tuple[Volume, Matrix], basis: Matrix
) -> Placement:
    """Where a volume of a run lies in an image of the same head.

    Parameters
    ----------
    source, image : tuple of (nz, ny, nx) float32 and (4, 4) float64
        Finite voxels, never modified, and world mm from voxel.
    basis : (8, m) float64
        Steps that are allowed, as `Reference.basis`.

    Raises
    ------
    EmptyVolumeError
        If the image shows no head.
    """
    source, image = _in_common_unit(*source), _in_common_unit(*image)
    low, low_affine = thinned(*image, _HEAD_FWHM_MM)
    head = np.argwhere(head_mask(low, rim_voxels=0))[:, ::-1].astype(np.float64)
    if not len(head):
        raise EmptyVolumeError("it shows no head: no voxel stands out from background")
    centre_mm = geometry.world(low_affine, head.mean(axis=0))
    start = wide_start(*source, prepare_wide(*image, centre_mm, basis))
    fit, unexplained = start or Fit(lost=True), 1.0
    for width_mm in _WIDTHS_MM:
        if not fit.lost:
            normal, affine, _ = _normalised(*source, width_mm)
            inset = _MARGIN_MM / float(geometry.voxel_sizes_mm(affine).max())
            inset = min(inset, _MOST_MARGIN * min(normal.shape))
            level = _normalised_level(image, width_mm, centre_mm, inset)
            moving = prepare_moving(normal, _DEGREE, Coefficients(normal.shape))
            frames = *frames_of(affine, level.affine, centre_mm), basis
            fit = Fit(fit.matrix)
            iterate(fit, level.level, moving, frames, (_TOLERANCE_MM, _MOST_STEPS))
            unexplained = fit.squares / max(fit.n_inside, 1) / level.variance
    found = not fit.lost and fit.next_mm <= _TOLERANCE_MM
    turn = geometry.compose(
        geometry.translation(centre_mm), fit.matrix, geometry.translation(-centre_mm)
    )
    # The scale makes residuals orthogonal to the image: their square is 1 / correlation^2 - 1.
    correlation = float(1.0 / np.sqrt(1.0 + unexplained)) if found else 0.0
    head_mm = geometry.world(low_affine, head)
    shown, held = _in_field(source, head_mm, turn), _in_field(source, head_mm, np.eye(4))
    on_own_grid = float((shown & held).sum() / max(int(shown.sum()), 1))
    return Placement(turn, float(shown.mean()), correlation, on_own_grid)


def _in_field(
    source: tuple[Volume, Matrix], head_mm: Matrix, source_from_image: Matrix
) -> NDArray[np.bool_]:
    """Which points of a head lie in a volume's field of view."""
    to_voxel = geometry.compose(geometry.inverse(source[1]), source_from_image)
    voxel = geometry.world(to_voxel, head_mm)
    last = np.array(source[0].shape[::-1]) - 1
    return np.asarray(((voxel >= 0) & (voxel <= last)).all(axis=1))


def _in_common_unit(volume: Volume, affine: Matrix) -> tuple[Volume, Matrix]:
    """A volume in units of the level that separates tissue from background."""
    return volume / np.float32(clip_level(volume) or 1.0), affine


def _normalised_level(
    image: tuple[Volume, Matrix], width_mm: float, centre_mm: Matrix, inset_voxels: float
) -> WideLevel:
    normal, affine, low = _normalised(*image, width_mm)
    sizes_mm = geometry.voxel_sizes_mm(affine)
    mask = head_mask(low, max(1, round(0.5 * width_mm / float(sizes_mm.min()))))
    inner = np.zeros_like(mask)
    inner[_within_margin(mask.shape, sizes_mm)] = True
    mask = mask & inner if (mask & inner).any() else mask
    level = wide_level((normal, affine), mask, centre_mm, rough=False)
    return replace(level, level=replace(level.level, inset_voxels=inset_voxels))


def _within_margin(shape: tuple[int, ...], sizes_mm: NDArray[np.float64]) -> tuple[slice, ...]:
    """Slices of a (nz, ny, nx) volume that leave its borders out."""
    margins = [
        min(round(_MARGIN_MM / float(size)), int(_MOST_MARGIN * n))
        for n, size in zip(shape, sizes_mm[::-1], strict=True)
    ]
    return tuple(slice(margin, n - margin) for margin, n in zip(margins, shape, strict=True))


def _normalised(volume: Volume, affine: Matrix, width_mm: float) -> tuple[Volume, Matrix, Volume]:
    """A volume in standard deviations around each voxel, its affine, and it before that."""
    low, affine = thinned(volume, affine, width_mm)
    around = [_AROUND_MM / float(size) for size in geometry.voxel_sizes_mm(affine)][::-1]
    mean = lowpass(low, around)
    variance = np.maximum(lowpass(low * low, around) - mean * mean, 0)
    noise = np.float32((_NOISE_PART * clip_level(low)) ** 2)
    return np.asarray((low - mean) / np.sqrt(variance + noise), np.float32), affine, low
