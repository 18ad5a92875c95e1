"""Temporal maps, against a straight line fitted voxel by voxel."""

import numpy as np
import pytest

from keepstill.maps import temporal_moments


def line_residuals(series, times):
    """Mean and variance about a fitted line of a (n, voxels) series."""
    design = np.stack([np.ones(len(times)), times], axis=1)
    fit = design @ np.linalg.lstsq(design, series, rcond=None)[0]
    return series.mean(axis=0), ((series - fit) ** 2).sum(axis=0) / (len(times) - 2)


def made(n=30, shape=(3, 4, 5), seed=0):
    rng = np.random.default_rng(seed)
    drift = rng.normal(size=shape) * np.arange(n)[:, None, None, None]
    series = (900 + drift + rng.normal(size=(n, *shape)) * 12).astype(np.float32)
    series.setflags(write=False)
    return series


@pytest.mark.parametrize("chosen", [range(30), [3, 4, 9, 20, 29], [0, 1, 2]])
def test_moments_of_chosen_volumes(chosen):
    series, chosen = made(), np.array(chosen)
    found = temporal_moments(lambda t, z: series[t, z], chosen, series.shape[1:])
    flat = series[chosen].reshape(len(chosen), -1).astype(np.float64)
    mean, variance = line_residuals(flat, chosen)
    np.testing.assert_allclose(found.mean.ravel(), mean, rtol=1e-12)
    np.testing.assert_allclose(found.variance.ravel(), variance, rtol=1e-7)
    np.testing.assert_allclose(found.tsnr().ravel(), mean / np.sqrt(variance), rtol=1e-6)


@pytest.mark.parametrize("nz", [1, 3, 37])
def test_moments_have_the_same_bytes_for_any_threads(nz):
    series, chosen = made(40, (nz, 4, 5)), np.delete(np.arange(40), [0, 9])
    found = [
        temporal_moments(lambda t, z: series[t, z], chosen, series.shape[1:], n_threads)
        for n_threads in (1, 2, 3)
    ]
    assert found[0].mean.shape == series.shape[1:]
    for other in found[1:]:
        assert other.mean.tobytes() == found[0].mean.tobytes()
        assert other.variance.tobytes() == found[0].variance.tobytes()


def test_what_does_not_vary_has_no_tsnr():
    series = made().copy()
    series[:, 0, 0, 0] = 7.5
    series[:, 0, 0, 1] = 7.5 + np.arange(30)
    found = temporal_moments(lambda t, z: series[t, z], np.arange(30), series.shape[1:])
    assert (found.tsnr()[0, 0, :2] == 0).all()
    assert (found.tsnr()[0, 0, 2:] > 0).all()
    nothing = np.zeros(series.shape[1:], bool)
    nothing[0, 0, :2] = True
    assert found.within(nothing) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_has_no_tsnr(value):
    series = made().copy()
    series[4, 1, 1, 1] = value
    found = temporal_moments(lambda t, z: series[t, z], np.arange(30), series.shape[1:])
    assert found.tsnr()[1, 1, 1] == 0
    tsnr, variance = found.within(np.ones(series.shape[1:], bool))
    assert np.isfinite([tsnr, variance]).all()
    assert variance == pytest.approx(144, rel=0.2)


@pytest.mark.parametrize("n", [1, 2])
def test_a_line_through_two_volumes_leaves_nothing(n):
    series = made()
    found = temporal_moments(lambda t, z: series[t, z], np.arange(n), series.shape[1:])
    assert (found.variance == 0).all()
    np.testing.assert_allclose(found.mean, series[:n].mean(axis=0), rtol=1e-6)
