"""Resampling in three passes: against its slow twin, the direct sum, and the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import naive
import runs
from keepstill import phantom
from keepstill.kernels import bspline, passes
from keepstill.moving import Asked, Coefficients, fill_values, prepare_moving
from keepstill.reslice import coverage, reslice_volume

DEGREES = (1, 2, 3, 4, 5)


def grid(shape):
    """Everything of a (nz, ny, nx) grid is asked for."""
    nz, ny, nx = shape
    rows = np.array([(y, z, 0, nx, (z * ny + y) * nx) for y in range(ny) for z in range(nz)])
    return Asked(rows, np.column_stack([0 * rows[:, 3], rows[:, 3]]))


def rough(asked):
    return Asked(asked.rows, asked.spans, rough=True)


def volume_of(shape, seed=0):
    volume = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    volume.setflags(write=False)
    return volume


def moved(seed, angle_rad=0.08, shift=0.6, scale=1.0):
    rng = np.random.default_rng(seed)
    angles = np.rad2deg(rng.uniform(-angle_rad, angle_rad, 3))
    return phantom.rigid(rng.uniform(-shift, shift, 3), angles) @ np.diag([scale] * 3 + [1.0])


@pytest.mark.parametrize("degree", DEGREES)
def test_pieces(degree):
    """Even and odd parts, put together, are the weights of the taps."""
    c = np.array(passes.PIECES[degree - 1]).reshape(2, 3, 3) / bspline.GAINS[degree]
    u = np.linspace(-0.5, 0.5, 21)[:-1] + 0.01
    middle, first_above = (0.5, 1) if degree % 2 else (0.0, 0)
    for pair in range(3):
        even = sum(c[0, pair, k] * u ** (2 * k) for k in range(3))
        odd = sum(c[1, pair, k] * u ** (2 * k + 1) for k in range(3))
        above = [naive.bspline(degree, pair + first_above - middle - x) for x in u]
        below = [naive.bspline(degree, -pair - middle - x) for x in u]
        halves = 0.5 if pair == first_above - middle == 0 else 1.0
        np.testing.assert_allclose(even + odd, np.multiply(above, halves), atol=1e-7)
        np.testing.assert_allclose(even - odd, np.multiply(below, halves), atol=1e-7)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_passes_of(seed):
    matrix = moved(seed, angle_rad=0.4, shift=20, scale=np.random.default_rng(seed).uniform(0.8, 2))
    found, obliqueness = passes.passes_of(matrix)
    np.testing.assert_allclose(found, naive.passes_of(matrix), atol=1e-9)
    expected = np.abs([found[0, 1], found[0, 2], found[1, 2]]).max()
    assert obliqueness == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_grids_with_other_axes_have_no_passes(axes):
    matrix = np.eye(4)
    matrix[:3] = matrix[list(axes)]
    assert passes.passes_of(matrix)[1] == np.inf


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize(("seed", "scale"), [(1, 1.0), (2, 1.0), (3, 0.8), (4, -1.3)])
def test_fill_by_passes(degree, seed, scale):
    volume, matrix = volume_of((5, 6, 23), seed), moved(seed, scale=scale)
    if scale < 0:
        matrix[:3, 3] += np.array(volume.shape[::-1]) - 1
    asked = rough(grid((4, 5, 21)))
    out = np.full(asked.rows[:, 3].sum(), np.nan, np.float32)
    moving = prepare_moving(volume, degree, Coefficients(volume.shape))
    n_inside = fill_values(out, asked, moving, matrix)
    assert not moving.is_full  # passes it was
    expected = naive.fill_by_passes((4, 5, 21), volume, degree, matrix)
    inside = np.zeros((4, 5, 21), bool)
    for (y, z, *_), (first, last) in zip(asked.rows, asked.spans, strict=True):
        inside[z, y, first:last] = True
    assert inside.sum() == n_inside > 50
    np.testing.assert_allclose(out, np.where(inside, expected, 0).ravel(), atol=2e-5)


def test_some_rows_of_a_grid():
    """What a row gets does not depend on which other rows are asked for."""
    volume, matrix = volume_of((9, 12, 40)), moved(5)
    moving = prepare_moving(volume, 5, Coefficients(volume.shape))
    everything = grid(volume.shape)
    whole = np.empty(volume.size, np.float32)
    fill_values(whole, everything, moving, matrix)
    rng = np.random.default_rng(0)
    rows = everything.rows[np.sort(rng.choice(len(everything.rows), 17, replace=False))].copy()
    rows[:, 2], rows[:, 3] = rng.integers(0, 12, 17), rng.integers(1, 28, 17)
    places = rows[:, 4] + rows[:, 2]
    rows[:, 4] = np.cumsum(rows[:, 3]) - rows[:, 3]
    part = np.full(rows[:, 3].sum(), np.nan, np.float32)
    asked = Asked(rows, np.column_stack([0 * rows[:, 3], rows[:, 3]]))
    fill_values(part, asked, moving, matrix)
    for place, n, at in zip(places, rows[:, 3], rows[:, 4], strict=True):
        np.testing.assert_allclose(part[at : at + n], whole[place : place + n], atol=1e-6)


def test_nothing_inside():
    volume = volume_of((5, 6, 19))
    matrix = np.eye(4)
    matrix[0, 3] = 400.0
    out = np.full(volume.size, np.nan, np.float32)
    moving = prepare_moving(volume, 5, Coefficients(volume.shape))
    assert fill_values(out, grid(volume.shape), moving, matrix) == 0
    assert (out == 0).all()


@pytest.mark.parametrize("shape", [(1, 9, 12), (7, 2, 3), (2, 2, 2)])
def test_thin_volumes(shape):
    volume = volume_of(shape)
    matrix = np.eye(4)
    matrix[1, 3] = 0.25
    out = np.empty(volume.size, np.float32)
    moving = prepare_moving(volume, 5, Coefficients(shape))
    assert fill_values(out, grid(shape), moving, matrix) > 0
    expected = naive.fill_by_passes(shape, volume, 5, matrix)
    expected[:, -1] = 0
    np.testing.assert_allclose(out.reshape(shape), expected, atol=2e-5)


def test_far_outside_a_row_goes_on_with_its_last_value():
    """A smooth volume, shifted by more than a row's margin: what is inside stays right."""
    z, y, x = np.indices((10, 14, 40))
    volume = (np.cos(0.2 * x) + np.sin(0.3 * y + 1) + np.cos(0.25 * z)).astype(np.float32)
    matrix = moved(3, angle_rad=0.09)
    matrix[0, 3] += 17.0
    results = []
    for degree in (3, 5):
        moving = prepare_moving(volume, degree, Coefficients(volume.shape))
        out = np.empty(volume.shape, np.float32)
        assert fill_values(out.reshape(-1), grid(volume.shape), moving, matrix) > 1000
        results.append(out)
    source = np.tensordot(matrix[:3], np.stack([x, y, z, np.ones_like(x)]), 1)
    margin = 1.0  # the mirrored border bends any spline
    inner = np.logical_and.reduce(
        [(p > margin) & (p < n - 1 - margin) for p, n in zip(source, (40, 14, 10), strict=True)]
    )
    truth = np.cos(0.2 * source[0]) + np.sin(0.3 * source[1] + 1) + np.cos(0.25 * source[2])
    for out in results:
        assert np.abs(out - truth)[inner].max() < 0.03


def test_result_does_not_depend_on_what_the_work_space_was_used_for():
    volume, matrix = volume_of((9, 12, 40)), moved(5)
    used = Coefficients(volume.shape)
    other = prepare_moving(1e6 * volume_of(volume.shape, 1), 4, used)
    fill_values(np.empty(20 * 30 * 60, np.float32), grid((20, 30, 60)), other, moved(6))
    results = []
    for space in (used, Coefficients(volume.shape)):
        out = np.empty(volume.size, np.float32)
        fill_values(out, grid(volume.shape), prepare_moving(volume, 5, space), matrix)
        results.append(out)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("angle_deg", [1.0, 5.0, 12.0])
def test_error_against_the_truth_is_that_of_the_direct_sum(head, angle_deg):
    """A clean volume, resliced by the true motion: scipy's orders 3 and 5 beside ours."""
    shape = (48, 56, 34)
    affine = phantom.grid_affine(shape, (3.4, 3.4, 3.5))
    motion = phantom.rigid((1.3, -0.8, 1.1), angle_deg * np.array([0.6, -0.5, 0.6]))
    run, _ = runs.head_run(head, np.array([np.eye(4), motion]), shape, affine, seed=1)
    truth, moved_volume = (phantom.clean_volume(run, t) for t in range(2))
    moving = prepare_moving(moved_volume, 5, Coefficients(shape[::-1]))
    out = np.empty(shape[::-1], np.float32)
    reslice_volume(out, moving, affine, run.truth[1], affine)
    z, y, x = np.indices(out.shape)
    matrix = np.linalg.inv(affine) @ run.truth[1] @ affine
    source = np.tensordot(matrix[:3], np.stack([x, y, z, np.ones_like(x)]), 1)
    chosen = (out > 0) & (truth > 100)

    def error(found):
        return np.sqrt(np.square(found - truth)[chosen].mean())

    cubic, quintic = (
        error(ndimage.map_coordinates(moving.volume, source[::-1], order=order, mode="mirror"))
        for order in (3, 5)
    )
    assert error(out) < 1.02 * quintic
    assert error(out) < 0.98 * cubic


def test_coverage_is_what_every_resliced_volume_has():
    shape, affine = (9, 12, 20), np.diag([3.0, 3.0, 4.0, 1.0])
    matrices = np.array([moved(seed, angle_rad=0.1, shift=9.0) for seed in range(3)])
    covered = coverage(matrices, (affine, (20, 12, 9)), affine, shape)
    expected = np.ones(shape, bool)
    for matrix in matrices:
        moving = prepare_moving(np.ones(shape, np.float32), 1, Coefficients(shape))
        out = np.empty(shape, np.float32)
        reslice_volume(out, moving, affine, matrix, affine)
        expected &= out > 0
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(covered, expected)
