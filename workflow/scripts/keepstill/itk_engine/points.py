"""The reference as the ITK engine sees it: points, derivatives and normal matrices."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import EmptyVolumeError
from keepstill.itk_bridge import Image, gradient, lowpassed
from keepstill.masks import dilated
from keepstill.settings import EstimateSettings

Volume = NDArray[np.float32]
Matrix = NDArray[np.float64]
Triple = tuple[float, float, float]
Steps = tuple[int, int, int]

_FWHM_PER_SD = 2.3548200450309493
_RIM_VOXELS = 3
# Low-pass of the derivatives that residuals are tested against. Wider keeps aliasing out: errors in
# two simulated runs with a sharp point spread at 2.2 are 0.81 and 0.98 of those at 1.8. Narrower
# keeps nearer to the native engine after large turns: 0.37 mm in a volume of the demo study's
# sagittal run at 1.8, 0.41 at 2.0, 0.49 at 2.4.
_TEST_FWHM_VOXELS = 2.0
_N_BINS = 256
# Large motion is found on images low-passed by this, on about four voxels a width.
_COARSE_FWHM_MM, _VOXELS_A_WIDTH = 12.0, 4
_FEWEST_VOXELS = 8
_NOT_LOWPASSED = (0.0, 0.0, 0.0)
# Steps go on until the next would be shorter: first on the low-passed images, then on every
# second voxel of the images as they are; on all of them, until the settings are content.
_COARSE_TOLERANCE_MM, _MIDDLE_TOLERANCE_MM = 0.2, 0.03


class Shown(NamedTuple):
    """An image, (nz, ny, nx), and its derivatives along world x, y, z, per mm, (3, nz, ny, nx)."""

    volume: Volume
    slopes: Volume


@dataclass(frozen=True)
class Level:
    """Points of the reference, on every n-th voxel, and what a volume is compared with there.

    Attributes
    ----------
    steps : (x, y, z)
        Of the grid.
    sd_voxels : (x, y, z)
        Standard deviations of the low-pass of both images; 0 for images as they are.
    where : (n,) int64
        Places of the points among the samples of the thinned grid.
    voxels : (n, 3) float64
        Of the reference, x, y, z.
    jacobian, test_jacobian : (7, n) float64
        Change of the reference by shifts (mm) and turns (rad) about its centre and by intensity,
        which is the image itself; and the same low-passed.
    normal : (7, 7) float64
        test_jacobian jacobian'.
    tolerance_mm : float
    """

    steps: Steps
    sd_voxels: Triple
    where: NDArray[np.int64]
    voxels: Matrix
    jacobian: Matrix
    test_jacobian: Matrix
    normal: Matrix
    tolerance_mm: float

    @property
    def values(self) -> Matrix:
        """The reference at the points, (n,)."""
        return self.jacobian[-1]


@dataclass(frozen=True)
class ItkReference:
    """A reference that volumes can be realigned to by ITK.

    Attributes
    ----------
    volume : (nz, ny, nx) float32
    affine : (4, 4) float64
        World mm from voxel.
    image : Image
    centre_mm : (3,) float64
        World point that steps turn about: the middle of the points.
    levels : tuple of Level
        Coarse, middle, fine.
    mean, variance : float
        Of the points.
    """

    volume: Volume
    affine: Matrix
    image: Image
    centre_mm: Matrix
    levels: tuple[Level, ...]
    mean: float
    variance: float


def prepare_for_itk(volume: Volume, affine: Matrix, settings: EstimateSettings) -> ItkReference:
    """Points, derivatives and normal matrices of a reference volume.

    Parameters
    ----------
    volume : (nz, ny, nx) float32
        Finite voxels; never modified.
    affine : (4, 4) float64
        World mm (RAS+) from voxel (x, y, z).
    settings : EstimateSettings

    Raises
    ------
    EmptyVolumeError
        If no voxel stands out from the background.
    """
    image = Image(volume, affine)
    smooth, sd_voxels, thin = _coarse(image)
    mask = _without_border(dilated(bright_part(smooth.array()), _RIM_VOXELS))
    if not mask.any():
        raise EmptyVolumeError("the reference shows no head: no voxel stands out from background")
    centre_mm = _world(affine, np.argwhere(mask)[:, ::-1]).mean(axis=0)
    coarse, plain = _shown(smooth), _shown(image)
    tested = _lowpassed(plain, image, _TEST_FWHM_VOXELS / _FWHM_PER_SD)
    points = _Points(mask, affine, centre_mm)
    levels = (
        points.level((coarse, coarse), thin, sd_voxels, _COARSE_TOLERANCE_MM),
        points.level((plain, tested), (2, 2, 2), _NOT_LOWPASSED, _MIDDLE_TOLERANCE_MM),
        points.level((plain, tested), (1, 1, 1), _NOT_LOWPASSED, settings.tolerance_mm),
    )
    values = levels[-1].values
    mean, variance = float(values.mean()), float(values.var())
    return ItkReference(volume, affine, image, centre_mm, levels, mean, variance)


class _Points:
    """Where points may be, and levels of them."""

    def __init__(self, mask: NDArray[np.bool_], affine: Matrix, centre_mm: Matrix) -> None:
        self._mask, self._affine, self._centre_mm = mask, affine, centre_mm

    def level(
        self, shown: tuple[Shown, Shown], steps: Steps, sd_voxels: Triple, tolerance_mm: float
    ) -> Level:
        """The points on every n-th voxel, of an image and what residuals are tested against."""
        nx, ny, nz = steps
        thinned = np.ascontiguousarray(self._mask[::nz, ::ny, ::nx])
        voxels = (np.argwhere(thinned) * (nz, ny, nx))[:, ::-1]
        arms = _world(self._affine, voxels) - self._centre_mm
        plain, tested = (_jacobian(part, tuple(voxels.T[::-1]), arms) for part in shown)
        return Level(
            steps=steps,
            sd_voxels=sd_voxels,
            where=np.flatnonzero(thinned),
            voxels=voxels.astype(np.float64),
            jacobian=plain,
            test_jacobian=tested,
            normal=products(tested, plain),
            tolerance_mm=tolerance_mm,
        )


def bright_part(volume: Volume) -> NDArray[np.bool_]:
    """Voxels above the threshold that leaves least variance on either side, (nz, ny, nx).

    Otsu 1979 (IEEE Trans. Syst. Man Cybern. 9:62), eq. 18, over 256 bins. Empty for a volume of
    one value.
    """
    if volume.min() == volume.max():
        return np.zeros(volume.shape, np.bool_)
    counts, edges = np.histogram(volume, _N_BINS)
    below = np.cumsum(counts)[:-1]
    above = volume.size - below
    sums = np.cumsum(counts * (edges[:-1] + edges[1:]))
    apart = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    return volume > edges[1:-1][np.argmax(below * above.astype(np.float64) * apart**2)]


def products(a: Matrix, b: Matrix) -> Matrix:
    """Product a b' of (m, n) matrices; no library splits the sum among threads."""
    return np.einsum("in,jn->ij", a, b)


def _coarse(image: Image) -> tuple[Image, Triple, Steps]:
    """An image low-passed as widely in all directions, by how much, and on which voxels."""
    edges_mm = np.linalg.norm(image.affine[:3, :3], axis=0).tolist()
    x, y, z = (_COARSE_FWHM_MM / _FWHM_PER_SD / edge for edge in edges_mm)
    wanted = [int(_COARSE_FWHM_MM / _VOXELS_A_WIDTH / edge) for edge in edges_mm]
    most = [n // _FEWEST_VOXELS for n in image.shape[::-1]]
    nx, ny, nz = (max(1, min(n, m)) for n, m in zip(wanted, most, strict=True))
    return lowpassed(image, (x, y, z)), (x, y, z), (nx, ny, nz)


def _shown(image: Image) -> Shown:
    return Shown(image.array(), gradient(image))


def _lowpassed(shown: Shown, grid: Image, sd_voxels: float) -> Shown:
    sd = (sd_voxels,) * 3
    volume, *slopes = (
        lowpassed(Image(part, grid.affine), sd).array() for part in (shown.volume, *shown.slopes)
    )
    return Shown(volume, np.stack(slopes))


def _jacobian(shown: Shown, at: tuple[NDArray[np.int64], ...], arms_mm: Matrix) -> Matrix:
    """The seven columns at some voxels (z, y, x), whose places from the centre are (n, 3) arms."""
    slopes = np.stack([slope[at] for slope in shown.slopes]).astype(np.float64)
    by_turn = np.cross(arms_mm, slopes.T).T
    return np.concatenate([slopes, by_turn, shown.volume[at][None].astype(np.float64)])


def _world(affine: Matrix, voxels: NDArray[np.int64]) -> Matrix:
    return np.einsum("ij,nj->ni", affine[:3, :3], voxels) + affine[:3, 3]


def _without_border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask without the border of the field, where an axis has room for it."""
    mask = mask.copy()
    for axis, size in enumerate(mask.shape):
        if size >= _FEWEST_VOXELS:
            edge = np.moveaxis(mask, axis, 0)
            edge[0] = edge[-1] = False
    return mask
