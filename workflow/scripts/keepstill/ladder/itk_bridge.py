"""What the ladder takes from ITK; nothing else in it imports itk.

ITK takes world coordinates to be LPS mm; it does not look at what they are called. Images get
the run's own RAS+ affine here, and points are RAS+ mm throughout.
"""

import importlib.util
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import SettingsError
from keepstill.ladder.rungs import SPLINE_DEGREE

Volume = NDArray[np.float32]
Matrix = NDArray[np.float64]


class Sampled(NamedTuple):
    """An image, ITK's cubic B-spline through it, and the indices (x, y, z) of its last voxel."""

    image: Any
    spline: Any
    last: tuple[int, int, int]


def require_itk() -> None:
    """Refuse to go on without ITK, which is not imported for that.

    Raises
    ------
    SettingsError
    """
    if importlib.util.find_spec("itk") is None:
        raise SettingsError(
            "ITK is not installed; the ladder needs it: make itk, or "
            "pip install --require-hashes -r envs/itk.txt"
        )


def use_one_thread() -> None:
    """Keep ITK to one thread a process; its interpolator has no more anyway."""
    import itk

    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(1)


def sampled(volume: Volume, affine: Matrix) -> Sampled:
    """Cubic B-spline through a volume (nz, ny, nx), to be asked at points (mm)."""
    import itk

    image = _image_of(volume, affine)
    spline = itk.BSplineInterpolateImageFunction[type(image), itk.D, itk.F].New()
    spline.SetSplineOrder(SPLINE_DEGREE)
    spline.SetInputImage(image)
    nx, ny, nz = image.GetLargestPossibleRegion().GetSize()
    return Sampled(image, spline, (nx - 1, ny - 1, nz - 1))


def coefficients(volume: Volume) -> NDArray[np.float32]:
    """Coefficients (nz, ny, nx) of ITK's cubic B-spline through a volume."""
    import itk

    image = itk.image_from_array(volume)
    kind = itk.BSplineDecompositionImageFilter[type(image), type(image)]
    filtering = kind.New(Input=image, SplineOrder=SPLINE_DEGREE)
    filtering.Update()
    return np.asarray(itk.array_from_image(filtering.GetOutput()))


def _image_of(volume: Volume, affine: Matrix) -> Any:
    import itk

    image = itk.image_from_array(np.ascontiguousarray(volume, np.float32))
    sizes_mm = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(sizes_mm.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection(np.ascontiguousarray(affine[:3, :3] / sizes_mm))
    return image
