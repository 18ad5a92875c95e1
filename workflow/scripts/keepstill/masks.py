"""Where the head and the brain are, from one echo-planar volume."""

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.components import largest_component

Volume = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Tissue is brighter than this part of the median of the bright voxels: AFNI 3dClipLevel's rule
# and default (Cox 1996, Comput. Biomed. Res. 29:162).
_CLIP_FRACTION = 0.5


def clip_level(volume: Volume) -> float:
    """Intensity that separates tissue from background.

    The level is half the median of the voxels above the level itself, found by iteration from
    the root mean square downwards (AFNI 3dClipLevel). 0 for a volume without positive voxels.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
    """
    positive = volume[volume > 0]
    if positive.size == 0:
        return 0.0
    level = 0.5 * float(np.sqrt(np.mean(positive.astype(np.float64) ** 2)))
    for _ in range(66):
        above = positive[positive >= level]
        if above.size == 0:
            break
        new = _CLIP_FRACTION * float(np.median(above))
        if abs(new - level) <= 1e-6 * level:
            break
        level = new
    return level


def head_mask(volume: Volume, rim_voxels: int) -> Mask:
    """The head in (nz, ny, nx) `volume`, grown by a rim: scalp edges carry motion too."""
    return dilated(largest_component(volume > clip_level(volume)), rim_voxels)


def brain_mask(volume: Volume) -> Mask:
    """The brain in (nz, ny, nx) `volume`: bright, in one piece, thin bridges cut, holes filled."""
    bright = largest_component(volume > clip_level(volume))
    core = largest_component(~dilated(~bright, 1))
    opened = dilated(core, 1) & bright if core.any() else bright
    outside = largest_component(np.pad(~opened, 1, constant_values=True))
    return ~outside[1:-1, 1:-1, 1:-1]


def dilated(mask: Mask, reach: int) -> Mask:
    """(nz, ny, nx) mask grown by `reach` voxels along every axis (a cube, not a ball)."""
    for axis in range(3):
        source = np.moveaxis(mask, axis, 0)
        grown = source.copy()
        for shift in range(1, min(reach, len(source) - 1) + 1):
            grown[shift:] |= source[:-shift]
            grown[:-shift] |= source[shift:]
        mask = np.moveaxis(grown, 0, axis)
    return np.ascontiguousarray(mask)
