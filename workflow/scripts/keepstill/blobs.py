"""A fast density: the sum of many Gaussian blobs on a grid."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from keepstill.errors import SettingsError
from keepstill.kernels.blobs import (
    Blobs,
    Grid,
    fill_factors,
    fill_planes,
    fill_spans,
    fill_whole_planes,
)

# What a blob may lose beyond its reach, as a part of its brightness.
_TAIL = float(np.finfo(np.float32).eps)
# Room for the rounding of a distance, so that a value of exactly the cut-off is still inside.
_REACH_MARGIN = 1.0 + 1e-9
# Numbers larger than this, and widths smaller than its inverse, have no squares.
_LARGEST = 1e100
_DTYPES = "needs float32, float64 or whole numbers, in native byte order"


def density(  # noqa: PLR0913, keywords with defaults
    shape: tuple[int, int, int],
    centres: ArrayLike,
    spreads: ArrayLike,
    brights: ArrayLike,
    *,
    spacing: ArrayLike = 1.0,
    origin: ArrayLike = 0.0,
    dtype: DTypeLike = np.float32,
    rounding: str = "sum",
    n_threads: int = 1,
) -> NDArray[Any]:
    """Sum of Gaussian blobs, bright * exp(-distance^2 / spread^2) each, on a regular grid.

    There is no factor 1/2 in the exponent: the standard deviation is spread / sqrt(2).

    Parameters
    ----------
    shape : (nx, ny, nz)
    centres : (n, 3)
        x, y, z of each blob, in the units of `spacing`; [] for none.
    spreads : (n,) or one number
        In the units of `spacing`; more than 0.
    brights : (n,) or one number
        Value at the centre; may be negative.
    spacing : one number or (3,)
        Distance between grid points along x, y, z; more than 0.
    origin : one number or (3,)
        Position of grid point (0, 0, 0).
    dtype : dtype
        float32, float64 or a whole-number type, in this machine's byte order.
    rounding : str
        For whole-number types. ``sum`` truncates the sum once, ``blob`` truncates each blob
        before it is added, as a sum of whole-number images does. Both truncate towards zero.
    n_threads : int
        The result does not depend on it.

    Returns
    -------
    density : (nx, ny, nz) of `dtype`

    Raises
    ------
    SettingsError
        For a shape, number or dtype that no density can have; for numbers beyond 1e100, and
        spreads and spacings below 1e-100.

    Notes
    -----
    A blob ends where its value falls below float32's eps (1.2e-7) times its brightness; with
    ``rounding="blob"``, where it falls below 1, since what is beyond is truncated to nothing.
    A sum beyond the range of a whole-number type is set to the type's limit: nothing wraps. One
    beyond float32 is infinite.
    """
    sizes, grid = _checked_grid(shape, spacing, origin)
    kind, each = _checked_dtype(dtype, rounding)
    table = _checked_blobs(centres, spreads, brights)
    return _filled(np.zeros(sizes, kind), table, grid, each, n_threads)


def _reaches(brights: NDArray[np.float64], spreads: NDArray[np.float64], each: bool) -> Any:
    """Distance at which a blob ends, (n,) float64; negative for one that has no voxel at all."""
    with np.errstate(divide="ignore"):
        fall = np.log(np.abs(brights)) if each else np.where(brights == 0, -1, -np.log(_TAIL))
    return np.where(fall >= 0, spreads * np.sqrt(np.maximum(fall, 0)) * _REACH_MARGIN, -1.0)


def _prepared(
    table: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    grid: Grid,
    sizes: tuple[int, ...],
    how: tuple[np.dtype[Any], bool],
) -> Blobs:
    """Spans and factors of all blobs, from (centres, spreads, brights)."""
    centres, spreads, brights = table
    reaches = _reaches(brights, spreads, how[1])
    first, number = np.zeros((2, len(centres), 3), np.int64)
    fill_spans(centres, reaches, np.array(sizes, np.int64), grid, first, number)
    ends = np.cumsum(number.ravel())
    begins = (ends - number.ravel()).reshape(number.shape)
    factors = np.empty(int(number.sum()), how[0])
    blobs = Blobs(brights, centres, reaches, first, number, begins, factors)
    fill_factors(blobs, spreads, grid)
    return blobs


def _filled(
    out: NDArray[Any],
    table: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    grid: Grid,
    each: bool,
    n_threads: int,
) -> NDArray[Any]:
    """An image with its blobs; of whole numbers, `each` blob is truncated before it is added."""
    if out.dtype.kind == "f":
        blobs = _prepared(table, grid, out.shape, (out.dtype, False))
        _in_slabs(out, n_threads, lambda slab, first: fill_planes(slab, first, blobs, grid))
        return out
    blobs = _prepared(table, grid, out.shape, (np.dtype(np.float64), each))
    limits = _limits(out.dtype)
    _in_slabs(
        out,
        n_threads,
        lambda slab, first: fill_whole_planes(slab, first, blobs, grid, limits, each),
    )
    return out


def _in_slabs(out: NDArray[Any], n_threads: int, fill: Callable[[NDArray[Any], int], None]) -> None:
    """Fill planes in as many slabs as there are threads."""
    edges = np.linspace(0, len(out), max(1, min(n_threads, len(out))) + 1).astype(int)
    slabs = [(out[a:b], int(a)) for a, b in itertools.pairwise(edges)]
    if len(slabs) == 1:
        fill(*slabs[0])
        return
    with ThreadPoolExecutor(len(slabs)) as pool:
        for done in [pool.submit(fill, *slab) for slab in slabs]:
            done.result()


def _limits(kind: np.dtype[Any]) -> tuple[float, float]:
    """Range of a whole-number type, in floats that it holds: 2**63 - 1 itself is not a float."""
    high = np.iinfo(kind).max
    return float(np.iinfo(kind).min), float(high) if kind.itemsize < 8 else float(high - 1023)


def _checked_grid(
    shape: tuple[int, int, int], spacing: ArrayLike, origin: ArrayLike
) -> tuple[tuple[int, ...], Grid]:
    try:
        sizes = tuple(int(size) for size in shape)
        is_shape = len(sizes) == 3 and sizes == tuple(shape) and min(sizes) > 0
    except (TypeError, ValueError, OverflowError):
        is_shape = False
    if not is_shape:
        raise SettingsError(f"shape: {shape!r} found; needs three whole numbers from 1 up")
    spacings, origins = _numbers("spacing", spacing, (3,)), _numbers("origin", origin, (3,))
    if spacings.min() < 1 / _LARGEST:
        raise SettingsError(
            f"spacing: {spacing!r} found; needs more than 0 along each axis, at least 1e-100"
        )
    return sizes, Grid(spacings, origins)


def _checked_dtype(dtype: DTypeLike, rounding: str) -> tuple[np.dtype[Any], bool]:
    """The dtype, and whether each blob is truncated."""
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise SettingsError(f"dtype: {dtype!r} found; {_DTYPES}") from error
    is_float = kind in (np.dtype(np.float32), np.dtype(np.float64))
    if not kind.isnative or not (kind.kind in "iu" or is_float):
        raise SettingsError(f"dtype: {kind} found; {_DTYPES}")
    if rounding not in ("sum", "blob"):
        raise SettingsError(f"rounding: {rounding!r} found; needs 'sum' or 'blob'")
    if rounding == "blob" and kind.kind == "f":
        raise SettingsError(f"rounding: 'blob' found with {kind}; it needs whole numbers")
    return kind, rounding == "blob"


def _checked_blobs(
    centres: ArrayLike, spreads: ArrayLike, brights: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    points = _floats("centres", centres)
    points = points.reshape(0, 3) if points.shape == (0,) else points
    if points.ndim != 2 or points.shape[1] != 3:
        raise SettingsError(f"centres: an array of shape {points.shape} found; needs (n, 3)")
    n = len(points)
    points = _numbers("centres", points, (n, 3))
    widths = _numbers("spreads", spreads, (n,))
    if n and widths.min() < 1 / _LARGEST:
        b = int(widths.argmin())
        raise SettingsError(
            f"spreads: {widths[b]:g} found for blob {b}; needs more than 0, at least 1e-100"
        )
    return points, widths, _numbers("brights", brights, (n,))


def _numbers(name: str, values: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Finite float64 of a shape, or one number for all."""
    array = _floats(name, values)
    if array.shape not in ((), shape):
        raise SettingsError(f"{name}: an array of shape {array.shape} found; needs {shape}")
    if not np.isfinite(array).all():
        raise SettingsError(f"{name}: NaN or infinity found; needs finite numbers")
    if np.abs(array).max(initial=0) > _LARGEST:
        found = np.abs(array).max()
        raise SettingsError(f"{name}: {found:g} found; needs numbers of at most {_LARGEST:g}")
    return np.ascontiguousarray(np.broadcast_to(array, shape))


def _floats(name: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{name}: not an array of numbers; {error}") from error
