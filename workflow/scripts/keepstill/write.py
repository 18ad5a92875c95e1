"""Writing outputs: every file under a temporary name first, and the same bytes every time."""

import io
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from keepstill.files import Written, put_file

T = TypeVar("T")
# Content of a part of a file, or what makes it once it is wanted.
Part = bytes | Callable[[], bytes]

# Voxels of a noisy series hardly repeat, so looking for runs only costs 1% of size and saves half
# the time. And there zlib-ng gives the bytes that zlib gives, whatever the processor.
_LEVEL, _MEMORY_LEVEL, _STRATEGY = 1, 9, zlib_ng.Z_RLE
# Gzip's head with neither time nor name nor system, so that equal voxels are equal bytes.
_GZIP_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_LAST_BLOCK = b"\x03\x00"
_INT16_LIMIT = 32767


def gzip_member(parts: Iterable[Part], n_threads: int) -> Iterable[bytes]:
    """One valid gzip member, whose bytes do not depend on the number of threads.

    Each part becomes deflate blocks of its own, ended by a full flush, so that parts can be
    compressed at the same time and laid end to end (RFC 1951, RFC 1952).

    Parameters
    ----------
    parts : iterable of bytes, or of functions that give them
        Uncompressed; functions are called by the thread that compresses, and at most two parts a
        thread are held at a time.
    n_threads : int
    """
    yield _GZIP_HEAD
    crc, size = 0, 0
    for deflated, part_crc, part_size in _in_order(n_threads, _deflated, parts):
        crc = zlib_ng.crc32_combine(crc, part_crc, part_size)
        size += part_size
        yield deflated
    yield _LAST_BLOCK + struct.pack("<II", crc, size & 0xFFFFFFFF)


def _in_order(n_threads: int, work: Callable[[T], Any], parts: Iterable[T]) -> Iterable[Any]:
    """Results of some work on parts, in order, by so many threads; few are held at a time."""
    if n_threads == 1:
        yield from map(work, parts)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        yield from ahead(pool, work, parts, 2 * n_threads)


def _content(part: Part) -> bytes:
    return part() if callable(part) else part


def _deflated(part: Part) -> tuple[bytes, int, int]:
    content = _content(part)
    stream = zlib_ng.compressobj(_LEVEL, zlib_ng.DEFLATED, -15, _MEMORY_LEVEL, _STRATEGY)
    deflated = stream.compress(content) + stream.flush(zlib_ng.Z_FULL_FLUSH)
    return deflated, zlib_ng.crc32(content), len(content)


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[T], Any], parts: Iterable[T], n_ahead: int
) -> Iterable[Any]:
    """Results of some work on parts, in order, with a bounded number of them under way."""
    waiting: list[Any] = []
    for part in parts:
        waiting.append(pool.submit(work, part))
        if len(waiting) > n_ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def put_nifti(path: Path, header: Any, parts: Iterable[Part], n_threads: int = 1) -> Written:
    """Write a .nii.gz, or .nii, of a header and the voxels' bytes, volume by volume."""

    def all_parts() -> Iterable[Part]:
        yield header.binaryblock + b"\0" * (int(header["vox_offset"]) - len(header.binaryblock))
        yield from parts

    is_plain = path.suffix == ".nii"
    contents = map(_content, all_parts()) if is_plain else gzip_member(all_parts(), n_threads)
    return put_file(path, contents)


def put_series(
    path: Path,
    header: Any,
    volumes: Callable[[], Iterable[NDArray[np.float32]]],
    n_threads: int,
) -> Written:
    """Write a series as .nii.gz or .nii, with a fitted slope if its header says int16.

    Parameters
    ----------
    path : Path
    header : nibabel header
        Of the series; slope and intercept are filled in.
    volumes : callable
        Gives the (nz, ny, nx) volumes, in order; called twice for int16.
    n_threads : int
    """
    stored: Callable[[NDArray[np.float32]], bytes] = _bytes_of
    if header.get_data_dtype() == np.int16:
        slope, inter = int16_scaling(volumes())
        header["scl_slope"], header["scl_inter"] = slope, inter
        stored = partial(_stored, slope=slope, inter=inter)
    # Converted by the thread that compresses: else one thread would convert for all.
    return put_nifti(path, header, (partial(stored, volume) for volume in volumes()), n_threads)


def _stored(volume: NDArray[np.float32], slope: float, inter: float) -> bytes:
    return _bytes_of(as_int16(volume, slope, inter))


def _bytes_of(volume: NDArray[Any]) -> bytes:
    return np.asarray(volume).tobytes()


def put_volume(path: Path, header: Any, volume: NDArray[Any]) -> Written:
    """Write one (nz, ny, nx) volume as .nii.gz."""
    return put_nifti(path, header, [_bytes_of(volume)])


def put_json(path: Path, values: Mapping[str, Any]) -> Written:
    """Write a JSON sidecar; NaN is refused, since JSON has none."""
    text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return put_file(path, [text.encode() + b"\n"])


def put_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> Written:
    """Write a BIDS table: tabs, nine significant digits, ``n/a`` for what is missing."""
    out = io.StringIO()
    out.write("\t".join(columns) + "\n")
    in_words = [_wording(column) for column in columns.values()]
    for row in zip(*columns.values(), strict=True):
        out.write("\t".join([word(value) for word, value in zip(in_words, row, strict=True)]))
        out.write("\n")
    return put_file(path, [out.getvalue().encode()])


def _wording(column: Sequence[Any]) -> Callable[[Any], str]:
    """What makes text of a column's cells; most are whole numbers, a column for each outlier."""
    return str if set(map(type, column)) == {int} else _cell


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    if isinstance(value, float):
        return f"{value + 0.0:.9g}"  # + 0.0: no negative zero
    return str(value)


def int16_scaling(volumes: Iterable[NDArray[np.float32]]) -> tuple[float, float]:
    """Slope and intercept (as float32 values) that spread all voxels over int16.

    Where 0 is among the values it is stored exactly, since it says that there are no data: the
    intercept is then a whole number of steps, and the step has so few digits that no product of
    the two is rounded.
    """
    low, high = math.inf, -math.inf
    for volume in volumes:
        low, high = min(low, float(volume.min())), max(high, float(volume.max()))
    if low <= 0 <= high and low < high:
        slope = _short((high - low) / 2 / (_INT16_LIMIT - 1))
        return slope, slope * round((low + high) / 2 / slope)
    inter = float(np.float32((low + high) / 2))
    slope = float(np.float32(max(high - inter, inter - low) / _INT16_LIMIT * (1 + 1e-6)))
    return (slope, inter) if slope > 0 else (1.0, inter)


def _short(value: float) -> float:
    """The next larger number of 9 binary digits: times 15 digits it fits in a float32's 24."""
    digits, exponent = math.frexp(value)
    return math.ldexp(math.ceil(digits * 2**9), exponent - 9)


def as_int16(volume: NDArray[np.float32], slope: float, inter: float) -> NDArray[np.int16]:
    """Stored values of a volume, rounded to nearest."""
    from keepstill.kernels.integers import fill_int16  # here: tables are written without numba

    voxels = np.ascontiguousarray(volume).reshape(-1)
    voxels.flags.writeable = False  # mapped or not, one kernel is compiled
    out = np.empty(volume.shape, np.int16)
    fill_int16(voxels, np.float32(slope), np.float32(inter), out.reshape(-1))
    return out


def itk_transforms(moving_from_reference: NDArray[np.float64]) -> str:
    """ITK text of one rigid transform a volume, reference -> moving, LPS mm, to the last bit.

    Parameters
    ----------
    moving_from_reference : (n, 4, 4) float64
        RAS+ mm.
    """
    ras_to_lps = np.array([-1.0, -1.0, 1.0])
    lines = ["#Insight Transform File V1.0"]
    for k, matrix in enumerate(moving_from_reference):
        rotation = matrix[:3, :3] * ras_to_lps[:, None] * ras_to_lps[None, :]
        numbers = [*rotation.ravel(), *(matrix[:3, 3] * ras_to_lps)]
        lines += [
            f"#Transform {k}",
            "Transform: AffineTransform_double_3_3",
            "Parameters: " + " ".join(repr(float(number) + 0.0) for number in numbers),
            "FixedParameters: 0 0 0",
            "",
        ]
    return "\n".join(lines)
