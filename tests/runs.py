"""Small runs as files, and runs of the phantom in memory."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from keepstill import geometry, phantom

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
