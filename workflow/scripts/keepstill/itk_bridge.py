"""ITK behind a few functions of arrays: all that the engine imports of it; the ladder has its own.

ITK is large, and slow to import, so it is imported when it is first used. Its images are given
origin, spacing and direction of their own, and points go through its own transforms, in LPS+ mm:
what comes out does not rest on our geometry, and is turned to RAS+ here.
"""

import functools
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import PackageError

Volume = NDArray[np.float32]
Matrix = NDArray[np.float64]

# World x and y point the other way in ITK.
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# A Gaussian kernel ends where this part of it is left, or at so many voxels.
_LEFT_OF_GAUSSIAN, _WIDEST_KERNEL = 0.001, 64
# Samples for a derivative are taken so far to either side, by the shortest edge of a voxel.
_DIFFERENCE_VOXELS = 0.1


def require_itk() -> str:
    """ITK's version, without importing it.

    Raises
    ------
    PackageError
        If it is not installed.
    """
    if find_spec("itk") is None:
        raise PackageError(
            "ITK is not installed in this environment; engine or check: itk needs it: make itk, or "
            "python -m pip install --require-hashes -r envs/itk.txt, both in keepstill's clone"
        )
    return metadata.version("itk")


@functools.cache
def _itk() -> Any:
    """The module, set to one thread: ranks share the work, and no sum may be split."""
    import itk

    itk.MultiThreaderBase.SetGlobalMaximumNumberOfThreads(1)
    return itk


class Image:
    """A volume in the world, as ITK sees it.

    Attributes
    ----------
    shape : (nz, ny, nx)
    affine : (4, 4) float64
        World mm (RAS+) from voxel (x, y, z).
    """

    def __init__(self, volume: Volume, affine: Matrix) -> None:
        itk, to_lps = _itk(), _LPS_FROM_RAS @ affine
        spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
        self.shape, self.affine = volume.shape, affine
        self.of_itk = itk.image_from_array(np.ascontiguousarray(volume, np.float32))
        self.of_itk.SetSpacing(spacing.tolist())
        self.of_itk.SetOrigin(to_lps[:3, 3].tolist())
        self.of_itk.SetDirection(itk.matrix_from_array(to_lps[:3, :3] / spacing))

    def array(self) -> Volume:
        """Its voxels, (nz, ny, nx) float32, a copy."""
        return np.array(_itk().array_from_image(self.of_itk))

    def made(self, filtered: Any) -> "Image":
        """An image of ITK's that has this one's grid."""
        out = Image.__new__(Image)
        out.shape, out.affine, out.of_itk = self.shape, self.affine, filtered
        return out


def lowpassed(image: Image, sd_voxels: Sequence[float]) -> Image:
    """Gaussian low-pass of an image, by standard deviations in voxels along x, y, z."""
    itk, out = _itk(), image.of_itk
    # One axis after the other: ITK's filter for all at once loads three times as many modules.
    for axis, sd in enumerate(sd_voxels):
        gaussian = itk.GaussianOperator[itk.F, 3]()
        gaussian.SetDirection(axis)
        gaussian.SetVariance(sd * sd)
        gaussian.SetMaximumError(_LEFT_OF_GAUSSIAN)
        gaussian.SetMaximumKernelWidth(_WIDEST_KERNEL)
        gaussian.CreateDirectional()
        convolved = itk.NeighborhoodOperatorImageFilter[type(out), type(out), itk.F].New(Input=out)
        convolved.SetOperator(gaussian)
        convolved.Update()
        out = convolved.GetOutput()
    return image.made(out)


def gradient(image: Image) -> Volume:
    """Derivatives along world x, y, z (RAS+, per mm) of an image's quintic spline, (3, nz, ny, nx).

    ITK evaluates a spline's derivative at one point a call only; of samples a fraction of a voxel
    to either side, the difference is as good.
    """
    sampler, step_mm = Sampler(image, image, 5), _DIFFERENCE_VOXELS * _smallest_edge_mm(image)
    slopes = []
    for axis in range(3):
        forth, back = np.eye(4), np.eye(4)
        forth[axis, 3], back[axis, 3] = step_mm, -step_mm
        slopes.append(np.subtract(sampler(forth), sampler(back)) / np.float32(2 * step_mm))
    return np.stack(slopes)


class Sampler:
    """A moving volume, sampled by ITK's B-spline on the grid of another, or every n-th voxel of it.

    Parameters
    ----------
    moving, grid : Image
    degree : int
        Of the spline, 1 to 5.
    steps : (x, y, z)
        Samples are taken at every so many voxels of the grid along each axis, from its first.
    """

    def __init__(
        self, moving: Image, grid: Image, degree: int, steps: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        itk, kind = _itk(), type(moving.of_itk)
        interpolator = itk.BSplineInterpolateImageFunction[kind, itk.D, itk.F].New()
        interpolator.SetSplineOrder(degree)
        self._transform = itk.AffineTransform[itk.D, 3].New()
        self._filter = itk.ResampleImageFilter[kind, kind].New(
            Input=moving.of_itk,
            Interpolator=interpolator,
            Transform=self._transform,
            OutputOrigin=grid.of_itk.GetOrigin(),
            OutputDirection=grid.of_itk.GetDirection(),
            OutputSpacing=[
                step * edge for step, edge in zip(steps, grid.of_itk.GetSpacing(), strict=True)
            ],
            Size=[-(-n // step) for n, step in zip(grid.shape[::-1], steps, strict=True)],
        )

    def __call__(self, moving_from_grid: Matrix) -> Volume:
        """The moving volume as the grid sees it, (nz, ny, nx) float32.

        Parameters
        ----------
        moving_from_grid : (4, 4) float64
            World mm (RAS+) of the grid -> world mm of the moving volume.
        """
        itk, lps = _itk(), _LPS_FROM_RAS @ moving_from_grid @ _LPS_FROM_RAS
        self._transform.SetMatrix(itk.matrix_from_array(lps[:3, :3].copy()))
        self._transform.SetTranslation(lps[:3, 3].tolist())
        self._filter.Update()
        return np.array(itk.array_from_image(self._filter.GetOutput()))


def _smallest_edge_mm(image: Image) -> float:
    return float(min(image.of_itk.GetSpacing()))
