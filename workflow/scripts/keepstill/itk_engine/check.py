"""A safety net: some volumes of a run realigned by ITK too, and by how much the two disagree."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.errors import counted
from keepstill.estimate import Estimate
from keepstill.itk_engine.run import motion_of, reference_of
from keepstill.masks import brain_mask
from keepstill.realign import Crew, Task
from keepstill.settings import CHECK_EVERY
from keepstill.smooth import fill_missing

# Where both are sound and the head has moved by less than 2 mm, the two have been found to differ
# by 0.049 mm at most (docs/itk.md): twice that.
WARN_MM = 0.1


def checked_volumes(n_volumes: int) -> list[int]:
    """Numbers of the volumes to check: every 20th, and of these the last is the run's last."""
    return list(range((n_volumes - 1) % CHECK_EVERY, n_volumes, CHECK_EVERY))


def check_volumes(task: Task, volumes: Iterable[int], crew: Crew) -> dict[int, Estimate]:
    """Estimates by ITK of some volumes, against the reference that the run was realigned to.

    Raises
    ------
    InputError
        If ITK finds no head in the reference.
    """
    reference = reference_of(task)
    return crew.each(
        lambda t: motion_of(fill_missing(task.run.volume(t))[0], task, reference), volumes
    )


def disagreement(
    task: Task, found: Sequence[Estimate], by_itk: dict[int, Estimate]
) -> dict[str, Any]:
    """How far two engines are apart, for sidecar and manifest.

    Parameters
    ----------
    task : Task
    found : sequence of Estimate
        Of all volumes.
    by_itk : dict of int to Estimate
        Of some.

    Returns
    -------
    record : dict
        ``volumes`` that both could realign and ``difference_mm`` of each, the mean distance over
        the brain between where the two see a voxel, with no offset taken out; ``median_mm``,
        ``worst_mm`` and ``worst_volume``, None without any; ``failed_volumes``, those that ITK
        alone could not realign; ``itk_only_volumes``, those that ITK alone could; ``warnings`` for
        people.
    """
    wanted = [t for t in sorted(by_itk) if found[t].status == "ok"]
    failed = [t for t in wanted if by_itk[t].status == "failed"]
    volumes = [t for t in wanted if t not in failed]
    apart_mm = [float(f"{mm:.6g}") for mm in _apart_mm(task, found, by_itk, volumes)]
    record: dict[str, Any] = {"volumes": volumes, "difference_mm": apart_mm}
    record |= {"median_mm": None, "worst_mm": None, "worst_volume": None}
    if volumes:
        worst = int(np.argmax(apart_mm))
        record["median_mm"] = float(f"{np.median(apart_mm):.6g}")
        record |= {"worst_mm": apart_mm[worst], "worst_volume": volumes[worst]}
    native_failed = [t for t in sorted(by_itk) if found[t].status == "failed"]
    itk_only = [t for t in native_failed if by_itk[t].status == "ok"]
    record |= {"failed_volumes": failed, "itk_only_volumes": itk_only, "warn_mm": WARN_MM}
    warnings = list(_warnings(task.run.run, record))
    if not volumes:
        warnings.append(_nothing_compared(task.run.run, len(native_failed), len(failed)))
    return record | {"warnings": warnings}


def _apart_mm(
    task: Task, found: Sequence[Estimate], by_itk: dict[int, Estimate], volumes: list[int]
) -> NDArray[np.float64]:
    if not volumes:
        return np.zeros(0)
    reference, space = task.target.reference, task.target.space
    own_from_end = geometry.inverse(space.reference_from_space) if space else np.eye(4)
    ours = np.array([found[t].moving_from_reference @ own_from_end for t in volumes])
    theirs = np.array([by_itk[t].moving_from_reference for t in volumes])
    voxels = np.argwhere(brain_mask(reference.volume))[:, ::-1].astype(np.float64)
    points_mm = geometry.world(reference.affine, voxels)
    if not len(points_mm):
        points_mm = reference.centre_mm[None]
    return geometry.displacement_mm(ours, theirs, points_mm)


def _nothing_compared(run: str, n_native_failed: int, n_itk_failed: int) -> str:
    """Why a run is as if it had not been checked; the reference is not compared to itself."""
    reasons = [f"{n_native_failed} failed"] if n_native_failed else []
    reasons += [f"ITK could not realign {n_itk_failed}"] if n_itk_failed else []
    return (
        f"{run}: check: itk had nothing to compare, of every {CHECK_EVERY}th volume "
        f"{', '.join(reasons) or 'there is the reference only'}; take this run as not checked"
    )


def _warnings(run: str, record: dict[str, Any]) -> Iterable[str]:
    far = [
        f"{t} ({mm:.2f} mm)"
        for t, mm in zip(record["volumes"], record["difference_mm"], strict=True)
        if mm > WARN_MM
    ]
    if far:
        yield (
            f"{run}: ITK sees these volumes more than {WARN_MM:g} mm away from where they were "
            f"realigned to: {', '.join(far)}; look at them"
        )
    if record["failed_volumes"]:
        numbers = ", ".join(map(str, record["failed_volumes"]))
        yield f"{run}: ITK could not realign these volumes: {numbers}; look at them"
    if itk_only := record["itk_only_volumes"]:
        yield (
            f"{run}: ITK could realign {counted(len(itk_only), 'volume')} that failed: "
            f"{', '.join(map(str, itk_only))}; look at them"
        )
