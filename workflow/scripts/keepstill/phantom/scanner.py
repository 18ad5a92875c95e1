"""The scanner: a voxel grid and a point spread that do not move, and what they make of a head."""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.errors import SettingsError
from keepstill.phantom.fine import FWHM_PER_SD, FineHead
from keepstill.phantom.motion import rigid
from keepstill.phantom.spline import Spline, fill_sampled, spline_of

Matrix = NDArray[np.float64]
Volume = NDArray[np.float32]

# Error allowed to the sum over nodes that stands for the rest of the point spread, at any
# frequency, after the blur: a part of the contrast. It makes the point spread a little less
# Gaussian, equally for every pose, so it hides no interpolation.
_NODE_ERROR = 1e-3
_MOST_NODES = 31


@dataclass(frozen=True)
class Scanner:
    """Where and how a volume is sampled.

    Attributes
    ----------
    shape : (nx, ny, nz)
    affine : (4, 4) float64
        World mm (RAS+) from voxel.
    point_spread_voxels : (x, y, z)
        Full width at half maximum of the Gaussian point spread along each voxel axis.
    tr_s : float
        Seconds from one volume to the next.
    slice_times_s : (nz,) tuple of float, or ()
        When each slice is taken, from the beginning of its volume; () takes all at once.
    """

    shape: tuple[int, int, int]
    affine: Matrix
    point_spread_voxels: tuple[float, float, float] = (0.8, 0.8, 0.8)
    tr_s: float = 2.0
    slice_times_s: tuple[float, ...] = ()

    @property
    def point_spread_mm(self) -> NDArray[np.float64]:
        """Full width at half maximum along each voxel axis, (3,) mm."""
        return np.array(self.point_spread_voxels) * geometry.voxel_sizes_mm(self.affine)


@dataclass(frozen=True)
class Camera:
    """A scanner aimed at a head.

    Attributes
    ----------
    scanner : Scanner
    signal, active, brain : Spline
        Of the fine head.
    nodes : tuple of (weight, (x, y, z))
        Points, in voxels about a voxel's centre, whose weighted sum is the rest of the point
        spread.
    n_between : int
        Samples taken per voxel along x; all but one are thrown away. The spline kernel shares its
        loads among neighbours that are about one fine voxel apart, so this takes a third less
        time than sampling voxels directly.
    """

    scanner: Scanner
    signal: Spline
    active: Spline
    brain: Spline
    nodes: tuple[tuple[float, tuple[float, float, float]], ...]
    n_between: int


def grid_affine(
    shape: tuple[int, int, int],
    sizes_mm: tuple[float, float, float],
    axcodes: str = "LAS",
    oblique_deg: float = 0.0,
) -> Matrix:
    """World from voxel of a grid centred on the origin, with given storage order.

    The grid is turned by `oblique_deg` about the world's x axis.
    """
    out = np.zeros((4, 4))
    for v, code in enumerate(axcodes):
        w = {"L": 0, "R": 0, "A": 1, "P": 1, "S": 2, "I": 2}[code]
        out[w, v] = sizes_mm[v] * (1 if code in "RAS" else -1)
    out[3, 3] = 1
    out = rigid((0, 0, 0), (oblique_deg, 0, 0)) @ out
    out[:3, 3] = -(out[:3, :3] @ ((np.array(shape) - 1) / 2))
    return out


def aim(scanner: Scanner, head: FineHead) -> Camera:
    """Make ready to take volumes of a head.

    Raises
    ------
    SettingsError
        If the head is blurred more than the scanner's point spread.
    """
    size_x = float(geometry.voxel_sizes_mm(scanner.affine)[0])
    signal, active, brain = (
        spline_of(volume, head.grid, scanner.affine)
        for volume in (head.tissue.signal, head.tissue.active, head.tissue.brain)
    )
    return Camera(
        scanner=scanner,
        signal=signal,
        active=active,
        brain=brain,
        nodes=_nodes(scanner, head.blur_sd_mm),
        n_between=max(1, round(size_x / head.grid.spacing_mm)),
    )


def _nodes(
    scanner: Scanner, blur_sd_mm: float
) -> tuple[tuple[float, tuple[float, float, float]], ...]:
    """Weights and offsets (voxels) of the point spread beyond a blur, a product over the axes."""
    sizes_mm = geometry.voxel_sizes_mm(scanner.affine)
    along: list[list[tuple[float, float]]] = []
    for axis in range(3):
        variance = (scanner.point_spread_mm[axis] / FWHM_PER_SD) ** 2 - blur_sd_mm**2
        if variance < -1e-6 * blur_sd_mm**2:
            raise SettingsError(
                f"point spread: {scanner.point_spread_mm[axis]:.3g} mm found along voxel axis "
                f"{axis}; the head is blurred by {blur_sd_mm * FWHM_PER_SD:.3g} mm already"
            )
        ratio = float(np.sqrt(max(variance, 0.0))) / blur_sd_mm
        at, weight = _gaussian_nodes(ratio)
        along.append([(float(w), float(a * blur_sd_mm / sizes_mm[axis])) for a, w in
                      zip(at, weight, strict=True)])  # fmt: skip
    return tuple(
        (wx * wy * wz, (x, y, z)) for (wx, x), (wy, y), (wz, z) in itertools.product(*along)
    )


def _gaussian_nodes(sd: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fewest points and weights that act like a Gaussian of `sd` on what a unit Gaussian left."""
    k = np.linspace(0.0, 6.0, 601)
    for n in range(1, _MOST_NODES):
        at, weight = hermegauss(n)
        at, weight = at * sd, weight / weight.sum()
        response = np.cos(np.outer(k, at)) @ weight
        error = np.abs(response - np.exp(-0.5 * (sd * k) ** 2)) * np.exp(-0.5 * k**2)
        if error.max() <= _NODE_ERROR:
            return at, weight
    raise SettingsError("point spread: more than ten times as wide along one axis as along another")


def exposed(camera: Camera, poses: Matrix, activity: NDArray[np.float64] | float = 0.0) -> Volume:
    """Noise-free volume of a head, (nz, ny, nx) float32.

    Parameters
    ----------
    camera : Camera
    poses : (4, 4) or (nz, 4, 4)
        World mm from head mm, of the volume or of each slice.
    activity : (nz,) or float
        Part of the cortex's intensity that the task adds.
    """
    out = _sampled(camera, camera.signal, poses)
    if np.any(activity):
        added = _sampled(camera, camera.active, poses)
        out += added * np.asarray(activity, np.float32).reshape(-1, 1, 1)
    return out


def brain_part(camera: Camera, pose: Matrix) -> Volume:
    """Part of each voxel's centre that is brain, (nz, ny, nx) float32."""
    nx, ny, nz = camera.scanner.shape
    out = np.empty((nz, ny, nx), np.float32)
    fill_sampled(out, camera.brain, geometry.inverse(pose), camera.scanner.affine)
    return out


def _sampled(camera: Camera, spline: Spline, poses: Matrix) -> Volume:
    nx, ny, nz = camera.scanner.shape
    n = camera.n_between
    out = np.zeros((nz, ny, nx), np.float32)
    dense = np.empty((nz, ny, (nx - 1) * n + 1), np.float32)
    for weight, offset in camera.nodes:
        dense_from_voxel = geometry.translation(np.array(offset))
        dense_from_voxel[0, 0] = 1.0 / n
        affine = geometry.compose(camera.scanner.affine, dense_from_voxel)
        if poses.ndim == 2:
            fill_sampled(dense, spline, geometry.inverse(poses), affine)
        else:
            for k in range(nz):
                here = geometry.compose(affine, geometry.translation(np.array([0, 0, k])))
                fill_sampled(dense[k : k + 1], spline, geometry.inverse(poses[k]), here)
        out += np.float32(weight) * dense[:, :, ::n]
    return out
