"""Lanes: the cores that one run's ranks have to themselves while other runs go on beside it.

Two launchers on one machine know nothing of each other and both bind from core 0 upwards. So a
lane first leases its cores, machine-wide: one abstract unix socket per core, which only one
process can bind and which the kernel frees with the last process that holds it. The sockets
are inherited across exec, so a lease outlives the launcher script, and Snakemake with it. Seen
with MPICH 5.0: mpirun, its proxy and every rank hold them; with Open MPI 5.0: mpirun alone.

A core is a CPU in the kernel's numbering: one hardware thread. Abstract names belong to a
network namespace, so containers with a network of their own do not see each other's leases.
There is no queue: a wide lane among many narrow ones may wait for long.
"""

import errno
import itertools
import logging
import os
import random
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from keepstill.errors import LaunchError

CORES_PLACEHOLDER = "{cores}"
SOCKET_NAME = "\0keepstill-core-"  # a leading NUL makes the name abstract: no file, no rights
CPU_DIR = Path("/sys/devices/system/cpu")
# Snakemake sets all of these to a rule's threads, which for a lane is the number of its ranks.
THREAD_COUNTS = (
    "OMP_NUM_THREADS",
    "GOTO_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """Cores held by this process and by whatever inherits its sockets.

    Attributes
    ----------
    cores : tuple of int
        One entry per core asked for, repeated where the mask is smaller; empty without a lease.
    sockets : tuple of socket.socket
        The bound sockets, one per distinct core, inheritable.
    """

    cores: tuple[int, ...]
    sockets: tuple[socket.socket, ...]

    def release(self) -> None:
        """Give up this process's hold; heirs keep theirs."""
        for held in self.sockets:
            held.close()


class Place(NamedTuple):
    """Where a hardware thread sits; equal places are one physical core."""

    package: int
    siblings: tuple[int, ...]


def lease_cores(
    n_cores: int,
    *,
    wait_s: float | None = None,
    poll_s: float = 0.2,
    on_wait: Callable[[str], None] | None = None,
) -> Lease:
    """Cores of this process's affinity mask that no other lane holds, waited for if need be.

    All or nothing: a lane that waits holds no core, so lanes cannot block each other.

    Parameters
    ----------
    n_cores : int
        More than the mask has leases the whole mask and repeats it in the lease's cores.
    wait_s : float, optional
        Seconds to wait before giving up; None waits for as long as it takes.
    poll_s : float
        Mean time between two attempts, in seconds.
    on_wait : callable, optional
        Told once, in words, that the lane waits; by default the log is.

    Returns
    -------
    lease : Lease
        Without cores, after a warning, where the system has no abstract sockets.

    Raises
    ------
    LaunchError
        If `n_cores` is below 1, or too few cores were free for `wait_s` seconds.
    """
    if n_cores < 1:
        raise LaunchError(f"{n_cores} cores asked for; needs 1 or more")
    if sys.platform != "linux":
        return _no_lease(f"{sys.platform} has no abstract unix sockets")
    mask = os.sched_getaffinity(0)
    if n_cores > len(mask):
        log.warning(
            "warning: %d cores asked for, %d allowed: ranks share cores", n_cores, len(mask)
        )
    try:
        lease = _wait_for_lease(mask, min(n_cores, len(mask)), wait_s, poll_s, on_wait or log.info)
    except OSError as error:
        return _no_lease(str(error))
    repeated = itertools.islice(itertools.cycle(lease.cores), n_cores)
    return Lease(tuple(repeated), lease.sockets)


def fill_cores(
    arguments: Sequence[str], cores: Sequence[int], *, threads_per_rank: int = 1
) -> list[str]:
    """Launcher arguments with every `{cores}` replaced by the leased cores.

    Parameters
    ----------
    arguments : sequence of str
    cores : sequence of int
        `threads_per_rank` entries for every rank. If empty, an argument with `{cores}` goes
        away together with the flag before it, and the ranks are left to the kernel.
    threads_per_rank : int
        Above 1 a rank's cores are joined by ``+``, which MPICH's ``-bind-to user:`` takes.

    Returns
    -------
    filled : list of str
        With ``2,3`` for ranks of one thread, ``2+3,4+5`` for ranks of two.
    """
    if not cores:
        return _without_placeholder(arguments)
    starts = range(0, len(cores), threads_per_rank)
    ranks = (dict.fromkeys(cores[start : start + threads_per_rank]) for start in starts)
    listed = ",".join("+".join(str(core) for core in rank) for rank in ranks)
    return [argument.replace(CORES_PLACEHOLDER, listed) for argument in arguments]


def launch_command(launcher: str, flags: str, n_ranks: int) -> list[str]:
    """What a rank's script is put behind: one rank needs no launcher, and no mpi4py."""
    if n_ranks == 1:
        return ["python"]
    launched = [*shlex.split(launcher), "-n", str(n_ranks), *shlex.split(flags)]
    return [*launched, "python", "-m", "mpi4py"]


def become(command: Sequence[str], n_ranks: int, threads_per_rank: int = 1) -> NoReturn:
    """Replace this process by `command`, on leased cores; signals and exit status are its own.

    The command is confined to the leased cores as well as told of them. That holds for a
    single rank and for a launcher that does not bind, and is no hindrance to one that does.

    Raises
    ------
    LaunchError
        If the command is not there, or not a single rank or thread was asked for.
    """
    if shutil.which(command[0]) is None:
        raise LaunchError(f"{command[0]}: no such command; needs to be installed and on PATH")
    if threads_per_rank < 1:
        raise LaunchError(f"{threads_per_rank} threads per rank asked for; needs 1 or more")
    lease = lease_cores(n_ranks * threads_per_rank)
    if sys.platform == "linux" and lease.cores:
        os.sched_setaffinity(0, lease.cores)
    for name in THREAD_COUNTS:
        os.environ[name] = str(threads_per_rank)
    filled = fill_cores(command, lease.cores, threads_per_rank=threads_per_rank)
    os.execvp(filled[0], filled)


def choose_cores(
    mask: Set[int], taken: Set[int], n_cores: int, places: Mapping[int, Place]
) -> tuple[int, ...] | None:
    """Cores for a lane: neighbours, on physical cores of their own while enough are idle.

    Parameters
    ----------
    mask : set of int
        What this process may use.
    taken : set of int
        What other lanes hold, in the mask or beside it.
    n_cores : int
    places : mapping of int to Place
        For every core of the mask.

    Returns
    -------
    cores : tuple of int, or None
        In the machine's order (package, physical core, thread); None if too few are free.
    """
    threads = sorted(mask, key=lambda cpu: (places[cpu], cpu))
    firsts: dict[Place, int] = {}
    for cpu in threads:
        firsts.setdefault(places[cpu], cpu)
    idle_cores = [cpu for place, cpu in firsts.items() if taken.isdisjoint(place.siblings)]
    idle_threads = [cpu for cpu in threads if cpu not in taken]
    for row, idle in ((list(firsts.values()), idle_cores), (threads, idle_threads)):
        if len(idle) >= n_cores:
            return _neighbours(_stretches(row, set(idle), places), n_cores)
    return None


def read_places(cpus: Iterable[int], cpu_dir: Path) -> dict[int, Place]:
    """Package and siblings of each CPU; a CPU the kernel tells nothing of stands alone."""
    return {cpu: _read_place(cpu, cpu_dir / f"cpu{cpu}" / "topology") for cpu in cpus}


def _read_place(cpu: int, topology: Path) -> Place:
    try:
        package = int((topology / "physical_package_id").read_text())
        spans = (topology / "thread_siblings_list").read_text().strip().split(",")
        bounds = [[int(bound) for bound in span.split("-")] for span in spans]
    except (OSError, ValueError):
        return Place(0, (cpu,))
    siblings = {s for bound in bounds for s in range(bound[0], bound[-1] + 1)}
    return Place(package, tuple(sorted(siblings | {cpu})))


def _stretches(row: list[int], idle: Set[int], places: Mapping[int, Place]) -> list[list[int]]:
    """Unbroken stretches of idle cores in a row, none across two packages."""
    grouped = itertools.groupby(row, key=lambda cpu: (places[cpu].package, cpu in idle))
    return [list(cpus) for (_, is_idle), cpus in grouped if is_idle]


def _neighbours(stretches: list[list[int]], n_cores: int) -> tuple[int, ...]:
    """Cores of the shortest stretch that holds them all, else of as few stretches as can be."""
    fitting = [stretch for stretch in stretches if len(stretch) >= n_cores]
    if fitting:
        return tuple(min(fitting, key=len)[:n_cores])
    longest_first = itertools.chain(*sorted(stretches, key=len, reverse=True))
    chosen = set(itertools.islice(longest_first, n_cores))
    return tuple(cpu for cpu in itertools.chain(*stretches) if cpu in chosen)


def _wait_for_lease(
    mask: Set[int],
    n_cores: int,
    wait_s: float | None,
    poll_s: float,
    on_wait: Callable[[str], None],
) -> Lease:
    places = read_places(mask, CPU_DIR)
    deadline_s = None if wait_s is None else time.monotonic() + wait_s
    told = False
    while (lease := _try_lease(mask, n_cores, places)) is None:
        if deadline_s is not None and time.monotonic() >= deadline_s:
            raise LaunchError(
                f"fewer than {n_cores} of {len(mask)} cores were free for {wait_s:g} s; "
                "wait for other runs to end or ask for fewer ranks"
            )
        if not told:
            on_wait(f"waiting for {n_cores} of {len(mask)} cores")
            told = True
        time.sleep(poll_s * random.uniform(0.5, 1.5))  # out of step with the other lanes
    return lease


def _try_lease(mask: Set[int], n_cores: int, places: Mapping[int, Place]) -> Lease | None:
    """Lease taken at once, or None if too few cores are free."""
    known = mask | {sibling for place in places.values() for sibling in place.siblings}
    while cores := choose_cores(mask, _taken(known), n_cores, places):
        sockets = _bind_all(cores)
        if sockets is not None:
            return Lease(cores, sockets)
    return None


def _taken(cpus: Iterable[int]) -> set[int]:
    """Cores that some lane holds; looking takes none, so it disturbs nobody."""
    answers = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        for cpu in cpus:
            answers[cpu] = probe.connect_ex(_address(cpu))
    for answer in set(answers.values()) - {0, errno.ECONNREFUSED}:
        raise OSError(answer, os.strerror(answer))
    return {cpu for cpu, answer in answers.items() if answer == 0}


def _bind_all(cores: Iterable[int]) -> tuple[socket.socket, ...] | None:
    """One bound socket per core, or None, holding nothing, if another lane was faster.

    All lanes bind in ascending order, so of those in a race one always gets through.
    """
    held: list[socket.socket] = []
    try:
        for core in sorted(cores):
            held.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            held[-1].bind(_address(core))
    except OSError as error:
        Lease((), tuple(held)).release()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    for bound in held:
        bound.set_inheritable(True)
    return tuple(held)


def _address(core: int) -> str:
    return f"{SOCKET_NAME}{core}"


def _no_lease(reason: str) -> Lease:
    log.warning("warning: no cores leased (%s): ranks are not bound", reason)
    return Lease((), ())


def _without_placeholder(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for argument in arguments:
        if CORES_PLACEHOLDER not in argument:
            kept.append(argument)
        elif not argument.startswith("-") and kept and kept[-1].startswith("-"):
            kept.pop()
    return kept
