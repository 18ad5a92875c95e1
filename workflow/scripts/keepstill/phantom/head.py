"""A head of blobs and shells, defined at every point of space.

Everything here is a formula of the position x, y, z (mm, RAS+, the origin in the middle of the
brain of an unmoved head): shells are depths below ellipsoids, folds and ventricles are sums of
Gaussian blobs, and a tissue begins where such a number passes a threshold, softly. `tissues_on`
evaluates the formula on any grid; a finer grid shows the same head. Intensities, of a `Contrast`,
are those of echo-planar images at 3 T: grey matter brighter than white, fluid brighter than both,
fat suppressed, bone black, and holes above the air of sinuses and ears.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstill.blobs import density
from keepstill.phantom.blob_sets import (
    BlobSet,
    Surface,
    blobs,
    folds,
    joined,
    mirrored,
    of_unit_spread,
    scattered,
    string,
)
from keepstill.phantom.contrast import Contrast

Volume = NDArray[np.float32]
Field = NDArray[np.floating]  # float32 too, but the checker loses track of it in sums
Axes = tuple[Field, Field, Field]

# Softness of a border: half the width over which a tissue goes from 12% to 88%, mm.
_EDGE_MM = 0.8
# The cortex: fluid to this distance from a sulcus or the surface, grey matter to that, mm.
_FLUID_MM, _CORTEX_MM = 0.5, 2.7
# Fluid around the brain, mm.
_RIM_MM = 0.8
# Sulci end at this depth, mm.
_SULCUS_MM = 15.0
# Sulci are where sine(number * fold field) is zero: a wave, not the field itself, since a field
# has wide plains and a cortex has none. One unit of the field is so many mm beside a sulcus.
_FOLD_NUMBER, _FOLD_MM = 1.6, 4.6
# Planes that are worked on at once: few enough that their fields stay in the cache.
_SLAB = 4


class Grid(NamedTuple):
    """Points of a regular grid along the world's axes.

    Attributes
    ----------
    shape : (nx, ny, nz)
    spacing_mm : float
    origin_mm : (x, y, z)
        Position of point (0, 0, 0).
    """

    shape: tuple[int, int, int]
    spacing_mm: float
    origin_mm: tuple[float, float, float]


class Tissue(NamedTuple):
    """What a grid shows of a head, (nz, ny, nx) float32 each.

    Attributes
    ----------
    signal
        Intensity.
    brain
        Part of the point that is brain, 0 to 1.
    active
        Intensity that a full activation adds, relative to 1 (times the cortex's intensity).
    """

    signal: Volume
    brain: Volume
    active: Volume


@dataclass(frozen=True)
class Head:
    """The blobs of one subject; its shells are everyone's.

    Attributes
    ----------
    folds, foliage : BlobSet
        Fields of unit spread whose zeros are the sulci of cerebrum and cerebellum.
    wobble : BlobSet
        mm by which surfaces are pushed out.
    bend : BlobSet
        mm by which the fissure between the hemispheres is pushed sideways.
    ventricles, nuclei, pallidum, eyes : BlobSet
        Their outline is where the sum passes a threshold.
    texture, skin : BlobSet
        Relative intensity of brain and scalp.
    vessels, air : BlobSet
        Negative logarithm of the signal that is left.
    task : BlobSet
        Part of the full activation.
    """

    folds: BlobSet
    foliage: BlobSet
    wobble: BlobSet
    bend: BlobSet
    ventricles: BlobSet
    nuclei: BlobSet
    pallidum: BlobSet
    eyes: BlobSet
    texture: BlobSet
    skin: BlobSet
    vessels: BlobSet
    air: BlobSet
    task: BlobSet


class _Shell(NamedTuple):
    """An ellipsoid: centre and half axes, mm."""

    centre: tuple[float, float, float]
    half: tuple[float, float, float]

    def depth_mm(self, axes: Axes) -> Field:
        """Depth below its surface, to first order; negative outside."""
        scaled = [(p - c) / h for p, c, h in zip(axes, self.centre, self.half, strict=True)]
        squares = [u * u for u in scaled]
        slopes = [u2 / (h * h) for u2, h in zip(squares, self.half, strict=True)]
        radius = np.sqrt(squares[0] + squares[1] + squares[2])
        return (1 - radius) * radius / np.sqrt(slopes[0] + slopes[1] + slopes[2] + 1e-9)


_HEMISPHERE = _Shell((15.0, -2.0, -5.0), (53.0, 84.0, 58.0))
_TEMPORAL = _Shell((44.0, -2.0, -34.0), (21.0, 44.0, 21.0))
_CEREBELLUM = _Shell((0.0, -56.0, -50.0), (50.0, 32.0, 24.0))
_STEM = _Shell((0.0, -24.0, -62.0), (15.0, 13.0, 52.0))
_CALLOSUM = _Shell((0.0, -6.0, 2.0), (1e3, 37.0, 17.0))
_SKIN = _Shell((12.0, 1.0, -6.0), (67.0, 97.0, 70.0))
_TEMPLE = _Shell((64.0, 20.0, -42.0), (9.0, 32.0, 24.0))


def draw_head(seed: int) -> Head:
    """A head of one subject; equal seeds give equal heads."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    return Head(
        folds=_cerebral_folds(rng),
        foliage=of_unit_spread(
            folds(Surface(_CEREBELLUM.centre, _CEREBELLUM.half, 4.5, 3.0, 15.0), rng), rng
        ),
        wobble=scattered(rng, 70, (85, 105, 80), (14, 26)).scaled(1.6),
        bend=scattered(rng, 60, (20, 90, 60), (10, 18)).scaled(1.0),
        ventricles=_ventricles(rng),
        nuclei=_nuclei(rng),
        pallidum=_jittered(mirrored(string([(18, 6, -6), (21, -5, -4)], [5, 5])), rng),
        eyes=_jittered(mirrored(blobs([(34, 62, -44), (30, 60, -36)], [8, 5])), rng),
        texture=joined(
            scattered(rng, 9000, (72, 92, 76), (1.6, 3.2)).scaled(0.09),
            scattered(rng, 500, (72, 92, 76), (6, 12)).scaled(0.045),
        ),
        skin=scattered(rng, 7000, (90, 112, 118), (3.5, 8)).scaled(0.75),
        vessels=_vessels(rng),
        air=_air(rng),
        task=mirrored(blobs([(10, -84, -4), (22, -78, 4), (40, -20, 40)], [15, 13, 13])),
    )


def _cerebral_folds(rng: np.random.Generator) -> BlobSet:
    surfaces = []
    for side in (-1.0, 1.0):
        for shell, depth in ((_HEMISPHERE, 24.0), (_TEMPORAL, 14.0)):
            x, y, z = shell.centre
            surfaces.append(Surface((side * x, y, z), shell.half, 7.5, 5.6, depth))
    surfaces.append(Surface((0.0, -2.0, -5.0), (3.0, 78.0, 52.0), 7.5, 5.6, 16.0))
    upright = of_unit_spread(joined(*(folds(surface, rng) for surface in surfaces)), rng)
    return joined(upright, scattered(rng, 4000, (72, 92, 76), (4.5, 6.5)).scaled(0.7))


def _ventricles(rng: np.random.Generator) -> BlobSet:
    lateral = string(
        [(18, 33, -2), (11, 24, 4), (6, 8, 10), (8, -8, 13), (15, -24, 9), (25, -37, 0)],
        [4, 6, 6, 6, 7, 6.5],
    )
    horns = (
        string([(25, -37, 0), (27, -52, -3)], [5, 2.5]),
        string([(26, -36, -4), (32, -26, -15), (31, -12, -24)], [4, 2.5, 2.2]),
    )
    third = string([(0, 14, -7), (0, 4, -4), (0, -10, -3), (0, -22, -7)], [1.8, 2.4, 2.4, 2.2])
    fourth = string([(0, -22, -7), (0, -29, -22), (0, -39, -38), (0, -42, -46)], [2, 1.7, 5, 5.5])
    return joined(_jittered(mirrored(joined(lateral, *horns)), rng), third, fourth)


def _nuclei(rng: np.random.Generator) -> BlobSet:
    caudate = string([(15, 22, 0), (14, 8, 9), (18, -8, 13)], [7, 6, 4])
    thalamus = string([(10, -9, 3), (13, -22, 3)], [9, 9])
    putamen = string([(25, 14, -3), (29, 0, -1), (30, -12, 1)], [6, 8, 6])
    return _jittered(mirrored(joined(caudate, thalamus, putamen)), rng)


def _vessels(rng: np.random.Generator) -> BlobSet:
    """Dark dots: veins along the midline and below the hemispheres, fewer elsewhere."""
    middle = np.stack(
        [rng.normal(size=260) * 2.5, rng.uniform(-82, 76, 260), rng.uniform(-30, 50, 260)], axis=1
    )
    below = np.stack(
        [rng.normal(size=120) * 16, rng.uniform(-50, 20, 120), rng.normal(size=120) * 7 - 20],
        axis=1,
    )
    anywhere = rng.uniform((-66, -84, -70), (66, 82, 50), (900, 3))
    return joined(
        blobs(middle, rng.uniform(1.2, 2.4, 260), rng.uniform(0.2, 1.0, 260)),
        blobs(below, rng.uniform(1.2, 2.6, 120), rng.uniform(0.3, 1.2, 120)),
        blobs(anywhere, rng.uniform(1.0, 1.7, 900), rng.uniform(0.1, 0.3, 900)),
    )


def _air(rng: np.random.Generator) -> BlobSet:
    """Signal lost above the frontal and sphenoid sinuses and the ears."""
    front = blobs([(0, 60, -38), (0, 34, -44), (0, 10, -58)], [26, 19, 20], [3.2, 3.0, 3.0])
    sides = blobs([(20, 70, -36), (64, -14, -44), (32, 8, -66)], [18, 16, 18], [2.2, 2.6, 2.2])
    return _jittered(joined(front, mirrored(sides)), rng, 2.0)


def _jittered(given: BlobSet, rng: np.random.Generator, size_mm: float = 0.7) -> BlobSet:
    """The same blobs, each a little elsewhere: no head is symmetric."""
    moved = given.centres + rng.normal(size=given.centres.shape) * size_mm
    return BlobSet(moved, given.spreads, given.brights)


def tissues_on(head: Head, grid: Grid, contrasts: Sequence[Contrast]) -> list[Tissue]:
    """Signal, brain and active cortex at the points of a grid, in each of some contrasts.

    The fields of blobs, which take most of the time, are summed once for all.
    """
    nx, ny, nz = grid.shape
    out = [Tissue(*np.zeros((3, nz, ny, nx), np.float32)) for _ in contrasts]
    for first in range(0, nz, 4 * _SLAB):
        n = min(4 * _SLAB, nz - first)
        fields = _Fields(head, _slab(grid, first, n))
        for low in range(0, n, _SLAB):
            here = slice(low, min(low + _SLAB, n))
            there = slice(first + here.start, first + here.stop)
            for tissue, contrast in zip(out, contrasts, strict=True):
                for whole, part in zip(tissue, _tissue(*fields.at(here), contrast), strict=True):
                    whole[there] = part
    return out


def _slab(grid: Grid, first: int, n: int) -> Grid:
    x, y, z = grid.origin_mm
    return Grid((*grid.shape[:2], n), grid.spacing_mm, (x, y, z + first * grid.spacing_mm))


class _Fields:
    """The blob fields of a slab, and the positions of its points."""

    def __init__(self, head: Head, grid: Grid) -> None:
        self._fields = {name: _field(value, grid) for name, value in vars(head).items()}
        spans = zip(grid.shape, grid.origin_mm, strict=True)
        x, y, z = (np.arange(n, dtype=np.float32) * grid.spacing_mm + o for n, o in spans)
        self._axes = x[None, None, :], y[None, :, None], z[:, None, None]

    def at(self, planes: slice) -> tuple[dict[str, Field], Axes]:
        """Fields and axes of some planes."""
        x, y, z = self._axes
        return {name: field[planes] for name, field in self._fields.items()}, (x, y, z[planes])


def _field(given: BlobSet, grid: Grid) -> Field:
    """Sum of blobs on a grid, (nz, ny, nx)."""
    return density(
        (grid.shape[2], grid.shape[1], grid.shape[0]),
        given.centres[:, ::-1],
        given.spreads,
        given.brights,
        spacing=grid.spacing_mm,
        origin=grid.origin_mm[::-1],
    )


def _tissue(fields: dict[str, Field], axes: Axes, contrast: Contrast) -> tuple[Field, Field, Field]:
    """Signal, brain and active cortex from the fields of a few planes."""
    x, y, z = axes
    axes = (x * (1 + 0.0016 * (y + 10)), y, z)  # the forehead is narrower than the back
    depth = _depths(fields, axes)
    inner = _inner(fields, axes, depth)
    fluid, white = _soft(_FLUID_MM - inner), _soft(inner - _CORTEX_MM)
    grey = 1 - fluid - white
    signal = fluid * contrast.fluid + white * contrast.white + grey * contrast.grey
    for name, at, level in (
        ("nuclei", 2.7, 0.97 * contrast.grey),
        ("pallidum", 2.7, contrast.pallidum),
        ("ventricles", 2.1, contrast.ventricle),
    ):
        inside = _soft((fields[name] - at) / (0.6 * at))
        signal += inside * (level - signal)
    signal *= 1 + fields["texture"]
    brain = _soft(depth["pia"] + _RIM_MM)
    lost = -fields["air"] * np.exp(0.5 * fields["skin"]) - fields["vessels"] * brain
    left = np.exp(lost * contrast.lost)
    signal = left * (brain * signal + _around(fields, axes, brain, contrast))
    active = contrast.grey * np.minimum(fields["task"], 1) * grey * brain * left
    return signal, brain, active * contrast.active


def _depths(fields: dict[str, Field], axes: Axes) -> dict[str, Field]:
    """Depth (mm) below the surface of each part of the brain, and below the nearest: pia."""
    _, y, z = axes
    wobble = fields["wobble"]
    left, right = _both_sides(_HEMISPHERE, axes)
    floor = z + 36 - 12 * np.tanh((y - 10) / 16) + 2 * wobble
    cerebrum = -_joined(-(_joined(left, right, 8) + wobble), -floor, 8)
    temporal = np.maximum(*_both_sides(_TEMPORAL, axes)) + wobble
    apart = np.maximum(-10 - y, 0) * 1.5  # one piece with the cerebrum further back
    temporal = np.minimum(temporal, apart - cerebrum - 1.5)
    cerebellum = np.minimum(_CEREBELLUM.depth_mm(axes) + wobble, -cerebrum - 1.5)
    stem = _STEM.depth_mm(axes) + np.minimum(0, -8 - z)
    cerebrum = cerebrum + 0.45 * _from_sulcus(fields) - 0.9  # its outline follows the gyri
    pia = np.maximum(_joined(np.maximum(cerebrum, temporal), stem, 6), cerebellum)
    return {"cerebellum": cerebellum, "stem": stem, "pia": pia}


def _inner(fields: dict[str, Field], axes: Axes, depth: dict[str, Field]) -> Field:
    """Distance (mm) from the nearest fluid: surface, fissure between hemispheres, sulci."""
    x, y, z = axes
    fissure = np.abs(x + fields["bend"]) + 0.2
    fissure = fissure + np.maximum(_CALLOSUM.depth_mm((0 * x, y, z)) + 3, 0)
    fissure = fissure + np.maximum(-18 - z, 0) * np.minimum(np.maximum(y + 60, 0), 1)
    surface = np.minimum(depth["pia"], fissure)
    sulci = _from_sulcus(fields) + 0.8 * np.maximum(surface - _SULCUS_MM - 3 * fields["wobble"], 0)
    leaves = np.abs(fields["foliage"]) * 1.8 + np.maximum(depth["cerebellum"] - 12, 0) + 1.3
    sulci = np.where(depth["cerebellum"] > 0, leaves, sulci)
    sulci = sulci + 8 * _soft(depth["stem"] / 2) * (depth["cerebellum"] < 0)
    return -_joined(-surface, -sulci, 1.5)


def _from_sulcus(fields: dict[str, Field]) -> Field:
    """Distance (mm) from the nearest sulcus of the cerebrum, depth aside."""
    return np.abs(np.sin(_FOLD_NUMBER * fields["folds"])) * (_FOLD_MM / _FOLD_NUMBER)


def _around(fields: dict[str, Field], axes: Axes, brain: Field, contrast: Contrast) -> Field:
    """Scalp, bone, muscle and eyes."""
    x, y, z = axes
    low = np.where(z < -20, 0.22 * (z + 20) - 20, z)  # a neck and a face, not a ball
    left, right = _both_sides(_SKIN, (x, y, low))
    skin = _joined(left, right, 12) + 0.5 * fields["wobble"]
    outer, inner = _soft(skin), _soft(skin - 5.5)
    muscle = _soft(np.maximum(*_both_sides(_TEMPLE, axes)) / 2)
    eyes = _soft((fields["eyes"] - 0.6) / 0.3)
    under = contrast.bone + contrast.muscle * muscle * np.exp(fields["skin"])
    under = under + contrast.eyes * eyes
    scalp = contrast.scalp * np.exp(fields["skin"])
    fade = _soft((z + 100) / 8)  # far from the coil
    return ((outer - inner) * scalp + inner * (1 - brain) * under) * fade


def _both_sides(shell: _Shell, axes: Axes) -> tuple[Field, Field]:
    """Depth below a shell's mirror image on the left, and below itself on the right."""
    x, y, z = shell.centre
    return _Shell((-x, y, z), shell.half).depth_mm(axes), shell.depth_mm(axes)


def _joined(a: Field, b: Field, width_mm: float) -> Field:
    """Greater of two depths, the corner between them rounded over a width."""
    overlap = np.maximum(width_mm - np.abs(a - b), 0)
    return np.maximum(a, b) + overlap * overlap * (0.25 / width_mm)


def _soft(distance_mm: Field) -> Field:
    """0 to 1 across a border."""
    return 0.5 + 0.5 * np.tanh(distance_mm * (1 / _EDGE_MM))
