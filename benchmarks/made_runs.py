"""Simulated runs on disk, made once: the same plan and the same phantom give the same bytes."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import keepstill
from cases import Case
from keepstill.simulate import StudyPlan, simulate_study
from keepstill.stage import claim_stage_root

# What makes a simulated run. Its foundations (geometry, B-spline kernels, writing) are left out:
# a change there that alters a run is a mistake, which the tests are for.
_ENGINE = Path(keepstill.__file__).parent
_SOURCES = ("blobs.py", "simulate.py", "kernels/blobs.py", "phantom/*.py")


def default_folder() -> Path:
    """Where runs are kept: in $TMPDIR, one folder a user."""
    return Path(tempfile.gettempdir()) / f"keepstill-bench-{os.getuid()}"


def plan_of(case: Case, point_spread: float, n_volumes: int, seed: int) -> StudyPlan:
    """Plan of one run; cases of one seed share head, noise and where they share a kind, motion."""
    spread = (point_spread,) * 3
    return StudyPlan(
        subjects=1, volumes=n_volumes, seed=seed, point_spread_voxels=spread, **case.plan
    )


def made_run(folder: Path, plan: StudyPlan, n_threads: int | None = None) -> Path:
    """The one run of a plan, simulated, on all cores if not told otherwise, if it is not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    claim_stage_root(folder)  # in $TMPDIR somebody else could have made it
    study = folder / _key(plan)
    if not study.exists():
        part = study.with_suffix(f".{os.getpid()}")
        try:
            simulate_study(part, plan, n_threads=n_threads or len(os.sched_getaffinity(0)))
            part.rename(study)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    (source,) = study.glob("sub-*/func/*_bold.nii.gz")
    return source


def _key(plan: StudyPlan) -> str:
    digest = hashlib.sha256(repr(plan).encode())
    for path in sorted(path for pattern in _SOURCES for path in _ENGINE.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
