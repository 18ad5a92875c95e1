"""Small runs as files."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

import phantom
from keepstill.bids import Origin
from keepstill.collect import collect_run
from keepstill.ranks import join_world, realign_staged
from keepstill.realign import Crew
from keepstill.settings import RealignSettings
from keepstill.stage import STAGED, remove_stage, stage_run


def ball_run(n=5, shape=(20, 22, 14), seed=0, dtype=np.int16) -> np.ndarray:
    """(nx, ny, nz, n) of a noisy, textured, gently moving ball."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1.6, 1.6, size) for size in shape), indexing="ij")
    out = np.empty((*shape, n))
    for t in range(n):
        x, y, z = (axis + 0.03 * np.sin(0.7 * t + k) for k, axis in enumerate(axes))
        texture = 1 + 0.3 * np.sin(7 * x + 1) * np.cos(6 * y) * np.sin(5 * z + 2)
        out[..., t] = 1000 * texture / (1 + np.exp(9 * (x**2 + y**2 + 1.2 * z**2 - 1)))
    out += rng.normal(size=out.shape) * 8 + 20
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


def read_table(path: Path) -> dict[str, list[str]]:
    """Columns of a table, as text."""
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    columns = zip(*lines[1:], strict=True)
    return {name: list(cells) for name, cells in zip(lines[0], columns, strict=True)}


def numbers(cells) -> np.ndarray:
    """Cells as float64, NaN for n/a."""
    return np.array([np.nan if cell == "n/a" else float(cell) for cell in cells])
