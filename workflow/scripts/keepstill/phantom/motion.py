"""How a head moves, and how far two sets of motions are apart.

A pose is where the head is: a rigid (4, 4) matrix, world mm (RAS+) from head mm. Its six numbers
are shifts along x, y, z (mm) and rotations about the world's x, then y, then z axis (rad); the
head turns first and is shifted then.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keepstill.errors import InputError

Matrices = NDArray[np.float64]

KINDS = ("drift", "spikes", "steps", "still")
COLUMNS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
# Sizes in mm, and in degrees for rotations.
DRIFT, STEP, JITTER = 2.0, 12.0, 0.03
_SPIKE_PART, _SPIKE = 0.05, 1.0
_VOLUMES_PER_STEP = 8
_SMOOTH_SD_VOLUMES = 3.0
# Nobody lies exactly in the middle of the scanner: volume 0 is off by up to this.
_START = 1.0
# Turns are kept below this, far from where three angles cease to say what a rotation is.
_MOST_ROTATION_RAD = 1.0


def rigid(shift_mm: ArrayLike, rotation_deg: ArrayLike) -> Matrices:
    """(4, 4) rigid matrix: rotations about world x, then y, then z, then the shift."""
    out = np.eye(4)
    for axis, angle in enumerate(np.deg2rad(np.asarray(rotation_deg, dtype=np.float64))):
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        turn = np.eye(4)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    out[:3, 3] = shift_mm
    return out


def pose_of(numbers: ArrayLike) -> Matrices:
    """Pose from its six numbers, mm and rad."""
    six = np.asarray(numbers, dtype=np.float64)
    return rigid(six[:3], np.rad2deg(six[3:]))


def numbers_of(pose: Matrices) -> NDArray[np.float64]:
    """Six numbers, mm and rad, of a pose; `pose_of` undone."""
    r = pose[:3, :3]
    angles = np.arctan2(r[2, 1], r[2, 2]), -np.arcsin(r[2, 0]), np.arctan2(r[1, 0], r[0, 0])
    return np.array([*pose[:3, 3], *angles])


def drawn_poses(kind: str, n: int, seed: int, size: float | None = None) -> Matrices:
    """Poses of n volumes, (n, 4, 4).

    Parameters
    ----------
    kind : str
        ``drift`` wanders smoothly, ``spikes`` is a drift in which one volume of twenty is off by
        up to half its size, ``steps`` lies still and moves on every eighth volume, ``still``
        breathes: 0.03 mm and degrees of jitter, which all kinds have.
    n, seed : int
    size : float
        Largest shift (mm) and rotation (degrees); 2 for a drift, 12 for steps.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    if kind in ("drift", "spikes"):
        walk = _walk(rng, n, DRIFT if size is None else size, kind == "spikes")
    elif kind == "steps":
        walk = _steps(rng, n, STEP if size is None else size)
    else:
        walk = np.zeros((n, 6))
    walk = walk + rng.normal(size=(n, 6)) * JITTER
    start = rng.uniform(-_START, _START, 6)
    return np.array([rigid(w[:3] + start[:3], w[3:] + start[3:]) for w in walk])


def _walk(rng: np.random.Generator, n: int, size: float, spikes: bool) -> NDArray[np.float64]:
    """Random walk, smoothed, that begins at 0 and reaches `size`; mm and degrees."""
    reach = int(4 * _SMOOTH_SD_VOLUMES)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SMOOTH_SD_VOLUMES) ** 2)
    steps = np.cumsum(rng.normal(size=(n + 2 * reach, 6)), axis=0)
    walk = np.stack([np.convolve(s, taps / taps.sum(), "valid") for s in steps.T], axis=1)
    walk -= walk[:1]
    walk *= size / np.maximum(np.abs(walk).max(axis=0), 1e-9)
    if spikes:
        where = rng.random(n) < _SPIKE_PART
        walk[where] += rng.uniform(-0.5, 0.5, (int(where.sum()), 6)) * _SPIKE * size
    return np.clip(walk, -size, size)


def _steps(rng: np.random.Generator, n: int, size: float) -> NDArray[np.float64]:
    """Poses kept for eight volumes each; shift and rotation have lengths up to `size`."""
    n_steps = -(-n // _VOLUMES_PER_STEP)
    held = rng.normal(size=(n_steps, 2, 3))
    held *= (rng.uniform(0.3, 1.0, (n_steps, 2)) * size / np.linalg.norm(held, axis=2))[..., None]
    held[0] = 0
    return np.repeat(held.reshape(-1, 6), _VOLUMES_PER_STEP, axis=0)[:n]


def read_poses(path: Path) -> Matrices:
    """Poses (n, 4, 4) from a table of six numbers a volume.

    Columns are ``trans_x trans_y trans_z rot_x rot_y rot_z`` (mm, rad) by their names in the
    first line, or the first six of a table without names; tabs, spaces or commas between them.

    Raises
    ------
    InputError
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    lines = [line.replace(",", " ").split() for line in text.splitlines()]
    lines = [line for line in lines if line and not line[0].startswith("#")]
    columns: Sequence[int] = range(6)
    if lines and set(COLUMNS) <= set(lines[0]):
        columns = [lines[0].index(name) for name in COLUMNS]
        lines = lines[1:]
    try:
        six = np.array([[float(line[c]) for c in columns] for line in lines])
    except (IndexError, ValueError):
        six = np.full((1, 6), np.nan)
    if six.size == 0 or not np.isfinite(six).all() or np.abs(six[:, 3:]).max() > _MOST_ROTATION_RAD:
        raise InputError(
            f"{path}: no motion found; needs {' '.join(COLUMNS)} a volume, "
            f"mm and rad (at most {_MOST_ROTATION_RAD:g})"
        )
    return np.array([pose_of(row) for row in six])


def best_rigid(points_mm: Matrices, moved_mm: Matrices) -> Matrices:
    """Rigid (4, 4) map that brings (m, 3) points closest to where they went (Kabsch 1976).

    Acta Cryst. A32:922, with the sign of the last singular vector as in Kabsch 1978.
    """
    centres = points_mm.mean(axis=0), moved_mm.mean(axis=0)
    u, _, vt = np.linalg.svd((points_mm - centres[0]).T @ (moved_mm - centres[1]))
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    out = np.eye(4)
    out[:3, :3] = (vt.T * sign) @ u.T
    out[:3, 3] = centres[1] - out[:3, :3] @ centres[0]
    return out
