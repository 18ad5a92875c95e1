"""Slices through a run, as SVG: what it was realigned to, and tSNR before and after."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
import nibabel as nib
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from keepstill.report.figures import FAILED_LINE, INK, STYLE, Y_LINE, to_svg

N_SLICES = 8
# Files that are shown, by the end of their names; the masks are drawn into the reference.
SHOWN = {
    "boldref": "_desc-hmc_boldref.nii.gz",
    "brain": "_desc-brain_mask.nii.gz",
    "coverage": "_desc-coverage_mask.nii.gz",
    "before": "_stat-tsnr_desc-raw_boldmap.nii.gz",
    "after": "_stat-tsnr_desc-hmc_boldmap.nii.gz",
}
NEEDED = ("boldref", "brain", "coverage")
TITLES = {
    "boldref": "reference (line: brain; shaded: not in every volume)",
    "before": "temporal signal-to-noise ratio before",
    "after": "and after",
}
TSNR_COLOURS = "inferno"
WIDTH_INCH, TITLE_INCH = 10.0, 0.3

Image = NDArray[Any]


def find_images(output_dir: Path, outputs: Iterable[str]) -> dict[str, Path]:
    """Images that `slices_svg` shows, among a run's outputs; none if one lacks that it needs."""
    found = {
        name: output_dir / path
        for path in outputs
        for name, ending in SHOWN.items()
        if path.endswith(ending) and (output_dir / path).is_file()
    }
    return found if all(name in found for name in NEEDED) else {}


def slices_svg(run: str, paths: Mapping[str, Path]) -> str:
    """SVG of axial slices of a run, the same slices in every row, right side on the right.

    Parameters
    ----------
    run : str
    paths : mapping
        From `find_images`. A map on another grid than the reference's is left out.
    """
    images = {name: nib.as_closest_canonical(nib.load(path)) for name, path in paths.items()}
    reference = images["boldref"]
    voxels = {
        name: image.get_fdata(dtype=np.float32)
        for name, image in images.items()
        if image.shape == reference.shape and np.allclose(image.affine, reference.affine)
    }
    chosen = choose_slices(voxels["brain"] > 0)
    rows = {"boldref": _drawn_reference(voxels)}
    limit = _tsnr_limit(voxels)
    for name in ("before", "after"):
        if name in voxels:
            rows[name] = colormaps[TSNR_COLOURS](voxels[name] / limit)[..., :3]
    mosaics = {TITLES[name]: mosaic(row, chosen) for name, row in rows.items()}
    width_mm, height_mm = reference.header.get_zooms()[:2]
    return _draw(run, mosaics, float(height_mm / width_mm), limit)


def choose_slices(brain: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Numbers of up to `N_SLICES` slices, evenly from the foot of the brain to its top.

    Parameters
    ----------
    brain : (nx, ny, nz) bool
    """
    inside = np.flatnonzero(brain.any(axis=(0, 1)))
    first, last = (inside[0], inside[-1]) if inside.size else (0, brain.shape[2] - 1)
    n = min(N_SLICES, int(last - first) + 1)
    return np.unique(np.rint(np.linspace(first, last, n)).astype(np.intp))


def mosaic(image: Image, chosen: NDArray[np.intp]) -> Image:
    """Slices of a (nx, ny, nz, 3) image side by side, front up, (ny, n nx, 3)."""
    return np.concatenate([image[:, ::-1, z].swapaxes(0, 1) for z in chosen], axis=1)


def _drawn_reference(voxels: Mapping[str, Image]) -> Image:
    """Reference in grey, what some volume does not show in a tint, the brain's edge in a line."""
    volume, brain = voxels["boldref"], voxels["brain"] > 0
    top = float(np.percentile(volume[brain] if brain.any() else volume, 99)) or 1.0
    grey = np.clip(volume / (1.2 * top), 0, 1)
    drawn = np.repeat(grey[..., None], 3, axis=3)
    uncovered = voxels["coverage"] == 0
    drawn[uncovered] = 0.5 * drawn[uncovered] + 0.5 * np.array(to_rgb(FAILED_LINE))
    drawn[_edge(brain)] = to_rgb(Y_LINE)
    return drawn


def _edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Voxels of a mask with a neighbour outside it, in their own slice."""
    padded = np.pad(mask, ((1, 1), (1, 1), (0, 0)))
    core = padded[1:-1, 1:-1]
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(core & ~inner)


def _tsnr_limit(voxels: Mapping[str, Image]) -> float:
    """Top of the colour scale: what 2 in 100 voxels of the brain exceed, after or before."""
    brain = voxels["brain"] > 0
    maps = [voxels[name][brain] for name in ("before", "after") if name in voxels]
    known = np.concatenate([*maps, [0.0]])
    return max(float(np.ceil(np.percentile(known, 98))), 1.0)


def _draw(run: str, mosaics: Mapping[str, Image], aspect: float, limit: float) -> str:
    image_inch = [
        WIDTH_INCH * aspect * image.shape[0] / image.shape[1] for image in mosaics.values()
    ]
    height_inch = sum(image_inch) + TITLE_INCH * len(mosaics)
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH_INCH, height_inch))
        top_inch = height_inch
        for (title, image), inch in zip(mosaics.items(), image_inch, strict=True):
            top_inch -= TITLE_INCH
            figure.text(0, (top_inch + 0.08) / height_inch, title, color=INK, weight="bold")
            if "noise" in title:
                words = f"black 0 to yellow {limit:g}"
                figure.text(1, (top_inch + 0.08) / height_inch, words, color=INK, ha="right")
            top_inch -= inch
            ax = figure.add_axes((0, top_inch / height_inch, 1, inch / height_inch))
            ax.imshow(image, interpolation="none", aspect="auto")
            ax.axis("off")
        return to_svg(figure, f"{run}: slices")
