"""A first look at a run's voxels: is there signal, do volumes differ, when is it steady."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import InputError

# Dummy volumes are looked for in the first volumes only; T1 settles within seconds.
_MOST_DUMMIES = 15
_FIRST_VOLUMES = 60
# A dummy volume is brighter than the steady ones by this many robust standard deviations of
# theirs, and by this part of their median: scanners drift by less in a minute.
_DUMMY_DEVIATIONS = 6.0
_DUMMY_PART = 0.015
_MOST_OF_A_SHORT_RUN = 3
_SD_PER_MAD = 1.4826


def check_signal(volumes: NDArray[Any], run: str) -> list[str]:
    """Refuse a run in which no volume shows anything; warn if all volumes are one.

    Most runs end both searches at the first volumes.

    Parameters
    ----------
    volumes : (n, nz, ny, nx)
        As stored, mapped.
    run : str
        Named in messages.

    Returns
    -------
    warnings : list of str

    Raises
    ------
    InputError
    """
    any_finite = False
    for volume in volumes:
        low, high = extent(volume)
        any_finite = any_finite or low <= high
        if low < high:
            break
    else:
        what = "every voxel has one and the same value" if any_finite else "no voxel is a number"
        raise InputError(f"{run}: {what} in all {len(volumes)} volumes; export the run again")
    first = volumes[0]
    if all(np.array_equal(first, volume, equal_nan=_has_nan(first)) for volume in volumes[1:]):
        return [f"{run}: all {len(volumes)} volumes are identical; is this one volume, repeated?"]
    return []


def count_dummies(volumes: NDArray[Any], slope: float = 1.0, inter: float = 0.0) -> int:
    """Number of first volumes that are brighter because magnetisation is not steady yet.

    The mean of each of the first 60 volumes is held against the later half of these.

    Parameters
    ----------
    volumes : (n, nz, ny, nx)
        As stored, mapped.
    slope, inter : float
        Intensity = stored value * slope + inter.
    """
    n = min(len(volumes), _FIRST_VOLUMES)
    if n < 4:
        return 0
    means = np.array([_mean(volume) for volume in volumes[:n]]) * slope + inter
    steady = means[n // 2 :]
    middle = float(np.median(steady))
    deviation = _SD_PER_MAD * float(np.median(np.abs(steady - middle)))
    limit = middle + max(_DUMMY_DEVIATIONS * deviation, _DUMMY_PART * abs(middle))
    bright = means[: min(n // 2, _MOST_DUMMIES)] > limit
    if bright.all():  # in a short run that is possible; in a long one it is a step, no decay
        return bright.size if bright.size <= _MOST_OF_A_SHORT_RUN else 0
    return int(np.argmin(bright))


def extent(volume: NDArray[Any]) -> tuple[float, float]:
    """Least and greatest number of a volume, slice by slice; the wrong way round without any."""
    low, high = np.inf, -np.inf
    for part in volume:
        numbers = _numbers(part)
        if numbers.size:
            low, high = min(low, float(numbers.min())), max(high, float(numbers.max()))
    return low, high


def _mean(volume: NDArray[Any]) -> float:
    total, n = 0.0, 0
    for part in volume:
        numbers = _numbers(part)
        total, n = total + float(numbers.sum(dtype=np.float64)), n + numbers.size
    return total / n if n else 0.0


def _numbers(part: NDArray[Any]) -> NDArray[Any]:
    return part[np.isfinite(part)] if part.dtype.kind == "f" else part


def _has_nan(volume: NDArray[Any]) -> bool:
    return volume.dtype.kind == "f"
