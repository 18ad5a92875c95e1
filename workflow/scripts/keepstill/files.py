"""Files written whole or not at all."""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from keepstill.errors import OutputError

_LOG_BYTES = 1 << 16  # more than any job's log


@dataclass(frozen=True)
class Written:
    """Hash and size of what was written to a file."""

    sha256: str
    bytes: int


def put_file(path: Path, parts: Iterable[bytes]) -> Written:
    """Write a file under a temporary name of its own, sync it, rename it.

    Its folder is made if need be. On an error nothing is left behind. What was handed to the
    file, all of which has reached the disk, is hashed on its way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, digest, n_bytes = _part_of(path), hashlib.sha256(), 0
    try:
        with part.open("wb") as file:
            for content in parts:
                file.write(content)
                digest.update(content)
                n_bytes += len(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return Written(digest.hexdigest(), n_bytes)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same file, which is gone afterwards.

    What a killed process leaves keeps nobody waiting. On a disk without locks nobody waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("w"))
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            # Who held it before has removed it, and a third may have made another.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def claim_output_dir(output_dir: Path, what: str) -> None:
    """Make the output directory, before any work is done for it.

    Raises
    ------
    OutputError
        If it cannot be made or written to, or is full.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(output_dir, os.W_OK | os.X_OK)
        reason = why_no_room(output_dir) if is_writable else "no permission to write"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise OutputError(f"{what}: cannot write to {output_dir} ({reason}); choose another folder")


def why_no_room(folder: Path) -> str:
    """Why a folder takes not even what jobs have to say (full, quota); empty if it does."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_LOG_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def refuse_foreign_data_set(output_dir: Path, what: str) -> None:
    """Refuse an output directory that is somebody else's BIDS data set.

    Raises
    ------
    OutputError
    """
    description = output_dir / "dataset_description.json"
    if not description.exists():
        return
    try:
        made_by = json.loads(description.read_text(encoding="utf-8")).get("GeneratedBy", [])
        names = [entry.get("Name") for entry in made_by]
    except (OSError, ValueError, AttributeError, TypeError):
        names = []
    if "keepstill" not in names:
        raise OutputError(
            f"{what}: {output_dir} is a data set that keepstill did not make; choose another "
            "folder, such as derivatives/keepstill in the raw data set"
        )


def _part_of(path: Path) -> Path:
    """A name for what is not whole yet; process numbers agree on two nodes, and in containers."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


def put_text(path: Path, text: str) -> None:
    """`put_file` of a text, as UTF-8."""
    put_file(path, [text.encode()])


def put_private(path: Path, content: bytes) -> None:
    """Write a file that its user alone may read, whole or not at all."""
    part = _part_of(path)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    part.replace(path)


def file_sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
