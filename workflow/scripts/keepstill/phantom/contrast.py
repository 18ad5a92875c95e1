"""How bright each tissue is: at an echo time, and in a single-band reference."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

# Echo time that the intensities of `PLAIN` are of, ms.
PLAIN_ECHO_MS = 30.0
# First echo and the steps between echoes where no times are given, ms.
_FIRST_ECHO_MS, _ECHO_STEP_MS = 14.0, 18.0
# What a volume with all of its magnetisation has more than one of a fast run, by each tissue's T1:
# long in fluid, short in fat and white matter.
_SINGLE_BAND = {"grey": 1.35, "white": 1.2, "fluid": 1.8, "ventricle": 1.8, "pallidum": 1.2,
                "scalp": 1.1, "muscle": 1.35, "eyes": 1.8}  # fmt: skip


class Decay(NamedTuple):
    """T2* at 3 T, ms.

    Brain: Wansapura 1999, Journal of Magnetic Resonance Imaging 9:531, rounded. Of pallidum, which
    holds iron, and fluid, which hardly decays, about right.
    """

    grey: float = 48.0
    white: float = 51.0
    fluid: float = 160.0
    ventricle: float = 200.0
    pallidum: float = 28.0
    scalp: float = 25.0
    bone: float = 5.0
    muscle: float = 30.0
    eyes: float = 160.0


@dataclass(frozen=True)
class Contrast:
    """Intensity of each tissue; those that stand here are of echo-planar images at 3 T and 30 ms.

    Attributes
    ----------
    grey, white, fluid, ventricle, pallidum, scalp, bone, muscle, eyes : float
    lost : float
        Signal lost above air and in vessels, as a multiple of that at 30 ms: its logarithm grows
        with the echo time.
    active : float
        Rise of active cortex, as a multiple of that at 30 ms.
    """

    grey: float = 1000.0
    white: float = 870.0
    fluid: float = 1550.0
    ventricle: float = 1650.0
    pallidum: float = 640.0
    scalp: float = 170.0
    bone: float = 25.0
    muscle: float = 150.0
    eyes: float = 500.0
    lost: float = 1.0
    active: float = 1.0

    def at_echo(self, echo_ms: float) -> "Contrast":
        """The same tissues at another echo time than 30 ms; a change of R2* grows with it."""
        later_ms = echo_ms - PLAIN_ECHO_MS
        left = {
            name: float(getattr(self, name) * math.exp(-later_ms / t2_star_ms))
            for name, t2_star_ms in Decay()._asdict().items()
        }
        ratio = echo_ms / PLAIN_ECHO_MS
        return replace(self, **left, lost=self.lost * ratio, active=self.active * ratio)

    def single_band(self) -> "Contrast":
        """The same tissues with all of their magnetisation, as in a single-band reference."""
        return replace(self, **{name: getattr(self, name) * k for name, k in _SINGLE_BAND.items()})


PLAIN = Contrast()


def default_echo_times_ms(n: int) -> tuple[float, ...]:
    """Times of n echoes where none are given: 14, 32, 50 ms and so on."""
    return tuple(_FIRST_ECHO_MS + k * _ECHO_STEP_MS for k in range(n))
