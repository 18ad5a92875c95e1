"""Each kernel against its slow twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from keepstill import geometry, phantom
from keepstill.estimate import new_coefficients, prepare_moving
from keepstill.kernels import bspline, components, sampling, small, sums
from keepstill.reference import prepare_reference
from keepstill.settings import EstimateSettings

DEGREES = (1, 2, 3, 4, 5)


def volume_of(shape, seed=0):
    volume = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    volume.setflags(write=False)
    return volume


def moved(seed, size=0.15, shift=0.6):
    rng = np.random.default_rng(seed)
    angles = np.rad2deg(rng.uniform(-size, size, 3))
    return phantom.rigid(rng.uniform(-shift, shift, 3), angles)


@pytest.mark.parametrize("degree", DEGREES)
def test_weights(degree):
    low = 0.0 if degree % 2 else -0.5
    t = np.linspace(low, low + 1, 33, endpoint=False).astype(np.float32)
    out = np.full((6, t.size), np.nan, np.float32)
    bspline.fill_weights(degree, t, out)
    np.testing.assert_allclose(out, naive.fill_weights(degree, t), atol=3e-7)
    np.testing.assert_allclose(out.sum(axis=0), 1, atol=3e-7)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("shape", [(9, 11, 21), (2, 3, 5), (3, 30, 2)])
def test_coefficients(degree, shape):
    volume = volume_of(shape)
    padded = prepare_moving(volume, degree, new_coefficients(shape)).coefficients
    nz, ny, nx = shape
    inner = padded[4 : 4 + nz, 4 : 4 + ny, 4 : 4 + nx]
    expected = naive.fill_coefficients(volume, degree)
    np.testing.assert_allclose(inner, expected, atol=2e-6 * np.abs(expected).max())
    for z, y, x in [(-2, -2, -2), (nz + 2, ny + 2, nx + 2), (0, -1, nx)]:
        source = naive.mirror(z, nz), naive.mirror(y, ny), naive.mirror(x, nx)
        assert padded[z + 4, y + 4, x + 4] == inner[source]


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("seed", [1, 2])
def test_reslice(degree, seed):
    volume = volume_of((5, 6, 19), seed)
    moving = prepare_moving(volume, degree, new_coefficients(volume.shape))
    matrix = moved(seed)
    out = np.full((4, 5, 21), np.nan, np.float32)
    n_inside = sampling.fill_resliced(
        out, moving.coefficients, degree, moving.slots, matrix, moving.shape, np.float32(-7)
    )
    expected = naive.fill_resliced(
        naive.fill_coefficients(volume, degree), degree, matrix, out.shape, -7
    )
    np.testing.assert_allclose(out, expected, atol=5e-5)
    assert n_inside == (expected != -7).sum()


def test_reslice_rows_longer_than_a_chunk():
    volume = volume_of((3, 3, 150))
    moving = prepare_moving(volume, 3, new_coefficients(volume.shape))
    out = np.empty_like(volume)
    sampling.fill_resliced(
        out, moving.coefficients, 3, moving.slots, np.eye(4), moving.shape, np.float32(0)
    )
    np.testing.assert_allclose(out, volume, atol=1e-5)


@pytest.mark.parametrize("degree", DEGREES)
def test_unmoved_volume_is_itself_to_the_border(degree):
    volume = volume_of((5, 6, 17))
    moving = prepare_moving(volume, degree, new_coefficients(volume.shape))
    out = np.empty_like(volume)
    n_inside = sampling.fill_resliced(
        out, moving.coefficients, degree, moving.slots, np.eye(4), moving.shape, np.float32(0)
    )
    assert n_inside == volume.size
    np.testing.assert_allclose(out, volume, atol=2e-5)


def test_clear_outside():
    matrix = moved(5, size=0.4, shift=3)
    mask = np.ones((6, 9, 12), bool)
    sampling.clear_outside(mask, matrix, (11, 8, 7))
    expected = naive.clear_outside(mask.shape, matrix, (11, 8, 7))
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(mask, expected)


def test_step_sums_and_normal_matrix():
    z, y, x = np.meshgrid(*(np.linspace(-1.6, 1.6, n) for n in (9, 10, 12)), indexing="ij")
    noise = np.random.default_rng(3).normal(size=x.shape)
    volume = (800 / (1 + np.exp(9 * (x**2 + y**2 + z**2 - 1))) + 5 * noise).astype(np.float32)
    affine = np.diag([3.0, 3.0, 4.0, 1.0])
    reference = prepare_reference(volume, affine, EstimateSettings())
    points = reference.fine.points
    np.testing.assert_allclose(reference.fine.normal, naive.normal_matrix(points), rtol=1e-9)
    moving = prepare_moving(volume, 3, new_coefficients(volume.shape))
    matrix = moved(7, size=0.1, shift=2.0)
    found = sums.step_sums(points, moving, matrix, 1.1)
    expected = naive.step_sums(points, naive.fill_coefficients(volume, 3), 3, matrix, 1.1)
    assert found[3] == expected[3]
    assert 0 < expected[3] < points.rows[:, 3].sum()  # some points are outside
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_largest_component(seed, density):
    mask = np.random.default_rng(seed).random((5, 6, 7)) < density
    found = components.largest_component(mask)
    assert found.sum() == naive.largest_component(mask).sum()
    assert (found <= mask).all()


@pytest.mark.parametrize("reach", [0, 1, 3, 20])
def test_dilated(reach):
    mask = np.random.default_rng(1).random((6, 9, 8)) < 0.03
    np.testing.assert_array_equal(components.dilated(mask, reach), naive.dilated(mask, reach))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_small_algebra(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(7, 7)), rng.normal(size=(7, 2))
    x, regular = small.solution(a, b)
    assert regular
    np.testing.assert_allclose(a @ x, b, atol=1e-7 * np.linalg.cond(a))
    np.testing.assert_allclose(small.product(a, b), naive.product(a, b), atol=1e-12)
    np.testing.assert_allclose(x, naive.solution(a, b), atol=1e-9 * np.linalg.cond(a))


def test_singular_matrix_is_said_to_be():
    assert not small.solution(np.ones((3, 3)), np.eye(3))[1]
    with pytest.raises(ValueError, match="singular"):
        geometry.inverse(np.zeros((4, 4)))
