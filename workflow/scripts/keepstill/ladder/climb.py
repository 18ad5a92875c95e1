"""One rung, in processes of its own: python -m keepstill.ladder.climb JOB, with or without mpirun.

What is imported, compiled and loaded before the clock starts counts as start-up.
"""

import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from keepstill.bids import run_name
from keepstill.errors import KeepstillError, LaunchError
from keepstill.files import put_file, put_text
from keepstill.ladder import itk_bridge
from keepstill.ladder.classic import (
    Matrix,
    Reference,
    estimate,
    prepare_reference,
    sampled_smooth,
)
from keepstill.ladder.reslicing import prepare_reslice
from keepstill.ladder.rungs import WITH_FILES, Rung, slices_run
from keepstill.ladder.teams import Alone, Ranks, Team, shares
from keepstill.read import open_staged
from keepstill.settings import RealignSettings
from keepstill.stage import MOTION as STAGED_MOTION
from keepstill.stage import stage_run

SETTINGS = RealignSettings()
MOTION, REALIGNED, SPENT = "motion.npy", "realigned.raw", "spent.json"


@dataclass(frozen=True)
class Job:
    """What a rung is to do.

    Attributes
    ----------
    rung : Rung
    stage_dir : Path
        Holds the run, uncompressed.
    folder : Path
        For what the rung finds.
    volumes : tuple of int
        Those of the run that are realigned; keepstill takes all.
    n_ranks : int
    source : Path
        The run as a file.
    """

    rung: Rung
    stage_dir: Path
    folder: Path
    volumes: tuple[int, ...]
    n_ranks: int
    source: Path

    def to_json(self) -> str:
        """As `from_json` takes it."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> "Job":
        """A job from its file."""
        found = json.loads(text)
        paths = {name: Path(found[name]) for name in ("stage_dir", "folder", "source")}
        made = {"rung": Rung(**found["rung"]), "volumes": tuple(found["volumes"])}
        return Job(**(found | paths | made))


@dataclass
class Watch:
    """Seconds of one rank while it ran: processor time of its threads, and wall time."""

    cpu_s: float = 0.0
    wall_s: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the watch meanwhile."""
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        yield
        self.cpu_s += time.process_time() - cpu_s
        self.wall_s += time.perf_counter() - wall_s


@dataclass
class Spent:
    """What a rank spent before the clock started, in the loop over voxels, and on all else."""

    start_up_cpu_s: float
    loop: Watch = field(default_factory=Watch)
    rest: Watch = field(default_factory=Watch)


Motions = dict[int, Matrix]


class Classic:
    """The five rungs that ask ITK."""

    def __init__(self, job: Job, team: Team) -> None:
        itk_bridge.use_one_thread()
        self._job, self._team, self._run = job, team, open_staged(job.stage_dir)
        self._affine = self._run.layout.affine
        shape = (len(job.volumes), *self._run.voxels.shape[1:])
        self._out = np.memmap(job.folder / REALIGNED, np.float32, "r+", shape=shape)
        # What itk and numba load or compile when they are first called.
        sampled_smooth(self._run.volume(0), self._affine)
        tiny = np.zeros((2, 2, 2), np.float32)
        prepare_reslice(job.rung.loop, tiny, np.eye(4), np.eye(4))(tiny.copy(), range(2))

    def work(self, spent: Spent) -> Motions:
        """Realign this rank's volumes, and with the others those that are left over."""
        with spent.rest.running():
            smooth = sampled_smooth(self._run.volume(0), self._affine)
            reference = prepare_reference(smooth)
        mine = shares(len(self._job.volumes), self._team.size, self._team.rank)
        own = {i: self._realign(i, reference, Alone(), spent) for i in mine.own}
        joint = {i: self._realign(i, reference, self._team, spent) for i in mine.joint}
        return own | joint

    def _realign(self, position: int, reference: Reference, team: Team, spent: Spent) -> Matrix:
        """Estimate one volume, `moving_from_reference`, and reslice it."""
        with spent.rest.running():
            volume = self._run.volume(self._job.volumes[position])
            smooth = sampled_smooth(volume, self._affine)
            found = estimate(smooth, reference, team, self._run.run)
            motion = np.asarray(np.linalg.inv(found), np.float64)
            fill = prepare_reslice(self._job.rung.loop, volume, self._affine, motion)
        slices = slices_run(volume.shape[0], self._job.rung.every_slice)
        with spent.loop.running():
            fill(self._out[position], slices[team.rank :: team.size])
        return found


class Engine:
    """keepstill itself: from staged voxels to realigned ones, or from file to files."""

    def __init__(self, job: Job, team: Team) -> None:
        from keepstill.ranks import join_world
        from keepstill.warm import warm_kernels

        self._job, self._team = job, team
        self._world = join_world(job.n_ranks)
        warm_kernels()

    def work(self, spent: Spent) -> Motions:
        """Realign the run, all volumes; the first rank has the motion."""
        with spent.rest.running():
            stage_dir = self._to_files() if self._job.rung.loop == WITH_FILES else self._realign()
        if self._team.rank > 0:
            return {}
        with np.load(stage_dir / STAGED_MOTION) as found:
            motions = found["moving_from_reference"]
        return {i: motions[t] for i, t in enumerate(self._job.volumes)}

    def _realign(self, stage_dir: Path | None = None) -> Path:
        from keepstill.ranks import n_threads_of, realign_staged
        from keepstill.realign import Crew

        stage_dir = stage_dir or self._job.stage_dir
        realign_staged(stage_dir, SETTINGS, self._world, Crew(n_threads_of(self._world)))
        return stage_dir

    def _to_files(self) -> Path:
        from keepstill.collect import collect_run
        from keepstill.ranks import n_threads_of, on_first

        job, stage_dir = self._job, self._job.folder / "stage"
        run = run_name(job.source)
        on_first(self._world, lambda: stage_run(job.source, run, None, stage_dir, SETTINGS))
        self._realign(stage_dir)
        n_threads = n_threads_of(self._world)
        out = job.folder / "files"
        on_first(self._world, lambda: collect_run(stage_dir, out, SETTINGS, n_threads))
        return stage_dir


def climb(job: Job) -> None:
    """Do a job with the team that this process is of, and write what was found and spent.

    Raises
    ------
    LaunchError
        If the team is not as large as was asked for.
    """
    team = Ranks() if job.rung.has_ranks else Alone()
    if team.size != job.n_ranks:
        raise LaunchError(
            f"{job.n_ranks} ranks asked for, {team.size} found by MPI: launcher and MPI library do "
            "not belong together; use the mpirun that came with mpi4py's library"
        )
    way = Classic(job, team) if job.rung.is_classic else Engine(job, team)
    spent = Spent(time.process_time())
    team.wait()
    motions = way.work(spent)
    gathered = team.gather((motions, asdict(spent)))
    if gathered is not None:
        found = {i: matrix for part, _ in gathered for i, matrix in part.items()}
        saved = io.BytesIO()
        np.save(saved, np.array([found[i] for i in range(len(job.volumes))]))
        put_file(job.folder / MOTION, [saved.getvalue()])
        put_text(job.folder / SPENT, json.dumps([each for _, each in gathered]))


def main() -> None:
    """Parse, then climb; what the user can mend is one line."""
    try:
        climb(Job.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
