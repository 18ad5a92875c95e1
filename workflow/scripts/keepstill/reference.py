"""The reference: what of it every volume is compared with, prepared once a run."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.cuts import Cells, Cut, cells_of, cuts_of, one_cell
from keepstill.errors import EmptyVolumeError
from keepstill.kernels.bspline import GAINS, LANES, PAD, POLES, fill_coefficients
from keepstill.kernels.sums import N_COLUMNS, Points
from keepstill.masks import dilated, head_mask
from keepstill.settings import EstimateSettings
from keepstill.smooth import lowpass, valid_filtered

Volume = NDArray[np.float32]

# Value and slope of the quintic B-spline at -2 ... 2: the derivative of a spline at grid points.
_QUINTIC_VALUE = (1 / 120, 26 / 120, 66 / 120, 26 / 120, 1 / 120)
_QUINTIC_SLOPE = (-1 / 24, -10 / 24, 0.0, 10 / 24, 1 / 24)
# The border of the field is left out of the sampling points where an axis has room for it: its
# slices lose and gain tissue that no other slice sees.
_SHORTEST_AXIS_WITH_BORDER = 8
# Beyond the border a spline has to guess. Where something much brighter than the head is cut there
# (fat, an eye), the guess is off by more than noise this far into the field, and in neighbouring
# columns, to which the head takes it as it moves. So changes over the outermost voxel of more than
# so many times the head's mean intensity carry no weight.
_STEEPEST_AT_BORDER = 1.5
_BORDER_DEPTH, _BORDER_REACH = 3, 2
# Spots are few: where it were more of the points than this part, the border is what the volume
# shows (few thick slices, small dark fields), and all points keep their weight.
_MOST_GUESSED = 0.02
# Early steps look at the rows of one y in so many, the last ones at all: what is left out is
# whole slabs of the volume, which then need not be interpolated in y and z.
_COARSE_STEP = 4
# Points are taken from so many voxels inside the moving field on; the last step, which goes by
# finer differences, keeps further away.
INSET_VOXELS, LAST_INSET_VOXELS = 1.0, 1.5
# Shading is looked for in what is left below this low-pass, full width at half maximum.
WIDE_FWHM_VOXELS = 4.0
# Blocks of points: what ranks and threads share out, and parts of the head that may disagree.
_N_BLOCKS = 16


class Images(NamedTuple):
    """An image, its derivatives along world x, y, z (per mm) and its ghost, (nz, ny, nx) each."""

    volume: Volume
    gradient: list[Volume]
    ghost: Volume


@dataclass(frozen=True)
class Level:
    """Sampling points and their normal matrix, test_jacobian' jacobian.

    Attributes
    ----------
    points : Points
    normal : (8, 8) float64
    rough : bool
        Whether the level's result is a starting point only.
    inset_voxels : float
        How far inside the moving field of view points are looked at.
    test_normal : (8, 8) float64
        test_jacobian' test_jacobian.
    cuts : tuple of Cut
        Ways to cut the points in parts, which may disagree; none on a rough level.
    """

    points: Points
    normal: NDArray[np.float64]
    rough: bool
    inset_voxels: float
    test_normal: NDArray[np.float64]
    cuts: tuple[Cut, ...]


@dataclass(frozen=True)
class Acquisition:
    """What realignment has to know of how a run was taken.

    Attributes
    ----------
    in_plane : bool
        Whether steps are held to the plane of the grid's first two axes.
    ghost_axis : int or None
        Voxel axis (x, y, z as 0, 1, 2) of the reference along which echo-planar images have
        their ghost, half a field of view away: that of phase encoding. None for no ghost.
    """

    in_plane: bool = False
    ghost_axis: int | None = None


@dataclass(frozen=True)
class Reference:
    """A reference that volumes can be realigned to.

    Attributes
    ----------
    volume : (nz, ny, nx) float32
    affine : (4, 4) float64
        World mm from voxel.
    centre_mm : (3,) float64
        World point that steps turn about: the middle of the sampling points.
    coarse, fine, last : Level
        Sampling points of every fourth y; all of them; and all of them with the narrower
        low-pass of the last step.
    blocks : (n_blocks + 1,) int64
        Rows of all points where blocks of about equal numbers of points begin, and where the
        last one ends: a block holds whole slabs of one y.
    cells : Cells
        Where the cuts of all points meet.
    ghost_slopes : (3, n) float32
        Change of the ghost at the points of the last level, by each voxel that it moves.
    ghost_half_voxels : (3,) float64
        Half the field of view along the ghost's axis.
    basis : (8, m) float64
        Steps that are allowed, as combinations of shifts, rotations, intensity and ghost: all
        eight, or within the slice plane two shifts, one rotation, intensity and ghost.
    mean_intensity, sd_intensity : float
        Mean and standard deviation of the reference over the sampling points.
    """

    volume: Volume
    affine: NDArray[np.float64]
    centre_mm: NDArray[np.float64]
    coarse: Level
    fine: Level
    last: Level
    blocks: NDArray[np.int64]
    cells: Cells
    ghost_slopes: NDArray[np.float32]
    ghost_half_voxels: NDArray[np.float64]
    basis: NDArray[np.float64]
    mean_intensity: float
    sd_intensity: float

    @property
    def ghost_axis(self) -> int | None:
        """Voxel axis along which there is a ghost."""
        axes = np.flatnonzero(self.ghost_half_voxels)
        return int(axes[0]) if axes.size else None


def prepare_reference(
    volume: Volume,
    affine: NDArray[np.float64],
    settings: EstimateSettings,
    acquisition: Acquisition = Acquisition(),
    missing: NDArray[np.bool_] | None = None,
) -> Reference:
    """Sampling points, Jacobians and normal matrices of a reference volume.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
        Finite voxels; never modified.
    affine : (4, 4) float64
        World mm (RAS+) from voxel (x, y, z).
    settings : EstimateSettings
    acquisition : Acquisition
    missing : (nz, ny, nx) bool, optional
        Voxels that were no numbers and have been filled.

    Raises
    ------
    EmptyVolumeError
        If no voxel stands out from the background.
    """
    points_mask = _points_mask(volume, missing)
    z, y, x = np.nonzero(points_mask)
    centre_mm = geometry.world(affine, np.array([x.mean(), y.mean(), z.mean()]))
    ghost = _ghost(volume, acquisition.ghost_axis)
    plain = Images(volume, world_gradient(volume, affine), ghost)
    mean = float(volume[points_mask].mean(dtype=np.float64))
    guessed = guessed_at_border(volume, mean, points_mask)
    first, last = (
        _without(_lowpassed(plain, affine, fwhm), guessed)
        for fwhm in (settings.lowpass_fwhm_voxels, settings.last_lowpass_fwhm_voxels)
    )
    rows = _rows(points_mask)
    blocks = _blocks(rows)
    cells = cells_of(rows, blocks)
    coarse = _points(_coarse(rows), (plain, first), affine, centre_mm)
    fine = _points(rows, (plain, first), affine, centre_mm)
    finest = fine._replace(test_jacobian=_jacobian(rows, last, affine, centre_mm))
    return Reference(
        volume=volume,
        affine=affine,
        centre_mm=centre_mm,
        coarse=_level(coarse, one_cell(coarse), mean, INSET_VOXELS, rough=True),
        fine=_level(fine, cells, mean, INSET_VOXELS),
        last=_level(finest, cells, mean, LAST_INSET_VOXELS),
        blocks=blocks,
        cells=cells,
        ghost_slopes=_ghost_slopes(ghost, rows, acquisition.ghost_axis),
        ghost_half_voxels=_ghost_half(volume.shape, acquisition.ghost_axis),
        basis=_in_plane_basis(affine) if acquisition.in_plane else np.eye(N_COLUMNS),
        mean_intensity=mean,
        sd_intensity=float(volume[points_mask].std(dtype=np.float64)),
    )


def block_points(reference: Reference, block: int) -> tuple[Points, slice]:
    """The last level's points with the rows of one block alone, and which rows these are."""
    rows = slice(int(reference.blocks[block]), int(reference.blocks[block + 1]))
    points = reference.last.points
    return points._replace(rows=np.ascontiguousarray(points.rows[rows])), rows


def extent_of(points: Points) -> slice:
    """Places of the points of a block."""
    return slice(int(points.rows[0, 4]), int(points.rows[-1, 4] + points.rows[-1, 3]))


class Wide(NamedTuple):
    """What the last level's points show of a strongly low-passed image.

    Attributes
    ----------
    values : (n,) float32
    test_jacobian : (8, n) float32
    ghost_slopes : (3, n) float32
    """

    values: NDArray[np.float32]
    test_jacobian: NDArray[np.float32]
    ghost_slopes: NDArray[np.float32]


def wide_lowpassed(reference: Reference) -> Wide:
    """The reference, strongly low-passed, at the points of its last level."""
    smooth = lowpass(reference.volume, WIDE_FWHM_VOXELS)
    rows = reference.last.points.rows[:, :4]
    axis = reference.ghost_axis
    ghost = _ghost(smooth, axis)
    images = Images(smooth, world_gradient(smooth, reference.affine), ghost)
    jacobian = _jacobian(rows, images, reference.affine, reference.centre_mm)
    return Wide(smooth[voxels_of(rows)], jacobian, _ghost_slopes(ghost, rows, axis))


def thinned(
    volume: Volume, affine: NDArray[np.float64], fwhm_mm: float
) -> tuple[Volume, NDArray[np.float64]]:
    """A volume low-passed as widely in all directions, and its affine, on every n-th voxel.

    Widths are in mm: a turned head is blurred as it was before. Axes keep four voxels a width,
    and eight voxels where they have them.
    """
    sizes_mm = geometry.voxel_sizes_mm(affine)
    widths = [fwhm_mm / float(size) for size in sizes_mm]
    smooth = lowpass(volume, widths[::-1])
    most = [max(1, n // _SHORTEST_AXIS_WITH_BORDER) for n in volume.shape[::-1]]
    nx, ny, nz = (max(1, min(int(w / 4), n)) for w, n in zip(widths, most, strict=True))
    every = np.diag([float(nx), float(ny), float(nz), 1.0])
    return np.ascontiguousarray(smooth[::nz, ::ny, ::nx]), geometry.compose(affine, every)


@dataclass(frozen=True)
class WideLevel:
    """Sampling points of a low-passed image, in and around the head.

    Attributes
    ----------
    level : Level
    affine : (4, 4) float64
        World mm from voxel of the grid that the points are on.
    variance : float
        Of the values at the points.
    """

    level: Level
    affine: NDArray[np.float64]
    variance: float


def wide_level(
    image: tuple[Volume, NDArray[np.float64]],
    mask: NDArray[np.bool_],
    centre_mm: NDArray[np.float64],
    rough: bool = True,
) -> WideLevel:
    """Sampling points of a low-passed image with its affine, in a mask, without a ghost."""
    volume, affine = image
    images = Images(volume, world_gradient(volume, affine), np.zeros_like(volume))
    rows = _rows(mask)
    points = _points(rows, (images, images), affine, centre_mm)
    size = float(np.abs(points.values).mean(dtype=np.float64))
    level = _level(points, one_cell(points), size, inset_voxels=0.0, rough=rough)
    return WideLevel(level, affine, float(points.values.var(dtype=np.float64)))


def _ghost(volume: Volume, axis: int | None) -> Volume:
    """The image as its ghost shows it: half a field of view away, come round at the border."""
    if axis is None or volume.shape[2 - axis] < _SHORTEST_AXIS_WITH_BORDER:
        return np.zeros_like(volume)
    return np.roll(volume, volume.shape[2 - axis] // 2, axis=2 - axis)


def _lowpassed(images: Images, affine: NDArray[np.float64], fwhm_voxels: float) -> Images:
    smooth = lowpass(images.volume, fwhm_voxels)
    return Images(smooth, world_gradient(smooth, affine), lowpass(images.ghost, fwhm_voxels))


def _ghost_half(shape: tuple[int, ...], axis: int | None) -> NDArray[np.float64]:
    """Half the field of view along the ghost's axis, (3,) voxels; 0 without a ghost."""
    out = np.zeros(3)
    if axis is not None:
        out[axis] = shape[2 - axis] // 2
    return out


def _ghost_slopes(ghost: Volume, rows: NDArray[np.int64], axis: int | None) -> NDArray[np.float32]:
    """Change (3, n) of the ghost at points, by each voxel that it moves along x, y, z.

    On the nearer half of the field of view the ghost has come round from the far side: what moves
    it one way there, beside the head, moves it the other way here.
    """
    voxels = voxels_of(rows)
    if axis is None or not ghost.any():
        return np.zeros((3, len(voxels[0])), np.float32)
    sign = np.where(voxels[2 - axis] >= ghost.shape[2 - axis] // 2, 1, -1).astype(np.float32)
    slopes = [
        np.gradient(ghost, axis=2 - k)[voxels] if ghost.shape[2 - k] > 1 else np.zeros(len(sign))
        for k in range(3)
    ]
    return np.array([sign * slope for slope in slopes], np.float32)


def _level(
    points: Points, cells: Cells, mean_intensity: float, inset_voxels: float, rough: bool = False
) -> Level:
    """Points and their normal matrices; a ghost that no point shows has a little certainty too."""
    prior = np.zeros((N_COLUMNS, N_COLUMNS))
    prior[-1, -1] = mean_intensity**2
    normal, of_tests, cuts = cuts_of(points, cells, prior)
    return Level(points, normal, rough, inset_voxels, of_tests, cuts)


def _blocks(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows where blocks begin: at a new y, each as near as can be to its share of the points."""
    new_slab = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
    ends = np.cumsum(rows[:, 3])
    before = ends - rows[:, 3]
    shares = ends[-1] * np.arange(1, _N_BLOCKS) // _N_BLOCKS
    inner = new_slab[np.minimum(np.searchsorted(before[new_slab], shares), len(new_slab) - 1)]
    return np.unique(np.concatenate([[0], inner, [len(rows)]])).astype(np.int64)


def world_gradient(volume: Volume, affine: NDArray[np.float64]) -> list[Volume]:
    """Derivatives of a volume's quintic spline along world x, y, z (per mm), at its voxels."""
    nz, ny, nx = volume.shape
    padded = np.empty((nz + 2 * PAD, ny + 2 * PAD, nx + 2 * PAD + LANES), np.float32)
    block = np.empty((nx, LANES), np.float32)
    fill_coefficients(volume, np.array(POLES[5], np.float32), GAINS[5], padded, block)
    coefficients = padded[2:-2, 2:-2, 2 : nx + 6]
    by_voxel = []
    for slope_axis in (2, 1, 0):
        part = coefficients
        for axis in range(3):
            taps = _QUINTIC_SLOPE if axis == slope_axis else _QUINTIC_VALUE
            part = valid_filtered(part, taps, axis)
        by_voxel.append(part)
    voxel_from_world = geometry.inverse(affine)
    to_world = voxel_from_world.astype(np.float32)
    return [
        to_world[0, w] * by_voxel[0] + to_world[1, w] * by_voxel[1] + to_world[2, w] * by_voxel[2]
        for w in range(3)
    ]


def _in_plane_basis(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Steps (8, 5) along the grid's x and y, about its z, of intensity and of ghost."""
    axes = affine[:3, :3] / geometry.voxel_sizes_mm(affine)
    basis = np.zeros((N_COLUMNS, 5))
    basis[0:3, :2], basis[3:6, 2] = axes[:, :2], axes[:, 2]
    basis[6, 3] = basis[7, 4] = 1.0
    return basis


def _points_mask(volume: Volume, missing: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """The head without the field's border and voxels that were no numbers."""
    mask = _without_border(head_mask(volume, rim_voxels=3))
    if missing is not None:
        mask &= ~missing
    if not mask.any():
        raise EmptyVolumeError("the reference shows no head: no voxel stands out from background")
    return mask


def _without_border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    mask = mask.copy()
    for axis, size in enumerate(mask.shape):
        if size >= _SHORTEST_AXIS_WITH_BORDER:
            edge = np.moveaxis(mask, axis, 0)
            edge[0] = edge[-1] = False
    return mask


def guessed_at_border(
    volume: Volume, mean_intensity: float, head: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Where a volume is known badly, since its border cuts something very bright, (nz, ny, nx).

    Nowhere, if that would be more than a few spots, or if the head's mean is not positive.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
    mean_intensity : float
        Of the head.
    head : (nz, ny, nx) bool
    """
    out = np.zeros(volume.shape, bool)
    if mean_intensity <= 0:
        return out
    for axis, size in enumerate(volume.shape):
        if size < _SHORTEST_AXIS_WITH_BORDER:
            continue
        across, near = np.moveaxis(volume, axis, 0), np.moveaxis(out, axis, 0)
        for outermost, depth in ((across, near), (across[::-1], near[::-1])):
            steep = np.abs(outermost[0] - outermost[1]) > _STEEPEST_AT_BORDER * mean_intensity
            if steep.any():
                depth[:_BORDER_DEPTH] |= dilated(steep[None], _BORDER_REACH)
    return out & (out[head].mean() <= _MOST_GUESSED)


def _without(images: Images, where: NDArray[np.bool_]) -> Images:
    """Images that show nothing at some voxels."""
    if not where.any():
        return images
    volume, ghost = (np.where(where, np.float32(0), part) for part in (images.volume, images.ghost))
    return Images(volume, [np.where(where, np.float32(0), g) for g in images.gradient], ghost)


def _rows(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows (y, z, first x, number), by y: each from its first to its last masked voxel."""
    y, z = np.nonzero(mask.any(axis=2).T)
    first = mask.argmax(axis=2)[z, y]
    last = mask.shape[2] - 1 - mask[:, :, ::-1].argmax(axis=2)[z, y]
    return np.column_stack([y, z, first, last - first + 1]).astype(np.int64)


def _coarse(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of every fourth y."""
    ys = np.unique(rows[:, 0])
    return rows[np.isin(rows[:, 0], ys[(ys.size - 1) % _COARSE_STEP // 2 :: _COARSE_STEP])]


def _points(
    rows: NDArray[np.int64],
    images: tuple[Images, Images],
    affine: NDArray[np.float64],
    centre_mm: NDArray[np.float64],
) -> Points:
    """Sampling points of some rows, from plain and low-passed images."""
    begins = np.cumsum(rows[:, 3]) - rows[:, 3]
    jacobians = [_jacobian(rows, image, affine, centre_mm) for image in images]
    values = images[0].volume[voxels_of(rows)]
    return Points(np.column_stack([rows, begins]), values, *jacobians)


def voxels_of(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Indices z, y, x of the points of rows, (n,) int64 each; rows as in `Points`, (n_rows, 4+)."""
    sizes = rows[:, 3]
    row = np.repeat(np.arange(len(rows)), sizes)
    x = np.arange(row.size) - (np.cumsum(sizes) - sizes)[row] + rows[row, 2]
    return rows[row, 1], rows[row, 0], x


def _jacobian(
    rows: NDArray[np.int64],
    images: Images,
    affine: NDArray[np.float64],
    centre_mm: NDArray[np.float64],
) -> NDArray[np.float32]:
    """The eight columns at the points of rows, (8, n)."""
    voxels = voxels_of(rows)
    at = geometry.world(affine, np.stack(voxels[::-1], axis=-1))
    arm = (at - centre_mm).astype(np.float32)
    g = [component[voxels] for component in images.gradient]
    out = np.empty((N_COLUMNS, len(arm)), np.float32)
    out[0:3] = g
    out[3] = arm[:, 1] * g[2] - arm[:, 2] * g[1]
    out[4] = arm[:, 2] * g[0] - arm[:, 0] * g[2]
    out[5] = arm[:, 0] * g[1] - arm[:, 1] * g[0]
    out[6], out[7] = images.volume[voxels], images.ghost[voxels]
    return out
