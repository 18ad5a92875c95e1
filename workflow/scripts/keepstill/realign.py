"""Realigning a staged run: which volume is the reference, and what is done with each."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
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
from keepstill.kernels.small import product
from keepstill.last_step import residuals_of, take_last_step, to_moving_voxel
from keepstill.lost_slices import filled, find_lost_slices, slice_means
from keepstill.moving import Coefficients, Moving, prepare_moving
from keepstill.other_contrast import place_volume
from keepstill.read import StagedRun, read_volume
from keepstill.reference import Acquisition, Reference, prepare_reference
from keepstill.reslice import extend_volume, reslice_volume
from keepstill.run_model import RunModel, fitted_to
from keepstill.settings import RealignSettings
from keepstill.smooth import fill_missing
from keepstill.stage import enlarge_staged
from keepstill.wide_start import Wide, better, prepare_wide, wants_wide_start, wide_start

Progress = Callable[[int], None]
T = TypeVar("T")

# Volumes that fit worse than this many times the median tell little of what all have in common.
_WORST_COST = 1.5
# Seven numbers at each point want more volumes than that.
_FEWEST_FOR_MODEL = 12
# Values of a series that are in memory at once for a median: 32 MB, and three times that to sort.
_MEDIAN_VALUES = 8_000_000
# Volumes of one head correlate by 0.61 (echoes at 14 and 62 ms) and more, those of two heads, at
# their best fit, by 0.43 at most (six real pairs each).
_LEAST_CORRELATION = 0.5
# Positions in a header are single precision.
_SAME_MM = 1e-3
# A grid that holds less of the head cuts off what people would miss.
_WHOLE_HEAD = 0.95
_IMAGE_DEGREE = 5
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
        """Result of some work on each of some volumes, which are asked for one by one."""
        if self.n_threads == 1:  # a pool of one costs a tenth
            return {t: work(t) for t in volumes}
        waiting, found = _Waiting(volumes), dict[int, T]()
        with ThreadPoolExecutor(self.n_threads) as pool:
            try:
                for done in pool.map(
                    lambda i: {t: work(t) for t in waiting}, range(self.n_threads)
                ):
                    found |= done
            except BaseException:
                waiting.leave()
                raise
        return {t: found[t] for t in sorted(found)}


class _Waiting:
    """Volumes that threads take one by one."""

    def __init__(self, volumes: Iterable[int]) -> None:
        self._volumes, self._lock = iter(volumes), threading.Lock()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        with self._lock:
            return next(self._volumes)

    def leave(self) -> None:
        """Leave what nobody has taken yet."""
        self._volumes = iter(())


@dataclass(frozen=True)
class Space:
    """An image from elsewhere, in whose pose and on whose grid a run ends.

    Attributes
    ----------
    volume : (nz, ny, nx) float32
    affine : (4, 4) float64
        World mm from voxel.
    reference_from_space : (4, 4) float64
        World mm of the image -> world mm of the run's own volume that all others go by.
    warning : str
        Empty, unless the grid of the result cuts the head off.
    """

    volume: NDArray[np.float32]
    affine: NDArray[np.float64]
    reference_from_space: NDArray[np.float64]
    warning: str = ""


@dataclass(frozen=True)
class Target:
    """What a run is realigned to.

    Attributes
    ----------
    reference : Reference
    volume : int or None
        The run's own volume that serves as reference, if one does.
    space : Space or None
        Where volumes are taken in the end, if not where the reference is.
    """

    reference: Reference
    volume: int | None
    space: Space | None = None

    @property
    def grid(self) -> tuple[tuple[int, ...], NDArray[np.float64]]:
        """Shape (nz, ny, nx) and affine of the result."""
        end = self.space or self.reference
        return end.volume.shape, end.affine


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
    """The run's volume that the settings name, or its first, to begin with.

    Where the run ends in the space of an image, `find_space` says where that volume lies there.

    Raises
    ------
    InputError
        If it shows no head.
    """
    return target_of(run, _next_with_signal(run, named_volume(run, settings)), settings)


def named_volume(run: StagedRun, settings: RealignSettings) -> int:
    """Number of the volume that the settings name, whether or not it shows anything."""
    t = run.n_dummy
    return t + (run.n_volumes - t) // 2 if settings.reference == "middle" else t


def target_of(run: StagedRun, t: int, settings: RealignSettings) -> Target:
    """Volume t of a run as reference.

    Raises
    ------
    InputError
        If it shows no head.
    """
    return Target(_prepared(run, run.volume(t), f"volume {t}", settings), t)


def find_space(run: str, own: Reference, image: Path, settings: RealignSettings) -> Space | None:
    """The space of an image, and where a run's own reference lies in it.

    None if the image is that very reference: then the run is there.

    Raises
    ------
    InputError
        If the file is not a volume, shows no head, or the run's reference is not found in it, or
        if the run is to stay on its own grid, and that is elsewhere.
    """
    try:
        volume, affine = read_volume(image, settings.affine_source)
        volume, _ = fill_missing(volume)
        if np.array_equal(volume, own.volume) and np.allclose(affine, own.affine, atol=_SAME_MM):
            return None
        placed = place_volume((own.volume, own.affine), (volume, affine), own.basis)
    except (InputError, EmptyVolumeError) as error:
        raise InputError(f"{run}: reference {image}: {error}") from error
    least = settings.estimate.min_overlap
    if placed.correlation < _LEAST_CORRELATION or placed.overlap < least:
        raise InputError(
            f"{run}: not found in reference {image}: overlap "
            f"{placed.overlap:.0%} (needs {least:.0%}), correlation {placed.correlation:.2f} "
            f"(needs {_LEAST_CORRELATION}); check its position, or choose another reference"
        )
    warning = ""
    if settings.grid == "own":
        warning = _cut_off(run, image, placed.on_own_grid, least)
        volume, affine = _on_grid_of(own, volume, affine), own.affine
    return Space(volume, affine, placed.volume_from_image, warning)


def _cut_off(run: str, image: Path, on_own_grid: float, least: float) -> str:
    """Warning of a head that the run's own grid does not hold, in the pose of an image.

    Raises
    ------
    InputError
        If it holds less than the least part.
    """
    if on_own_grid >= _WHOLE_HEAD:
        return ""
    found = f"{run}: its own grid holds {on_own_grid:.0%} of its head in the pose of {image.name}"
    if on_own_grid < least:
        raise InputError(
            f"{found} (needs {least:.0%}); set grid: reference (keepstill realign: --grid)"
        )
    return f"{found}; the rest is cut off, unless grid is set to reference"


def _on_grid_of(
    own: Reference, volume: NDArray[np.float32], affine: NDArray[np.float64]
) -> NDArray[np.float32]:
    """An image where it is in the world, on the grid of a run."""
    nz, ny, nx = volume.shape
    moving = prepare_moving(volume, _IMAGE_DEGREE, Coefficients((nz, ny, nx)))
    out = np.empty_like(own.volume)
    reslice_volume(out, moving, affine, np.eye(4), own.affine)
    return out


def _next_with_signal(run: StagedRun, first: int) -> int:
    """Number of the first volume, from `first` on, that shows anything."""
    for t in (*range(first, run.n_volumes), *range(first)):
        if shows_anything(run.volume(t)):
            return t
    return first


def shows_anything(volume: NDArray[np.float32]) -> bool:
    """Whether a volume has two values that differ."""
    numbers = volume[np.isfinite(volume)]
    return bool(numbers.size and numbers.min() != numbers.max())


def mean_target(
    run: StagedRun, first: Target, estimates: list[Estimate], settings: RealignSettings
) -> Target:
    """The mean of the realigned volumes as reference of a second pass; no failed, no dummy ones.

    Pose and grid stay those of the first volume. The sum runs in the order of the volumes, from
    the realigned file, so that it does not depend on who wrote what.
    """
    realigned = open_realigned(run, first.reference.volume.shape)
    total = np.zeros(first.reference.volume.shape)
    good = _steady(run, estimates)
    for t in good:
        total += realigned[t]
    mean = (total / len(good)).astype(np.float32)
    return _made_target(run, mean, settings)


def median_slices(
    run: StagedRun, estimates: list[Estimate], slices: Iterable[int]
) -> dict[int, NDArray[np.float32]]:
    """Voxelwise median of the realigned volumes, slice (z) by slice; no failed, no dummy ones.

    No more than a few rows of the series are in memory at once.
    """
    realigned = open_realigned(run, run.voxels.shape[1:])
    good = _steady(run, estimates)
    n_rows = max(1, _MEDIAN_VALUES // (len(good) * realigned.shape[3]))
    out = {}
    for z in slices:
        parts = [
            _median_seen(realigned[good, z, y : y + n_rows])
            for y in range(0, realigned.shape[2], n_rows)
        ]
        out[z] = np.concatenate(parts)
    return out


def _median_seen(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Median over the first axis of what was seen: 0 and NaN are outside the field of view.

    At the ends of the field of view, half of a still head's volumes may not see a slice.
    """
    seen = np.isfinite(values) & (values != 0)
    n_seen = seen.sum(axis=0)
    ordered = np.sort(np.where(seen, values, np.float32(np.inf)), axis=0)
    lower, upper = (
        np.take_along_axis(ordered, np.maximum(k, 0)[None], axis=0)[0]
        for k in ((n_seen - 1) // 2, np.minimum(n_seen // 2, len(values) - 1))
    )
    return np.where(n_seen > 0, np.float32(0.5) * (lower + upper), np.float32(0))


def median_target(
    run: StagedRun, slices: dict[int, NDArray[np.float32]], settings: RealignSettings
) -> Target:
    """The median of the realigned volumes as reference of a second pass, from all its slices.

    Pose and grid stay those of the first volume.
    """
    return _made_target(run, np.stack([slices[z] for z in range(len(slices))]), settings)


def lowest_motion_target(
    run: StagedRun, first: Target, estimates: list[Estimate], settings: RealignSettings
) -> Target:
    """The volume that all others are nearest to, by the motion of a first pass.

    Distance is the rms displacement of a head of 80 mm radius (Jenkinson 1999, TR99MJ1), its mean
    over the run's steady volumes that have not failed. Volumes that fit badly, or have lost
    slices, are no reference.
    """
    candidates = _good(run, estimates)
    if not candidates:
        return first
    matrices = np.array([estimate.moving_from_reference for estimate in estimates])
    places = geometry.pose_places_mm(matrices, first.reference.centre_mm)
    others = places[_steady(run, estimates)]
    far_mm = [np.sqrt(((others - places[t]) ** 2).sum(axis=1)).mean() for t in candidates]
    return target_of(run, candidates[int(np.argmin(far_mm))], settings)


def _made_target(run: StagedRun, volume: NDArray[np.float32], settings: RealignSettings) -> Target:
    return Target(_prepared(run, volume, f"the {settings.reference} volume", settings), None)


def _steady(run: StagedRun, estimates: list[Estimate]) -> list[int]:
    """Steady volumes that have not failed."""
    return [t for t in range(run.n_dummy, run.n_volumes) if estimates[t].status != "failed"]


def _good(run: StagedRun, estimates: list[Estimate]) -> list[int]:
    """Steady volumes without lost slices that fit well."""
    whole = [t for t in _steady(run, estimates) if not estimates[t].lost_slices]
    costs = [estimates[t].cost for t in whole if estimates[t].status == "ok"]
    if not costs:
        return []
    most = _WORST_COST * float(np.median(costs))
    return [t for t in whole if estimates[t].cost <= most]


def estimate_volumes(task: Task, volumes: Iterable[int], crew: Crew) -> Part:
    """Estimate some of a run's volumes, but for the last step.

    Each volume depends on itself and the reference alone: not on the others, not on who does it.
    """
    worker = Worker(task)
    return worker.part(crew.each(worker.estimate, volumes))


def model_volumes(task: Task, estimates: list[Estimate]) -> list[int]:
    """Volumes that say what the run's residuals have in common: good ones, evenly over the run.

    Empty where they are too few.
    """
    good = _good(task.run, estimates)
    n = min(task.settings.estimate.model_volumes, len(good))
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
    worker = Worker(task)
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
    worker, run, target = Worker(task), task.run, task.target
    own_pose = np.eye(4)
    if target.volume is not None:
        still = worker.last_step(target.volume, _AT_REST, model)
        own_pose = geometry.inverse(still.moving_from_reference)
    if task.settings.reslice:
        n_bytes = 4 * int(np.prod(target.grid[0])) * run.n_volumes
        enlarge_staged(run.realigned_path, n_bytes, run.run)
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
    run: StagedRun, volume: NDArray[np.float32], name: str, settings: RealignSettings
) -> Reference:
    acquisition = Acquisition(settings.in_plane, run.ghost_axis)
    try:
        volume, missing = fill_missing(volume)
        affine = run.layout.affine
        return prepare_reference(volume, affine, settings.estimate, acquisition, missing)
    except EmptyVolumeError as error:
        raise InputError(f"{run.run}: {name}: {error}; choose another reference") from error


class Worker:
    """What one volume needs; each thread has work space of its own."""

    def __init__(self, task: Task) -> None:
        run, target = task.run, task.target
        self._run, self._target, self._settings = run, target, task.settings
        self._affine, self._reference = run.layout.affine, target.reference
        self._slice_means = slice_means(target.reference.volume)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._wide: Wide | None = None
        self._missing: NDArray[np.bool_] | None = None
        self._n_missing = 0

    def part(self, estimates: dict[int, Estimate]) -> Part:
        """What was found, with the values that were missing on the way."""
        return Part(estimates, self._missing, self._n_missing)

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
        first = estimate_motion(moving, self._affine, self._reference, settings)
        if not wants_wide_start(first, self._reference):
            return first
        start = wide_start(moving.volume, self._affine, self._wide_reference())
        if start is None:
            return first
        return better(
            first, estimate_motion(moving, self._affine, self._reference, settings, start)
        )

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
        if self._target.space:
            estimate = _from_space(estimate, self._target.space)
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

    def _wide_reference(self) -> Wide:
        """What wide starts go by; no volume of an ordinary run asks for it."""
        with self._lock:
            if self._wide is None:
                reference = self._reference
                self._wide = prepare_wide(
                    reference.volume, reference.affine, reference.centre_mm, reference.basis
                )
            return self._wide

    def _note_missing(self, missing: NDArray[np.bool_]) -> None:
        with self._lock:
            self._missing = missing if self._missing is None else self._missing | missing
            self._n_missing += int(missing.sum())

    def _reslice(
        self, volume: NDArray[np.float32], moving: Moving, estimate: Estimate
    ) -> NDArray[np.float32]:
        settings = self._settings
        if estimate.status == "reference" and not self._target.space:
            return np.maximum(volume, np.float32(0)) if settings.non_negative else volume
        _, out = self._work_space()
        degree = settings.interpolation_degree
        if degree != moving.degree or moving.lost_slices.size:
            moving = prepare_moving(volume, degree, moving.coefficients)
        matrix, affine = estimate.moving_from_reference, self._target.grid[1]
        reslice_volume(out, moving, self._affine, matrix, affine)
        if settings.outside == "nearest":
            extend_volume(out, moving, self._affine, matrix, affine)
        if settings.non_negative:
            np.maximum(out, np.float32(0), out=out)
        return out

    def _work_space(self) -> tuple[Coefficients, NDArray[np.float32]]:
        if not hasattr(self._local, "space"):
            nz, ny, nx = self._run.voxels.shape[1:]
            out = np.empty(self._target.grid[0], np.float32)
            self._local.space = Coefficients((nz, ny, nx)), out
        space: tuple[Coefficients, NDArray[np.float32]] = self._local.space
        return space


def _from_space(estimate: Estimate, space: Space) -> Estimate:
    """An estimate against the run's own reference, expressed in the space where it ends."""
    to_space = geometry.inverse(space.reference_from_space)[:3, :3]
    turn = np.zeros((6, 6))
    turn[:3, :3] = turn[3:, 3:] = to_space
    covariance = product(product(turn, estimate.covariance), np.ascontiguousarray(turn.T))
    matrix = geometry.compose(estimate.moving_from_reference, space.reference_from_space)
    return replace(estimate, moving_from_reference=matrix, covariance=covariance)


def _as_array(slices: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(slices, np.int64)
