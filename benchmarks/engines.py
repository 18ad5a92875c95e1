"""How far ITK as the engine is from keepstill's own, on simulated runs and on the demo study.

    python benchmarks/engines.py [--volumes 40] [--seed 1] [--cache DIR] [--runs mild sub-01 ...]

Each run goes through `keepstill realign` twice, with `--engine native` and `--engine itk`. A
difference of motion is the mean distance over the brain between where the two send a voxel, both
against volume 0, with no offset taken out; a difference of voxels is the rms over the brain (where
all volumes have data), as a part of its mean. Volumes that either engine marks as failed are left
out and counted. Prints a table, and exits with 1 if a simulated run, or one with motion under 2 mm,
misses what is required.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from accuracy import read_columns
from cases import CASES, POINT_SPREADS
from keepstill import geometry
from keepstill.transforms.itk import read_itk
from keepstill.truth import read_truth, truth_path
from made_runs import default_folder, made_run, plan_of

Array = np.ndarray
DEMO = Path(__file__).parents[1] / "tests" / "data" / "study"
# What is required of a run whose every volume has moved by less than `SMALL_MM`, and of a simulated
# run whatever it has moved by.
SMALL_MM, MEDIAN_MM, WORST_MM, MOST_PERCENT = 2.0, 0.02, 0.05, 0.5


@dataclass(frozen=True)
class Result:
    """What `keepstill realign` has written.

    Attributes
    ----------
    matrices : (n, 4, 4)
        moving_from_reference.
    status : (n,) str
    voxels : (nx, ny, nz, n)
    brain : (nx, ny, nz) bool
        Where all volumes have data.
    affine : (4, 4)
    """

    matrices: Array
    status: Array
    voxels: Array
    brain: Array
    affine: Array


@dataclass(frozen=True)
class Apart:
    """Two engines on one run; (n,) each, of the volumes that both have realigned.

    Attributes
    ----------
    motion_mm
        How far the head had moved.
    apart_mm, percent
        Difference of motion; of voxels.
    n_failed : (int, int)
        Volumes that the native engine and ITK mark as failed.
    errors_mm : (native, itk) or None
        Errors against the truth, where that is known.
    """

    motion_mm: Array
    apart_mm: Array
    percent: Array
    n_failed: tuple[int, int]
    errors_mm: tuple[Array, Array] | None


def realigned(source: Path, engine: str) -> Result:
    """A run realigned by one of the engines."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "keepstill", "realign", str(source), "--engine", engine]
        done = subprocess.run(
            [*command, "--out", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{source}: keepstill realign failed\n{done.stderr}")
        found = {path.name.split("_desc-")[-1]: path for path in Path(folder).rglob("*")}
        bold, brain, coverage = (
            nib.nifti1.load(found[name])
            for name in ("hmc_bold.nii.gz", "brain_mask.nii.gz", "coverage_mask.nii.gz")
        )
        return Result(
            matrices=read_itk(found["hmc_xfm.txt"]),
            status=np.array(read_columns(found["confounds_timeseries.tsv"])["status"]),
            voxels=np.asarray(bold.dataobj),
            brain=(np.asarray(brain.dataobj) > 0) & (np.asarray(coverage.dataobj) > 0),
            affine=bold.affine,
        )


def compared(source: Path, native: Result, itk: Result) -> Apart:
    """How far two results of one run are apart."""
    both = (native.status == "ok") & (itk.status == "ok")
    brain = native.brain & itk.brain
    points_mm = geometry.world(native.affine, np.argwhere(brain).astype(np.float64))
    at_rest = np.broadcast_to(np.eye(4), native.matrices.shape)
    differences = native.voxels[brain] - itk.voxels[brain]
    rms = np.sqrt((differences.astype(np.float64) ** 2).mean(axis=0))
    errors_mm = None
    if truth := _truth_of(source):
        ours, theirs = (truth.error_mm(result.matrices, 0)[both] for result in (native, itk))
        errors_mm = ours, theirs
    return Apart(
        motion_mm=geometry.displacement_mm(native.matrices, at_rest, points_mm)[both],
        apart_mm=geometry.displacement_mm(native.matrices, itk.matrices, points_mm)[both],
        percent=100 * (rms / native.voxels[brain].mean(axis=0))[both],
        n_failed=(int((native.status == "failed").sum()), int((itk.status == "failed").sum())),
        errors_mm=errors_mm,
    )


def _truth_of(source: Path):
    path = truth_path(source.parents[2], source)
    return read_truth(path) if path.is_file() else None


def is_required(name: str, apart: Apart) -> bool:
    """Whether anything is required of a run, or it is reported only."""
    return name.startswith("phantom") or bool(apart.motion_mm.max(initial=0.0) < SMALL_MM)


def faults(apart: Apart) -> Iterator[str]:
    """What a run misses, in words."""
    if not len(apart.apart_mm):
        yield "no volume that both have realigned"
        return
    median_mm, worst_mm = np.median(apart.apart_mm), apart.apart_mm.max()
    if not median_mm <= MEDIAN_MM:
        yield f"median {median_mm:.3f} mm"
    if not worst_mm <= WORST_MM:
        yield f"worst {worst_mm:.3f} mm"
    if not apart.percent.max() <= MOST_PERCENT:
        yield f"voxels {apart.percent.max():.2f}%"


def line(name: str, apart: Apart) -> str:
    """A run's line of the table."""
    errors = "| | |"
    if apart.errors_mm:
        errors = "".join(f"| {np.median(mm):.4f}, {mm.max():.4f} " for mm in apart.errors_mm) + "|"
    return (
        f"| {name} | {len(apart.apart_mm)} | {apart.n_failed[0]}, {apart.n_failed[1]} "
        f"| {apart.motion_mm.max():.2f} "
        f"| {np.median(apart.apart_mm):.4f} | {apart.apart_mm.max():.4f} "
        f"| {np.median(apart.percent):.2f}, {apart.percent.max():.2f} {errors}"
    )


def sources(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Name and file of each run."""
    for name, point_spread in POINT_SPREADS.items():
        if name in options.runs:
            plan = plan_of(CASES["drift"], point_spread, options.volumes, options.seed)
            yield f"phantom, {name}", made_run(options.cache, plan)
    for path in sorted(DEMO.glob("sub-*/func/*_bold.nii.gz")):
        if path.name[:6] in options.runs:
            yield path.name.removesuffix("_bold.nii.gz"), path


def main() -> None:
    """Print the table; exit with 1 if something required is missed."""
    everything = [*POINT_SPREADS, *(path.name for path in sorted(DEMO.glob("sub-*")))]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", choices=everything, default=everything)
    parser.add_argument("--volumes", type=int, default=40, help="of a simulated run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=default_folder())
    options = parser.parse_args()
    print(
        "| run | volumes | failed: native, itk | motion, largest (mm) | apart, median (mm) "
        "| worst (mm) | voxels, median and worst (%) | error, native: median, worst (mm) "
        "| error, itk |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    missed = []
    for name, source in sources(options):
        apart = compared(source, realigned(source, "native"), realigned(source, "itk"))
        print(line(name, apart), flush=True)
        if is_required(name, apart):
            missed += [f"{name}: {fault}" for fault in faults(apart)]
    if missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
