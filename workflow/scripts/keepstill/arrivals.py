"""What has arrived of a run while it is still being staged, for ranks that would begin with it.

Two small files in the run's stage directory, open to its user alone. One says how much of the
staged file is whole, the other which volume is next: each is taken once, by whoever is free.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keepstill.errors import StageError

_ARRIVED, _TURN = "arrived", "turn"
_NUMBER_BYTES = 8


def ask_for_arrivals(stage_dir: Path) -> None:
    """Ask, before a run is staged in its folder, to be told what arrives.

    The files are empty, which is 0, and takes no room: there may be none.

    Raises
    ------
    StageError
        If there may not even be another file.
    """
    try:
        for name in (_ARRIVED, _TURN):
            os.close(os.open(stage_dir / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise StageError(
            f"stage directory {stage_dir}: {error.strerror}; choose another stage_root"
        ) from error


@contextlib.contextmanager
def telling(stage_dir: Path, known: dict[str, Any]) -> Iterator[Callable[[int], None]]:
    """What tells how many bytes of the staged file are whole.

    Nobody is told where nobody asked, or where there is no room for it.

    Parameters
    ----------
    stage_dir : Path
    known : dict
        What is known of the run before its voxels.
    """
    with contextlib.ExitStack() as stack:
        try:
            handle, turn = (os.open(stage_dir / name, os.O_WRONLY) for name in (_ARRIVED, _TURN))
            stack.callback(os.close, handle)
            stack.callback(os.close, turn)
            content = json.dumps(known).encode()
            # All room at once, before anybody takes a turn: half of what is known could be written.
            os.posix_fallocate(turn, 0, _NUMBER_BYTES)
            os.posix_fallocate(handle, 0, _NUMBER_BYTES + len(content))
            os.pwrite(handle, content, _NUMBER_BYTES)
        except OSError:
            yield lambda n_bytes: None
        else:
            yield lambda n_bytes: _put_number(handle, n_bytes)


class Arrivals:
    """What has arrived in a stage directory where `ask_for_arrivals` was called."""

    def __init__(self, stage_dir: Path) -> None:
        self._path = stage_dir / _ARRIVED
        self._handle = os.open(self._path, os.O_RDONLY)

    def n_bytes(self) -> int:
        """Number of bytes of the staged file that are whole."""
        return _number(self._handle)

    def known(self) -> dict[str, Any]:
        """What was known of the run before its voxels, once some of these are there."""
        content: dict[str, Any] = json.loads(self._path.read_bytes()[_NUMBER_BYTES:])
        return content


class Turns:
    """Numbers from 0, each of which one of several processes and threads takes."""

    def __init__(self, stage_dir: Path) -> None:
        self._handle = os.open(stage_dir / _TURN, os.O_RDWR)
        self._lock = threading.Lock()  # that of the file keeps out other processes only

    def take(self, end: int) -> int | None:
        """Next number, or None if that is not below an end."""
        with self._lock:
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            try:
                turn = _number(self._handle)
                if turn >= end:
                    return None
                _put_number(self._handle, turn + 1)
                return turn
            finally:
                fcntl.flock(self._handle, fcntl.LOCK_UN)

    def all_below(self, end: int) -> Iterator[int]:
        """Turns, one by one, until none is left below an end."""
        while (turn := self.take(end)) is not None:
            yield turn


def _number(handle: int) -> int:
    return int.from_bytes(os.pread(handle, _NUMBER_BYTES, 0), "little")


def _put_number(handle: int, number: int) -> None:
    os.pwrite(handle, number.to_bytes(_NUMBER_BYTES, "little"), 0)
