"""Small runs as files, and runs of the phantom in memory."""

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np

from keepstill import geometry, phantom
from keepstill.bids import Origin
from keepstill.collect import collect_run
from keepstill.mean_echo import stage_mean
from keepstill.ranks import join_world, realign_staged
from keepstill.realign import Crew
from keepstill.settings import RealignSettings
from keepstill.stage import STAGED, remove_stage, stage_run

SCRIPTS = Path(__file__).parents[1] / "workflow" / "scripts"
# The phantom's point spread in tests: 0.9 of a voxel of 3.4 mm.
POINT_SPREAD_MM = 3.1


def scanner(shape, affine, **options) -> phantom.Scanner:
    """A scanner whose point spread is as wide in all directions, in mm."""
    spread = tuple(float(POINT_SPREAD_MM / size) for size in geometry.voxel_sizes_mm(affine))
    return phantom.Scanner(tuple(shape), affine, spread, **options)


def head_run(head, poses, shape, affine, tsnr=60.0, seed=0):
    """Run of a head, and its volumes (nz, ny, nx)."""
    run = phantom.make_run(head, scanner(shape, affine), poses, phantom.Effects(tsnr=tsnr), seed)
    return run, [phantom.volume_of(run, t) for t in range(len(run))]


def ball_run(n=5, shape=(20, 22, 14), seed=0, dtype=np.int16) -> np.ndarray:
    """(nx, ny, nz, n) of a noisy, gently moving ball."""
    rng = np.random.default_rng(seed)
    shifts = 0.03 * np.sin(0.7 * np.arange(n)[:, None] + np.arange(3))
    out = np.stack([phantom.ball(shape, shift) for shift in shifts], axis=-1)
    out = out + rng.normal(size=out.shape) * 8 + 20
    return (
        np.rint(out).clip(0).astype(dtype)
        if np.issubdtype(dtype, np.integer)
        else out.astype(dtype)
    )


def write_run(path: Path, data: np.ndarray, affine=None, tr_s=2.0, sidecar=True) -> Path:
    """Write data as NIfTI with both codes set, and a sidecar beside it."""
    if affine is None:
        affine = phantom.grid_affine(data.shape[:3], (3.0, 3.0, 4.0))
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm", "sec")
    if data.ndim == 4:
        image.header["pixdim"][4] = tr_s
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    if sidecar:
        beside = path.with_name(path.name.split(".")[0] + ".json")
        beside.write_text(json.dumps({"RepetitionTime": tr_s, "TaskName": "rest"}))
    return path


def write_stored(path: Path, data, affine, kind=nib.Nifti1Header, scaling=(1, 0)) -> Path:
    """Write data, type and byte order as they are, under a header that says all one can say.

    `scaling` is slope and intercept: intensity = data * slope + intercept.
    """
    is_native = data.dtype.isnative
    header = kind(endianness="<" if is_native else ">")
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header.set_sform(affine, 2)
    header.set_qform(affine, 1)
    header.set_xyzt_units("mm", "sec")
    header.set_intent("time series", name="what")
    header.set_dim_info(0, 1, 2)
    header["pixdim"][4], header["slice_duration"] = 1.5, 0.1
    header["slice_code"], header["slice_end"] = 3, data.shape[2] - 1
    header["scl_slope"], header["scl_inter"] = scaling
    header["vox_offset"] = kind.sizeof_hdr + 4
    if kind is nib.Nifti1Header:
        header["magic"] = b"n+1"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.binaryblock + bytes(4) + data.tobytes(order="F"))
    return path


def collected(source: Path, out: Path, settings: RealignSettings, bids_dir=None, **found) -> Path:
    """Stage, realign and collect a run, as if staging had found what `found` says."""
    stage_dir = out.with_name(f"{out.name}-stage")
    origin = None if bids_dir is None else Origin(bids_dir)
    stage_run(source, source.name.split("_bold")[0], origin, stage_dir)
    staged = json.loads((stage_dir / STAGED).read_text()) | found
    (stage_dir / STAGED).write_text(json.dumps(staged))
    realign_staged(stage_dir, settings, join_world(), Crew())
    collect_run(stage_dir, out, settings)
    remove_stage(stage_dir)
    return out


def collected_leader(run, origin: Origin, stage_dir: Path, out: Path, settings) -> None:
    """Stage, realign and collect a multi-echo run as far as its echoes share it."""
    if run.mean_of:
        stage_mean(dict(run.mean_of), run.name, origin, stage_dir, settings)
    else:
        stage_run(run.source, run.name, origin, stage_dir, settings)
    realign_staged(stage_dir, settings, join_world(), Crew())
    collect_run(stage_dir, out, settings)
    remove_stage(stage_dir)


def read_table(path: Path) -> dict[str, list[str]]:
    """Columns of a table, as text."""
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    columns = zip(*lines[1:], strict=True)
    return {name: list(cells) for name, cells in zip(lines[0], columns, strict=True)}


def numbers(cells) -> np.ndarray:
    """Cells as float64, NaN for n/a."""
    return np.array([np.nan if cell == "n/a" else float(cell) for cell in cells])


def digests(folder):
    """Of every file below a folder, by its place there; logs left out."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "logs" not in path.parts
    }
