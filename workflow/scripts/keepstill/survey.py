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
        finite = _numbers(volume)
        any_finite = any_finite or finite.size > 0
        if finite.size and finite.min() != finite.max():
            break
    else:
        what = "every voxel has one and the same value" if any_finite else "no voxel is a number"
        raise InputError(f"{run}: {what} in all {len(volumes)} volumes; export the run again")
    first = volumes[0]
    if all(np.array_equal(first, volume, equal_nan=_has_nan(first)) for volume in volumes[1:]):
        return [f"{run}: all {len(volumes)} volumes are identical; is this one volume, repeated?"]
    return []


def count_dummies(volumes: NDArray[Any]) -> int:
    """Number of first volumes that are brighter because magnetisation is not steady yet.

    The mean of each of the first 60 volumes is held against the later half of these.

    Parameters
    ----------
    volumes : (n, nz, ny, nx)
        As stored, mapped.
    """
    n = min(len(volumes), _FIRST_VOLUMES)
    if n < 4:
        return 0
    means = np.array([_mean(volume) for volume in volumes[:n]])
    steady = means[n // 2 :]
    middle = float(np.median(steady))
    deviation = _SD_PER_MAD * float(np.median(np.abs(steady - middle)))
    limit = middle + max(_DUMMY_DEVIATIONS * deviation, _DUMMY_PART * abs(middle))
    bright = means[: min(n // 2, _MOST_DUMMIES)] > limit
    if bright.all():  # in a short run that is possible; in a long one it is a step, no decay
        return bright.size if bright.size <= _MOST_OF_A_SHORT_RUN else 0
    return int(np.argmin(bright))


def _mean(volume: NDArray[Any]) -> float:
    numbers = _numbers(volume)
    return float(numbers.mean(dtype=np.float64)) if numbers.size else 0.0


def _numbers(volume: NDArray[Any]) -> NDArray[Any]:
    return volume[np.isfinite(volume)] if volume.dtype.kind == "f" else volume


def _has_nan(volume: NDArray[Any]) -> bool:
    return volume.dtype.kind == "f"
