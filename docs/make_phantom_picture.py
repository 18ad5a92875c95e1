"""Draw the phantom beside a real volume.

    python docs/make_phantom_picture.py [--output docs/phantom.png]

Left columns: the first volume of the demo study's sub-01. Right: a volume of the phantom with the
same voxels and noise like its, seen by a scanner at the same tilt. Same grey scale: black to the
99.5th percentile of each.
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np

from keepstill import phantom

mpl.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
REAL = DOCS.parent / "tests/data/study/sub-01/func/sub-01_task-oneback_run-1_bold.nii.gz"
# Slices from the bottom up, and mm right of and in front of the middle of the head.
SLICES = (3, 6, 10, 15, 18, 21, 25, 29)
SAGITTAL_MM, CORONAL_MM = 14, -15
HEAD_SEED, POINT_SPREAD_VOXELS, TSNR = 1, 0.8, 60.0


def real_volume() -> tuple[np.ndarray, np.ndarray]:
    """First volume (nx, ny, nz) of the real run, axes R, A, S, and voxel sizes."""
    image = nib.load(REAL)
    first = nib.Nifti1Image(np.asarray(image.dataobj[..., 0], np.float32), image.affine)
    first = nib.as_closest_canonical(first)
    return first.get_fdata(dtype=np.float32), np.array(first.header.get_zooms()[:3])


def phantom_volume(shape: tuple[int, int, int], sizes_mm: np.ndarray) -> np.ndarray:
    """A volume of the phantom on such a grid, axes R, A, S."""
    sizes = tuple(float(size) for size in sizes_mm)
    affine = phantom.grid_affine(shape, sizes, "RAS")
    view = phantom.Scanner(shape, affine, (POINT_SPREAD_VOXELS,) * 3)
    head = phantom.fine_head(HEAD_SEED, float(view.point_spread_mm.min()))
    pose = phantom.rigid((1.0, 4.0, 2.0), (4.0, 1.0, -2.0))
    effects = phantom.Effects(tsnr=TSNR, shading=0.1, ghost=0.01)
    return phantom.volume_of(phantom.make_run(head, view, [pose], effects), 0).T


def panels(volume: np.ndarray, sizes_mm: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Slices as (image, height of a pixel over its width)."""
    middle = np.array(volume.shape) // 2
    x = int(middle[0] + SAGITTAL_MM / sizes_mm[0])
    y = int(middle[1] + CORONAL_MM / sizes_mm[1])
    axial = [(volume[:, :, k].T, sizes_mm[1] / sizes_mm[0]) for k in SLICES]
    return [
        *axial,
        (volume[x].T, sizes_mm[2] / sizes_mm[1]),
        (volume[:, y].T, sizes_mm[2] / sizes_mm[0]),
    ]


def draw(output: Path) -> None:
    """Two blocks of panels, side by side."""
    real, sizes_mm = real_volume()
    made = phantom_volume(real.shape, sizes_mm)
    figure, axes = plt.subplots(5, 4, figsize=(10, 12), facecolor="black")
    for block, (volume, title) in enumerate(((real, "real: sub-01"), (made, "phantom"))):
        top = float(np.percentile(volume, 99.5))
        for i, (image, aspect) in enumerate(panels(volume, sizes_mm)):
            axis = axes[i // 2, 2 * block + i % 2]
            axis.imshow(image, cmap="gray", origin="lower", aspect=aspect, vmin=0, vmax=top)
            axis.axis("off")
        axes[0, 2 * block].set_title(title, color="white", loc="left")
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.97, 0.01, 0.01)
    figure.savefig(output, dpi=80, metadata={"Software": None})


def main() -> None:
    """Parse and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DOCS / "phantom.png")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
