"""Volumes that lie far away are found again; what cannot be found is said to have failed."""

import numpy as np
import pytest

import runs
from keepstill import geometry, phantom, realign
from keepstill.estimate import estimate_motion
from keepstill.moving import Coefficients, prepare_moving
from keepstill.ranks import join_world, realign_staged
from keepstill.realign import Crew
from keepstill.reference import Acquisition, prepare_reference, thinned
from keepstill.settings import EstimateSettings, RealignSettings
from keepstill.smooth import lowpass
from keepstill.stage import MOTION, stage_run
from keepstill.wide_start import better, prepare_wide, wants_wide_start, wide_start

SHAPE = (64, 64, 36)
AFFINE = phantom.grid_affine(SHAPE, (3.4, 3.4, 3.5))
SETTINGS = EstimateSettings()
N_DIRECTIONS = 4


def jumps(shift_mm, turn_deg, seed=5):
    """Poses: rest, and jumps as far in drawn directions."""
    drawn = np.random.default_rng(seed).normal(size=(N_DIRECTIONS, 2, 3))
    drawn /= np.linalg.norm(drawn, axis=2, keepdims=True)
    return [np.eye(4), *(phantom.rigid(shift_mm * s, turn_deg * r) for s, r in drawn)]


def wide_of(reference):
    volume, affine = reference.volume, reference.affine
    return prepare_wide(volume, affine, reference.centre_mm, reference.basis)


def both_starts(volumes, affine, in_plane=False):
    """Estimates from no motion, and from a wide start, of all volumes but the first."""
    reference = prepare_reference(volumes[0], affine, SETTINGS, Acquisition(in_plane))
    levels, found = wide_of(reference), []
    for volume in volumes[1:]:
        moving = prepare_moving(volume, 5, Coefficients(volume.shape))
        start = wide_start(volume, affine, levels)
        plain, wide = (
            estimate_motion(moving, affine, reference, SETTINGS, s) for s in (None, start)
        )
        found.append((plain, wide, wants_wide_start(plain, reference)))
    return found


def errors_mm(run, estimates):
    found = np.array([e.moving_from_reference for e in estimates])
    return phantom.displacement_mm(found, run.truth[1:], run.brain_mm)


@pytest.mark.parametrize(
    ("shift_mm", "turn_deg"), [(10, 10), (20, 20), (30, 30), (30, 60), (30, 75), (0, 90)]
)
def test_capture_range(head, shift_mm, turn_deg):
    """30 mm with 75 degrees, and 90 degrees, in any direction, as long as the head is in view.

    They end within interpolation's error of the truth, as smaller ones do.
    """
    run, volumes = runs.head_run(head, jumps(shift_mm, turn_deg), SHAPE, AFFINE)
    found = both_starts(volumes, AFFINE)
    assert {wide.status for _, wide, _ in found} == {"ok"}
    assert errors_mm(run, [wide for _, wide, _ in found]).max() < 0.03


def test_a_wide_start_finds_what_no_motion_does_not(head):
    """Head turns of 110 degrees: seen to be poor by their cost alone, and found all the same."""
    run, volumes = runs.head_run(head, jumps(0, 110), SHAPE, AFFINE)
    found = both_starts(volumes, AFFINE)
    lost = [i for i, (plain, _, _) in enumerate(found) if plain.status == "failed"]
    assert len(lost) >= 2
    assert all(wants for _, _, wants in (found[i] for i in lost))
    errors = errors_mm(run, [better(plain, wide) for plain, wide, _ in found])
    assert (errors[lost] < 0.03).sum() >= len(lost) - 1


def staged(source, stage_dir, n_threads=1, **settings):
    chosen = RealignSettings(**settings)
    stage_run(source, "sub-01_task-rest", None, stage_dir, chosen)
    realign_staged(stage_dir, chosen, join_world(), Crew(n_threads))
    with np.load(stage_dir / MOTION) as saved:
        return {name: saved[name] for name in saved.files}


def written(path, volumes, affine=AFFINE):
    return runs.write_run(path, np.stack([v.T for v in volumes], axis=-1), affine)


def test_jumps_within_a_run(head, tmp_path):
    """Each is found by itself: in another order, and on two threads, they have the same motion."""
    run, volumes = runs.head_run(head, jumps(25, 100), SHAPE, AFFINE)
    source = written(tmp_path / "a_bold.nii", volumes)
    motion = staged(source, tmp_path / "a")
    turned = written(tmp_path / "b_bold.nii", [volumes[0], *volumes[:0:-1]])
    other = staged(turned, tmp_path / "b", 2)
    for name in ("moving_from_reference", "status", "iterations", "cost", "overlap"):
        np.testing.assert_array_equal(motion[name][1:], other[name][:0:-1])
    good = motion["status"][1:] == "ok"
    assert good.sum() >= N_DIRECTIONS - 1
    found = motion["moving_from_reference"][1:][good]
    truth = run.truth[1:][good]
    assert phantom.displacement_mm(found, truth, run.brain_mm).max() < 0.03


def test_ordinary_runs_never_ask_for_it(head, tmp_path, monkeypatch):
    def asked(*arguments):
        raise AssertionError("asked for")

    monkeypatch.setattr(realign, "prepare_wide", asked)
    poses = [*phantom.drawn_poses("spikes", 6, 3), phantom.rigid((8, -5, 4), (9, -4, 12))]
    _, volumes = runs.head_run(head, poses, SHAPE, AFFINE, tsnr=15)
    motion = staged(written(tmp_path / "a_bold.nii", volumes), tmp_path / "stage")
    assert set(motion["status"]) == {"reference", "ok"}


@pytest.mark.parametrize("shift_mm", [95, 130])
def test_outside_the_field_of_view_has_failed(head, tmp_path, shift_mm):
    """With the overlap in the table, below what is asked for."""
    poses = [
        np.eye(4),
        phantom.rigid((0.5, 0, 0), (0, 0, 0)),
        phantom.rigid((0, 0, shift_mm), 3 * (0,)),
    ]
    _, volumes = runs.head_run(head, poses, SHAPE, AFFINE)
    motion = staged(written(tmp_path / "a_bold.nii", volumes), tmp_path / "stage")
    assert motion["status"].tolist() == ["reference", "ok", "failed"]
    if shift_mm < 100:  # further off, nothing of the head is left to go by
        assert 0 < motion["overlap"][2] < SETTINGS.min_overlap


def test_within_the_plane(head):
    """A single slice turns about its normal only, in wide starts too."""
    poses = [
        np.eye(4),
        phantom.rigid((20, 10, 0), (0, 0, 50)),
        phantom.rigid((0, 0, 0), (0, 0, -70)),
    ]
    run, volumes = runs.head_run(head, poses, SHAPE, AFFINE)
    affine = geometry.compose(AFFINE, geometry.translation(np.array([0, 0, 16.0])))
    slices = [np.ascontiguousarray(volume[16:17]) for volume in volumes]
    found = both_starts(slices, affine, in_plane=True)
    near = run.brain_mm[np.abs(run.brain_mm[:, 2] - affine[2, 3]) < 2]
    matrices = np.array([wide.moving_from_reference for _, wide, _ in found])
    assert phantom.displacement_mm(matrices, run.truth[1:], near).max() < 0.3
    np.testing.assert_allclose(matrices[:, 2, [0, 1, 3]], 0, atol=1e-9)


def test_head_turns_of_real_runs(study, tmp_path):
    """Three runs of ten volumes; without wide starts 3, 1 and 4 volumes fail.

    What still fails moved while it was scanned: its slices show the head in several poses.
    """
    failed = []
    for run in (1, 2, 3):
        source = study / "sub-02" / "func" / f"sub-02_task-headturn_run-{run}_bold.nii.gz"
        status = staged(source, tmp_path / str(run))["status"]
        failed.append(np.flatnonzero(status == "failed").tolist())
    assert failed == [[6, 7], [7], [6, 7, 8]]


def test_thinned_volumes_show_the_same_places():
    """A blob stays where it is in the world, and is blurred as widely in all directions."""
    affine = phantom.grid_affine((40, 44, 24), (2.0, 3.0, 5.0), "LPS", 20.0)
    at = np.stack(np.indices((40, 44, 24)), axis=-1).astype(float)
    place = geometry.world(affine, np.array([18.0, 23.0, 11.0]))
    far2 = ((geometry.world(affine, at) - place) ** 2).sum(axis=-1)
    low, low_affine = thinned(np.exp(-far2 / 2 / 8.0**2).astype(np.float32).T.copy(), affine, 28.0)
    assert low.size < at[..., 0].size / 5
    world_mm = geometry.world(low_affine, np.argwhere(low.T >= 0).astype(float)) - place
    weights = low.T.ravel() / low.sum()
    middle = weights @ world_mm
    spread = (world_mm - middle).T @ ((world_mm - middle) * weights[:, None])
    assert np.abs(middle).max() < 0.5
    expected = 8.0**2 + (28.0 / 2.3548) ** 2
    np.testing.assert_allclose(spread, np.eye(3) * expected, atol=0.12 * expected)


def test_low_pass_by_axis():
    volume = np.random.default_rng(0).normal(size=(9, 10, 11)).astype(np.float32)
    np.testing.assert_array_equal(lowpass(volume, (2.0, 2.0, 2.0)), lowpass(volume, 2.0))
    alone = lowpass(volume, (0, 0, 3.0))
    np.testing.assert_allclose(alone[4], lowpass(volume[4:5], (0, 0, 3.0))[0], rtol=1e-6)
    assert lowpass(volume, 0) is volume
