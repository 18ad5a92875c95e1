"""Shared memory that MPICH makes in /dev/shm: nothing of it stays behind, however ranks end.

MPICH takes the names away when a world ends as it should. Ranks that are killed, or abort, would
leave them, and with them 1 to 3 MB a run, until the machine is started anew. Open MPI makes such
memory later, and keeps its names.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_FOLDER = Path("/dev/shm")
_NAME = "mpich_shm_"
# By this age all ranks of a world have long mapped what they share, or never will.
_OLD_S = 60.0
_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Let signals that end a process wait, while there are names that it has to take away.

    They are noted, not blocked: the kernel would give them to a thread of some library. Only the
    main thread may do so; in another one, nothing waits.
    """
    came: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    usual = {number: signal.getsignal(number) for number in _SIGNALS if in_main}
    for number in usual:
        signal.signal(number, lambda number, _: came.append(number))
        signal.siginterrupt(number, False)  # what MPI reads and writes goes on
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        for one in came:  # the first may be one that is ignored
            signal.raise_signal(one)


def unlink_segments(maps: Path) -> None:
    """Take the names off the segments that are mapped here; the memory stays with the ranks.

    Parameters
    ----------
    maps : Path
        This process's, as /proc has them.
    """
    for name in _mapped(maps):
        with contextlib.suppress(OSError):  # a name that stays is no reason to end a run
            (_FOLDER / name).unlink()


def sweep_segments(folder: Path = _FOLDER, patience_s: float | None = None) -> None:
    """Remove what ranks left that were killed outright: segments that no process maps.

    A young one may be that of ranks that are starting, perhaps where their maps cannot be seen, and
    stays, unless this can wait for them.

    Parameters
    ----------
    folder : Path
    patience_s : float, optional
        Seconds after which segments go that nobody maps by then, old or young. There is no waiting
        where there is no segment.
    """
    with contextlib.suppress(OSError):
        found = [path for path in folder.glob(f"{_NAME}*") if path.lstat().st_uid == os.getuid()]
        if patience_s is None:
            found = [path for path in found if time.time() - path.lstat().st_mtime > _OLD_S]
        elif found:
            time.sleep(patience_s)
        if found:
            used = set[str]().union(*map(_mapped, Path("/proc").glob("[0-9]*/maps")))
            for path in found:
                if path.name not in used:
                    path.unlink(missing_ok=True)


def _mapped(maps: Path) -> set[str]:
    """Names of the segments that a process has mapped; none if it is gone, or another user's."""
    try:
        lines = maps.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    paths = (Path(line.split(maxsplit=5)[-1]) for line in lines if _NAME in line)
    return {path.name for path in paths}  # of an unlinked one it ends in " (deleted)"
