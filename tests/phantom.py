"""A head that moves by a known motion, sampled from a finer grid so that no interpolator wins.

The head lives on a 1 mm grid, already blurred by the scanner's point spread. That blur leaves
nothing near the fine grid's Nyquist frequency, so reading the fine grid at any point by scipy's
quintic spline is exact to a part in ten thousand: the voxel grid of the run is never involved.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from keepstill import geometry


@dataclass(frozen=True)
class Phantom:
    """A run and its truth.

    `data` is (nz, ny, nx, n) float32 without noise applied to the truth; `truth` is
    (n, 4, 4) `moving_from_reference` against volume 0; `brain_mm` is (m, 3) world points.
    """

    data: np.ndarray
    clean: np.ndarray
    affine: np.ndarray
    truth: np.ndarray
    brain_mm: np.ndarray
    noise_sd: float


def fine_head(seed: int, half_mm=(80.0, 92.0, 68.0), point_spread_mm=2.9) -> np.ndarray:
    """Head of ellipsoid shells and folded texture on a 1 mm grid centred on the world origin."""
    rng = np.random.default_rng(seed)
    margin = 24
    axes = [np.arange(-h - margin, h + margin + 1.0) for h in half_mm]
    x, y, z = np.meshgrid(*axes, indexing="ij")

    def ellipsoid(scale, centre=(0.0, 0.0, 0.0)):
        q = sum(
            ((c - c0) / (h * scale)) ** 2
            for c, c0, h in zip((x, y, z), centre, half_mm, strict=True)
        )
        distance_mm = (np.sqrt(q) - 1.0) * scale * min(half_mm)
        return 0.5 * (1.0 - np.tanh(distance_mm / 1.0))

    def texture(sd_mm):
        t = ndimage.gaussian_filter(rng.normal(size=x.shape), sd_mm)
        return t / t.std()

    folds = 1.0 + 0.25 * np.tanh(texture(3.0)) + 0.10 * texture(1.6) + 0.12 * texture(12.0)
    skull, brain = ellipsoid(0.95), ellipsoid(0.88)
    head = 0.45 * (ellipsoid(1.0) - skull) + 0.12 * (skull - brain) + brain * folds
    head += 0.5 * ellipsoid(0.22, (12.0, 5.0, 8.0)) + 0.5 * ellipsoid(0.22, (-12.0, 5.0, 8.0))
    head *= 1.0 - 0.8 * np.exp(-((x**2 + (y - 60) ** 2 + (z + 45) ** 2) / 22.0**2))
    head = ndimage.gaussian_filter(1000.0 * head, point_spread_mm / 2.3548)
    return np.clip(head, 0, None)


def rigid(shift_mm, rotation_deg) -> np.ndarray:
    """(4, 4) rigid matrix: rotations about world x, then y, then z, then the shift."""
    out = np.eye(4)
    for axis, angle in enumerate(np.deg2rad(rotation_deg)):
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        turn = np.eye(4)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    out[:3, 3] = shift_mm
    return out


def drift(n: int, seed: int, size: float = 2.0) -> list[np.ndarray]:
    """Smooth wander with spikes, up to `size` mm and degrees; volume 0 moves too."""
    rng = np.random.default_rng(seed)
    walk = ndimage.gaussian_filter1d(np.cumsum(rng.normal(size=(n, 6)), axis=0), 3, axis=0)
    walk -= walk[:1]
    walk *= size / np.abs(walk).max(axis=0)
    spikes = rng.random(n) < 0.05
    walk[spikes] += rng.uniform(-0.5, 0.5, size=(int(spikes.sum()), 6)) * size
    walk = np.clip(walk, -size, size)
    start = rng.uniform(-1, 1, size=6)
    return [rigid(w[:3] + start[:3], w[3:] + start[3:]) for w in walk]


def grid_affine(shape, sizes_mm, axcodes="LAS", oblique_deg=0.0) -> np.ndarray:
    """World from voxel of a grid centred on the origin, with given storage order."""
    out = np.zeros((4, 4))
    for v, code in enumerate(axcodes):
        w = {"L": 0, "R": 0, "A": 1, "P": 1, "S": 2, "I": 2}[code]
        out[w, v] = sizes_mm[v] * (1 if code in "RAS" else -1)
    out[3, 3] = 1
    out = rigid((0, 0, 0), (oblique_deg, 0, 0)) @ out
    out[:3, 3] = -(out[:3, :3] @ ((np.array(shape) - 1) / 2))
    return out


def moving_run(head, motions, shape, affine, tsnr=60.0, seed=0) -> Phantom:
    """Run of a fine head under (4, 4) motions, with Rician noise of 1 / tsnr of the brain mean."""
    rng = np.random.default_rng(seed)
    coefficients = ndimage.spline_filter(head, order=5, output=np.float32)
    origin = (np.array(head.shape) - 1) / 2
    i, j, k = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    points = geometry.world(affine, np.stack([i, j, k], axis=-1).reshape(-1, 3).astype(float))
    clean = np.empty((shape[2], shape[1], shape[0], len(motions)), np.float32)
    for t, motion in enumerate(motions):
        back = np.linalg.inv(motion)
        at = points @ back[:3, :3].T + back[:3, 3] + origin
        values = ndimage.map_coordinates(coefficients, at.T, order=5, prefilter=False)
        clean[..., t] = values.reshape(shape).T
    brain = clean[..., 0] > 600
    sd = float(clean[..., 0][brain].mean() / tsnr)
    noise = rng.normal(size=(2, *clean.shape)).astype(np.float32) * np.float32(sd)
    data = np.sqrt((clean + noise[0]) ** 2 + noise[1] ** 2)
    z, y, x = np.nonzero(brain)
    first = np.linalg.inv(motions[0])
    return Phantom(
        data=data.astype(np.float32),
        clean=clean,
        affine=affine,
        truth=np.array([m @ first for m in motions]),
        brain_mm=geometry.world(affine, np.stack([x, y, z], axis=-1).astype(float)),
        noise_sd=sd,
    )


def displacement_mm(found: np.ndarray, truth: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
    """Mean distance (mm) over `points_mm` between where two (n, 4, 4) sets of maps send them."""
    difference = found[:, :3] - truth[:, :3]
    moved = np.einsum("nij,pj->npi", difference[:, :, :3], points_mm) + difference[:, None, :, 3]
    return np.linalg.norm(moved, axis=-1).mean(axis=-1)
