"""Realigning a staged run: which volume is the reference, and what is done with each."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import EmptyVolumeError, InputError
from keepstill.estimate import Estimate, estimate_motion
from keepstill.moving import Coefficients, Moving, prepare_moving
from keepstill.read import StagedRun, read_volume
from keepstill.reference import Reference, prepare_reference
from keepstill.reslice import reslice_volume
from keepstill.settings import RealignSettings
from keepstill.smooth import fill_missing

Progress = Callable[[int], None]


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


@dataclass(frozen=True)
class Target:
    """What a run is realigned to.

    Attributes
    ----------
    reference : Reference
    volume : int or None
        The run's own volume that serves as reference, if one does.
    """

    reference: Reference
    volume: int | None


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
    return Target(_prepared(run, (volume, affine, name), settings), t)


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
    return Target(_prepared(run, (mean, affine, "the mean volume"), settings), None)


def realign_volumes(
    run: StagedRun,
    target: Target,
    volumes: Iterable[int],
    settings: RealignSettings,
    crew: Crew,
) -> Part:
    """Estimate some of a run's volumes and write them, resliced, at their own offsets.

    Each volume depends on itself and the reference alone: not on the others, not on who does it.

    Parameters
    ----------
    run : StagedRun
    target : Target
    volumes : iterable of int
    settings : RealignSettings
    crew : Crew

    Returns
    -------
    Part
    """
    worker = _Worker(run, target, settings, crew.on_volume)
    chosen = list(volumes)
    handle = os.open(run.realigned_path, os.O_RDWR)
    try:
        with ThreadPoolExecutor(crew.n_threads) as pool:
            found = pool.map(lambda t: worker.realign(t, handle), chosen)
            estimates = dict(zip(chosen, found, strict=True))
        return Part(estimates, worker.missing, worker.n_missing)
    finally:
        os.close(handle)


def open_realigned(run: StagedRun, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The realigned series, (n, nz, ny, nx) float32, mapped."""
    return np.memmap(run.realigned_path, np.float32, "r", 0, (run.n_volumes, *shape))


def _prepared(
    run: StagedRun,
    source: tuple[NDArray[np.float32], NDArray[np.float64], str],
    settings: RealignSettings,
) -> Reference:
    volume, affine, name = source
    try:
        volume, missing = fill_missing(volume)
        return prepare_reference(volume, affine, settings.estimate, settings.in_plane, missing)
    except EmptyVolumeError as error:
        raise InputError(f"{run.run}: {name}: {error}; choose another reference") from error


class _Worker:
    """What one volume needs; each thread has work space of its own."""

    def __init__(
        self, run: StagedRun, target: Target, settings: RealignSettings, on_volume: Progress
    ) -> None:
        self._run, self._target, self._settings = run, target, settings
        self._on_volume = on_volume
        self._local = threading.local()
        self._lock = threading.Lock()
        self.missing: NDArray[np.bool_] | None = None
        self.n_missing = 0

    def realign(self, t: int, handle: int) -> Estimate:
        """Estimate volume t, reslice it and write it to an open file at its offset."""
        coefficients, out = self._work_space()
        volume, missing = fill_missing(self._run.volume(t))
        if missing is not None and not missing.all():  # a volume without any number fails anyway
            self._note_missing(missing)
        moving = prepare_moving(volume, self._settings.estimate.degree, coefficients)
        estimate = self._estimate(t, volume, moving)
        if self._settings.reslice:
            self._reslice(out, volume, moving, estimate)
            os.pwrite(handle, out.data, t * out.nbytes)
        self._on_volume(t)
        return estimate

    def _note_missing(self, missing: NDArray[np.bool_]) -> None:
        with self._lock:
            self.missing = missing if self.missing is None else self.missing | missing
            self.n_missing += int(missing.sum())

    def _estimate(self, t: int, volume: NDArray[np.float32], moving: Moving) -> Estimate:
        if t == self._target.volume:
            return Estimate(np.eye(4), "reference", 0, 0.0, 1.0, 1.0)
        if volume.min() == volume.max():
            return Estimate(np.eye(4), "failed", 0, np.nan, 0.0, 1.0)
        settings = self._settings.estimate
        return estimate_motion(moving, self._run.layout.affine, self._target.reference, settings)

    def _reslice(
        self,
        out: NDArray[np.float32],
        volume: NDArray[np.float32],
        moving: Moving,
        estimate: Estimate,
    ) -> None:
        if estimate.status == "reference":
            out[:] = volume
            return
        degree = self._settings.interpolation_degree
        if degree != moving.degree:
            moving = prepare_moving(volume, degree, moving.coefficients)
        affine = self._target.reference.affine
        reslice_volume(out, moving, self._run.layout.affine, estimate.moving_from_reference, affine)

    def _work_space(self) -> tuple[Coefficients, NDArray[np.float32]]:
        if not hasattr(self._local, "space"):
            nz, ny, nx = self._run.voxels.shape[1:]
            out = np.empty(self._target.reference.volume.shape, np.float32)
            self._local.space = Coefficients((nz, ny, nx)), out
        space: tuple[Coefficients, NDArray[np.float32]] = self._local.space
        return space
