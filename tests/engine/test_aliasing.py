"""The kernels of a run's model against their slow twins."""

import numpy as np
import pytest

import naive
from keepstill import phantom
from keepstill.kernels import aliasing, courses
from keepstill.kernels.sums import N_COLUMNS, Points

RIDGE = 1.0
FIRST, END = 3, 9  # rows of the block


@pytest.fixture(scope="module")
def points():
    """Rows of many lengths."""
    rng = np.random.default_rng(1)
    rows = rng.integers((0, 0, 0, 1, 0), (9, 9, 9, 14, 1), (12, 5))
    rows[:, 4] = np.cumsum(rows[:, 3]) - rows[:, 3]
    n = int(rows[:, 3].sum())
    values, *columns = rng.normal(size=(1 + 2 * N_COLUMNS, n)).astype(np.float32)
    jacobian, test = np.array(columns[:N_COLUMNS]), np.array(columns[N_COLUMNS:])
    return Points(rows, 100 + values, jacobian, test)


@pytest.fixture(scope="module")
def fitted(points):
    """Nine volumes in eleven slots, each with a span of its own in each row, some of them empty."""
    rng = np.random.default_rng(2)
    m, sizes = 9, points.rows[:, 3]
    low = rng.integers(0, 4, (m, sizes.size)).clip(max=sizes)
    high = (sizes - rng.integers(0, 3, (m, sizes.size))).clip(min=low)
    spans = np.stack([low, high], axis=-1)
    assert (spans[..., 0] == spans[..., 1]).any()
    maps = [phantom.rigid(rng.uniform(-3, 3, 3), rng.uniform(-4, 4, 3))[:3] for _ in range(m)]
    slots = rng.permutation(11)[:m]
    residuals = rng.normal(size=(11, points.values.size)).astype(np.float32)
    for slot, of_volume in zip(slots, spans, strict=True):
        residuals[slot, ~naive.is_in_span(points, of_volume)] = 0
    residuals.setflags(write=False)
    phases = [aliasing.row_phases(to_moving, points.rows) for to_moving in maps]
    tables = aliasing.wave_tables(np.array(maps), points.rows[:, 3].max())
    return aliasing.Fitted(residuals, slots, spans, np.array(maps), np.array(phases), tables)


@pytest.fixture(scope="module")
def block(points, fitted):
    """The middle rows, their places unchanged, and spans of these rows alone."""
    spans = np.ascontiguousarray(fitted.spans[:, FIRST:END])
    phases = np.ascontiguousarray(fitted.phases[:, FIRST:END])
    of_block = fitted._replace(spans=spans, phases=phases)
    return points._replace(rows=points.rows[FIRST:END]), of_block


@pytest.fixture(scope="module")
def places(block):
    rows = block[0].rows
    return slice(int(rows[0, 4]), int(rows[-1, 4] + rows[-1, 3]))


@pytest.fixture(scope="module")
def factors(points, block):
    out = np.full((aliasing.N_FACTORS, points.values.size), np.nan, np.float32)
    aliasing.fill_factors(out, *block, RIDGE)
    return out


def test_wave_tables(fitted):
    for to_moving, found in zip(fitted.maps, aliasing.wave_tables(fitted.maps, 70), strict=True):
        turned = 2 * np.pi * to_moving[:, :1] * np.arange(70)
        np.testing.assert_allclose(found[::2], np.cos(turned), atol=1e-6)
        np.testing.assert_allclose(found[1::2], np.sin(turned), atol=1e-6)


def test_fill_waves(points, fitted):
    """Far from the origin too: what a float32 would lose is taken off before."""
    for shift, to_moving in enumerate(fitted.maps):
        far = to_moving + [[0, 0, 0, 1000.0 * shift]] * 3
        row = points.rows[shift]
        table = aliasing.wave_tables(far[None], 70)[0]
        found = np.full((aliasing.N_FIELDS - 1, 70), np.nan, np.float32)
        phases = aliasing.row_phases(far, points.rows)[shift]
        aliasing.fill_waves(found, table, phases, row[3])
        expected = np.array([naive.waves(voxel, far)[1:] for voxel, _ in naive.voxels_of([row])])
        np.testing.assert_allclose(found[:, : row[3]], expected.T, atol=2e-6)


def test_fill_factors(block, places, factors):
    expected = naive.fill_factors(*block, RIDGE)
    np.testing.assert_allclose(factors[:, places], expected, atol=2e-5, rtol=1e-5)
    assert np.isnan(factors[:, : places.start]).all() and np.isnan(factors[:, places.stop :]).all()


def test_factors_solve(block, places, factors):
    """Lower triangle times its transpose, the diagonal inverted once more, is the normal matrix."""
    normals = naive.normals_of_fields(*block, RIDGE)
    for packed, normal in zip(factors[:, places].T.astype(float), normals, strict=True):
        factor = np.zeros((7, 7))
        factor[np.tril_indices(7)] = packed
        np.fill_diagonal(factor, 1 / np.diag(factor))
        np.testing.assert_allclose(factor @ factor.T, normal, atol=1e-5)


def test_fit_fields(points, block, places, factors):
    steps = (0.3 * np.random.default_rng(3).normal(size=(9, N_COLUMNS))).astype(np.float32)
    fields = np.full((aliasing.N_FIELDS, points.values.size), np.nan, np.float32)
    right = aliasing.fit_fields(fields, factors, *block, steps)
    expected, expected_right = naive.fit_fields(*block, RIDGE, steps)
    np.testing.assert_allclose(fields[:, places], expected, atol=2e-4)
    np.testing.assert_allclose(right, expected_right, atol=2e-4 * np.abs(expected_right).max())
    assert np.isnan(fields[:, : places.start]).all() and np.isnan(fields[:, places.stop :]).all()


def test_take_off_aliasing(points, fitted):
    fields = np.random.default_rng(4).normal(size=(7, points.values.size)).astype(np.float32)
    for slot, spans, to_moving in zip(fitted.slots, fitted.spans, fitted.maps, strict=True):
        found = fitted.residuals[slot].copy()
        aliasing.take_off_aliasing(found, points, spans, to_moving, fields)
        residuals = fitted.residuals[slot]
        expected = naive.take_off_aliasing(residuals, points, spans, to_moving, fields)
        np.testing.assert_allclose(found, expected, atol=5e-6)
        assert (found[~naive.is_in_span(points, spans)] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_take_off_parabolas(points, fitted, symmetric):
    parabola = 1e-3 * np.random.default_rng(5).normal(size=(4, 4))
    if symmetric:
        parabola += parabola.T
    residuals, spans = fitted.residuals[fitted.slots[0]], fitted.spans[0]
    found = residuals.copy()
    aliasing.take_off_parabolas(found, points, spans, parabola)
    expected = naive.take_off_parabolas(residuals, points, spans, parabola)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())
    assert (found[~naive.is_in_span(points, spans)] == 0).all()


def test_take_off_columns(points, fitted):
    rng = np.random.default_rng(6)
    columns = rng.normal(size=(3, points.values.size)).astype(np.float32)
    factors = rng.normal(size=3).astype(np.float32)
    residuals, spans = fitted.residuals[fitted.slots[0]], fitted.spans[0]
    found = residuals.copy()
    aliasing.take_off_columns(found, points, spans, columns, factors)
    expected = naive.take_off_columns(residuals, points, spans, columns, factors)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert (found[~naive.is_in_span(points, spans)] == 0).all()


def test_fill_left(points, block, fitted):
    """Of rows in the middle, whose points come one after the other."""
    rng = np.random.default_rng(11)
    fields = rng.normal(size=(aliasing.N_FIELDS, points.values.size)).astype(np.float32)
    steps = rng.normal(size=(len(fitted.slots), N_COLUMNS)).astype(np.float32)
    left = np.full((len(fitted.slots), int(block[0].rows[:, 3].sum())), np.nan, np.float32)
    courses.fill_left(left, *block, fields, steps)
    np.testing.assert_allclose(left, naive.fill_left(*block, fields, steps), atol=1e-4)


def test_maps_and_courses():
    rng = np.random.default_rng(12)
    left = rng.normal(size=(9, 300)).astype(np.float32)
    course, weights = rng.normal(size=9), rng.normal(size=300) * (rng.random(300) < 0.2)
    np.testing.assert_allclose(courses.map_of(left, course), naive.map_of(left, course))
    expected = naive.course_of(left, weights)
    np.testing.assert_allclose(courses.course_of(left, weights), expected)


def test_take_off_pattern(points, fitted):
    rng = np.random.default_rng(13)
    pattern = rng.normal(size=points.values.size).astype(np.float32)
    probe = pattern + rng.normal(size=pattern.size).astype(np.float32) / 4
    for slot, spans in zip(fitted.slots, fitted.spans, strict=True):
        found = fitted.residuals[slot].copy()
        amount = courses.take_off_pattern(found, points, spans, pattern, probe)
        expected, part = naive.take_off_pattern(
            fitted.residuals[slot], points, spans, pattern, probe
        )
        assert amount == pytest.approx(part, rel=1e-5)
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, abs(part)))


def test_no_probe_takes_nothing_off(points, fitted):
    nothing, residuals = np.zeros(points.values.size, np.float32), fitted.residuals[0].copy()
    spans = fitted.spans[0]
    assert courses.take_off_pattern(residuals, points, spans, nothing, nothing) == 0
    np.testing.assert_array_equal(residuals, fitted.residuals[0])
