"""Staging: one run, decompressed once into the stage root, checked on the way.

The stage root is shared memory as a rule. Brain scans are private, so all that is made there is
open to its user alone; and it is small, so room for all a run will need is taken at once, before
anything is written.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from keepstill.arrivals import telling
from keepstill.bids import Origin
from keepstill.breathing import check_filter
from keepstill.errors import InputError, StageError
from keepstill.files import put_private
from keepstill.manifest import stamp_of
from keepstill.nifti import (
    GZIP_MAGIC,
    HEADER_BYTES,
    Layout,
    check_run_shape,
    check_same_grid,
    check_units,
    parse_image_layout,
    parse_layout,
)
from keepstill.segments import sweep_segments
from keepstill.settings import SBREF, RealignSettings
from keepstill.survey import check_signal, count_dummies

STAGED = "staged.json"
STAGED_VOXELS = "bold.nii"
REALIGNED_VOXELS = "realigned.raw"
MOTION = "motion.npz"
ITK_NOTE = "itk.json"
_OVERFLOW = "overflow"  # a link to where the voxels are, if they are not here
_LOCK = "lock"
# Room for what is written later: staged.json and motion.npz with its reference and masks.
_ROOM = "room"
_ROOM_BYTES, _ROOM_BYTES_A_VOXEL, _ROOM_BYTES_A_VOLUME = 1 << 18, 10, 1 << 10
_SINGLE = "run-"
DEFAULTS = RealignSettings()
_CHUNK_BYTES = 1 << 20
_FIRST_WINDOW_BYTES = 1 << 10  # of a gzip member
_TR_TOLERANCE_S = 1e-3
# A longer repetition time is milliseconds under a header that says seconds.
_LONGEST_TR_S = 100.0
# A shorter one is seconds under a header that says milliseconds.
_SHORTEST_TR_S = 0.03
# Deflate cannot do better than this (1032), so a header that promises more is wrong.
_MOST_GZIP_RATIO = 1040

_log = logging.getLogger(__name__)


def stage_run(
    source: Path,
    run: str,
    origin: Origin | None,
    stage_dir: Path,
    settings: RealignSettings = DEFAULTS,
) -> None:
    """Bring a run into its stage directory and say what was found.

    Makes ``bold.nii`` (uncompressed), ``realigned.raw`` (room for the result) and, last,
    ``staged.json``. Where the stage root has too little room, the voxels go to a folder in the
    temporary directory instead, and a warning says so.

    Parameters
    ----------
    source : Path
        ``.nii`` or ``.nii.gz``.
    run : str
        The run's name.
    origin : Origin or None
        Data set or table that the run is part of: its outputs go to a folder of the same name.
        If None they lie flat, and sidecars are looked for in the data set above the file, if any.
    stage_dir : Path
        The run's own folder; made if need be, for this user alone.
    settings : RealignSettings
        Which affine counts, dummy volumes, single slices.

    Raises
    ------
    InputError
        If the file is not a run, or is damaged.
    StageError
        If there is no room anywhere.
    """
    source, origin = Path(os.path.abspath(source)), origin or Origin()
    _refuse_without_sbref(source, run, settings)
    stage_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    metadata = origin.metadata(source, run)
    stamp = _checked_stamp(source, run)
    chunks = Chunks(source, run)
    layout = parse_layout(chunks.peek(HEADER_BYTES), run, settings.affine_source)
    warnings = _check_layout(layout, run, settings)
    refuse_impossible_size(layout, stamp.bytes, run)
    voxels_dir = _reserve(stage_dir, layout, settings, run)
    try:
        arriving: dict[str, Any] = {"run": run, "metadata": metadata, "voxels_dir": str(voxels_dir)}
        arriving["layout"] = layout.facts()
        with telling(stage_dir, arriving) as tell:
            _write_voxels(chunks, voxels_dir / STAGED_VOXELS, layout, run, tell)
        volumes = map_volumes(voxels_dir / STAGED_VOXELS, layout)
        seen = _look_over(volumes, layout, metadata, settings, run)
    except BaseException:
        _clear(voxels_dir)
        raise
    warnings += seen["warnings"]
    for warning in warnings:
        _log.warning("%s", warning)
    known = arriving | seen | {"warnings": warnings}
    known["input"] = {"sha256": chunks.sha256(), "bytes": stamp.bytes, "stamp": asdict(stamp)}
    put_staged(stage_dir / STAGED, json.dumps(_identity(source, run, origin) | known).encode(), run)


def _look_over(
    volumes: NDArray[Any],
    layout: Layout,
    metadata: dict[str, Any],
    settings: RealignSettings,
    run: str,
) -> dict[str, Any]:
    """Repetition time (s), number of dummy volumes and warnings of staged volumes."""
    warnings = check_signal(volumes, run)
    n_dummy = _dummy_volumes(volumes, layout, settings, run)
    tr_s, odd = _repetition_time(layout, metadata, run)
    check_filter(tr_s, settings, run)
    return {"tr_s": tr_s, "n_dummy": n_dummy, "warnings": warnings + odd}


def _refuse_without_sbref(source: Path, run: str, settings: RealignSettings) -> None:
    """Refuse a run whose single-band reference is wanted and was not found."""
    if settings.reference == SBREF and not settings.shared_reference:
        name = f"{source.name.removesuffix('.gz').removesuffix('.nii').removesuffix('_bold')}_sbref"
        raise InputError(
            f"{run}: no {name}.nii[.gz] beside {source.name}; add it, name it in a table of runs, "
            "or choose another reference"
        )


def _check_layout(layout: Layout, run: str, settings: RealignSettings) -> list[str]:
    """Refuse a header that is not that of a run to be realigned; warnings."""
    check_run_shape(layout, run, settings.in_plane)
    _check_shared(layout, run, settings)
    return check_units(layout, run)


def _check_shared(layout: Layout, run: str, settings: RealignSettings) -> None:
    """Refuse a run whose shared reference is missing, or on another grid that was not asked for."""
    if not settings.shared_reference:
        return
    image = Path(settings.shared_reference)
    if not image.is_file():
        raise InputError(
            f"{run}: {image.name}, in whose space it is to end, is not in {image.parent}; add it, "
            "or choose another reference"
        )
    if settings.grid == "auto":
        first_bytes = Chunks(image, image.name).peek(HEADER_BYTES)
        other = parse_image_layout(first_bytes, image.name, settings.affine_source)
        check_same_grid(layout, other, run, image.name)


def _identity(source: Path, run: str, origin: Origin) -> dict[str, Any]:
    """What ``staged.json`` says of where a run comes from and where its outputs go."""
    bids_dir = origin.data_set(source)
    return {
        "run": run,
        "folder": origin.folder(run),
        "source": str(source),
        "is_multi_echo": origin.is_multi_echo,
        "bids_dir": str(bids_dir) if bids_dir else None,
    }


def put_staged(path: Path, content: bytes, run: str) -> None:
    """Write one of a stage directory's small files, into the room that was kept for them.

    Raises
    ------
    StageError
        If there is none left.
    """
    (path.parent / _ROOM).unlink(missing_ok=True)
    try:
        put_private(path, content)
    except OSError as error:
        raise StageError(
            f"{run}: {path} cannot be written ({error.strerror}); free some room, or choose "
            "another stage_root"
        ) from error


def enlarge_staged(path: Path, n_bytes: int, run: str) -> None:
    """Give one of a staged run's files room for so many bytes, if it has less.

    Raises
    ------
    StageError
        If there is no room.
    """
    try:
        with path.open("r+b") as file:
            if os.fstat(file.fileno()).st_size < n_bytes:
                os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        raise StageError(
            f"{run}: {n_bytes / 1e6:.3g} MB needed in {path.parent} ({error.strerror}), since the "
            "reference's grid is finer; free some room, or choose another stage_root"
        ) from error


def remove_stage(stage_dir: Path) -> None:
    """Remove all that a run has in the stage root, and what overflowed to disk."""
    with contextlib.suppress(OSError):
        shutil.rmtree((stage_dir / _OVERFLOW).readlink(), ignore_errors=True)
    shutil.rmtree(stage_dir, ignore_errors=True)


def private_stage_root(shared: Path) -> Path:
    """Folder of this user in a stage root that users share; without one, in $TMPDIR."""
    root = shared if shared.is_dir() else Path(tempfile.gettempdir())
    if root != shared:
        _log.warning("stage root %s: no such folder; %s serves instead", shared, root)
    return root.absolute() / f"keepstill-{os.getuid()}"


def claim_stage_root(stage_root: Path) -> None:
    """Make the user's own stage root, closed to all others.

    Raises
    ------
    StageError
        If it cannot be made, or somebody else made it.
    """
    try:
        stage_root.mkdir(mode=0o700, exist_ok=True)
        status = stage_root.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise StageError(
                f"stage root {stage_root}: belongs to user {status.st_uid}; "
                "choose another stage_root"
            )
        if status.st_mode & 0o077:
            stage_root.chmod(0o700)
    except FileExistsError as error:
        raise StageError(f"stage root {stage_root}: is no folder; remove it") from error
    except OSError as error:
        if isinstance(error, StageError):
            raise
        raise StageError(f"stage root {stage_root}: {error}; choose another stage_root") from error


@contextlib.contextmanager
def single_stage_dir(stage_root: Path) -> Iterator[Path]:
    """Folder in which one call stages one run; gone afterwards, whatever happens.

    A call that is killed cannot clean up. So it holds a lock that dies with it, and the next
    call removes the folders whose lock nobody holds.

    Raises
    ------
    StageError
        If the stage root cannot be used.
    """
    claim_stage_root(stage_root)
    sweep_stage_root(stage_root)
    try:
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=stage_root))
    except OSError as error:
        raise StageError(f"stage root {stage_root}: {error}; choose another stage_root") from error
    with (made / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stage_dir = made.rename(stage_root / f"{_SINGLE}{made.name.removeprefix('.new-')}")
        try:
            yield stage_dir
        finally:
            remove_stage(stage_dir)
            with contextlib.suppress(OSError):
                stage_root.rmdir()  # unless another call is at work there


def hold_stage_dir(stage_dir: Path) -> TextIO:
    """Make a stage directory that other processes of this call share, and hold it.

    The returned file holds a lock that the kernel frees with this process; `sweep_stage_root`
    spares what is held.
    """
    stage_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = (stage_dir / _LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def sweep_stage_root(stage_root: Path, patience_s: float | None = None) -> None:
    """Remove what killed calls left: the folders whose lock nobody holds, and segments of MPI.

    `patience_s` as in `keepstill.segments.sweep_segments`.
    """
    sweep_segments(patience_s=patience_s)
    for folder in stage_root.glob("[!.]*/"):
        with contextlib.suppress(OSError), (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for staged in folder.glob("*/"):
                remove_stage(staged)
            remove_stage(folder)


class Chunks:
    """A file's decompressed bytes, chunk by chunk, while its own bytes are hashed."""

    def __init__(self, source: Path, run: str) -> None:
        self._run = run
        self._digest = hashlib.sha256()
        self._chunks = self._read(source)
        self._ahead = b""

    def __iter__(self) -> Iterator[bytes]:
        if self._ahead:
            ahead, self._ahead = self._ahead, b""
            yield ahead
        yield from self._chunks

    def peek(self, n: int) -> bytes:
        """First n bytes, or all there are; they come again when iterated."""
        while len(self._ahead) < n:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            self._ahead += chunk
        return self._ahead[:n]

    def sha256(self) -> str:
        """Hash of the file as it lies on disk, once all of it was read."""
        return self._digest.hexdigest()

    def _read(self, source: Path) -> Iterator[bytes]:
        with source.open("rb") as file:
            is_gzip = file.read(2) == GZIP_MAGIC
            file.seek(0)
            if not is_gzip and source.name.endswith(".gz"):
                raise InputError(
                    f"{self._run}: {source.name} is no gzip file (it begins with "
                    f"{file.read(8)!r}); copy it again, or compress it, or name it .nii"
                )
            yield from self._gunzip(file) if is_gzip else self._plain(file)

    def _plain(self, file: BinaryIO) -> Iterator[bytes]:
        while chunk := file.read(_CHUNK_BYTES):
            self._digest.update(chunk)
            yield chunk

    def _gunzip(self, file: BinaryIO) -> Iterator[bytes]:
        """Decompress with bounded memory: at most one chunk comes out at a time.

        A member is shown the file in windows that grow: behind its end the rest of a window is
        copied, which for a file of many small members must not be the rest of a chunk.
        """
        stream, window = zlib_ng.decompressobj(wbits=31), _FIRST_WINDOW_BYTES
        pending = memoryview(b"")
        try:
            while pending or (pending := self._compressed(file)):
                if stream.eof:
                    if not any(pending):  # padding to a block, as tape drives did
                        pending = memoryview(b"")
                        continue
                    stream, window = zlib_ng.decompressobj(wbits=31), _FIRST_WINDOW_BYTES
                shown = pending[:window]
                chunk = stream.decompress(shown, _CHUNK_BYTES)
                left = stream.unused_data if stream.eof else stream.unconsumed_tail
                pending = pending[len(shown) - len(left) :]
                window = min(2 * window, _CHUNK_BYTES)
                if chunk:
                    yield chunk
        except zlib_ng.error as error:  # type: ignore[misc]
            raise InputError(
                f"{self._run}: the gzip stream is damaged ({error}); copy the file again"
            ) from error
        if not stream.eof:
            raise InputError(
                f"{self._run}: the file ends inside the gzip stream (truncated); copy it again"
            )

    def _compressed(self, file: BinaryIO) -> memoryview:
        chunk = file.read(_CHUNK_BYTES)
        self._digest.update(chunk)
        return memoryview(chunk)


def _checked_stamp(source: Path, run: str) -> Any:
    if source.is_symlink() and not source.exists():
        raise InputError(
            f"{run}: {source} is a link to a file that is not there; fetch it "
            f"(datalad get {source.name}) or mend the link"
        )
    try:
        stamp = stamp_of(source)
        if source.is_file():
            with source.open("rb"):
                pass
    except OSError as error:
        raise InputError(
            f"{run}: {source} cannot be read ({error.strerror}); check path and permissions"
        ) from error
    if not source.is_file():
        raise InputError(f"{run}: {source} is no plain file; needs a .nii or .nii.gz file")
    if stamp.bytes == 0:
        raise InputError(f"{run}: {source.name} is an empty file; copy it again")
    return stamp


def _reserve(stage_dir: Path, layout: Layout, settings: RealignSettings, run: str) -> Path:
    """Folder that has room for the run and its result, taken before a byte is written."""
    n_voxels, n_volumes = int(np.prod(layout.shape[:3], dtype=np.int64)), layout.shape[3]
    if not settings.reslice and not settings.reslices_twice:  # residuals need room all the same
        n_volumes = min(n_volumes, settings.estimate.model_volumes)
    sizes = {STAGED_VOXELS: layout.n_bytes, REALIGNED_VOXELS: 4 * n_voxels * n_volumes}
    needed = sum(sizes.values())
    room = _ROOM_BYTES + _ROOM_BYTES_A_VOXEL * n_voxels + _ROOM_BYTES_A_VOLUME * layout.shape[3]
    try:
        _allocate(stage_dir, sizes | {_ROOM: room})
        return stage_dir
    except OSError as error:
        _clear(stage_dir)
        reason = error.strerror
    overflow = Path(tempfile.gettempdir())
    spare = (
        overflow
        / f"keepstill-{os.getuid()}-{hashlib.sha256(str(stage_dir).encode()).hexdigest()[:16]}"
    )
    try:
        (stage_dir / _OVERFLOW).unlink(missing_ok=True)
        (stage_dir / _OVERFLOW).symlink_to(spare)
        claim_stage_root(spare)
        _allocate(spare, sizes)
    except OSError as error:
        _clear(spare)
        _clear(stage_dir)
        raise StageError(
            f"{run}: {needed / 1e6:.3g} MB needed; neither {stage_dir.parent} ({reason}) nor "
            f"{overflow} ({error.strerror}) has them; free some, or set stage_root or TMPDIR"
        ) from error
    _log.warning(
        "%s: %.3g MB do not fit in %s (%s); staged in %s instead",
        run,
        needed / 1e6,
        stage_dir.parent,
        reason,
        overflow,
    )
    return spare


def _allocate(folder: Path, sizes: dict[str, int]) -> None:
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if sum(sizes.values()) > free:  # asked first: a header may claim terabytes
        raise OSError(28, f"only {free / 1e6:.3g} MB free")
    for name, n_bytes in sizes.items():
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            if n_bytes > 0:
                os.posix_fallocate(handle, 0, n_bytes)
        finally:
            os.close(handle)


def _clear(folder: Path) -> None:
    for name in (STAGED_VOXELS, REALIGNED_VOXELS, _OVERFLOW, _ROOM):
        (folder / name).unlink(missing_ok=True)


def _write_voxels(
    chunks: Chunks, path: Path, layout: Layout, run: str, tell: Callable[[int], None]
) -> None:
    n_bytes, n_told = 0, 0
    with path.open("r+b") as file:
        for chunk in chunks:
            n_bytes += len(chunk)
            if n_bytes > layout.n_bytes:
                raise InputError(
                    f"{run}: more than the {layout.n_bytes} bytes that the header promises "
                    f"(axes {layout.shape}); header and voxels do not belong together"
                )
            file.write(chunk)
            if n_bytes - n_told >= _CHUNK_BYTES:  # chunks of small gzip members are smaller
                file.flush()
                tell(n_bytes)
                n_told = n_bytes
    if n_bytes < layout.n_bytes:
        raise InputError(
            f"{run}: {n_bytes} of {layout.n_bytes} bytes found (axes {layout.shape}); "
            "the file is truncated; copy it again"
        )


def map_volumes(path: Path, layout: Layout) -> NDArray[Any]:
    """Volumes of a staged run, (n, nz, ny, nx) as stored, mapped."""
    return np.memmap(path, layout.dtype, "r", layout.offset, layout.shape[::-1])


def refuse_impossible_size(layout: Layout, n_file_bytes: int, run: str) -> None:
    """Refuse a header that promises more than the file can hold, before taking room for it."""
    if layout.n_bytes > n_file_bytes * _MOST_GZIP_RATIO:
        raise InputError(
            f"{run}: the header promises {layout.n_bytes} bytes (axes {layout.shape}), a file of "
            f"{n_file_bytes} bytes cannot hold them; the header is damaged or the file truncated"
        )


def _dummy_volumes(
    volumes: NDArray[Any], layout: Layout, settings: RealignSettings, run: str
) -> int:
    if settings.dummy_scans == "auto":
        return count_dummies(volumes, layout.slope, layout.inter)
    n_dummy = int(settings.dummy_scans)
    if n_dummy > len(volumes) - 2:
        raise InputError(
            f"{run}: dummy_scans {n_dummy} of {len(volumes)} volumes; at least 2 must remain"
        )
    return n_dummy


def _repetition_time(
    layout: Layout, metadata: dict[str, Any], run: str
) -> tuple[float | None, list[str]]:
    """Repetition time in seconds, the sidecar's if it has one, and what is odd about it."""
    header_tr_s, warnings = _header_repetition_time(layout, run)
    given = metadata.get("RepetitionTime")
    if given is None:
        if header_tr_s is None:
            return None, [f"{run}: no repetition time in sidecar or header; outputs have none"]
        taken = f"{run}: no RepetitionTime in a sidecar; the header's {header_tr_s:g} s is taken"
        return header_tr_s, [*warnings, taken]
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < 1e3:
        raise InputError(f"{run}: RepetitionTime {given!r} in the sidecar; needs seconds")
    if header_tr_s is None or abs(header_tr_s - given) > _TR_TOLERANCE_S:
        shown = "none" if header_tr_s is None else f"{header_tr_s:g} s"
        return float(given), [
            f"{run}: repetition time {shown} in the header, {given:g} s in the sidecar; "
            "the sidecar's is taken"
        ]
    return float(given), []


def _header_repetition_time(layout: Layout, run: str) -> tuple[float | None, list[str]]:
    """Repetition time by the header, and a warning where its unit cannot be right."""
    tr_s = layout.header_tr_s
    if not _SHORTEST_TR_S / 1000 < tr_s < _LONGEST_TR_S * 1000:
        return None, []  # none, or damaged
    if tr_s < _SHORTEST_TR_S:
        return tr_s * 1000, [
            f"{run}: a repetition time of {tr_s:g} s by the header's unit must be seconds"
        ]
    if tr_s < _LONGEST_TR_S:
        return tr_s, []
    return tr_s / 1000, [
        f"{run}: a repetition time of {tr_s:g} s in the header must be milliseconds"
    ]
