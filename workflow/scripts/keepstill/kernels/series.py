"""Figures of voxels over time: moments, quartiles, differences between volumes, the median.

A block holds the same voxels of all volumes, volume by volume: neighbouring lanes are neighbouring
voxels, and every loop over time runs on whole vectors.
"""

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.compiled import kernel, part

# Voxels that are looked at together: what is summed of them stays in the nearest cache.
_LANES = 64
# Rows of what `fill_moments` fills.
MEAN, VARIANCE, LAG1 = 0, 1, 2
_LARGEST_KEY = np.int32(0x7FFFFFFF)
# Half a float32's bits, which `count_halves` counts at a time.
HALF_BITS = 16
_LOWER_HALF, _SIGN_BIT, _ALL_BITS = 0xFFFF, 0x80000000, 0xFFFFFFFF


@kernel
def fill_moments(block: NDArray[np.float32], out: NDArray[np.float64]) -> None:
    """Mean, variance and lag-1 autocorrelation of each voxel.

    Parameters
    ----------
    block : (n, m) float32
        m voxels of n volumes.
    out : (3, m) float64
        Filled. The variance is that about the voxel's own line through time, with n - 2 degrees
        of freedom; the autocorrelation is of biased sums about the mean, 0 for a constant.
    """
    m = block.shape[1]
    sums = np.empty((4, _LANES))
    for first in range(0, m, _LANES):
        last = min(m, first + _LANES)
        _fill_sums(block, first, last, sums)
        _from_sums(block, first, last, sums, out)


@part
def _fill_sums(
    block: NDArray[np.float32], first: int, last: int, sums: NDArray[np.float64]
) -> None:
    """Sums of x, x t, x x and x times the next x; x from the first volume, t from the middle."""
    n = block.shape[0]
    sums[:] = 0
    start = block[0, first:last]
    for t in range(n):
        time = t - 0.5 * (n - 1)
        row = block[t, first:last]
        after = block[min(t + 1, n - 1), first:last]
        more = 1.0 if t + 1 < n else 0.0
        for i in range(row.size):
            x = np.float64(row[i]) - np.float64(start[i])
            sums[0, i] += x
            sums[1, i] += x * time
            sums[2, i] += x * x
            sums[3, i] += more * x * (np.float64(after[i]) - np.float64(start[i]))


@part
def _from_sums(
    block: NDArray[np.float32],
    first: int,
    last: int,
    sums: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    n = block.shape[0]
    squared_time = n * (n * n - 1.0) / 12.0
    for i in range(last - first):
        start = np.float64(block[0, first + i])
        end = np.float64(block[n - 1, first + i]) - start
        mean = sums[0, i] / n
        power = max(sums[2, i] - n * mean * mean, 0.0)
        along = sums[1, i] * sums[1, i] / squared_time if n > 1 else 0.0
        lagged = sums[3, i] - mean * (2.0 * sums[0, i] - end) + (n - 1) * mean * mean
        out[MEAN, first + i] = start + mean
        out[VARIANCE, first + i] = max(power - along, 0.0) / max(n - 2, 1)
        out[LAG1, first + i] = lagged / power if power > 0 else 0.0


@kernel
def fill_ranked(block: NDArray[np.float32], rank: int, out: NDArray[np.float32]) -> None:
    """Value of a rank, from 0, among the n values of each voxel in order.

    Parameters
    ----------
    block : (n, m) float32
    rank : int
    out : (m,) float32
        Filled.
    """
    n, m = block.shape
    keys, found = np.empty((n, _LANES), np.int32), np.empty(_LANES, np.int32)
    bits = block.view(np.int32)
    for first in range(0, m, _LANES):
        last = min(m, first + _LANES)
        _fill_keys(bits, first, last, keys)
        _bisect(keys, rank, found)
        floats = found.view(np.float32)
        for i in range(last - first):
            out[first + i] = floats[i]


@part
def _fill_keys(bits: NDArray[np.int32], first: int, last: int, keys: NDArray[np.int32]) -> None:
    """Whole numbers in the same order as the floats that `bits` are; lanes to spare are 0."""
    keys[:, last - first :] = 0
    for t in range(bits.shape[0]):
        for i in range(last - first):
            b = bits[t, first + i]
            keys[t, i] = b ^ ((b >> 31) & _LARGEST_KEY)


@part
def _is_open(low: NDArray[np.int32], high: NDArray[np.int32]) -> bool:
    """Whether a lane is left to search. Numba's `any` would have every process import scipy."""
    n_open = 0
    for i in range(low.size):
        n_open += low[i] < high[i]
    return n_open > 0


@part
def _bisect(keys: NDArray[np.int32], rank: int, out: NDArray[np.int32]) -> None:
    """Bits of the float of a rank in each lane. Counting needs no branches, as sorting would."""
    low, high = keys[0].copy(), keys[0].copy()
    for t in range(1, keys.shape[0]):
        for i in range(_LANES):
            low[i], high[i] = min(low[i], keys[t, i]), max(high[i], keys[t, i])
    middle, count = np.empty(_LANES, np.int32), np.empty(_LANES, np.int32)
    while _is_open(low, high):
        for i in range(_LANES):
            middle[i] = (low[i] & high[i]) + ((low[i] ^ high[i]) >> 1)  # no overflow
            count[i] = 0
        for t in range(keys.shape[0]):
            for i in range(_LANES):
                count[i] += np.int32(keys[t, i] <= middle[i])
        for i in range(_LANES):
            if count[i] > rank:
                high[i] = middle[i]
            else:
                low[i] = middle[i] + np.int32(1)
    for i in range(_LANES):
        out[i] = low[i] ^ ((low[i] >> 31) & _LARGEST_KEY)


@kernel
def add_squared_steps(
    block: NDArray[np.float32], weights: NDArray[np.float64], totals: NDArray[np.float64]
) -> None:
    """Add the weighted sum over voxels of the squared step from each volume to the next.

    Parameters
    ----------
    block : (n, m) float32
    weights : (m,) float64
    totals : (n - 1,) float64
        Added to.
    """
    n, m = block.shape
    lanes = np.empty(_LANES)
    for t in range(n - 1):
        lanes[:] = 0
        for first in range(0, m, _LANES):
            last = min(m, first + _LANES)
            row, after, weight = block[t, first:last], block[t + 1, first:last], weights[first:last]
            for i in range(row.size):
                step = np.float64(after[i]) - np.float64(row[i])
                lanes[i] += weight[i] * step * step
        for i in range(_LANES):
            totals[t] += lanes[i]


@kernel
def fill_chosen(
    series: NDArray[np.float32],
    volumes: NDArray[np.int64],
    voxels: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    """Some voxels of some volumes: a block, as the other kernels here want it.

    Parameters
    ----------
    series : (n, n_voxels) float32
        Only read.
    volumes, voxels : int64
        Numbers of volumes, and flat indices.
    out : (n_volumes, n_voxels) float32
        Filled.
    """
    for t in range(volumes.size):
        volume = series[volumes[t]]
        for i in range(voxels.size):
            out[t, i] = volume[voxels[i]]


@kernel
def count_halves(
    series: NDArray[np.float32],
    chosen: tuple[NDArray[np.int64], NDArray[np.int64]],
    upper: int,
    counts: NDArray[np.int64],
) -> None:
    """Count floats by half their keys: all by the upper, those with a given upper by the lower.

    A key is a whole number of 32 bits; keys are in the order of the floats. `float_of` leads back.

    Parameters
    ----------
    series : (n, n_voxels) float32
        Only read.
    chosen : tuple of int64 arrays
        Numbers of the volumes, and flat indices of the voxels, that are counted.
    upper : int
        Upper half of the keys that are counted by their lower half.
    counts : (2, 65536) int64
        Added to: by the upper half, by the lower.
    """
    bits, (volumes, voxels) = series.view(np.uint32), chosen
    for t in range(volumes.size):
        volume = bits[volumes[t]]
        for i in range(voxels.size):
            b = np.int64(volume[voxels[i]])
            # As bits, positive floats are in order, and negative ones in the opposite order.
            key = b ^ (_ALL_BITS if b >> 31 else _SIGN_BIT)
            counts[0, key >> HALF_BITS] += 1
            if key >> HALF_BITS == upper:
                counts[1, key & _LOWER_HALF] += 1


def float_of(key: int) -> float:
    """The float32 that a key of `count_halves` stands for."""
    bits = key ^ (_SIGN_BIT if key >> 31 else _ALL_BITS)
    return float(np.array(bits, np.uint32).view(np.float32))
