"""All rungs on one simulated run, in turn: what each costs, and how far it is from the truth."""

import contextlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.bids import run_name
from keepstill.errors import LaunchError, OutputError
from keepstill.files import put_text
from keepstill.ladder.climb import MOTION, REALIGNED, SETTINGS, SPENT, Job
from keepstill.ladder.itk_bridge import require_itk
from keepstill.ladder.rungs import RUNGS, Rung, numbered, slices_run
from keepstill.lanes import THREAD_COUNTS
from keepstill.read import open_staged
from keepstill.stage import private_stage_root, single_stage_dir, stage_run
from keepstill.truth import Truth, read_truth, truth_path


@dataclass(frozen=True)
class Trial:
    """What is run, and how.

    Attributes
    ----------
    source : Path
        BOLD file of a simulated study, ``sub-*/func/`` below its folder.
    n_ranks : int
    launcher, binding : str
        The MPI launcher, and its flags that bind ranks to cores.
    every_volume : int
        The classic rungs realign only every so manieth volume.
    n_repeats : int
        All rungs are run one after the other, so often; medians count.
    stage_root : Path
        Holds the run, uncompressed, and what is found.
    rungs : tuple of Rung
    """

    source: Path
    n_ranks: int
    launcher: str = "mpirun"
    binding: str = ""
    every_volume: int = 5
    n_repeats: int = 3
    stage_root: Path = Path("/dev/shm")
    rungs: tuple[Rung, ...] = RUNGS


class Cost(NamedTuple):
    """Seconds a volume, and of start-up: processor time of all ranks, and wall time."""

    cpu_s: float
    wall_s: float
    start_up_cpu_s: float
    start_up_wall_s: float


@dataclass(frozen=True)
class Figures:
    """Line of the table.

    Attributes
    ----------
    name : str
    n_ranks : int
    cost : Cost
        Medians of the repeats.
    volumes, slices : (run, of)
        How many were realigned, and how many slices of each were resliced.
    error_mm : (median, worst)
        Mean displacement over the brain against the known motion, over volumes.
    apart_mm : float
        Most that a volume's motion is from that of the first rung, in the same measure.
    """

    name: str
    n_ranks: int
    cost: Cost
    volumes: tuple[int, int]
    slices: tuple[int, int]
    error_mm: tuple[float, float]
    apart_mm: float


def measure(trial: Trial, tell: Callable[[str], object] = lambda line: None) -> list[Figures]:
    """Figures of each rung.

    Raises
    ------
    SettingsError
        Without ITK.
    LaunchError
        If a rung's processes fail.
    OutputError
        If a rung does not return every volume.
    """
    require_itk()
    truth = read_truth(truth_path(trial.source.parents[2], trial.source))
    costs: dict[Rung, list[Cost]] = {rung: [] for rung in trial.rungs}
    motions: dict[Rung, NDArray[np.float64]] = {}
    with single_stage_dir(private_stage_root(trial.stage_root)) as folder:
        stage_run(trial.source, run_name(trial.source), None, folder / "staged", SETTINGS)
        for repeat in range(trial.n_repeats):
            for line, rung in enumerate(trial.rungs, 1):
                name = f"rung {numbered(line)}: {rung.name}" if numbered(line) else rung.name
                tell(f"repeat {repeat + 1} of {trial.n_repeats}, {name}")
                with _job(trial, rung, folder) as job:
                    costs[rung].append(run_job(job, trial))
                    motions[rung] = checked_motion(job)
        shape = open_staged(folder / "staged").voxels.shape
    of = Compared(truth, motions[trial.rungs[0]], shape, trial)
    return [figures_of(rung, costs[rung], motions[rung], of) for rung in trial.rungs]


class Compared(NamedTuple):
    """What a rung's motion is compared with, and the (n, nz, ny, nx) of the run."""

    truth: Truth
    first: NDArray[np.float64]
    shape: tuple[int, ...]
    trial: Trial


def figures_of(
    rung: Rung, costs: Sequence[Cost], motion: NDArray[np.float64], of: Compared
) -> Figures:
    """Line of a rung, from its costs in all repeats and its motion, (n, 4, 4), of volumes run."""
    n, nz = of.shape[:2]
    volumes = range(0, n, of.trial.every_volume)
    truth = replace(of.truth, moving_from_first=of.truth.moving_from_first[list(volumes)])
    error_mm = truth.error_mm(motion, 0)[1:]
    apart_mm = geometry.displacement_mm(motion, of.first, truth.brain_mm)
    return Figures(
        name=_name(rung, of.trial),
        n_ranks=of.trial.n_ranks if rung.has_ranks else 1,
        cost=Cost(*(statistics.median(each) for each in zip(*costs, strict=True))),
        volumes=(len(volumes) if rung.is_classic else n, n),
        slices=(len(slices_run(nz, rung.every_slice)), nz),
        error_mm=(float(np.median(error_mm)), float(error_mm.max())),
        apart_mm=float(apart_mm.max()),
    )


def _name(rung: Rung, trial: Trial) -> str:
    """A rung as table and picture have it: one that is about binding may have gone without."""
    is_without = rung.is_classic and rung.is_bound and not trial.binding
    return f"{rung.name} (not bound: no flags in the profile)" if is_without else rung.name


@contextlib.contextmanager
def _job(trial: Trial, rung: Rung, folder: Path) -> Iterator[Job]:
    """A rung's job, with room for what it finds, which goes afterwards."""
    own, staged = folder / "rung", folder / "staged"
    own.mkdir()
    n, *shape = open_staged(staged).voxels.shape
    volumes = tuple(range(0, n, trial.every_volume))
    if rung.is_classic:  # NaN marks what no rank returns
        np.memmap(own / REALIGNED, np.float32, "w+", shape=(len(volumes), *shape))[:] = np.nan
    n_ranks = trial.n_ranks if rung.has_ranks else 1
    yield Job(rung, staged, own, volumes, n_ranks, trial.source)
    shutil.rmtree(own)


def run_job(job: Job, trial: Trial) -> Cost:
    """Run a rung's processes to their end; what they cost.

    Raises
    ------
    LaunchError
        If they fail.
    """
    path = job.folder / "job.json"
    put_text(path, job.to_json())
    command = [sys.executable, "-m", "keepstill.ladder.climb", str(path)]
    if job.rung.has_ranks:
        flags = shlex.split(trial.binding) if job.rung.is_bound else []
        launcher = [*shlex.split(trial.launcher), "-n", str(job.n_ranks), *flags]
        command = [*launcher, sys.executable, "-m", "mpi4py", *command[1:]]
    began_s = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_one_each())
    except OSError as error:
        raise LaunchError(f"{command[0]}: {error.strerror}; set mpi in the profile") from error
    seconds = time.perf_counter() - began_s
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [""]
        own = [line for line in said if line.startswith("keepstill: ")] or said
        raise LaunchError(f"{job.rung.name}: {own[-1].removeprefix('keepstill: ')}")
    n_slices = open_staged(job.stage_dir).voxels.shape[1]
    scale = n_slices / len(slices_run(n_slices, job.rung.every_slice))
    n_volumes = len(job.volumes)
    if not job.rung.is_classic:
        n_volumes = open_staged(job.stage_dir).n_volumes
    return cost_of(json.loads((job.folder / SPENT).read_text()), scale, n_volumes, seconds)


def _one_each() -> dict[str, str]:
    """The environment, with a thread a rank for libraries; numba takes what a rank is bound to."""
    return dict(os.environ) | dict.fromkeys(THREAD_COUNTS, "1")


def cost_of(
    ranks: Sequence[Mapping[str, Any]], scale: float, n_volumes: int, seconds: float
) -> Cost:
    """Cost a volume from what each rank spent.

    Parameters
    ----------
    ranks : sequence of mapping
        Of each rank, ``start_up_cpu_s``, and ``cpu_s`` and ``wall_s`` of ``loop`` and ``rest``.
    scale : float
        The loop over voxels was run on one part in so many, and is multiplied up; the rest is not.
    n_volumes : int
        Volumes that were realigned.
    seconds : float
        Wall time of the whole, launcher included. What is not work is start-up.

    Returns
    -------
    cost : Cost
        Processor time is the sum over ranks, wall time that of the slowest.
    """
    cpu_s = [rank["rest"]["cpu_s"] + scale * rank["loop"]["cpu_s"] for rank in ranks]
    wall_s = [rank["rest"]["wall_s"] + scale * rank["loop"]["wall_s"] for rank in ranks]
    worked_s = max(rank["rest"]["wall_s"] + rank["loop"]["wall_s"] for rank in ranks)
    return Cost(
        cpu_s=sum(cpu_s) / n_volumes,
        wall_s=max(wall_s) / n_volumes,
        start_up_cpu_s=sum(rank["start_up_cpu_s"] for rank in ranks),
        start_up_wall_s=seconds - worked_s,
    )


def checked_motion(job: Job) -> NDArray[np.float64]:
    """Motion (n, 4, 4) that a rung found, once it is known to have returned every volume.

    Raises
    ------
    OutputError
    """
    motion: NDArray[np.float64] = np.load(job.folder / MOTION)
    if job.rung.is_classic:
        nz, ny, nx = open_staged(job.stage_dir).voxels.shape[1:]
        shape = (len(job.volumes), nz, ny, nx)
        volumes = np.memmap(job.folder / REALIGNED, np.float32, "r", shape=shape)
        slices = slices_run(nz, job.rung.every_slice)
        missing = [t for t, volume in zip(job.volumes, volumes, strict=True)
                   if not np.isfinite(volume[slices]).all()]  # fmt: skip
        if missing:
            raise OutputError(f"{job.rung.name}: no voxels of volumes {missing}; a rank lost them")
    return motion
