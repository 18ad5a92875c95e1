"""Small runs as files."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

import phantom


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
