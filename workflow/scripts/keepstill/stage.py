"""Staging: one run, decompressed once into the stage root, checked on the way.

The stage root is shared memory as a rule. Brain scans are private, so all that is made there is
open to its user alone; and it is small, so room for all a run will need is taken at once, before
anything is written.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal import isal_zlib

from keepstill.bids import Origin, bids_uri
from keepstill.errors import InputError, StageError
from keepstill.files import put_private
from keepstill.manifest import stamp_of
from keepstill.nifti import HEADER_BYTES, Layout, check_run_shape, parse_layout

STAGED = "staged.json"
STAGED_VOXELS = "bold.nii"
REALIGNED_VOXELS = "realigned.raw"
MOTION = "motion.npz"
_CHUNK_BYTES = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_TR_TOLERANCE_S = 1e-3

_log = logging.getLogger(__name__)


def stage_run(source: Path, run: str, origin: Origin | None, stage_dir: Path) -> None:
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

    Raises
    ------
    InputError
        If the file is not a run, or is damaged.
    StageError
        If there is no room anywhere.
    """
    source = Path(os.path.abspath(source))
    origin = origin or Origin()
    bids_dir = origin.data_set(source)
    stage_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    metadata = origin.metadata(source, run)
    stamp = _checked_stamp(source, run)
    chunks = _Chunks(source, run)
    layout = parse_layout(chunks.peek(HEADER_BYTES), run)
    check_run_shape(layout, run)
    voxels_dir = _reserve(stage_dir, layout, run)
    try:
        _write_voxels(chunks, voxels_dir / STAGED_VOXELS, layout, run)
        _check_signal(voxels_dir / STAGED_VOXELS, layout, run)
        tr_s, warnings = _repetition_time(layout, metadata, run)
    except BaseException:
        _clear(voxels_dir)
        raise
    for warning in warnings:
        _log.warning("%s", warning)
    found = {
        "run": run,
        "folder": origin.folder(run),
        "source": str(source),
        "source_uri": bids_uri(source, bids_dir) if bids_dir else source.name,
        "bids_dir": str(bids_dir) if bids_dir else None,
        "input": {"sha256": chunks.sha256(), "bytes": stamp.bytes, "stamp": asdict(stamp)},
        "metadata": metadata,
        "tr_s": tr_s,
        "warnings": warnings,
        "voxels_dir": str(voxels_dir),
    }
    put_private(stage_dir / STAGED, json.dumps(found).encode())


def remove_stage(stage_dir: Path) -> None:
    """Remove all that a run has in the stage root, and what overflowed to disk."""
    try:
        voxels_dir = json.loads((stage_dir / STAGED).read_text())["voxels_dir"]
        shutil.rmtree(voxels_dir, ignore_errors=True)
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(stage_dir, ignore_errors=True)


def open_private_dir(root: Path) -> Path:
    """New folder below `root` (below the temporary directory if there is no such root), 0700."""
    base = root if root.is_dir() and os.access(root, os.W_OK) else Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix=f"keepstill-{os.getuid()}-", dir=base))


class _Chunks:
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
            is_gzip = file.read(2) == _GZIP_MAGIC
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
        """Decompress with bounded memory: at most one chunk comes out at a time."""
        stream = isal_zlib.decompressobj(wbits=31)
        pending = b""
        try:
            while True:
                if not pending:
                    pending = file.read(_CHUNK_BYTES)
                    self._digest.update(pending)
                    if not pending:
                        break
                if stream.eof:
                    if not pending.lstrip(b"\0"):  # padding to a block, as tape drives did
                        pending = b""
                        continue
                    stream = isal_zlib.decompressobj(wbits=31)
                chunk = stream.decompress(pending, _CHUNK_BYTES)
                pending = stream.unused_data if stream.eof else stream.unconsumed_tail
                if chunk:
                    yield chunk
        except isal_zlib.error as error:  # type: ignore[misc]
            raise InputError(
                f"{self._run}: the gzip stream is damaged ({error}); copy the file again"
            ) from error
        if not stream.eof:
            raise InputError(
                f"{self._run}: the file ends inside the gzip stream (truncated); copy it again"
            )


def _checked_stamp(source: Path, run: str) -> Any:
    if source.is_symlink() and not source.exists():
        raise InputError(
            f"{run}: {source} is a link to a file that is not there; fetch it "
            f"(`datalad get {source.name}`) or mend the link"
        )
    try:
        stamp = stamp_of(source)
        with source.open("rb"):
            pass
    except OSError as error:
        raise InputError(
            f"{run}: {source} cannot be read ({error.strerror}); check path and permissions"
        ) from error
    if stamp.bytes == 0:
        raise InputError(f"{run}: {source.name} is an empty file; copy it again")
    return stamp


def _reserve(stage_dir: Path, layout: Layout, run: str) -> Path:
    """Folder that has room for the run and its result, taken before a byte is written."""
    n_realigned = 4 * int(np.prod(layout.shape, dtype=np.int64))
    sizes = {STAGED_VOXELS: layout.n_bytes, REALIGNED_VOXELS: n_realigned}
    needed = sum(sizes.values())
    try:
        _allocate(stage_dir, sizes)
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
        spare.mkdir(mode=0o700, exist_ok=True)
        _allocate(spare, sizes)
    except OSError as error:
        _clear(spare)
        raise StageError(
            f"{run}: {needed / 1e6:.0f} MB needed; neither {stage_dir.parent} ({reason}) nor "
            f"{overflow} ({error.strerror}) has them; free some, or set stage_root or TMPDIR"
        ) from error
    _log.warning(
        "%s: %.0f MB do not fit in %s (%s); staged in %s instead",
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
        raise OSError(28, f"only {free / 1e6:.0f} MB free")
    for name, n_bytes in sizes.items():
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(handle, 0, n_bytes)
        finally:
            os.close(handle)


def _clear(folder: Path) -> None:
    for name in (STAGED_VOXELS, REALIGNED_VOXELS):
        (folder / name).unlink(missing_ok=True)


def _write_voxels(chunks: _Chunks, path: Path, layout: Layout, run: str) -> None:
    n_bytes = 0
    with path.open("r+b") as file:
        for chunk in chunks:
            n_bytes += len(chunk)
            if n_bytes > layout.n_bytes:
                raise InputError(
                    f"{run}: more than the {layout.n_bytes} bytes that the header promises "
                    f"(axes {layout.shape}); header and voxels do not belong together"
                )
            file.write(chunk)
    if n_bytes < layout.n_bytes:
        raise InputError(
            f"{run}: {n_bytes} of {layout.n_bytes} bytes found (axes {layout.shape}); "
            "the file is truncated; copy it again"
        )


def _check_signal(path: Path, layout: Layout, run: str) -> None:
    """Refuse a run in which no volume shows anything; most runs end the search at the first."""
    volumes = np.memmap(path, layout.dtype, "r", layout.offset, layout.shape[::-1])
    any_finite = False
    for volume in volumes:
        finite = volume[np.isfinite(volume)] if layout.dtype.kind == "f" else volume
        any_finite = any_finite or finite.size > 0
        if finite.size and finite.min() != finite.max():
            return
    what = "every voxel has one and the same value" if any_finite else "no voxel is a number (NaN)"
    raise InputError(f"{run}: {what} in all {len(volumes)} volumes; export the run again")


def _repetition_time(layout: Layout, metadata: dict[str, Any], run: str) -> tuple[float, list[str]]:
    """Repetition time in seconds, the sidecar's if it has one, and what is odd about it."""
    header_tr_s = layout.header_tr_s
    given = metadata.get("RepetitionTime")
    if given is None:
        return header_tr_s, [
            f"{run}: no RepetitionTime in a sidecar; the header's {header_tr_s:g} s is taken"
        ]
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < 1e4:
        raise InputError(f"{run}: RepetitionTime {given!r} in the sidecar; needs seconds")
    if abs(header_tr_s - given) > _TR_TOLERANCE_S:
        return float(given), [
            f"{run}: repetition time {header_tr_s:g} s in the header, {given:g} s in the sidecar; "
            "the sidecar's is taken"
        ]
    return float(given), []
