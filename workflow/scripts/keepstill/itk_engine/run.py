"""A run realigned by ITK: what a rank does with its volumes."""

import os
import threading
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import EmptyVolumeError, InputError
from keepstill.estimate import Estimate
from keepstill.itk_bridge import Image, Sampler
from keepstill.itk_engine.fit import estimate_by_itk
from keepstill.itk_engine.points import ItkReference, prepare_for_itk
from keepstill.lost_slices import filled, find_lost_slices, slice_means
from keepstill.read import StagedRun
from keepstill.realign import Crew, Part, Task
from keepstill.smooth import fill_missing
from keepstill.stage import enlarge_staged

Volume = NDArray[np.float32]
Matrix = NDArray[np.float64]

# A source so little outside the field is inside, as for the coverage mask.
_TOLERANCE_VOXELS = 1e-6


def reference_of(task: Task) -> ItkReference:
    """A run's reference, prepared for ITK.

    Raises
    ------
    InputError
        If it shows no head.
    """
    reference = task.target.reference
    try:
        return prepare_for_itk(reference.volume, reference.affine, task.settings.estimate)
    except EmptyVolumeError as error:
        raise InputError(f"{task.run.run}: {error}; choose another reference") from error


def refuse_multi_echo(run: StagedRun) -> None:
    """Refuse a run whose echoes would be resliced by the other engine.

    Raises
    ------
    InputError
    """
    if run.found["is_multi_echo"]:
        raise InputError(
            f"{run.run}: several echoes found; engine: itk needs runs of one echo; choose engine: "
            "native, and check: itk for a second opinion"
        )


def motion_of(volume: Volume, task: Task, reference: ItkReference) -> Estimate:
    """Estimate of one volume (nz, ny, nx) of finite voxels, lost slices left out."""
    if volume.min() == volume.max():
        return Estimate(np.eye(4), "failed", 0, np.nan, 0.0, 1.0)
    lost = find_lost_slices(volume, slice_means(reference.volume))
    moving = Image(filled(volume, lost), task.run.layout.affine)
    return estimate_by_itk(moving, lost, reference, task.settings.estimate)


def realign_by_itk(task: Task, volumes: Iterable[int], crew: Crew) -> Part:
    """Estimate some of a run's volumes and write them, resliced, at their own offsets.

    Each volume depends on itself and the reference alone.

    Raises
    ------
    InputError
        If the reference shows no head, or the run has several echoes.
    """
    refuse_multi_echo(task.run)
    worker, run = _Worker(task), task.run
    if task.settings.reslice:
        n_bytes = 4 * int(np.prod(task.target.grid[0])) * run.n_volumes
        enlarge_staged(run.realigned_path, n_bytes, run.run)
    handle = os.open(run.realigned_path, os.O_RDWR)

    def realign(t: int) -> Estimate:
        estimate = worker.realign(t, handle)
        crew.on_volume(t)
        return estimate

    try:
        return Part(crew.each(realign, volumes), worker.missing, worker.n_missing)
    finally:
        os.close(handle)


class _Worker:
    """What one volume needs."""

    def __init__(self, task: Task) -> None:
        self._task, self._affine = task, task.run.layout.affine
        self._reference = reference_of(task)
        self._lock = threading.Lock()
        self.missing: NDArray[np.bool_] | None = None
        self.n_missing = 0

    def realign(self, t: int, handle: int) -> Estimate:
        """Estimate volume t, reslice it and write it to an open file at its offset."""
        volume, missing = fill_missing(self._task.run.volume(t))
        if missing is not None and not missing.all():
            self._note_missing(missing)
        estimate = self._estimate(t, volume)
        if self._task.settings.reslice:
            out = self._resliced(volume, estimate)
            os.pwrite(handle, out.data, t * out.nbytes)
        return estimate

    def _estimate(self, t: int, volume: Volume) -> Estimate:
        if t != self._task.target.volume:
            return motion_of(volume, self._task, self._reference)
        # The reference's own noise is in the residuals of all others.
        none = np.zeros((6, 6))
        return Estimate(np.eye(4), "reference", 0, 0.0, 1.0, 1.0, covariance=none)

    def _resliced(self, volume: Volume, estimate: Estimate) -> Volume:
        settings, out = self._task.settings, volume
        if estimate.status != "reference":
            matrix, degree = estimate.moving_from_reference, settings.interpolation_degree
            sampler = Sampler(Image(volume, self._affine), self._reference.image, degree)
            out = np.where(self._is_seen(matrix, volume.shape), sampler(matrix), np.float32(0))
        return np.maximum(out, np.float32(0)) if settings.non_negative else out

    def _is_seen(self, matrix: Matrix, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Voxels whose source lies inside the field: ITK would go half a voxel beyond."""
        to_moving = np.linalg.inv(self._affine) @ matrix @ self._reference.affine
        nz, ny, nx = self._reference.volume.shape
        z, y, x = np.ogrid[:nz, :ny, :nx]
        seen = np.ones((nz, ny, nx), np.bool_)
        for (a, b, c, d), size in zip(to_moving[:3], shape[::-1], strict=True):
            at = a * x + b * y + c * z + d
            seen &= (at >= -_TOLERANCE_VOXELS) & (at <= size - 1 + _TOLERANCE_VOXELS)
        return seen

    def _note_missing(self, missing: NDArray[np.bool_]) -> None:
        with self._lock:
            self.missing = missing if self.missing is None else self.missing | missing
            self.n_missing += int(missing.sum())
