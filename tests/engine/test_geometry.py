"""Rigid steps and coordinates."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstill import geometry, phantom

component = st.floats(-0.5, 0.5)


@given(st.lists(component, min_size=6, max_size=6))
@settings(max_examples=50, deadline=None)
def test_step_is_rigid_and_right_to_first_order(values):
    step = np.array(values)
    matrix = geometry.rigid_step(step)
    np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix[:3, :3]) == pytest.approx(1)
    tiny = 1e-5 * step
    point = np.array([10.0, -20.0, 30.0])
    moved = geometry.rigid_step(tiny)[:3] @ [*point, 1]
    expected = point + tiny[:3] + np.cross(tiny[3:], point)
    np.testing.assert_allclose(moved, expected, atol=1e-8)


def test_inverse_and_compose():
    a, b = phantom.rigid((1, 2, 3), (4, 5, 6)), phantom.rigid((-7, 0, 2), (1, -9, 3))
    np.testing.assert_allclose(geometry.compose(geometry.inverse(a), a, b), b, atol=1e-12)


def test_step_size_is_rms_over_the_sphere():
    assert geometry.step_size_mm(np.array([3.0, 0, 4, 0, 0, 0])) == pytest.approx(5)
    turn = np.array([0, 0, 0, 0.01, 0, 0])
    rng = np.random.default_rng(0)
    ball = rng.normal(size=(200_000, 3))
    ball *= (80 * rng.random(len(ball)) ** (1 / 3))[:, None] / np.linalg.norm(ball, axis=1)[:, None]
    moved = np.cross(turn[3:], ball)
    expected = np.sqrt((moved**2).sum(axis=1).mean())
    assert geometry.step_size_mm(turn) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("axcodes", ["LAS", "RAS", "LPS", "PSL"])
def test_world_and_sizes(axcodes):
    shape, sizes = (10, 12, 8), (2.0, 3.0, 4.0)
    affine = phantom.grid_affine(shape, sizes, axcodes, oblique_deg=30)
    np.testing.assert_allclose(geometry.voxel_sizes_mm(affine), sizes)
    np.testing.assert_allclose(geometry.field_centre_mm(affine, shape), 0, atol=1e-12)
    np.testing.assert_allclose(
        geometry.world(affine, np.array([[1.0, 2.0, 3.0]]))[0], (affine @ [1, 2, 3, 1])[:3]
    )
