"""Realigning a staged run: which volume is the reference, and what is done with each."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.error_bars import with_explained_noise
from keepstill.errors import EmptyVolumeError, InputError
from keepstill.estimate import Estimate, estimate_motion
from keepstill.kernels.aliasing import Fitted
from keepstill.last_step import residuals_of, take_last_step, to_moving_voxel
from keepstill.lost_slices import filled, find_lost_slices, slice_means
from keepstill.moving import Coefficients, Moving, prepare_moving
from keepstill.read import StagedRun, read_volume
from keepstill.reference import Acquisition, Reference, prepare_reference
from keepstill.reslice import extend_volume, reslice_volume
from keepstill.run_model import RunModel, fitted_to
from keepstill.settings import RealignSettings
from keepstill.smooth import fill_missing
from keepstill.stage import enlarge_staged

Progress = Callable[[int], None]
T = TypeVar("T")

# Volumes that fit worse than this many times the median tell little of what all have in common.
_WORST_COST = 1.5
# Seven numbers at each point want more volumes than that.
_FEWEST_FOR_MODEL = 12
_AT_REST = Estimate(np.eye(4), "ok", 0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Crew:
    """Who works on a rank, and who is told.

    Attributes
    ----------
    n_threads : int
        Volumes under way at once.
    on_volume : callable
        Told the number of each finished volume, by any thread.
    """

    n_threads: int = 1
    on_volume: Progress = lambda t: None

    def each(self, work: Callable[[int], T], volumes: Iterable[int]) -> dict[int, T]:
        """Result of some work on each of some volumes."""
        chosen = list(volumes)
        if self.n_threads == 1:  # a pool of one costs a tenth
            return {t: work(t) for t in chosen}
        with ThreadPoolExecutor(self.n_threads) as pool:
            return dict(zip(chosen, pool.map(work, chosen), strict=True))


@dataclass(frozen=True)
class Target:
    """What a run is realigned to.

    Attributes
    ----------
    reference : Reference
    volume : int or None
        The run's own volume that serves as reference, if one does.
    own_grid : bool
        Whether the reference has the run's grid.
    """

    reference: Reference
    volume: int | None
    own_grid: bool = True


@dataclass(frozen=True)
class Task:
    """A run, what it is realigned to and how."""

    run: StagedRun
    target: Target
    settings: RealignSettings


@dataclass(frozen=True)
class Part:
    """What one rank found.

    Attributes
    ----------
    estimates : dict of int to Estimate
    missing : (nz, ny, nx) bool or None
        Voxels that are no number in one of the rank's volumes.
    n_missing : int
        Number of such values over all its volumes.
    """

    estimates: dict[int, Estimate]
    missing: NDArray[np.bool_] | None = None
    n_missing: int = 0


def merged(parts: Iterable[Part]) -> Part:
    """What all ranks found, estimates in the order of the volumes."""
    estimates: dict[int, Estimate] = {}
    missing, n_missing = None, 0
    for part in parts:
        estimates |= part.estimates
        n_missing += part.n_missing
        if part.missing is not None:
            missing = part.missing if missing is None else missing | part.missing
    return Part({t: estimates[t] for t in sorted(estimates)}, missing, n_missing)


def choose_target(run: StagedRun, settings: RealignSettings) -> Target:
    """The reference that the settings name; for ``mean``, the first volume, to begin with.

    Raises
    ------
    InputError
        If it shows no head, or the named file is not a volume.
    """
    if settings.reference in ("first", "mean", "middle"):
        n_dummy = run.n_dummy
        t = n_dummy + (run.n_volumes - n_dummy) // 2 if settings.reference == "middle" else n_dummy
        t = _next_with_signal(run, t)
        volume, affine = run.volume(t), run.layout.affine
        name = f"volume {t}"
    else:
        t = None
        try:
            volume, affine = read_volume(Path(settings.reference))
        except InputError as error:
            raise InputError(f"{run.run}: reference {error}") from error
        name = settings.reference
    own_grid = bool(
        volume.shape == run.voxels.shape[1:] and np.array_equal(affine, run.layout.affine)
    )
    return Target(_prepared(run, (volume, affine, name), settings, own_grid), t, own_grid)


def _next_with_signal(run: StagedRun, first: int) -> int:
    """Number of the first volume, from `first` on, that shows anything."""
    for t in (*range(first, run.n_volumes), *range(first)):
        volume = run.volume(t)
        numbers = volume[np.isfinite(volume)]
        if numbers.size and numbers.min() != numbers.max():
            return t
    return first


def mean_target(
    run: StagedRun, first: Target, estimates: list[Estimate], settings: RealignSettings
) -> Target:
    """The mean of the realigned volumes as reference of a second pass; no failed, no dummy ones.

    Pose and grid stay those of the first volume. The sum runs in the order of the volumes, from
    the realigned file, so that it does not depend on who wrote what.
    """
    realigned = open_realigned(run, first.reference.volume.shape)
    total = np.zeros(first.reference.volume.shape)
    steady = enumerate(estimates[run.n_dummy :], run.n_dummy)
    good = [t for t, estimate in steady if estimate.status != "failed"]
    for t in good:
        total += realigned[t]
    mean = (total / len(good)).astype(np.float32)
    affine = first.reference.affine
    source = mean, affine, "the mean volume"
    return Target(_prepared(run, source, settings, first.own_grid), None, first.own_grid)


def estimate_volumes(task: Task, volumes: Iterable[int], crew: Crew) -> Part:
    """Estimate some of a run's volumes, but for the last step.

    Each volume depends on itself and the reference alone: not on the others, not on who does it.
    """
    worker = _Worker(task)
    return Part(crew.each(worker.estimate, volumes), worker.missing, worker.n_missing)


def model_volumes(task: Task, estimates: list[Estimate]) -> list[int]:
    """Volumes that say what the run's residuals have in common: good ones, evenly over the run.

    Empty where they are too few.
    """
    run, n_most = task.run, task.settings.estimate.model_volumes
    steady = [t for t in range(run.n_dummy, run.n_volumes) if estimates[t].status != "failed"]
    whole = [t for t in steady if not estimates[t].lost_slices]
    costs = [estimates[t].cost for t in whole if estimates[t].status == "ok"]
    if not costs:
        return []
    most = _WORST_COST * float(np.median(costs))
    good = [t for t in whole if estimates[t].cost <= most]
    n = min(n_most, len(good))
    if n < _FEWEST_FOR_MODEL:
        return []
    return [good[(2 * i + 1) * len(good) // (2 * n)] for i in range(n)]


def write_residuals(
    task: Task, slots: dict[int, int], estimates: list[Estimate], crew: Crew
) -> dict[int, NDArray[np.int64]]:
    """Write residuals of some volumes to slots of the realigned file; their spans, by slot.

    What is there is written over when the volumes are resliced.

    Parameters
    ----------
    task : Task
    slots : dict of int to int
        Slot of each volume that this rank writes.
    estimates : list of Estimate
        Of all volumes.
    crew : Crew
    """
    if not slots:
        return {}
    worker = _Worker(task)
    residuals = open_residuals(task.run, task.target, max(slots.values()) + 1)

    def write(t: int) -> NDArray[np.int64]:
        residuals[slots[t]], spans = worker.residuals(t, estimates[t])
        return spans

    return {slots[t]: spans for t, spans in crew.each(write, slots).items()}


def open_residuals(run: StagedRun, target: Target, n_slots: int) -> NDArray[np.float32]:
    """The realigned file's beginning as (n_slots, n_points) float32 of residuals, mapped.

    Raises
    ------
    StageError
        If a reference with a finer grid than the run's wants more room than there is.
    """
    n_points, path = target.reference.last.points.values.size, run.realigned_path
    n_bytes = 4 * n_points * n_slots
    enlarge_staged(path, n_bytes, run.run)
    return np.asarray(np.memmap(path, np.float32, "r+", 0, (n_slots, n_points)))


def fitted_volumes(
    task: Task, estimates: list[Estimate], spans: dict[int, NDArray[np.int64]]
) -> Fitted:
    """What a run's model is fitted to: residuals in the realigned file, of volumes by slot."""
    slots = sorted(spans)
    affine, reference = task.run.layout.affine, task.target.reference
    maps = [to_moving_voxel(estimate, affine, reference) for estimate in estimates]
    residuals = open_residuals(task.run, task.target, len(slots))
    return fitted_to(reference, residuals, slots, [spans[slot] for slot in slots], maps)


def finish_volumes(
    task: Task, estimates: dict[int, Estimate], model: RunModel, crew: Crew
) -> dict[int, Estimate]:
    """Take the last step of some volumes and write them, resliced, at their own offsets.

    All are expressed in the pose of the reference, if that is a volume of the run: what the last
    step says of it is taken off the others.

    Parameters
    ----------
    task : Task
    estimates : dict of int to Estimate
        From `estimate_volumes`.
    model : RunModel
    crew : Crew
    """
    worker, run, target = _Worker(task), task.run, task.target
    own_pose = np.eye(4)
    if target.volume is not None:
        still = worker.last_step(target.volume, _AT_REST, model)
        own_pose = geometry.inverse(still.moving_from_reference)
    handle = os.open(run.realigned_path, os.O_RDWR)

    def finish(t: int) -> Estimate:
        estimate = worker.finish(t, estimates[t], model, own_pose, handle)
        crew.on_volume(t)
        return estimate

    try:
        return crew.each(finish, estimates)
    finally:
        os.close(handle)


def open_realigned(run: StagedRun, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The realigned series, (n, nz, ny, nx) float32, mapped."""
    return np.memmap(run.realigned_path, np.float32, "r", 0, (run.n_volumes, *shape))


def _prepared(
    run: StagedRun,
    source: tuple[NDArray[np.float32], NDArray[np.float64], str],
    settings: RealignSettings,
    own_grid: bool,
) -> Reference:
    volume, affine, name = source
    acquisition = Acquisition(settings.in_plane, run.ghost_axis if own_grid else None)
    try:
        volume, missing = fill_missing(volume)
        return prepare_reference(volume, affine, settings.estimate, acquisition, missing)
    except EmptyVolumeError as error:
        raise InputError(f"{run.run}: {name}: {error}; choose another reference") from error


class _Worker:
    """What one volume needs; each thread has work space of its own."""

    def __init__(self, task: Task) -> None:
        run, target = task.run, task.target
        self._run, self._target, self._settings = run, target, task.settings
        self._affine, self._reference = run.layout.affine, target.reference
        whole = target.reference.volume if target.own_grid else self._volume(run.n_dummy)
        self._slice_means = slice_means(whole)
        self._local = threading.local()
        self._lock = threading.Lock()
        self.missing: NDArray[np.bool_] | None = None
        self.n_missing = 0

    def estimate(self, t: int) -> Estimate:
        """Estimate of volume t, but for its last step."""
        volume, missing = fill_missing(self._run.volume(t))
        if missing is not None and not missing.all():  # a volume without any number fails anyway
            self._note_missing(missing)
        if t == self._target.volume:
            return Estimate(np.eye(4), "reference", 0, 0.0, 1.0, 1.0)
        if volume.min() == volume.max():
            return Estimate(np.eye(4), "failed", 0, np.nan, 0.0, 1.0)
        settings = self._settings.estimate
        lost = find_lost_slices(volume, self._slice_means)
        moving = self._moving(volume, lost)
        return estimate_motion(moving, self._affine, self._reference, settings)

    def residuals(
        self, t: int, estimate: Estimate
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Residuals of volume t at the points of the reference's last level, and their spans."""
        moving = self._moving(self._volume(t), _as_array(estimate.lost_slices))
        to_moving = to_moving_voxel(estimate, self._affine, self._reference)
        return residuals_of(moving, to_moving, self._reference.last, estimate.scale)

    def last_step(self, t: int, estimate: Estimate, model: RunModel) -> Estimate:
        """Estimate of volume t after its last step."""
        moving = self._moving(self._volume(t), _as_array(estimate.lost_slices))
        return self._after_last_step(t, moving, estimate, model)

    def finish(
        self,
        t: int,
        estimate: Estimate,
        model: RunModel,
        own_pose: NDArray[np.float64],
        handle: int,
    ) -> Estimate:
        """Take volume t's last step, reslice it and write it to an open file at its offset."""
        volume = self._volume(t)
        moving = self._moving(volume, _as_array(estimate.lost_slices))
        if estimate.status == "reference":
            still = self._after_last_step(t, moving, _AT_REST, model)
            estimate = replace(still, status="reference", moving_from_reference=np.eye(4),
                               iterations=0, cost=0.0, scale=1.0)  # fmt: skip
        elif estimate.status == "ok":
            last = self._after_last_step(t, moving, estimate, model)
            pose = geometry.compose(last.moving_from_reference, own_pose)
            estimate = replace(last, moving_from_reference=pose)
        if self._settings.reslice:
            out = self._reslice(volume, moving, estimate)
            os.pwrite(handle, out.data, t * out.nbytes)
        return estimate

    def _after_last_step(
        self, t: int, moving: Moving, estimate: Estimate, model: RunModel
    ) -> Estimate:
        last = take_last_step(moving, self._affine, self._reference, estimate, model)
        return with_explained_noise(last, model.explained) if t in model.learnt_from else last

    def _volume(self, t: int) -> NDArray[np.float32]:
        return fill_missing(self._run.volume(t))[0]

    def _moving(self, volume: NDArray[np.float32], lost: NDArray[np.int64]) -> Moving:
        coefficients, _ = self._work_space()
        degree = self._settings.estimate.degree
        return prepare_moving(filled(volume, lost), degree, coefficients, lost)

    def _note_missing(self, missing: NDArray[np.bool_]) -> None:
        with self._lock:
            self.missing = missing if self.missing is None else self.missing | missing
            self.n_missing += int(missing.sum())

    def _reslice(
        self, volume: NDArray[np.float32], moving: Moving, estimate: Estimate
    ) -> NDArray[np.float32]:
        settings = self._settings
        if estimate.status == "reference":
            return np.maximum(volume, np.float32(0)) if settings.non_negative else volume
        _, out = self._work_space()
        degree = settings.interpolation_degree
        if degree != moving.degree or moving.lost_slices.size:
            moving = prepare_moving(volume, degree, moving.coefficients)
        matrix = estimate.moving_from_reference
        reslice_volume(out, moving, self._affine, matrix, self._reference.affine)
        if settings.outside == "nearest":
            extend_volume(out, moving, self._affine, matrix, self._reference.affine)
        if settings.non_negative:
            np.maximum(out, np.float32(0), out=out)
        return out

    def _work_space(self) -> tuple[Coefficients, NDArray[np.float32]]:
        if not hasattr(self._local, "space"):
            nz, ny, nx = self._run.voxels.shape[1:]
            out = np.empty(self._reference.volume.shape, np.float32)
            self._local.space = Coefficients((nz, ny, nx)), out
        space: tuple[Coefficients, NDArray[np.float32]] = self._local.space
        return space


def _as_array(slices: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(slices, np.int64)
