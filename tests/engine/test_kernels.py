"""Each kernel against its slow twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from keepstill import geometry, phantom
from keepstill.kernels import bspline, components, integers, moments, sampling, series, small, sums
from keepstill.reference import Acquisition, prepare_reference
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


def poles_of(degree):
    return np.array(bspline.POLES[degree], np.float32)


def full_coefficients(volume, degree):
    nz, ny, nx = volume.shape
    out = np.full((nz + 8, ny + 8, nx + 24), np.nan, np.float32)
    block = np.zeros((nx, 16), np.float32)
    bspline.fill_coefficients(volume, poles_of(degree), bspline.GAINS[degree], out, block)
    assert np.isfinite(out).all()
    return out


def grid_rows(shape):
    """All rows of a (nz, ny, nx) grid: y, z, first x, number, place."""
    nz, ny, nx = shape
    return np.array([(y, z, 0, nx, (z * ny + y) * nx) for y in range(ny) for z in range(nz)])


def narrowed(rows, matrix, volume):
    spans = np.column_stack([0 * rows[:, 3], rows[:, 3]])
    sampling.narrow_spans(spans, rows, matrix, volume.shape[::-1])
    return spans


@pytest.mark.parametrize("degree", DEGREES)
def test_weights(degree):
    low = 0.0 if degree % 2 else -0.5
    t = np.linspace(low, low + 1, 33, endpoint=False).astype(np.float32)
    out = np.full((6, t.size), np.nan, np.float32)
    bspline.fill_weights(degree, t, out)
    np.testing.assert_allclose(out, naive.fill_weights(degree, t), atol=3e-7)
    np.testing.assert_allclose(out.sum(axis=0), 1, atol=3e-7)


SHAPES = [(9, 11, 21), (2, 3, 5), (3, 30, 2), (1, 9, 40), (12, 2, 1)]


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("n", [1, 2, 3, 17, 70])
def test_filter_lines(degree, n):
    lines = volume_of((1, n, 5))[0].copy()
    expected = naive.filter_lines(lines, degree)
    bspline.filter_lines(lines, poles_of(degree))
    np.testing.assert_allclose(lines, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 21)])
def test_filter_rows(degree, shape):
    rows = volume_of((1, *shape))[0]
    out = np.full((shape[0], shape[1] + 16), np.nan, np.float32)
    bspline.filter_rows(rows, poles_of(degree), out, np.zeros((shape[1], 16), np.float32))
    expected = naive.filter_rows(rows, degree, 8)
    np.testing.assert_allclose(out, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("shape", SHAPES)
def test_coefficients(degree, shape):
    volume = volume_of(shape)
    padded = full_coefficients(volume, degree)
    nz, ny, nx = shape
    inner = padded[4 : 4 + nz, 4 : 4 + ny, 4 : 4 + nx]
    expected = naive.fill_coefficients(volume, degree)
    np.testing.assert_allclose(inner, expected, atol=2e-6 * np.abs(expected).max())
    for z, y, x in [(-2, -2, -2), (nz + 2, ny + 2, nx + 2), (0, -1, nx)]:
        source = naive.mirror(z, nz), naive.mirror(y, ny), naive.mirror(x, nx)
        assert padded[z + 4, y + 4, x + 4] == inner[source]


def wild_spans(seed):
    """Rows beside the grid they look at, the spans asked for, and a map and the grid's shape."""
    rows = grid_rows((4, 5, 21))
    rows[:, 2:4] += (2, -3)
    spans = np.random.default_rng(seed).integers((0, 12), (6, 18), (len(rows), 2))
    return rows, spans, moved(seed, shift=2.0), (15, 6, 5)


@pytest.mark.parametrize("inset", [(0.0, 0.0, 0.0), (1.0, 0.0, 1.5), (1.5, 1.5, 0.0)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_narrow_spans(seed, inset):
    rows, spans, matrix, shape = wild_spans(seed)
    expected = naive.narrow_spans(rows, spans, matrix, shape, inset)
    n_inside = sampling.narrow_spans(spans, rows, matrix, shape, inset)
    assert n_inside == (expected[:, 1] - expected[:, 0]).sum() > 0
    np.testing.assert_array_equal(spans, expected)


def test_an_unmoved_field_keeps_what_lies_on_its_border():
    """Rounding pushes no voxel out: not of the field, and not of a field inset by a voxel."""
    rows = grid_rows((5, 6, 9))
    spans = np.column_stack([0 * rows[:, 3], rows[:, 3]])
    assert sampling.narrow_spans(spans, rows, np.eye(4) * (1 + 1e-12), (9, 6, 5)) == 9 * 6 * 5
    assert sampling.narrow_spans(spans, rows, np.eye(4), (9, 6, 5), (1.0, 1.0, 1.0)) == 7 * 4 * 3


@pytest.mark.parametrize("slices", [[2], [0, 1, 4], [3, 4], [9], []])
@pytest.mark.parametrize("tilt", [0.0, 0.25])
def test_leave_out_slices(slices, tilt):
    """Rows along the slices, and rows that a slice cuts in two."""
    rows, spans, matrix, _ = wild_spans(4)
    matrix[2, 0] += tilt
    lost = np.array(slices, np.int64)
    expected = naive.leave_out_slices(rows, spans, matrix, slices)
    before = (spans[:, 1] - spans[:, 0]).clip(0).sum()
    n_inside = sampling.leave_out_slices(spans, rows, matrix, lost)
    assert n_inside == (expected[:, 1] - expected[:, 0]).sum()
    assert (n_inside < before) == (slices not in ([9], []))
    kept = spans[:, 1] > spans[:, 0]
    np.testing.assert_array_equal(spans[kept], expected[kept])
    assert (expected[~kept, 0] == expected[~kept, 1]).all()


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("seed", [1, 2])
def test_fill_directly(degree, seed):
    volume, matrix = volume_of((5, 6, 19), seed), moved(seed)
    rows = grid_rows((4, 5, 21))
    spans = narrowed(rows, matrix, volume)
    out = np.full(rows[:, 3].sum(), np.nan, np.float32)
    spline = (degree, *bspline.tap_slots(degree))
    sampling.fill_directly(out, rows, spans, full_coefficients(volume, degree), spline, matrix)
    coefficients = naive.fill_coefficients(volume, degree)
    expected = naive.fill_directly(rows, spans, coefficients, degree, matrix)
    np.testing.assert_allclose(out, expected, atol=5e-5)


@pytest.mark.parametrize("degree", DEGREES)
def test_fill_nearest(degree):
    """Rows that cross the field, and rows that miss it; what lies inside is left alone."""
    volume, matrix = volume_of((5, 6, 19), 3), moved(3, shift=2.5)
    rows = grid_rows((6, 7, 24))
    spans = narrowed(rows, matrix, volume)
    assert {True, False} == set((spans[:, 1] > spans[:, 0]).tolist())
    out = np.zeros(rows[:, 3].sum(), np.float32)
    spline, full = (degree, *bspline.tap_slots(degree)), full_coefficients(volume, degree)
    sampling.fill_nearest(out, rows, spans, full, spline, matrix, volume.shape[::-1])
    coefficients = naive.fill_coefficients(volume, degree)
    expected = naive.fill_nearest(rows, spans, coefficients, degree, matrix, volume.shape[::-1])
    np.testing.assert_allclose(out, expected, atol=5e-5)


def test_rows_longer_than_a_chunk():
    volume = volume_of((3, 3, 150))
    rows = grid_rows(volume.shape)
    spans = narrowed(rows, np.eye(4), volume)
    out = np.empty_like(volume)
    full = full_coefficients(volume, 3)
    sampling.fill_directly(out.reshape(-1), rows, spans, full, (3, 1, 4), np.eye(4))
    np.testing.assert_allclose(out, volume, atol=1e-5)


def test_fill_unmoved():
    volume = volume_of((5, 6, 19))
    rows = grid_rows((5, 6, 21))  # wider than the volume, which spans must know
    spans = narrowed(rows, np.eye(4), volume)
    out = np.full(rows[:, 3].sum(), np.nan, np.float32)
    sampling.fill_unmoved(out, rows, spans, volume)
    np.testing.assert_array_equal(out, naive.fill_unmoved(rows, spans, volume))


@pytest.fixture(scope="module")
def sampled():
    """Points of a noisy ball, and spans of which some points are left out."""
    ball = phantom.ball((12, 10, 9)).T
    noise = np.random.default_rng(3).normal(size=ball.shape)
    volume = np.ascontiguousarray(ball + 5 * noise, np.float32)
    acquisition = Acquisition(ghost_axis=1)
    affine = np.diag([3.0, 3.0, 4.0, 1.0])
    reference = prepare_reference(volume, affine, EstimateSettings(), acquisition)
    points = reference.fine.points
    spans = narrowed(points.rows, moved(7, size=0.1, shift=2.0), volume)
    assert 0 < (spans[:, 1] - spans[:, 0]).sum() < points.rows[:, 3].sum()  # some are outside
    return reference, points, spans


def assert_close(found, expected, part):
    """Equal but for a part of the largest value."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=part * np.abs(expected).max())


def test_normal_matrices(sampled):
    reference, points, spans = sampled
    expected = naive.normal_matrix(points)
    expected[7, 7] += reference.mean_intensity**2  # what is known of a ghost beforehand
    assert_close(reference.fine.normal, expected, 1e-12)
    assert_close(sums.outside_normal(points, spans), naive.outside_normal(points, spans), 1e-12)


def test_normal_matrices_of_parts(sampled):
    """Of all points, and of those that left the field."""
    reference, points, spans = sampled
    cells, everywhere = reference.cells, np.zeros_like(spans)
    for cut in reference.fine.cuts:
        parts = (cut.part_of_cell[cells.cell_of_row], len(cut.normals))
        assert_close(cut.normals, naive.outside_normals(points, everywhere, *parts), 1e-12)
    parts = (cells.cell_of_row, cells.n_cells)
    found = sums.outside_normals(points, spans, *parts)
    assert_close(found, naive.outside_normals(points, spans, *parts), 1e-12)
    assert_close(found.sum(axis=0), naive.outside_normal(points, spans), 1e-12)
    expected = naive.cross_sums(points.test_jacobian, points.test_jacobian)
    assert_close(reference.fine.test_normal, expected, 1e-12)


@pytest.mark.parametrize("n_parts", [1, 3, 9])
def test_sums_of_parts(n_parts):
    """Parts in any order; of the nine, some are empty."""
    rng = np.random.default_rng(n_parts)
    rows, parts = rng.normal(size=(12, 9)), rng.integers(0, n_parts, 12)
    found = sums.sums_of_parts(rows, parts, n_parts)
    assert_close(found, naive.sums_of_parts(rows, parts, n_parts), 1e-12)


def test_to_residuals(sampled):
    _, points, spans = sampled
    values = points.values + np.random.default_rng(1).normal(size=points.values.size)
    found = values.astype(np.float32)
    expected = naive.to_residuals(found, points, spans, 1.1)
    sums.to_residuals(found, points, spans, 1.1)
    assert_close(found, expected, 1e-6)
    assert (found[~naive.is_in_span(points, spans)] == 0).all()


@pytest.mark.parametrize("ends", [[0, 700], [0, 1, 130, 130, 700], [5, 133, 600]])
def test_sums_over_points(ends):
    """Blocks that are empty, of one point, a lane long, and not all points."""
    rng = np.random.default_rng(5)
    left, right = (rng.normal(size=(n, 700)).astype(np.float32) for n in (3, 5))
    found = sums.cross_sums(left, right, ends[0], ends[-1])
    between = slice(ends[0], ends[-1])
    assert_close(found, naive.cross_sums(left[:, between], right[:, between]), 1e-12)
    found = sums.block_sums(left, right[0], np.array(ends))
    assert found.shape == (len(ends) - 1, 4)
    assert_close(found, naive.block_sums(left, right[0], ends), 1e-12)


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_largest_component(seed, density):
    mask = np.random.default_rng(seed).random((5, 6, 7)) < density
    found = components.largest_component(mask)
    assert found.sum() == naive.largest_component(mask).sum()
    assert (found <= mask).all()


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


@given(st.floats(2**-9, 2**9, width=32), st.floats(-(2**13), 2**13, width=32), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_stored_integers(slope, inter, seed):
    """Every one as numpy makes it: halves, values beyond the ends and infinite ones too."""
    slope, inter, rng = np.float32(slope), np.float32(inter), np.random.default_rng(seed)
    voxels = (rng.uniform(-40_000, 40_000, 301).astype(np.float32) * slope + inter)[:300]
    voxels[:20] = (rng.integers(-99, 99, 20) + np.float32(0.5)) * slope + inter
    voxels[20:22] = np.inf, -np.inf
    found = np.zeros(voxels.shape, np.int16)
    integers.fill_int16(voxels, slope, inter, found)
    np.testing.assert_array_equal(found, naive.fill_int16(voxels, slope, inter))


@pytest.mark.parametrize("n_voxels", [50, 700])
def test_moments(n_voxels):
    volumes, origin = volume_of((3, n_voxels), 1), volume_of((n_voxels,), 2)
    before = np.random.default_rng(3).normal(size=(3, n_voxels))
    found, times = before.copy(), np.array([-2.5, 0.0, 4.0])
    moments.add_volumes(found, volumes, origin, times)
    expected = naive.add_volumes(before, volumes, origin, times)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 50])
@pytest.mark.parametrize("m", [1, 64, 131])
def test_block_of_a_series(n, m):
    block = (1000 + 10 * np.random.default_rng(n).normal(size=(n, m))).astype(np.float32)
    block[:, 0] = 300
    found = np.full((3, m), np.nan)
    series.fill_moments(block, found)
    np.testing.assert_allclose(found, naive.fill_moments(block), rtol=1e-9, atol=1e-9)
    weights, totals = np.arange(m) % 2.0, np.ones(n - 1)
    series.add_squared_steps(block, weights, totals)
    np.testing.assert_allclose(totals, 1 + naive.add_squared_steps(block, weights), rtol=1e-12)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e-38, 1e30]))
@settings(max_examples=20, deadline=None)
def test_ranked(seed, scale):
    """Negative values, zeros of both signs, ties and tiny numbers too."""
    rng = np.random.default_rng(seed)
    block = (scale * np.round(3 * rng.normal(size=(21, 70)), rng.integers(0, 6))).astype(np.float32)
    rank, out = int(rng.integers(0, 21)), np.full(70, np.nan, np.float32)
    series.fill_ranked(block, rank, out)
    np.testing.assert_array_equal(out, naive.fill_ranked(block, rank))
    volumes, voxels = np.array([20, 3, 0, 7]), np.flatnonzero(rng.random(70) < 0.6)
    chosen = np.full((4, voxels.size), np.nan, np.float32)
    series.fill_chosen(block, volumes, voxels, chosen)
    np.testing.assert_array_equal(chosen, naive.fill_chosen(block, volumes, voxels))
    smallest = chosen.min() + np.float32(0)  # zeros of both signs are one value, and two keys
    counts = np.zeros((2, 1 << 16), np.int64)
    series.count_halves(block, (volumes, voxels), -1, counts)
    assert counts[0].sum() == chosen.size and not counts[1].any()
    upper = int(np.flatnonzero(counts[0])[0])
    series.count_halves(block, (volumes, voxels), upper, counts)
    assert counts[0].sum() == 2 * chosen.size and 2 * counts[1].sum() == counts[0, upper]
    found = series.float_of((upper << 16) + int(np.flatnonzero(counts[1])[0]))
    assert found == smallest
