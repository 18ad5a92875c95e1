"""Slices that lost their signal are found, and nothing else is."""

import numpy as np
import pytest

import runs
from keepstill import phantom
from keepstill.lost_slices import filled, find_lost_slices, slice_means

SHAPE, SIZES_MM = (64, 64, 36), (3.4, 3.4, 3.5)
KEPT = 0.25


@pytest.fixture(scope="module")
def clean(head):
    """A reference and a volume of the head moved a little, without noise, (nz, ny, nx)."""
    poses = np.array([np.eye(4), phantom.rigid((0.6, -0.4, 0.9), (0.8, -0.5, 0.6))])
    affine = phantom.grid_affine(SHAPE, SIZES_MM)
    run, _ = runs.head_run(head, poses, SHAPE, affine)
    out = np.array([phantom.clean_volume(run, t) for t in range(2)])
    out.setflags(write=False)
    return out


def noisy(volume, seed, tsnr=60.0):
    """Rician noise."""
    sd = volume.max() / 2 / tsnr
    parts = np.random.default_rng(seed).normal(size=(2, *volume.shape)) * sd
    return np.hypot(volume + parts[0], parts[1]).astype(np.float32)


def with_lost(volume, lost):
    factor = np.ones((len(volume), 1, 1))
    factor[list(lost)] = KEPT
    return volume * factor


def with_signal(volume):
    """Slices of a clean volume that show more than noise would."""
    means = slice_means(volume)
    return np.flatnonzero(means > 0.15 * means.max())


@pytest.mark.parametrize("n_lost", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(10))
def test_scattered_slices_are_found(clean, n_lost, seed):
    means = slice_means(noisy(clean[0], 1000))
    where = with_signal(clean[1])
    lost = np.sort(np.random.default_rng(seed).choice(where, n_lost, replace=False))
    volume = noisy(with_lost(clean[1], lost), seed)
    np.testing.assert_array_equal(find_lost_slices(volume, means), lost)


@pytest.mark.parametrize("n_lost", [2, 3, 4])
def test_neighbouring_slices_are_found(clean, n_lost):
    """Every place, but for the ends, where so many are most of what lies around."""
    means = slice_means(noisy(clean[0], 1000))
    where = with_signal(clean[1])
    for first in where[4 : -n_lost - 3]:
        lost = np.arange(first, first + n_lost)
        volume = noisy(with_lost(clean[1], lost), int(first))
        np.testing.assert_array_equal(find_lost_slices(volume, means), lost)


def test_every_second_slice(clean):
    """Half of an interleaved volume is too much to find it all; no whole slice is taken for it."""
    means = slice_means(noisy(clean[0], 1000))
    volume = noisy(with_lost(clean[1], range(0, SHAPE[2], 2)), 1)
    assert (find_lost_slices(volume, means) % 2 == 0).all()


@pytest.mark.parametrize("nz", [36, 24])
def test_motion_loses_no_slice(head, nz):
    """Far up and down, and turned; in 24 slices the head is cut at both ends.

    Where the head has moved down, the air above it may pass for a slice: nothing is lost with it.
    """
    poses = [np.eye(4)]
    poses += [phantom.rigid((0, 0, z), (0, 0, 0)) for z in (-12, -6, 6, 12)]
    poses += [phantom.rigid((3, -5, z), (9, -8, 7)) for z in (-8, 8)]
    poses += list(phantom.drawn_poses("spikes", 12, 4))
    affine = phantom.grid_affine((64, 64, nz), SIZES_MM)
    for tsnr in (20, 100):
        _, volumes = runs.head_run(head, np.array(poses), (64, 64, nz), affine, tsnr, seed=3)
        means = slice_means(volumes[0])
        for volume in volumes:
            lost = find_lost_slices(volume, means)
            assert (slice_means(volume)[lost] < 0.2 * means.max()).all(), lost


def test_brightness_of_slices_is_no_loss(clean):
    """Slices of an interleaved volume that differ by 10%, and a whole volume at half its signal."""
    means = slice_means(noisy(clean[0], 1000))
    uneven = np.where(np.arange(SHAPE[2]) % 2, 1.05, 0.95)[:, None, None]
    for volume in (clean[1] * uneven, clean[1] * 0.5, clean[1] * uneven[::-1]):
        assert find_lost_slices(noisy(volume, 2), means).size == 0


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_emptiness(clean, seed):
    rng = np.random.default_rng(seed)
    noise = np.abs(rng.normal(size=clean.shape)).astype(np.float32)
    assert find_lost_slices(noise[1], slice_means(noise[0])).size == 0
    empty = clean[1].copy()
    empty[5] = 0  # what was never taken was not lost
    assert find_lost_slices(empty, slice_means(clean[0])).size == 0
    assert find_lost_slices(clean[1, :8], slice_means(clean[0, :8])).size == 0


def test_slice_means(clean):
    expected = clean[1].mean(axis=(1, 2), dtype=float)
    np.testing.assert_allclose(slice_means(clean[1]), expected, rtol=1e-5)


def test_filled(clean):
    """Between whole neighbours by distance, beyond the last one as that one."""
    volume = np.arange(12, dtype=np.float32)[:, None, None] * np.ones((1, 3, 4), np.float32)
    volume.setflags(write=False)
    lost = np.array([0, 3, 4, 5, 10, 11])
    found = filled(volume, lost)[:, 0, 0]
    np.testing.assert_allclose(found, [1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9], rtol=1e-6)
    assert filled(volume, np.zeros(0, np.int64)) is volume
