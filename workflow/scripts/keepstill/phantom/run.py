"""A run of a moving head: volumes with noise and with what else troubles realignment."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.phantom.fine import FineHead
from keepstill.phantom.motion import best_rigid, numbers_of, pose_of
from keepstill.phantom.scanner import Camera, Scanner, aim, brain_part, exposed

Matrices = NDArray[np.float64]
Volume = NDArray[np.float32]

# Blocks of rest and task, s.
BLOCK_S = 20.0
# A dropped slice keeps this part of its signal; slices are dropped in one volume of twenty.
DROPPED_SIGNAL, _DROPPED_VOLUMES = 0.25, 0.05
# Saturation is reached with the T1 of grey matter at 3 T, s (Wansapura 1999, Journal of Magnetic
# Resonance Imaging 9:531).
_T1_S = 1.33
# A ghost's strength changes from volume to volume by this part.
_GHOST_SD = 0.3
# The shading has its range between points so far from the scanner's centre, mm: the rim of a head.
_SHADING_RADIUS_MM = 80.0
# Length of the haemodynamic response, and the gamma functions' orders and the undershoot's part
# that SPM and most others use: peaks at 5 and 15 s, 1/6.
_RESPONSE_S, _PEAK_S, _UNDERSHOOT_S, _UNDERSHOOT_PART = 32.0, 5, 15, 1 / 6
_TIME_STEP_S = 0.1


@dataclass(frozen=True)
class Effects:
    """What changes the volumes of a run, motion aside; 0 leaves an effect out.

    Attributes
    ----------
    tsnr : float
        Mean of the brain over the standard deviation of the noise, which is Rician.
    activation_percent : float
        Rise of active cortex in blocks of 20 s task after 20 s rest.
    shading : float
        Range of the receive coil's sensitivity across the head, as a part of its mean. It stays
        with the scanner.
    gain_drift : float
        Part by which the gain has risen at the end of the run.
    dropped_slices : int
        In one volume of twenty so many slices keep a quarter of their signal.
    first_brighter : float
        Part by which the first volume is brighter; it decays with grey matter's T1.
    ghost : float
        Part of the image that is seen again, half a field of view away along y. Its strength
        varies by 30% from volume to volume.
    """

    tsnr: float = 60.0
    activation_percent: float = 0.0
    shading: float = 0.0
    gain_drift: float = 0.0
    dropped_slices: int = 0
    first_brighter: float = 0.0
    ghost: float = 0.0


@dataclass(frozen=True)
class Run:
    """A run and its truth; volumes are made one by one, in any order.

    Attributes
    ----------
    camera : Camera
    effects : Effects
    seed : int
    slice_numbers : (n, nz, 6) or (n, 1, 6) float64
        Six numbers of the head's pose at each slice, or of the whole volume.
    poses : (n, 4, 4)
        World mm from head mm: of the volume, or the rigid map closest to those of its slices.
    bent_mm : (n,)
        Mean distance over the brain between where the slices put it and where `poses` do.
    truth : (n, 4, 4)
        `moving_from_reference` against volume 0.
    brain_mm : (m, 3)
        Voxels of volume 0 whose centre is brain, world mm.
    noise_sd : float
    gains : (n,)
        Factor on the signal.
    lost : (n, nz)
        Factor on the signal of each slice.
    ghosts : (n,)
        Part of the image that is seen again.
    """

    camera: Camera
    effects: Effects
    seed: int
    slice_numbers: NDArray[np.float64]
    poses: Matrices
    bent_mm: NDArray[np.float64]
    truth: Matrices
    brain_mm: NDArray[np.float64]
    noise_sd: float
    gains: NDArray[np.float64]
    lost: NDArray[np.float64]
    ghosts: NDArray[np.float64]

    @property
    def scanner(self) -> Scanner:
        """The scanner that takes the run."""
        return self.camera.scanner

    @property
    def affine(self) -> NDArray[np.float64]:
        """World mm (RAS+) from voxel, (4, 4)."""
        return self.camera.scanner.affine

    def __len__(self) -> int:
        """Return the number of volumes."""
        return len(self.poses)


def make_run(
    head: FineHead,
    scanner: Scanner,
    poses: Matrices | Sequence[Matrices],
    effects: Effects | None = None,
    seed: int = 0,
) -> Run:
    """Plan a run of a head under given motion.

    Parameters
    ----------
    head : FineHead
    scanner : Scanner
    poses : (n, 4, 4)
        World mm from head mm, at the middle of each volume. Where slices have times of their own,
        the head moves evenly from one pose to the next.
    effects : Effects
    seed : int
        Of the noise and of all that is drawn for `effects`.
    """
    effects = effects or Effects()
    given = np.asarray(poses, dtype=np.float64)
    camera = aim(scanner, head)
    n, nz = len(given), scanner.shape[2]
    slice_numbers = _slice_numbers(given, scanner)
    inside = brain_part(camera, given[0]) > 0.5
    closest, bent_mm = given, np.zeros(n)
    if slice_numbers.shape[1] > 1:
        closest, bent_mm = _closest(slice_numbers, inside, camera)
    mean = float(exposed(camera, closest[0])[inside].mean(dtype=np.float64))
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(3,)))
    return Run(
        camera=camera,
        effects=effects,
        seed=seed,
        slice_numbers=slice_numbers,
        poses=closest,
        bent_mm=bent_mm,
        truth=np.array([pose @ geometry.inverse(closest[0]) for pose in closest]),
        brain_mm=_positions(inside, scanner),
        noise_sd=mean / effects.tsnr,
        gains=_gains(n, effects, scanner.tr_s),
        lost=_lost(rng, n, nz, effects.dropped_slices),
        ghosts=effects.ghost * np.maximum(1 + _GHOST_SD * rng.normal(size=n), 0),
    )


def volume_of(run: Run, t: int) -> Volume:
    """Volume t with noise, (nz, ny, nx) float32; the same whatever is made before or beside it."""
    clean = clean_volume(run, t)
    seeds = np.random.SeedSequence(run.seed, spawn_key=(4, t))
    rng = np.random.default_rng(seeds)
    noise = rng.standard_normal((2, *clean.shape), np.float32) * np.float32(run.noise_sd)
    return np.hypot(clean + noise[0], noise[1])


def clean_volume(run: Run, t: int) -> Volume:
    """Volume t without noise, (nz, ny, nx) float32, effects included."""
    numbers = run.slice_numbers[t]
    poses = run.poses[t] if len(numbers) == 1 else np.array([pose_of(six) for six in numbers])
    volume = exposed(run.camera, poses, _activity(run, t))
    volume *= (run.gains[t] * run.lost[t]).astype(np.float32)[:, None, None]
    if run.effects.shading:
        volume *= shading(run.scanner, run.effects.shading)
    if run.ghosts[t]:
        half = run.scanner.shape[1] // 2
        volume = volume + np.float32(run.ghosts[t]) * np.roll(volume, half, axis=1)
    return volume


def shading(scanner: Scanner, part: float) -> Volume:
    """Sensitivity of the receive coil, (nz, ny, nx), mean about 1.

    It rises by `part` across a head, from the left back to the right front and somewhat upwards,
    and by a tenth of that from the middle to the rim.
    """
    nx, ny, nz = scanner.shape
    voxel = np.stack(np.meshgrid(*map(np.arange, (nz, ny, nx)), indexing="ij")[::-1], axis=-1)
    at = geometry.world(scanner.affine, voxel.astype(np.float64)) / _SHADING_RADIUS_MM
    slope = 0.60 * at[..., 0] + 0.75 * at[..., 1] + 0.28 * at[..., 2]  # a unit vector
    rim = np.sum(at**2, axis=-1) - 0.5
    return np.exp(np.clip(part * (0.5 * slope + 0.1 * rim), -2, 2)).astype(np.float32)


def task_blocks_s(scanner: Scanner, n: int) -> list[tuple[float, float]]:
    """Onset and duration (s) of the task's blocks that a run of n volumes holds."""
    onsets = np.arange(BLOCK_S, n * scanner.tr_s, 2 * BLOCK_S)
    return [(float(onset), min(BLOCK_S, n * scanner.tr_s - float(onset))) for onset in onsets]


def response(scanner: Scanner, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times (s) and the response to the task's blocks, 1 at the peak of a long block's."""
    times = np.arange(0.0, n * scanner.tr_s + _TIME_STEP_S, _TIME_STEP_S)
    boxes = np.zeros_like(times)
    for onset, duration in task_blocks_s(scanner, n):
        boxes[(times >= onset) & (times < onset + duration)] = 1.0
    t = np.arange(0.0, _RESPONSE_S, _TIME_STEP_S)
    peak, undershoot = (t**k * np.exp(-t) / math.factorial(k) for k in (_PEAK_S, _UNDERSHOOT_S))
    kernel = peak - _UNDERSHOOT_PART * undershoot
    return times, np.convolve(boxes, kernel / np.cumsum(kernel).max())[: times.size]


def _activity(run: Run, t: int) -> NDArray[np.float64] | float:
    """Part of the cortex's intensity that the task adds to each slice of volume t."""
    scanner = run.scanner
    if not run.effects.activation_percent:
        return 0.0
    within = np.array(scanner.slice_times_s or (scanner.tr_s / 2,))
    times, values = response(scanner, len(run))
    return (
        0.01 * run.effects.activation_percent * np.interp(t * scanner.tr_s + within, times, values)
    )


def _slice_numbers(poses: Matrices, scanner: Scanner) -> NDArray[np.float64]:
    """Six numbers of each volume's slices, by linear interpolation between volumes."""
    numbers = np.array([numbers_of(pose) for pose in poses])
    if not scanner.slice_times_s:
        return numbers[:, None]
    n = len(poses)
    at = np.arange(n)[:, None] + np.array(scanner.slice_times_s) / scanner.tr_s - 0.5
    return np.stack([np.interp(at, np.arange(n), numbers[:, a]) for a in range(6)], axis=-1)


def _closest(
    slice_numbers: NDArray[np.float64], inside: NDArray[np.bool_], camera: Camera
) -> tuple[Matrices, NDArray[np.float64]]:
    """Rigid map of each volume closest to those of its slices, over the brain, and how close."""
    world_mm = _positions(inside, camera.scanner)
    slices = np.nonzero(inside)[0]
    out, bent_mm = [], []
    for numbers in slice_numbers:
        poses = np.array([pose_of(six) for six in numbers])
        moved = np.einsum("pij,pj->pi", poses[slices, :3, :3], world_mm) + poses[slices, :3, 3]
        out.append(best_rigid(world_mm, moved))
        left = geometry.world(out[-1], world_mm) - moved
        bent_mm.append(np.linalg.norm(left, axis=1).mean())
    return np.array(out), np.array(bent_mm)


def _positions(inside: NDArray[np.bool_], scanner: Scanner) -> NDArray[np.float64]:
    """World mm of the voxels of a (nz, ny, nx) mask, (m, 3)."""
    z, y, x = np.nonzero(inside)
    return geometry.world(scanner.affine, np.stack([x, y, z], axis=-1).astype(np.float64))


def _gains(n: int, effects: Effects, tr_s: float) -> NDArray[np.float64]:
    t = np.arange(n)
    drift = 1 + effects.gain_drift * t / max(n - 1, 1)
    return drift * (1 + effects.first_brighter * np.exp(-t * tr_s / _T1_S))


def _lost(rng: np.random.Generator, n: int, nz: int, n_slices: int) -> NDArray[np.float64]:
    """Factor on each slice of each volume; volume 0 loses none."""
    out = np.ones((n, nz))
    if n_slices == 0 or n < 2:
        return out
    for t in rng.choice(np.arange(1, n), max(1, round(_DROPPED_VOLUMES * n)), replace=False):
        out[t, rng.choice(nz, min(n_slices, nz), replace=False)] = DROPPED_SIGNAL
    return out
