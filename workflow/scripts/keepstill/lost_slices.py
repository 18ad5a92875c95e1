"""Slices that lost their signal in a single volume, as a jerk during their excitation does.

One such slice pulls a fit of the whole volume by tenths of a millimetre. It is found from the
slices' means before anything is fitted, filled with what its neighbours let expect, so that the
spline through them does not ring, and kept away from.
"""

import numpy as np
from numpy.typing import NDArray

Volume = NDArray[np.float32]
Slices = NDArray[np.int64]

# A lost slice has less than this part of what its neighbours and the reference let expect.
_MOST_KEPT = 0.75
# At the end of the field there is one neighbour to go by, and tissue may have moved out.
_MOST_KEPT_AT_END = 0.5
# What is expected of a slice is the third largest of itself and so many on either side: several
# neighbours may be lost.
_REACH, _FROM_TOP = 6, 3
# With more than this part of its slices lost, a volume has no whole neighbours to go by.
_MOST_LOST = 0.5


def slice_means(volume: Volume) -> NDArray[np.float64]:
    """Mean of each slice of a (nz, ny, nx) volume of finite voxels, (nz,)."""
    return np.asarray(volume.reshape(len(volume), -1).mean(axis=1), np.float64)


def find_lost_slices(volume: Volume, reference_means: NDArray[np.float64]) -> Slices:
    """Slices (z) of a volume that have lost signal.

    A slice is lost if it is darker, against the reference's slice, than the slices around it are
    against theirs, and also darker than its nearest whole neighbours on either side let expect:
    the slices at the top of a head that has moved down are only the former.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
    reference_means : (nz,) float64
        `slice_means` of the reference.

    Returns
    -------
    lost : (m,) int64
    """
    means = slice_means(volume)
    if (means <= 0).any() or (reference_means <= 0).any() or len(means) <= _REACH:
        return np.zeros(0, np.int64)
    ratio = means / reference_means
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(ratio, _REACH), 2 * _REACH + 1)
    around = np.partition(windows, -_FROM_TOP, axis=1)[:, -_FROM_TOP]
    suspect = ratio < _MOST_KEPT * around
    if suspect.sum() > _MOST_LOST * len(means):
        return np.zeros(0, np.int64)
    whole = np.flatnonzero(~suspect)
    lost = [z for z in np.flatnonzero(suspect) if _is_dip(z, whole, means, ratio)]
    return np.array(lost, np.int64)


def _is_dip(
    z: np.signedinteger, whole: Slices, means: NDArray[np.float64], ratio: NDArray[np.float64]
) -> bool:
    below, above = whole[whole < z], whole[whole > z]
    if below.size and above.size:
        beside = np.array([below[-1], above[0]])
        between = np.exp(np.interp(z, beside, np.log(means[beside])))
        return bool(means[z] < _MOST_KEPT * between and ratio[z] < _MOST_KEPT * min(ratio[beside]))
    neighbour = below[-1] if below.size else above[0]
    return bool(ratio[z] < _MOST_KEPT_AT_END * ratio[neighbour])


def filled(volume: Volume, lost: Slices) -> Volume:
    """A volume whose lost slices are interpolated between the whole ones beside them."""
    if lost.size == 0:
        return volume
    out = volume.copy()
    whole = np.setdiff1d(np.arange(len(volume)), lost)
    for z in lost:
        below, above = whole[whole < z], whole[whole > z]
        if below.size and above.size:
            part = np.float32((z - below[-1]) / (above[0] - below[-1]))
            out[z] = (1 - part) * volume[below[-1]] + part * volume[above[0]]
        else:
            out[z] = volume[below[-1] if below.size else above[0]]
    return out
