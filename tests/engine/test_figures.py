"""Motion numbers, displacement, DVARS: against other tools' formulas, computed anew."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstill import figures, geometry, phantom

SHAPE = (64, 60, 36)
small = st.floats(-0.3, 0.3)
shift = st.floats(-15, 15)


def matrices(n, seed=0, size=2.0):
    return phantom.drawn_poses("spikes", n, seed, size)


def spm_matrix(p):
    """SPM's spm_matrix for shifts and pitch, roll, yaw: M = T R1(x) R2(y) R3(z)."""
    x, y, z = p[3:]
    r1 = np.array([[1, 0, 0], [0, np.cos(x), np.sin(x)], [0, -np.sin(x), np.cos(x)]])
    r2 = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    r3 = np.array([[np.cos(z), np.sin(z), 0], [-np.sin(z), np.cos(z), 0], [0, 0, 1]])
    out = np.eye(4)
    out[:3, :3] = r1 @ r2 @ r3
    out[:3, 3] = p[:3]
    return out


@given(st.tuples(shift, shift, shift, small, small, small), st.sampled_from(["RAS", "LAS"]))
@settings(max_examples=60, deadline=None)
def test_fsl_numbers_follow_from_spm_numbers(p, axcodes):
    """About the world origin, FSL (rx, ry, rz, tx, ty, tz) = SPM (rx, ry, -rz, -tx, ty, tz)."""
    affine = phantom.grid_affine(SHAPE, (3.0, 3.1, 3.5), axcodes)
    matrix = np.linalg.inv(spm_matrix(p))  # an rp file is moving -> reference
    centre = (np.array(SHAPE) - 1) / 2  # the grid is centred on the origin
    found = figures.fsl_motion(matrix[None], affine, SHAPE, centre)[0]
    expected = [-p[0], p[1], p[2], p[3], p[4], -p[5]]
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_fsl_matrix_is_what_nitransforms_reads(tmp_path):
    """The numbers rebuild an FSL matrix that nitransforms turns into our master matrix."""
    import nibabel as nib
    from nitransforms.linear import load

    affine = phantom.grid_affine(SHAPE, (3.0, 3.1, 3.5), "LAS", oblique_deg=12)
    image = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), affine)
    master = matrices(3, 4)[2]
    centre = np.array([30.0, 25.0, 20.0])
    tx, ty, tz, rx, ry, rz = figures.fsl_motion(master[None], affine, SHAPE, centre)[0]
    c, s = np.cos([rx, ry, rz]), np.sin([rx, ry, rz])
    turn_x = np.array([[1, 0, 0], [0, c[0], s[0]], [0, -s[0], c[0]]])
    turn_y = np.array([[c[1], 0, -s[1]], [0, 1, 0], [s[1], 0, c[1]]])
    turn_z = np.array([[c[2], s[2], 0], [-s[2], c[2], 0], [0, 0, 1]])
    fsl = np.eye(4)
    fsl[:3, :3] = turn_x @ turn_y @ turn_z
    centre_mm = centre * (3.0, 3.1, 3.5)
    fsl[:3, 3] = (tx, ty, tz) - fsl[:3, :3] @ centre_mm + centre_mm
    np.savetxt(tmp_path / "MAT_0000", fsl)
    read = load(tmp_path / "MAT_0000", fmt="fsl", reference=image, moving=image)
    np.testing.assert_allclose(read.matrix, master, atol=1e-5)


def test_framewise_displacement_by_hand():
    motion = np.zeros((3, 6))
    motion[1] = [0.1, -0.2, 0.3, 0.001, -0.002, 0.003]
    found = figures.framewise_displacement_mm(motion, radius_mm=50)
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1:], [0.6 + 50 * 0.006] * 2)


def test_rms_displacement_is_the_mean_square_over_a_sphere():
    """Jenkinson's closed form against points drawn in the ball."""
    rng = np.random.default_rng(1)
    pair = matrices(2, 3)
    centre = np.array([3.0, -8.0, 12.0])
    ball = rng.normal(size=(400_000, 3))
    ball *= (geometry.HEAD_RADIUS_MM * rng.random(len(ball)) ** (1 / 3))[:, None] / np.linalg.norm(
        ball, axis=1, keepdims=True
    )
    points = ball + centre
    forward = [np.linalg.inv(m) for m in pair]
    change = forward[1] @ np.linalg.inv(forward[0])
    moved = points @ change[:3, :3].T + change[:3, 3] - points
    expected = np.sqrt((moved**2).sum(axis=1).mean())
    found = figures.rms_displacement_mm(pair, centre)
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(expected, rel=3e-3)


def nipype_dvars(data):
    """DVARS of (voxels, n) data, step by step as nipype's compute_dvars words it."""
    data = data / np.median(data) * 1000
    q75 = np.percentile(data, 75, axis=1, method="lower")
    q25 = np.percentile(data, 25, axis=1, method="lower")
    sd = (q75 - q25) / 1.349
    data, sd = data[sd > 1e-7], sd[sd > 1e-7]
    centred = data - data.mean(axis=1, keepdims=True)
    lag1 = (centred[:, 1:] * centred[:, :-1]).sum(axis=1) / (centred**2).sum(axis=1)
    expected = (np.sqrt(2 * (1 - lag1)) * sd).mean()
    dvars = np.sqrt((np.diff(data, axis=1) ** 2).mean(axis=0))
    return dvars, dvars / expected


@pytest.mark.parametrize("n", [3, 41])
def test_dvars(n):
    rng = np.random.default_rng(n)
    shape = (n, 6, 30, 40)
    series = (500 + 100 * rng.random(shape[1:]) + rng.normal(size=shape) * 9).astype(np.float32)
    mask = rng.random(shape[1:]) < 0.8
    series[:, 0, 0] = 300  # voxels that do not vary are left out
    found = figures.series_figures(series, np.arange(n), mask)
    dvars, std_dvars = nipype_dvars(series[:, mask].T.astype(np.float64))
    assert np.isnan(found.dvars[0])
    np.testing.assert_allclose(found.dvars[1:], dvars, rtol=1e-6)
    np.testing.assert_allclose(found.std_dvars[1:], std_dvars, rtol=2e-6)


def test_dvars_has_the_same_bytes_for_any_threads(monkeypatch):
    rng = np.random.default_rng(5)
    series = (500 + rng.normal(size=(50, 5, 20, 30)) * 9).astype(np.float32)
    mask, good = rng.random(series.shape[1:]) < 0.7, np.delete(np.arange(50), [3, 20])
    monkeypatch.setattr(figures, "_VALUES_AT_ONCE", 50 * 300)  # several blocks of voxels
    found = [figures.series_figures(series, good, mask, n_threads) for n_threads in (1, 2, 3)]
    assert np.isfinite(found[0].std_dvars[1:]).all()
    for other in found[1:]:
        assert other.dvars.tobytes() == found[0].dvars.tobytes()
        assert other.std_dvars.tobytes() == found[0].std_dvars.tobytes()


def test_failed_volumes_do_not_say_what_is_expected():
    """The others' std_dvars are as if the failed ones were not there; theirs stand out."""
    rng = np.random.default_rng(8)
    series = (500 + rng.normal(size=(12, 3, 20, 30)) * 9).astype(np.float32)
    mask = np.ones(series.shape[1:], bool)
    broken = series.copy()
    broken[[4, 5]] = 0
    good = np.array([0, 1, 2, 3, 6, 7, 8, 9, 10, 11])
    found = figures.series_figures(broken, good, mask)
    _, std_dvars = nipype_dvars(series[good][:, mask].T.astype(np.float64))
    np.testing.assert_allclose(found.std_dvars[1:4], std_dvars[:3], rtol=2e-6)
    np.testing.assert_allclose(found.std_dvars[7:], std_dvars[4:], rtol=2e-6)
    assert found.std_dvars[4] > 20 and found.std_dvars[6] > 20


@pytest.mark.parametrize("n_values", [1, 2, 7, 1000])
@pytest.mark.parametrize("offset", [0.0, -40.0, 900.0])
def test_median(n_values, offset):
    """DVARS is scaled by the median over mask and time, exactly."""
    values = np.random.default_rng(n_values).normal(offset, 30, (n_values, 1, 1, 3))
    values = values.astype(np.float32)
    found = figures._median(values.reshape(n_values, 3), np.arange(n_values), np.arange(3), 2)
    assert found == pytest.approx(np.median(values.astype(np.float64)), rel=1e-12)


def test_median_where_the_first_volumes_looked_at_lie_elsewhere():
    """Every 16th volume is bright; the median is not, and lies between two values far apart."""
    values = np.full((64, 4), 100.0, np.float32)
    values[32:] = 300.0
    values[::16] = 9000.0
    values[1:5] = 300.0 - np.arange(4, dtype=np.float32)
    expected = np.median(values.astype(np.float64))
    assert figures._median(values, np.arange(64), np.arange(4), 1) == expected


def test_two_volumes_have_no_dvars():
    """A quartile of two values is one of them: no voxel varies by that measure."""
    series = np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float32)
    found = figures.series_figures(series, np.arange(2), np.ones(series.shape[1:], bool))
    assert np.isnan(found.dvars).all() and np.isnan(found.std_dvars).all()


def test_centre_of_gravity():
    volume = np.full((5, 6, 7), 3.0, np.float32)
    volume[1, 2, 3], volume[3, 2, 3] = 5.0, 9.0
    np.testing.assert_allclose(figures.centre_of_gravity(volume), [3, 2, 2.5])
    np.testing.assert_allclose(figures.centre_of_gravity(volume * 0), [3, 2.5, 2])
