"""Motion numbers without what breathing does to them.

The chest's motion shifts the field, and so the image, at the pace of breathing: the head seems to
move. Where the repetition time shows that pace, a notch takes it out (Fair 2020, NeuroImage
208:116400); where it does not, the aliased shifts are everywhere and only slow motion can be
trusted (Gratton 2020, NeuroImage 217:116866).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import InputError
from keepstill.settings import RealignSettings

_SECONDS_A_MINUTE = 60.0
# Fair's notch is applied twice, each time forwards and backwards.
_N_NOTCHES = 2


@dataclass(frozen=True)
class Biquad:
    """Second-order filter, gain 1 at frequency 0: y = b0 x0 + b1 x1 + b2 x2 - a1 y1 - a2 y2.

    Attributes
    ----------
    b : (b0, b1, b2)
        Of the newest value and the two before it.
    a : (a1, a2)
        Of the two results before.
    """

    b: tuple[float, float, float]
    a: tuple[float, float]


def check_filter(tr_s: float | None, settings: RealignSettings, run: str) -> None:
    """Refuse a filter of rates that the run's repetition time cannot show.

    Raises
    ------
    InputError
    """
    if settings.fd_filter == "none":
        return
    if tr_s is None:
        raise InputError(
            f"{run}: fd_filter {settings.fd_filter} needs a repetition time, and there is none in "
            "sidecar or header; add RepetitionTime, or choose fd_filter: none"
        )
    is_notch = settings.fd_filter == "notch"
    rate = settings.fd_notch_high_per_min if is_notch else settings.fd_lowpass_per_min
    most = _SECONDS_A_MINUTE / (2 * tr_s)
    if rate >= most:
        other = "fd_filter: lowpass or none" if is_notch else "fd_filter: none"
        raise InputError(
            f"{run}: fd_filter {settings.fd_filter} at {rate:g} breaths/min; a repetition time of "
            f"{tr_s:g} s shows less than {most:.3g}; choose {other}, or lower rates"
        )


def without_breathing(
    motion: NDArray[np.float64], failed: NDArray[np.bool_], tr_s: float, settings: RealignSettings
) -> NDArray[np.float64]:
    """Motion numbers, filtered forwards and backwards, so that nothing is delayed.

    Parameters
    ----------
    motion : (n, 6) float64
    failed : (n,) bool
        Volumes whose numbers mean nothing: those between their neighbours stand in for them.
    tr_s : float
    settings : RealignSettings
        With a filter.
    """
    t, good = np.arange(len(motion)), ~failed
    out = np.empty_like(motion)
    for i in range(motion.shape[1]):
        values = np.interp(t, t[good], motion[good, i]).tolist()
        for biquad in _filters(tr_s, settings):
            values = both_ways(biquad, values)
        out[:, i] = values
    return out


def _filters(tr_s: float, settings: RealignSettings) -> Iterable[Biquad]:
    if settings.fd_filter == "lowpass":
        return [lowpass(settings.fd_lowpass_per_min * tr_s / _SECONDS_A_MINUTE)]
    low, high = (
        rate * tr_s / _SECONDS_A_MINUTE
        for rate in (settings.fd_notch_low_per_min, settings.fd_notch_high_per_min)
    )
    return [notch(low, high)] * _N_NOTCHES


def notch(low: float, high: float) -> Biquad:
    """Filter that stops a band; its ends, in cycles a volume, lose 3 dB (Orfanidis 1996, 11.3)."""
    gain = 1 / (1 + math.tan(math.pi * (high - low)))
    cosine = math.cos(math.pi * (low + high))
    return Biquad((gain, -2 * gain * cosine, gain), (-2 * gain * cosine, 2 * gain - 1))


def lowpass(cutoff: float) -> Biquad:
    """Butterworth filter of order 2; the cutoff, in cycles a volume, loses 3 dB."""
    k = math.tan(math.pi * cutoff)
    norm = 1 / (1 + math.sqrt(2) * k + k * k)
    b = k * k * norm
    return Biquad((b, 2 * b, b), (2 * (k * k - 1) * norm, (1 - math.sqrt(2) * k + k * k) * norm))


def both_ways(biquad: Biquad, values: list[float]) -> list[float]:
    """Values filtered forwards, then backwards; beyond the ends they go on as they end."""
    n = len(values)
    forwards = _filtered(biquad, values + values[-1:] * (n - 1))
    return _filtered(biquad, forwards[::-1])[: -n - 1 : -1]


def _filtered(biquad: Biquad, values: list[float]) -> list[float]:
    """Filter values that had always been as the first one is."""
    (b0, b1, b2), (a1, a2) = biquad.b, biquad.a
    second = (b2 - a2) * values[0]
    first = (b1 - a1) * values[0] + second
    out = []
    for x in values:
        y = b0 * x + first
        first, second = b1 * x - a1 * y + second, b2 * x - a2 * y
        out.append(y)
    return out
