"""The phantom is what it says: the same head on any grid, moved exactly, seen as declared."""

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import runs
from keepstill import geometry, phantom
from keepstill.errors import InputError, SettingsError
from keepstill.estimate import estimate_motion
from keepstill.moving import Coefficients, prepare_moving
from keepstill.phantom import blob_sets, fine, motion, scanner
from keepstill.phantom import head as anatomy
from keepstill.phantom import run as run_module
from keepstill.reference import prepare_reference
from keepstill.settings import EstimateSettings

SHAPE, SIZES = (64, 64, 36), (3.4, 3.4, 3.5)
AFFINE = phantom.grid_affine(SHAPE, SIZES)
SEED = 1  # of the head that all tests share
MOVED = phantom.rigid((1.3, -0.8, 0.6), (3.0, -4.0, 5.0))
GREY = phantom.PLAIN.grey


@pytest.fixture(scope="module")
def camera(head):
    return scanner.aim(runs.scanner(SHAPE, AFFINE), head)


@pytest.fixture(scope="module")
def still(head):
    """A run of six volumes of a head that does not move."""
    return phantom.make_run(head, runs.scanner(SHAPE, AFFINE), [MOVED] * 6, seed=3)


def with_effects(head, n=6, poses=None, seed=3, **effects):
    poses = [np.eye(4)] * n if poses is None else poses
    return phantom.make_run(
        head, runs.scanner(SHAPE, AFFINE), poses, phantom.Effects(**effects), seed
    )


# The head


def test_head_is_the_same_on_a_finer_grid():
    """A formula of the position, whatever grid it is evaluated on."""
    drawn = anatomy.draw_head(5)
    coarse = anatomy.tissues_on(
        drawn, anatomy.Grid((30, 20, 13), 2.0, (-20.0, -60.0, 5.0)), [phantom.PLAIN]
    )[0]
    finer = anatomy.tissues_on(
        drawn, anatomy.Grid((118, 78, 50), 0.5, (-20.0, -60.0, 5.0)), [phantom.PLAIN]
    )[0]
    for one, other in zip(coarse, finer, strict=True):
        shared = other[::4, ::4, ::4][:13, :20, :30]
        scale = max(1.0, float(np.abs(one).max()))
        # float32 sums of thousands of blobs, each cut at eps of its own brightness
        np.testing.assert_allclose(one, shared, atol=2e-3 * scale)


def test_heads_differ_and_equal_seeds_do_not():
    grid = anatomy.Grid((20, 20, 4), 4.0, (-40.0, -40.0, 20.0))
    one, same, other = (
        anatomy.tissues_on(anatomy.draw_head(seed), grid, [phantom.PLAIN])[0].signal
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).mean() > 0.03 * GREY


def test_head_has_its_parts(head):
    """Sizes and intensities of a head, by rough bounds."""
    signal, brain, active = head.tissue
    litres = brain.sum() * (head.grid.spacing_mm / 100) ** 3
    assert 1.2 < litres < 1.7
    inside = brain > 0.95
    assert np.percentile(signal[inside], 25) < 0.9 * GREY < np.percentile(signal[inside], 60)
    assert (signal[inside] > 1.4 * GREY).mean() > 0.005  # ventricles
    assert (signal[inside] < 0.4 * GREY).mean() > 0.01  # the hole above the sinuses
    around = brain < 0.01
    assert 0.1 * GREY < np.percentile(signal[around & (signal > 30)], 75) < 0.5 * GREY  # scalp
    assert 0.02 < (active > 0.2 * GREY).sum() / inside.sum() < 0.1
    for volume in head.tissue:
        for axis in range(3):
            faces = np.moveaxis(volume, axis, 0)[[0, -1]]
            assert np.abs(faces).max() < 0.5  # nothing is cut off by the fine grid


def test_blobs_of_a_set_are_summed():
    some = blob_sets.joined(
        blob_sets.string([(0, 0, 0), (10, 0, 5)], [2, 4]), blob_sets.blobs([(3, 1, 2)], 5.0, -2.0)
    )
    point = np.array([[4.0, 2.0, 1.0]])
    by_hand = sum(
        b * np.exp(-np.sum((point[0] - c) ** 2) / s**2) for c, s, b in zip(*some, strict=True)
    )
    assert some.value_at(point)[0] == pytest.approx(by_hand)
    grid = anatomy.Grid((1, 1, 1), 1.0, (4.0, 2.0, 1.0))
    assert anatomy._field(some, grid)[0, 0, 0] == pytest.approx(by_hand, rel=1e-5)


# Sampling: no interpolator is favoured


def by_direct_sums(view, pose, voxels, step_mm=0.4):
    """Voxels by summing over the point spread in the scanner's frame, on a 0.4 mm head.

    Nothing of the phantom's own way is used but the head's formula: another grid, trilinear
    reading, no blur of the head, no spline and no nodes.
    """
    sizes = geometry.voxel_sizes_mm(view.affine)
    sd = np.array(view.point_spread_voxels) / fine.FWHM_PER_SD
    reach = np.ceil(4.6 * sd * sizes / step_mm).astype(int)
    steps = [np.arange(-r, r + 1) * step_mm / size for r, size in zip(reach, sizes, strict=True)]
    lines = [np.exp(-0.5 * (s / d) ** 2) for s, d in zip(steps, sd, strict=True)]
    weights = np.einsum("i,j,k->ijk", *(line / line.sum() for line in lines)).ravel()
    offsets = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)
    back = np.linalg.inv(pose) @ view.affine
    centres, spread = voxels @ back[:3, :3].T + back[:3, 3], offsets @ back[:3, :3].T
    low = centres.min(axis=0) + spread.min(axis=0) - 1
    high = centres.max(axis=0) + spread.max(axis=0) + 1
    grid = fine.covering_grid(tuple(zip(low, high, strict=True)), step_mm)
    signal = anatomy.tissues_on(anatomy.draw_head(SEED), grid, [phantom.PLAIN])[0].signal
    values = []
    for centre in centres:
        at = (centre + spread - grid.origin_mm) / step_mm
        values.append(weights @ ndimage.map_coordinates(signal, at[:, ::-1].T, order=1))
    return np.array(values)


@pytest.mark.parametrize(
    "pose",
    [np.eye(4), MOVED, phantom.rigid((-6.0, 7.0, 3.0), (10.0, -8.0, 12.0))],
    ids=["unmoved", "moved", "far"],
)
def test_volume_agrees_with_a_much_finer_evaluation(camera, pose):
    """0.2% of grey matter, rms; the noise of a volume is 1.7% at tSNR 60."""
    rng = np.random.default_rng(2)
    voxels = (np.array([18, 38, 22]) + rng.integers(0, 8, (60, 3))).astype(float)  # cortex
    volume = scanner.exposed(camera, pose)
    found = np.array([volume[int(z), int(y), int(x)] for x, y, z in voxels])
    expected = by_direct_sums(camera.scanner, pose, voxels)
    assert expected.std() > 0.1 * GREY  # there is something to see
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.002 * GREY


def test_fine_grid_is_read_without_interpolation_error(head, camera):
    """A shift by part of a fine voxel against the Fourier shift, which is exact: 1e-4 of grey.

    Interpolation is all that depends on where the head lies; what the fine grid misses of the
    formula moves along with the head.
    """
    shift_mm = np.array([0.37, -0.45, 0.5])
    spectrum = np.fft.rfftn(head.tissue.signal)
    nz, ny, nx = head.tissue.signal.shape
    for axis, (n, s) in enumerate(zip((nz, ny, nx), shift_mm[::-1], strict=True)):
        k = np.fft.rfftfreq(n) if axis == 2 else np.fft.fftfreq(n)
        turn = np.exp(-2j * np.pi * k * s / head.grid.spacing_mm)
        spectrum *= turn.reshape([-1 if a == axis else 1 for a in range(3)])
    shifted = np.fft.irfftn(spectrum, s=(nz, ny, nx), axes=(0, 1, 2)).astype(np.float32)
    tissue = head.tissue._replace(signal=shifted)
    exact = scanner.aim(camera.scanner, dataclasses.replace(head, tissue=tissue))
    expected = scanner.exposed(exact, np.eye(4))
    found = scanner.exposed(camera, phantom.rigid(shift_mm, (0, 0, 0)))
    inner = (slice(2, -2),) * 3
    rms = np.sqrt(np.mean((found - expected)[inner] ** 2))
    assert rms < 1e-4 * GREY


def test_only_relative_motion_of_head_and_scanner_counts(head):
    """A moved head before a still scanner is a still head before a scanner moved back."""
    spread = (runs.POINT_SPREAD_MM / 3.4, 1.1, 1.1)
    here = phantom.Scanner(SHAPE, AFFINE, spread)
    there = phantom.Scanner(SHAPE, np.linalg.inv(MOVED) @ AFFINE, spread)
    one = scanner.exposed(scanner.aim(here, head), MOVED)
    other = scanner.exposed(scanner.aim(there, head), np.eye(4))
    np.testing.assert_allclose(one, other, atol=2e-2)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PSL", "SAR"])
def test_storage_order_is_only_an_order(head, axcodes):
    sizes = dict(zip("RAS", (3.4, 3.6, 4.0), strict=True)) | {"L": 3.4, "P": 3.6, "I": 4.0}
    shapes = {"R": 40, "L": 40, "A": 44, "P": 44, "S": 30, "I": 30}
    views = []
    for codes in ("LAS", axcodes):
        shape, size = tuple(shapes[c] for c in codes), tuple(sizes[c] for c in codes)
        affine = phantom.grid_affine(shape, size, codes)
        volume = scanner.exposed(scanner.aim(runs.scanner(shape, affine), head), MOVED)
        xyz = volume.T
        order = [{"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}[c] for c in codes]
        for axis, code in enumerate(codes):
            xyz = np.flip(xyz, axis) if code in "LPI" else xyz
        views.append(xyz.transpose(np.argsort(order)))
    np.testing.assert_allclose(views[0], views[1], atol=2e-2)


def test_point_spread_is_as_wide_as_declared():
    """Second moments of a point, seen from many places, along each voxel axis."""
    blur_mm, spread = 3.0, (1.0, 1.25, 1.6)
    point = np.zeros((41, 41, 41), np.float32)
    point[20, 20, 20] = 1e6
    blurred = fine.blurred(point, blur_mm / fine.FWHM_PER_SD)
    tissue = anatomy.Tissue(blurred, point * 0, point * 0)
    grid = anatomy.Grid((41, 41, 41), 1.0, (-20.0, -20.0, -20.0))
    shape, sizes = (12, 12, 12), (3.0, 3.0, 3.5)
    view = phantom.Scanner(shape, phantom.grid_affine(shape, sizes, oblique_deg=20), spread)
    seen = scanner.aim(view, fine.FineHead(tissue, grid, blur_mm / fine.FWHM_PER_SD))
    rng = np.random.default_rng(0)
    index = np.arange(12.0)
    squares, sums = np.zeros(3), np.zeros(3)
    for at_voxel in rng.uniform(5, 6, (200, 3)):
        at_mm = view.affine[:3] @ [*at_voxel, 1]
        volume = scanner.exposed(seen, phantom.rigid(at_mm, (0, 0, 0)))
        for axis in range(3):
            line = volume.sum(axis=tuple(a for a in range(3) if a != 2 - axis), dtype=float)
            squares[axis] += (line * (index - at_voxel[axis]) ** 2).sum()
            sums[axis] += line.sum()
    found = np.sqrt(squares / sums) * fine.FWHM_PER_SD
    np.testing.assert_allclose(found, spread, rtol=0.01)


def test_narrower_point_spread_than_the_head_s_blur_is_refused(head):
    with pytest.raises(SettingsError, match="2 mm found along voxel axis 2"):
        scanner.aim(phantom.Scanner(SHAPE, AFFINE, (1.0, 1.0, 2.0 / 3.5)), head)


# Noise, seeds, truth


def test_noise_is_rician(still):
    volumes = np.array([phantom.volume_of(still, t) for t in range(len(still))])
    clean = phantom.clean_volume(still, 0)
    air = clean < 1e-3
    sd = still.noise_sd
    assert volumes[:, air].mean() == pytest.approx(sd * np.sqrt(np.pi / 2), rel=0.01)
    assert (volumes[:, air] ** 2).mean() == pytest.approx(2 * sd**2, rel=0.01)
    bright = clean > 20 * sd
    assert (volumes - clean)[:, bright].std() == pytest.approx(sd, rel=0.01)


def test_tsnr_is_the_brain_s(still):
    points = np.c_[still.brain_mm, np.ones(len(still.brain_mm))]
    x, y, z = np.rint(np.linalg.solve(AFFINE, points.T))[:3].astype(int)
    mean = phantom.clean_volume(still, 0)[z, y, x].mean()
    assert mean / still.noise_sd == pytest.approx(60, rel=1e-5)
    litres = len(z) * np.prod(SIZES) * 1e-6
    assert 1.1 < litres < 1.7


def test_same_seed_same_bytes_in_any_order(head, still):
    again = phantom.make_run(head, runs.scanner(SHAPE, AFFINE), [MOVED] * 6, seed=3)
    backwards = [phantom.volume_of(again, t) for t in (5, 0, 2)]
    for t, volume in zip((5, 0, 2), backwards, strict=True):
        np.testing.assert_array_equal(volume, phantom.volume_of(still, t))
    other = phantom.make_run(head, runs.scanner(SHAPE, AFFINE), [MOVED] * 6, seed=4)
    assert (phantom.volume_of(other, 0) != backwards[1]).mean() > 0.99
    assert (backwards[0] != backwards[1]).mean() > 0.99


def test_volumes_can_be_made_at_the_same_time(head):
    """Threads share the head and nothing else."""
    poses = phantom.drawn_poses("steps", 24, 2)
    run = phantom.make_run(head, runs.scanner(SHAPE, AFFINE), poses)
    alone = [phantom.volume_of(run, t) for t in range(0, 24, 4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda t: phantom.volume_of(run, t), range(0, 24, 4)))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_truth_maps_volume_0_to_each_volume(head):
    """The truth brings volume t's fine head onto that of volume 0, with no noise at all."""
    poses = phantom.drawn_poses("drift", 4, 9)
    run = phantom.make_run(head, runs.scanner(SHAPE, AFFINE), poses)
    np.testing.assert_allclose(run.truth[0], np.eye(4), atol=1e-12)
    for pose, truth in zip(poses, run.truth, strict=True):
        np.testing.assert_allclose(truth @ poses[0], pose, atol=1e-12)
    tip = np.array([10.0, 80.0, -20.0, 1.0])  # a point of the head
    np.testing.assert_allclose(run.truth[3] @ (poses[0] @ tip), poses[3] @ tip, atol=1e-9)


# Effects


def test_gain_first_volumes_and_lost_slices(head):
    run = with_effects(head, n=20, gain_drift=0.05, first_brighter=0.45, dropped_slices=4)
    plain = phantom.clean_volume(with_effects(head, n=2), 0)
    assert run.gains[0] == pytest.approx(1.45)
    assert run.gains[10] == pytest.approx(1 + 0.05 * 10 / 19, rel=1e-4)
    assert run.gains[-1] == pytest.approx(1.05)
    lost = run.lost < 1
    assert not lost[0].any() and lost.any(axis=1).sum() == 1
    t = int(np.flatnonzero(lost.any(axis=1))[0])
    assert lost[t].sum() == 4
    volume = phantom.clean_volume(run, t)
    kept = volume[~lost[t]] / run.gains[t]
    np.testing.assert_allclose(kept, plain[~lost[t]], rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(
        volume[lost[t]], 0.25 * run.gains[t] * plain[lost[t]], rtol=1e-5, atol=1e-2
    )


def test_shading_stays_with_the_scanner_and_spans_its_range(head, still):
    field = run_module.shading(still.scanner, 0.35)
    around = np.linalg.norm(geometry.world(AFFINE, voxel_grid()), axis=-1) < 80
    assert np.ptp(field[around]) == pytest.approx(0.35, rel=0.05)
    assert field[around].mean() == pytest.approx(1, abs=0.02)
    poses = [np.eye(4), MOVED]
    shaded, plain = with_effects(head, poses=poses, shading=0.35), with_effects(head, poses=poses)
    for t in range(2):
        expected = phantom.clean_volume(plain, t) * field
        np.testing.assert_allclose(phantom.clean_volume(shaded, t), expected, rtol=1e-5)


def voxel_grid():
    nx, ny, nz = SHAPE
    z, y, x = np.meshgrid(np.arange(nz), np.arange(ny), np.arange(nx), indexing="ij")
    return np.stack([x, y, z], axis=-1).astype(float)


def test_ghost_is_half_a_field_away(head):
    ghosted, plain = with_effects(head, ghost=0.05), with_effects(head)
    assert np.std(ghosted.ghosts) > 0
    for t in range(2):
        clean = phantom.clean_volume(plain, t)
        added = phantom.clean_volume(ghosted, t) - clean
        expected = ghosted.ghosts[t] * np.roll(clean, SHAPE[1] // 2, axis=1)
        np.testing.assert_allclose(added, expected, atol=1e-2)


def test_task_cortex_brightens_after_a_block_begins(head):
    n = 25
    run, plain = with_effects(head, n=n, activation_percent=4.0), with_effects(head, n=n)
    assert run_module.task_blocks_s(run.scanner, n) == [(20.0, 20.0)]
    np.testing.assert_array_equal(phantom.clean_volume(run, 8), phantom.clean_volume(plain, 8))
    before = phantom.clean_volume(plain, 17)
    rise = phantom.clean_volume(run, 17) - before
    assert 0.02 * GREY < rise.max() <= 0.04 * GREY
    assert (rise > 0.005 * GREY).mean() < 0.05  # in some cortex only
    assert (phantom.clean_volume(run, 24) - before).max() < 0.5 * rise.max()


# Slices at their own times


def timed(**options):
    times = tuple(np.argsort([*range(0, 36, 2), *range(1, 36, 2)]) * 2.0 / 36)
    return runs.scanner(SHAPE, AFFINE, slice_times_s=times, **options)


def test_still_head_is_the_same_slice_by_slice(head, still):
    run = phantom.make_run(head, timed(), [MOVED] * 2)
    np.testing.assert_allclose(run.truth, [np.eye(4)] * 2, atol=1e-9)
    np.testing.assert_allclose(run.bent_mm, 0, atol=1e-9)
    np.testing.assert_allclose(
        phantom.clean_volume(run, 1), phantom.clean_volume(still, 1), atol=2e-2
    )


def test_each_slice_is_seen_at_its_own_pose(head, camera):
    poses = phantom.drawn_poses("drift", 5, 4, size=0.5)
    run = phantom.make_run(head, timed(), poses)
    t, k = 2, 7
    numbers = np.array([phantom.numbers_of(pose) for pose in poses])
    at = t + run.scanner.slice_times_s[k] / 2.0 - 0.5
    pose = phantom.pose_of([np.interp(at, np.arange(5), numbers[:, a]) for a in range(6)])
    expected = scanner.exposed(camera, pose)[k]
    np.testing.assert_allclose(phantom.clean_volume(run, t)[k], expected, atol=2e-2)
    error = phantom.displacement_mm(run.poses[1:4], np.array(poses)[1:4], run.brain_mm)
    assert error.max() < 0.2  # the closest rigid map is near the middle of the volume


def test_how_far_slices_are_from_the_closest_rigid_map(head):
    """A shift that grows from slice to slice; interleaved, it is no rigid map and no shear."""
    still, shifted = np.eye(4), phantom.rigid((8.0, 0, 0), (0, 0, 0))
    run = phantom.make_run(head, timed(), [still, shifted, shifted])
    voxel = geometry.world(np.linalg.inv(AFFINE), run.brain_mm)
    shift_mm = run.slice_numbers[1][np.rint(voxel[:, 2]).astype(int), 0]  # 4 to 8, and 8
    from_their_mean_mm = np.abs(shift_mm - shift_mm.mean()).mean()
    assert 0.8 * from_their_mean_mm < run.bent_mm[1] < from_their_mean_mm  # a turn fits better
    assert run.bent_mm[2] < 1e-9  # nothing moves after the last
    still_run = phantom.make_run(head, runs.scanner(SHAPE, AFFINE), [still, shifted])
    np.testing.assert_array_equal(still_run.bent_mm, 0)


def test_best_rigid_map_of_a_rigid_motion_is_itself(rng):
    points = rng.normal(size=(50, 3)) * 40
    moved = points @ MOVED[:3, :3].T + MOVED[:3, 3]
    np.testing.assert_allclose(motion.best_rigid(points, moved), MOVED, atol=1e-9)


# Motion


@given(st.lists(st.floats(-0.9, 0.9), min_size=3, max_size=3), st.floats(-20, 20))
@settings(max_examples=50, deadline=None)
def test_six_numbers_and_a_pose_are_the_same(angles, shift):
    six = np.array([shift, -2 * shift, 3.0, *angles])
    np.testing.assert_allclose(phantom.numbers_of(phantom.pose_of(six)), six, atol=1e-9)


@pytest.mark.parametrize("kind", motion.KINDS)
def test_drawn_motion_keeps_to_its_size(kind):
    poses = phantom.drawn_poses(kind, 200, 3)
    np.testing.assert_array_equal(poses, phantom.drawn_poses(kind, 200, 3))
    assert np.abs(poses - phantom.drawn_poses(kind, 200, 4)).max() > 0.01
    six = np.array([phantom.numbers_of(pose) for pose in poses]) * [1, 1, 1, *[180 / np.pi] * 3]
    moved = np.abs(six - six[0]).max(axis=0)
    low, high = {"drift": (1.8, 2.3), "spikes": (1.8, 2.3), "steps": (4, 14), "still": (0, 0.3)}[
        kind
    ]
    assert (moved >= low).all() and (moved <= high).all()
    jumps = np.abs(np.diff(six, axis=0)).max(axis=1) > 0.35
    assert (jumps.sum() > 5) == (kind in ("spikes", "steps"))


def test_motion_is_read_from_a_table(tmp_path):
    six = np.array([[0, 0, 0, 0, 0, 0], [1, 2, 3, 0.01, 0.02, 0.03]])
    expected = np.array([phantom.pose_of(row) for row in six])
    plain, named = tmp_path / "a.txt", tmp_path / "b.tsv"
    np.savetxt(plain, six)
    rows = ["\t".join(map(str, [*row[3:], 7, *row[:3]])) for row in six]
    named.write_text("\n".join(["rot_x\trot_y\trot_z\tfd\ttrans_x\ttrans_y\ttrans_z", *rows]))
    np.testing.assert_allclose(phantom.read_poses(plain), expected, atol=1e-12)
    np.testing.assert_allclose(phantom.read_poses(named), expected, atol=1e-12)


@pytest.mark.parametrize(
    "text", ["", "1 2 3\n", "a b c d e f\n", "0 0 0 0 0 nan\n", "0 0 0 9 0 0\n"]
)
def test_what_is_no_motion_is_refused(tmp_path, text):
    path = tmp_path / "motion.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"motion\.txt: no motion found; needs trans_x"):
        phantom.read_poses(path)


def test_missing_table_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: cannot be read"):
        phantom.read_poses(tmp_path / "none.txt")


# The bound


def test_mean_displacement_is_that_of_drawn_errors(rng):
    half = rng.normal(size=(6, 6)) * [[0.01]] * 3 + [[0.0]]
    half[3:] /= 50
    covariance = half @ half.T
    arms = rng.normal(size=(40, 3)) * 40
    drawn = rng.normal(size=(20_000, 6)) @ half.T
    moved = drawn[:, None, :3] + np.cross(drawn[:, None, 3:], arms[None])
    expected = np.linalg.norm(moved, axis=-1).mean()
    found = phantom.mean_displacement_mm(covariance, arms)
    assert found == pytest.approx(expected, rel=0.01)


def test_bound_is_what_a_fit_of_the_known_template_reaches(head):
    """Least squares with the true derivatives, over noisy volumes of a still head."""
    n, tsnr = 60, 200.0  # little noise, so that one step is enough and Rician noise is Gaussian
    run = phantom.make_run(
        head, runs.scanner(SHAPE, AFFINE), [MOVED] * n, phantom.Effects(tsnr=tsnr), seed=8
    )
    bound = phantom.cramer_rao(run)
    template = phantom.clean_volume(run, 0).astype(float)
    to_centre = geometry.translation(-bound.centre_mm)
    from_centre = geometry.translation(bound.centre_mm)
    columns, size = [], np.array([0.1] * 3 + [0.001] * 3)
    for step in np.diag(size):
        moved = from_centre @ geometry.rigid_step(step) @ to_centre @ MOVED
        columns.append((scanner.exposed(run.camera, moved) - template).ravel())
    jacobian = np.array([*(c / s for c, s in zip(columns, size, strict=True)), template.ravel()])
    tissue = template.ravel() > 10 * run.noise_sd  # in air the noise has a mean
    fit = np.linalg.pinv(jacobian[:, tissue].T)
    found = [fit @ (phantom.volume_of(run, t) - template).ravel()[tissue] for t in range(n)]
    steps = [geometry.rigid_step(-x[:6]) for x in found]
    errors = np.array([from_centre @ s @ to_centre for s in steps])
    reached = phantom.displacement_mm(errors, np.array([np.eye(4)] * n), run.brain_mm).mean()
    assert reached == pytest.approx(bound.template_known_mm, rel=0.1)
    assert bound.noisy_reference_mm == pytest.approx(np.sqrt(2) * bound.template_known_mm)


def test_bound_grows_with_noise_and_no_estimate_beats_it(head):
    poses = phantom.drawn_poses("still", 9, 2)
    few, many = (
        phantom.make_run(head, runs.scanner(SHAPE, AFFINE), poses, phantom.Effects(tsnr=tsnr), 5)
        for tsnr in (30, 60)
    )
    low, high = phantom.cramer_rao(many), phantom.cramer_rao(few)
    assert high.template_known_mm == pytest.approx(2 * low.template_known_mm, rel=1e-3)
    assert 0.002 < low.template_known_mm < 0.004  # 0.0028 known of such runs
    volumes = [phantom.volume_of(many, t) for t in range(9)]
    chosen = EstimateSettings()
    reference = prepare_reference(volumes[0], AFFINE, chosen)
    space = Coefficients(volumes[0].shape)
    found = np.array(
        [
            estimate_motion(
                prepare_moving(v, chosen.degree, space), AFFINE, reference, chosen
            ).moving_from_reference
            for v in volumes
        ]
    )
    error = np.median(phantom.displacement_mm(found, many.truth, many.brain_mm)[1:])
    assert 0.8 * low.noisy_reference_mm < error < 2 * low.noisy_reference_mm


# The rest


def test_ball_moves_with_its_shift():
    soft = phantom.soft_ball((21, 21, 21))
    assert soft[10, 10, 10] > 990 and soft[0].max() < 1
    still_ball, moved = phantom.ball((33, 33, 33)), phantom.ball((33, 33, 33), (0.1, 0, 0))
    centre = [
        (ball.sum(axis=(1, 2)) * np.arange(33)).sum() / ball.sum() for ball in (still_ball, moved)
    ]
    assert centre[1] - centre[0] == pytest.approx(0.1 * 10, rel=0.01)
    assert 500 < np.median(still_ball[still_ball > 200]) < 1500


def test_neither_scipy_nor_mpi_is_needed():
    program = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(['scipy', 'mpi4py', 'matplotlib'])  # not to be found\n"
        "import keepstill.phantom, keepstill.simulate"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(runs.SCRIPTS)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
