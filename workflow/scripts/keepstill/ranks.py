"""Ranks: who realigns which volume, with MPI under a launcher and alone without one.

Nothing of the series travels between ranks: each maps the staged file, writes its own volumes at
their own offsets, and only transforms are gathered.
"""

import contextlib
import fcntl
import io
import json
import logging
import os
import signal
import sys
import termios
import time
import traceback
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import numpy as np

from keepstill import geometry
from keepstill.ahead import Ahead
from keepstill.error_bars import with_error_bars
from keepstill.errors import InputError, KeepstillError, LaunchError
from keepstill.estimate import Estimate
from keepstill.figures import centre_of_gravity
from keepstill.itk_bridge import require_itk
from keepstill.itk_engine.check import check_volumes, checked_volumes, disagreement
from keepstill.itk_engine.run import realign_by_itk
from keepstill.read import StagedRun, open_staged
from keepstill.realign import (
    Crew,
    Part,
    Target,
    Task,
    choose_target,
    estimate_volumes,
    find_space,
    finish_volumes,
    fitted_volumes,
    lowest_motion_target,
    mean_target,
    median_slices,
    median_target,
    merged,
    model_volumes,
    write_residuals,
)
from keepstill.run_model import NO_MODEL, RunModel, fit_run_model
from keepstill.segments import signals_wait, unlink_segments
from keepstill.settings import RealignSettings
from keepstill.stage import ITK_NOTE, MOTION, put_staged
from keepstill.team import Team

# What launchers tell a rank of the world's size: MPICH and Slurm's PMI-2, Open MPI, PMIx.
_WORLD_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE")
# What srun says of its step, with or without a PMI that would let the tasks find each other.
_SLURM_STEP_SIZE = "SLURM_STEP_NUM_TASKS"

# How long a rank sleeps between two looks at whether the others have come: a part of the time that
# it has waited, for each look costs some 20 microseconds.
_NAP_S, _LONGEST_NAP_S, _NAP_PART = 0.0005, 0.005, 0.05

# How long a rank that crashes waits for the launcher to read its traceback.
_LAST_WORDS_S = 1.0

T = TypeVar("T")
# Does a little work; whether there was any.
Meanwhile = Callable[[], bool]

_log = logging.getLogger(__name__)


class Alone:
    """A world of one rank, without MPI."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """All ranks' values, on rank 0."""
        return [value]

    def allgather(self, value: Any, meanwhile: Meanwhile | None = None) -> list[Any]:
        """All ranks' values, on all ranks."""
        return [value]

    def bcast(self, value: Any, root: int = 0) -> Any:
        """One rank's value, on all ranks."""
        return value

    def abort(self, code: int) -> NoReturn:
        """End all ranks."""
        sys.exit(code)


class World:
    """The ranks that a launcher started; MPI is imported here and nowhere else."""

    def __init__(self) -> None:
        with signals_wait():
            from mpi4py import MPI

            self._comm = MPI.COMM_WORLD
            self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
            self._rest()  # until all ranks have mapped what they share
            unlink_segments(Path("/proc/self/maps"))

    def _rest(self, meanwhile: Meanwhile | None = None) -> None:
        """Sleep until all ranks are here: MPI's own waiting keeps a core busy.

        What can be done meanwhile is done, a little at a time.
        """
        all_here, began_s = self._comm.Ibarrier(), time.monotonic()
        while not all_here.Test():
            if meanwhile and meanwhile():
                began_s = time.monotonic()
            else:
                waited_s = time.monotonic() - began_s
                time.sleep(min(max(_NAP_S, _NAP_PART * waited_s), _LONGEST_NAP_S))

    def gather(self, value: Any) -> list[Any] | None:
        """All ranks' values, on rank 0."""
        self._rest()
        gathered: list[Any] | None = self._comm.gather(value)
        return gathered

    def allgather(self, value: Any, meanwhile: Meanwhile | None = None) -> list[Any]:
        """All ranks' values, on all ranks; those that wait do something meanwhile."""
        self._rest(meanwhile)
        gathered: list[Any] = self._comm.allgather(value)
        return gathered

    def bcast(self, value: Any, root: int = 0) -> Any:
        """One rank's value, on all ranks."""
        self._rest()
        return self._comm.bcast(value, root)

    def abort(self, code: int) -> NoReturn:
        """End all ranks, once the launcher has read what this one said."""
        sys.stdout.flush()
        sys.stderr.flush()
        _await_reader(sys.stderr.fileno())
        self._comm.Abort(code)
        os._exit(code)  # not reached, but the type checker cannot know


def _await_reader(pipe: int) -> None:
    """Wait until the reader of a pipe has taken what is in it, or a second.

    A launcher that is told to end all ranks drops what it has not read yet.
    """
    deadline_s = time.monotonic() + _LAST_WORDS_S
    unread = array("i", [1])
    with suppress(OSError):  # not a pipe
        while unread[0] and time.monotonic() < deadline_s:
            time.sleep(_NAP_S)
            fcntl.ioctl(pipe, termios.FIONREAD, unread)


def together(world: Alone | World, work: Callable[[], T], meanwhile: Meanwhile | None = None) -> T:
    """Own value of some work that all ranks do, once all have done it.

    A user's error on any rank becomes the error of all, so that they end alike, none waits for
    another that has left, and the first rank tells it once. Ranks that are done before others do
    something else meanwhile, a little at a time.

    Raises
    ------
    KeepstillError
        That of the lowest rank that met one.
    """
    value, error = _tried(work)
    _raise_first(world.allgather(error, meanwhile))
    return cast(T, value)


def _tried(work: Callable[[], T]) -> tuple[T | None, KeepstillError | None]:
    """Value of some work, or the user's error that it met."""
    try:
        return work(), None
    except KeepstillError as error:
        return None, error


def _raise_first(errors: Iterable[KeepstillError | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


def together_all(
    world: Alone | World, work: Callable[[], T], meanwhile: Meanwhile | None = None
) -> list[T]:
    """Values of all ranks, on all ranks, of some work that all do; errors as in `together`."""
    tried: list[tuple[T, KeepstillError | None]] = world.allgather(_tried(work), meanwhile)
    _raise_first(error for _, error in tried)
    return [value for value, _ in tried]


def on_first(world: Alone | World, work: Callable[[], T], meanwhile: Meanwhile | None = None) -> T:
    """Rank 0's value of some work that it alone does, on all ranks; errors as in `together`."""
    done = together_all(world, lambda: work() if world.rank == 0 else None, meanwhile)
    return cast(T, done[0])


@contextlib.contextmanager
def cores_of_all(world: Alone | World, n_threads: int) -> Iterator[int]:
    """Threads for what rank 0 does alone: the others rest, and their cores are for it to use.

    All ranks of a run are on one machine. Rank 0 may run on any of their cores meanwhile, and so
    may threads that it starts.
    """
    mask = os.sched_getaffinity(0)
    joint = set[int]().union(*world.allgather(mask))
    if world.rank == 0 and joint != mask:
        os.sched_setaffinity(0, joint)
    try:
        yield max(n_threads, min(n_threads * world.size, len(joint)))
    finally:
        os.sched_setaffinity(0, mask)


def launched_size() -> int | None:
    """Size of the world that a launcher says it started, or None without a launcher."""
    for variable in _WORLD_SIZE_VARIABLES:
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return None


def join_world(n_ranks: int | None = None) -> Alone | World:
    """The world that this process belongs to.

    Parameters
    ----------
    n_ranks : int or None
        How many ranks were asked for; None takes what the launcher says.

    Raises
    ------
    LaunchError
        If MPI finds another number of ranks. A launcher and a library that do not belong
        together would give as many worlds of one, each doing all the work over the others.
    """
    launched = launched_size()
    if launched is None and int(os.environ.get(_SLURM_STEP_SIZE) or 1) > 1:
        raise LaunchError(
            f"srun started {os.environ[_SLURM_STEP_SIZE]} tasks that do not know of each other; "
            "use srun --mpi=pmi2"
        )
    wanted = n_ranks or launched or 1
    world = Alone() if launched is None else World()
    if world.size != wanted:
        raise LaunchError(
            f"{wanted} ranks asked for, {world.size} found by MPI: launcher and MPI library do not "
            "belong together; use the mpirun that came with mpi4py's library"
        )
    return world


def run_in_world(n_ranks: int | None, work: Callable[[Alone | World], None]) -> int:
    """Exit code of some work that all ranks do.

    A user's error, which `together` has made the error of all ranks, is one line; anything else
    is a traceback, from the rank that met it, and the end of all ranks.
    """
    try:
        world = join_world(n_ranks)
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as end:
        os._exit(_exit_code(end))  # the launcher ends the others, for whom MPI's own end would wait
    try:
        work(world)
    except KeepstillError as error:
        if world.rank == 0:
            print(f"keepstill: {error}", file=sys.stderr, flush=True)
        return 2
    except (KeyboardInterrupt, SystemExit) as end:
        _end_all(world, _exit_code(end))  # one alone may be told to: the others would wait for ever
    except Exception:
        # In one piece: by line, a launcher may hear of the end between two of them.
        sys.stderr.write(traceback.format_exc())
        world.abort(1)
    return 0


def _exit_code(end: BaseException) -> int:
    """What a program that was told to end exits with, as shells have it."""
    if isinstance(end, SystemExit):
        return end.code if isinstance(end.code, int) else 1
    return 128 + signal.SIGINT


def _end_all(world: Alone | World, code: int) -> NoReturn:
    """End all ranks, the first one last: it clears the stage root, if it was told to end too."""
    if world.rank:
        time.sleep(_LAST_WORDS_S)
    world.abort(code)


def n_threads_of(world: Alone | World) -> int:
    """Threads for this rank: its affinity mask, shared out among ranks with the same mask."""
    mask = os.uname().nodename, tuple(sorted(os.sched_getaffinity(0)))
    masks = world.allgather(mask)
    return max(1, len(mask[1]) // masks.count(mask))


def log_ranks(world: Alone | World) -> None:
    """Tell the log, once and in order, which cores each rank may run on."""
    masks = world.gather(sorted(os.sched_getaffinity(0)))
    for rank, mask in enumerate(masks or ()):
        _log.info("rank %d of %d: cores %s", rank, world.size, ",".join(map(str, mask)))


def share(n: int, size: int, rank: int) -> range:
    """Volumes 0 ... n - 1 that a rank of `size` realigns: neighbours, as evenly as can be."""
    return range(n * rank // size, n * (rank + 1) // size)


def realign_staged(
    stage_dir: Path,
    settings: RealignSettings,
    world: Alone | World,
    crew: Crew,
    ahead: Ahead | None = None,
) -> None:
    """Realign the run in a stage directory, together with the other ranks of `world`.

    Leaves ``realigned.raw`` filled and ``motion.npz`` beside ``staged.json``.

    Parameters
    ----------
    stage_dir : Path
    settings : RealignSettings
    world : Alone or World
    crew : Crew
    ahead : Ahead or None
        What this rank has made of the run while it was staged, if all ranks had the opportunity.

    Raises
    ------
    InputError
        If the run has no usable reference, or no volume could be realigned.
    """
    if settings.uses_itk:
        together(world, require_itk)
    run = open_staged(stage_dir)
    target, ahead = _own_target(run, settings, world, crew, ahead)
    if image := settings.image:
        own = target.reference
        space = on_first(world, lambda: find_space(run.run, own, image, settings))
        if space and space.warning and not world.rank:
            _log.warning("%s", space.warning)
        target = replace(target, space=space)
    task = Task(run, target, settings)
    by_itk = settings.engine == "itk"
    if by_itk:
        found = _realign_all_by_itk(task, world, crew)
    else:
        found = _realign_all(task, world, crew, ahead)
    found = replace(found, estimates=with_error_bars(found.estimates))
    if settings.uses_itk:
        check = None if by_itk else _checked_by_itk(task, found, world, crew)
        on_first(world, lambda: _note_itk(stage_dir, check))
    on_first(world, lambda: _finish(stage_dir, run, target, found))


def own_target(
    run: StagedRun, settings: RealignSettings, world: Alone | World, crew: Crew
) -> Target:
    """What of a run the settings name as reference, whether or not it ends elsewhere.

    Raises
    ------
    InputError
        If it shows no head.
    """
    return _own_target(run, settings, world, crew, None)[0]


def _own_target(
    run: StagedRun, settings: RealignSettings, world: Alone | World, crew: Crew, ahead: Ahead | None
) -> tuple[Target, Ahead | None]:
    """As `own_target` has it, and what has been made ahead with it."""
    target, ahead = _first_target(run, settings, world, ahead)
    if settings.reslices_twice or settings.reference == "lowest-motion":
        return _second_target(Task(run, target, settings), world, crew, ahead), None
    return target, ahead


def _first_target(
    run: StagedRun, settings: RealignSettings, world: Alone | World, ahead: Ahead | None
) -> tuple[Target, Ahead | None]:
    """What all volumes are compared with first, and what has been made ahead with it, if any has.

    A rank that has prepared the reference ahead gives it to all.
    """
    if ahead:
        have_it = world.allgather(ahead.is_right(run))
        if any(have_it):
            return world.bcast(ahead.target, have_it.index(True)), ahead
        ahead.leave()
    return on_first(world, lambda: choose_target(run, settings)), None


def _second_target(task: Task, world: Alone | World, crew: Crew, ahead: Ahead | None) -> Target:
    """The reference of a second pass, which a first one tells."""
    run, first, settings = task.run, task.target, task.settings
    if settings.reference == "lowest-motion":
        estimates = list(_estimate_all(task, world, crew, ahead).estimates.values())
        return on_first(world, lambda: lowest_motion_target(run, first, estimates, settings))
    plain = replace(settings, reslice=True, outside="zero", non_negative=False)
    found = _realign_all(Task(run, first, plain), world, crew, ahead)
    estimates = list(found.estimates.values())
    if settings.reference == "mean":
        return on_first(world, lambda: mean_target(run, first, estimates, settings))
    mine = share(run.voxels.shape[1], world.size, world.rank)
    parts = together_all(world, lambda: median_slices(run, estimates, mine))
    slices = {z: part for each in parts for z, part in each.items()}
    return on_first(world, lambda: median_target(run, slices, settings))


def _estimate_all(task: Task, world: Alone | World, crew: Crew, ahead: Ahead | None) -> Part:
    """What all ranks find of all volumes before the last step, on all ranks.

    Where some have begun, whoever is free takes the next volume; else all take as many.
    """
    if ahead:
        return merged(together_all(world, lambda: ahead.finish(task, crew)))
    mine = share(task.run.n_volumes, world.size, world.rank)
    return merged(together_all(world, lambda: estimate_volumes(task, mine, crew)))


def _realign_all(task: Task, world: Alone | World, crew: Crew, ahead: Ahead | None) -> Part:
    """Estimate all volumes, fit the run's model, and finish each rank's own."""
    found = _estimate_all(task, world, crew, ahead)
    estimates = list(found.estimates.values())
    model = _fit_model(task, estimates, world, crew)
    own = {t: estimates[t] for t in share(task.run.n_volumes, world.size, world.rank)}
    finished = together_all(world, lambda: finish_volumes(task, own, model, crew))
    return replace(found, estimates={t: e for part in finished for t, e in part.items()})


def _realign_all_by_itk(task: Task, world: Alone | World, crew: Crew) -> Part:
    """What all ranks find of all volumes by ITK, on all ranks; each has written its own."""
    mine = share(task.run.n_volumes, world.size, world.rank)
    return merged(together_all(world, lambda: realign_by_itk(task, mine, crew)))


def _checked_by_itk(task: Task, found: Part, world: Alone | World, crew: Crew) -> dict[str, Any]:
    """What ITK says of some volumes, on all ranks."""
    mine = checked_volumes(task.run.n_volumes)[world.rank :: world.size]
    quiet = replace(crew, on_volume=lambda t: None)
    parts = together_all(world, lambda: check_volumes(task, mine, quiet) if mine else {})
    by_itk = {t: estimate for part in parts for t, estimate in part.items()}
    return disagreement(task, list(found.estimates.values()), by_itk)


def _note_itk(stage_dir: Path, check: dict[str, Any] | None) -> None:
    """Leave, for those that come after, which ITK it was and what it said."""
    for warning in check["warnings"] if check else ():
        _log.warning("%s", warning)
    note = {"version": require_itk(), "check": check}
    put_staged(stage_dir / ITK_NOTE, json.dumps(note).encode(), stage_dir.name)


def _fit_model(task: Task, estimates: list[Estimate], world: Alone | World, crew: Crew) -> RunModel:
    """What the residuals of a run's volumes have in common, the same on all ranks."""
    chosen = model_volumes(task, estimates)
    if not chosen:
        return NO_MODEL
    slots = {chosen[slot]: slot for slot in share(len(chosen), world.size, world.rank)}
    written = together_all(world, lambda: write_residuals(task, slots, estimates, crew))
    spans = {slot: part for parts in written for slot, part in parts.items()}
    fitted = fitted_volumes(task, [estimates[t] for t in chosen], spans)
    reference = task.target.reference
    blocks = share(len(reference.blocks) - 1, world.size, world.rank)
    team = Team(blocks, crew.n_threads, world.allgather)
    model = fit_run_model(reference, fitted, team)
    return replace(model, learnt_from=frozenset(chosen))


def _finish(stage_dir: Path, run: StagedRun, target: Target, found: Part) -> None:
    _refuse_if_none(run, found)
    _save(stage_dir, run, target, found)


def _refuse_if_none(run: StagedRun, found: Part) -> None:
    estimates = found.estimates.values()
    if all(estimate.status in ("failed", "reference") for estimate in estimates):
        raise InputError(
            f"{run.run}: none of {len(estimates)} volumes could be realigned; look at the run, "
            "or choose another reference"
        )


def _save(stage_dir: Path, run: StagedRun, target: Target, found: Part) -> None:
    estimates = list(found.estimates.values())
    own, end = target.reference, target.space or target.reference
    centre_mm, run_from_reference = own.centre_mm, np.eye(4)
    statuses = [e.status for e in estimates]
    if target.space:
        run_from_reference = target.space.reference_from_space
        centre_mm = geometry.world(geometry.inverse(run_from_reference), centre_mm)
        statuses = ["ok" if status == "reference" else status for status in statuses]
    missing = np.zeros((0, 0, 0), np.bool_) if found.missing is None else found.missing
    saved = io.BytesIO()
    np.savez(
        saved,
        moving_from_reference=np.array([e.moving_from_reference for e in estimates]),
        status=np.array(statuses),
        iterations=np.array([e.iterations for e in estimates]),
        cost=np.array([e.cost for e in estimates]),
        overlap=np.array([e.overlap for e in estimates]),
        scale=np.array([e.scale for e in estimates]),
        n_lost_slices=np.array([len(e.lost_slices) for e in estimates]),
        covariance=np.array([e.covariance for e in estimates]),
        centre_mm=centre_mm,
        run_from_reference=run_from_reference,
        run_centre_voxel=centre_of_gravity(own.volume),
        reference=end.volume,
        affine=end.affine,
        missing=missing,
        n_missing=found.n_missing,
        warning=np.array(target.space.warning if target.space else ""),
    )
    put_staged(stage_dir / MOTION, saved.getvalue(), run.run)
