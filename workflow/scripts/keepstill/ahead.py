"""Working ahead: what ranks make of a run while the first of them is still staging it.

The reference is prepared as soon as the volume is there that the settings name, and volumes are
estimated as they come in. Each estimate depends on its volume and the reference alone, so who makes
it, and when, changes no byte. The number of dummy volumes is found once all is staged; where it is
not what was taken for granted, what was made ahead is dropped.
"""

import itertools
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from keepstill.arrivals import Arrivals, Turns
from keepstill.errors import KeepstillError
from keepstill.kernels import (
    aliasing,
    bspline,
    components,
    courses,
    passes,
    sampling,
    small,
    sums,
)
from keepstill.kernels.cache import load_kept
from keepstill.read import StagedRun, open_arriving
from keepstill.realign import (
    Crew,
    Part,
    Target,
    Task,
    Worker,
    estimate_volumes,
    merged,
    named_volume,
    shows_anything,
    target_of,
)
from keepstill.settings import RealignSettings

# What each rank runs, in the order in which it is wanted.
_KERNELS = (
    *(components.largest_component, bspline.filter_rows, small.product, small.solution),
    *(bspline.fill_coefficients, sums.cross_sums, sums.sums_of_parts),
    *(sampling.narrow_spans, sampling.fill_unmoved, passes.passes_of, passes.fill_by_passes),
    *(sums.to_residuals, sums.block_sums, sums.outside_normal, sums.outside_normals),
    *(aliasing.row_phases, aliasing.wave_tables, aliasing.fill_factors, aliasing.fit_fields),
    *(aliasing.take_off_aliasing, courses.fill_left, courses.map_of, courses.course_of),
)


class Ahead:
    """What one rank makes of a run ahead.

    Parameters
    ----------
    stage_dir : Path
        Of the run, where `arrivals.ask_for_arrivals` was called.
    settings : RealignSettings
    n_threads : int
        Volumes under way at once.

    Attributes
    ----------
    target : Target or None
        The reference, once it is prepared.
    """

    def __init__(self, stage_dir: Path, settings: RealignSettings, n_threads: int) -> None:
        self._arrivals, self._turns = Arrivals(stage_dir), Turns(stage_dir)
        self._settings, self._crew = settings, Crew(n_threads)
        self._n_dummy = 0 if settings.dummy_scans == "auto" else int(settings.dummy_scans)
        self._found = Part({})
        self._error: KeepstillError | None = None
        self._work = self._steps()
        self.target: Target | None = None

    def step(self) -> bool:
        """Do a little; whether there was anything to do."""
        return next(self._work, False)

    def is_right(self, run: StagedRun) -> bool:
        """Whether this rank's reference is that of the run, now that it is staged."""
        return self.target is not None and run.n_dummy == self._n_dummy

    def leave(self) -> None:
        """Go no further; with its work space goes this rank's own copy of the reference."""
        self._work.close()
        self.target = None

    def finish(self, task: Task, crew: Crew) -> Part:
        """What this rank found ahead, and what it finds while there are volumes left.

        Raises
        ------
        KeepstillError
            That of a volume ahead.
        """
        self.leave()
        if self._error:
            raise self._error
        turns = self._turns.all_below(task.run.n_volumes)
        return merged([self._found, estimate_volumes(task, turns, crew)])

    def _steps(self) -> Generator[bool, None, None]:
        """A little at a time; whether there was anything to do."""
        for kernel in _KERNELS:
            load_kept(kernel)
            yield True
        while not self._arrivals.n_bytes():
            yield False
        try:
            run = open_arriving(self._arrivals.known(), self._n_dummy)
        except OSError:  # removed, since the run cannot be staged
            return
        try:
            yield from self._prepare(run)
            if self.target:
                yield from self._estimate(Task(run, self.target, self._settings))
        except KeepstillError as error:
            self._error = error

    def _prepare(self, run: StagedRun) -> Iterator[bool]:
        t = named_volume(run, self._settings)
        while self._n_whole(run) <= t < run.n_volumes:
            yield False
        # Where it shows nothing, another volume is chosen once all are there.
        if t < run.n_volumes and shows_anything(run.volume(t)):
            self.target = target_of(run, t, self._settings)
            yield True

    def _estimate(self, task: Task) -> Iterator[bool]:
        worker, found = Worker(task), dict[int, Any]()
        while True:
            end = self._n_whole(task.run)
            turns = list(itertools.islice(self._turns.all_below(end), self._crew.n_threads))
            if turns:  # else threads would start for nothing, at each look
                found |= self._crew.each(worker.estimate, turns)
                self._found = worker.part(found)
            yield bool(turns)

    def _n_whole(self, run: StagedRun) -> int:
        """Number of volumes that have arrived."""
        return (self._arrivals.n_bytes() - run.layout.offset) // run.voxels[0].nbytes
