"""What volumes are realigned to: each choice is what it says, and where it says."""

import numpy as np
import pytest

import runs
from keepstill import geometry, phantom, realign
from keepstill.bids import find_sbref
from keepstill.ranks import join_world, realign_staged
from keepstill.read import open_staged
from keepstill.realign import Crew, open_realigned
from keepstill.run_table import read_run_table
from keepstill.settings import RealignSettings, with_sbref
from keepstill.stage import MOTION, stage_run

SHAPE = (48, 52, 28)
AFFINE = phantom.grid_affine(SHAPE, (4.2, 4.2, 4.5))


def staged(source, stage_dir, n_threads=1, **settings):
    """What realignment leaves: arrays, and the realigned series."""
    chosen = RealignSettings(**settings)
    stage_run(source, "sub-01_task-rest", None, stage_dir, chosen)
    realign_staged(stage_dir, chosen, join_world(), Crew(n_threads))
    run = open_staged(stage_dir)
    with np.load(stage_dir / MOTION) as saved:
        motion = {name: saved[name] for name in saved.files}
    return motion, open_realigned(run, motion["reference"].shape)


@pytest.fixture(scope="module")
def made(head, tmp_path_factory):
    """A head that wanders off step by step, and comes back for a moment; volume 4 lost slices."""
    steps = [0.0, 0.4, 1.0, 1.4, 1.5, 1.7, 2.4, 3.0]
    poses = [phantom.rigid((s, 0.3 * s, 0.5 * s), (0.5 * s, -s, 0.4 * s)) for s in steps]
    run, volumes = runs.head_run(head, poses, SHAPE, AFFINE)
    volumes[4] = volumes[4].copy()
    volumes[4][[9, 14]] *= 0.2
    data = np.stack([volume.T for volume in volumes], axis=-1)
    path = tmp_path_factory.mktemp("references") / "sub-01_task-rest_bold.nii"
    return run, runs.write_run(path, data, AFFINE), data


@pytest.mark.parametrize("reference", ["mean", "median"])
def test_made_of_the_realigned_volumes(made, tmp_path, reference):
    run, source, _ = made
    _, series = staged(source, tmp_path / "first", reference="first")
    seen = np.asarray(series, np.float64)
    if reference == "median":  # of what was seen
        seen = np.where(series == 0, np.nan, seen)
        assert np.isnan(seen).any(axis=0).sum() > 1000 > np.isnan(seen).all(axis=0).sum()
    expected = {"mean": np.mean, "median": np.nanmedian}[reference](seen, axis=0)
    motion, _ = staged(source, tmp_path / reference, reference=reference)
    np.testing.assert_allclose(motion["reference"], expected, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(motion["affine"], AFFINE, atol=1e-5)
    assert set(motion["status"]) == {"ok"}
    # Pose: that of the first volume, within what the mean itself is off.
    assert phantom.displacement_mm(
        motion["moving_from_reference"], run.truth, run.brain_mm
    ).max() < 0.1  # fmt: skip


def test_a_median_is_found_in_slabs(made, tmp_path, monkeypatch):
    _, source, _ = made
    whole, _ = staged(source, tmp_path / "whole", reference="median")
    n_bytes, median = [], realign._median_seen

    def noted(values):
        n_bytes.append(values.nbytes)
        return median(values)

    monkeypatch.setattr(realign, "_median_seen", noted)
    monkeypatch.setattr(realign, "_MEDIAN_VALUES", 8 * SHAPE[0] * 5)
    slabs, _ = staged(source, tmp_path / "slabs", 2, reference="median")
    for name, values in whole.items():
        np.testing.assert_array_equal(slabs[name], values)
    assert len(n_bytes) == SHAPE[2] * -(-SHAPE[1] // 5)
    assert max(n_bytes) == 4 * 8 * SHAPE[0] * 5


def test_lowest_motion(made, tmp_path):
    """Of eight the fifth is nearest to all; it has lost slices, so the fourth or sixth it is."""
    run, source, data = made
    motion, series = staged(source, tmp_path / "stage", reference="lowest-motion")
    pairs = np.array(
        [phantom.displacement_mm(run.truth, np.array([t] * 8), run.brain_mm) for t in run.truth]
    )
    order = np.argsort(pairs.mean(axis=1))
    assert order[0] == 4
    (reference,) = np.flatnonzero(motion["status"] == "reference")
    assert reference == order[1]
    np.testing.assert_array_equal(motion["reference"], data[..., reference].T.astype(np.float32))
    np.testing.assert_array_equal(series[reference], motion["reference"])
    to_chosen = np.array([m @ np.linalg.inv(run.truth[reference]) for m in run.truth])
    brain = run.brain_mm
    errors = phantom.displacement_mm(motion["moving_from_reference"], to_chosen, brain)
    assert errors.max() < 0.06


def test_lowest_motion_never_takes_dummy_scans(made, tmp_path):
    _, source, _ = made
    motion, _ = staged(source, tmp_path / "s", reference="lowest-motion", dummy_scans=6)
    assert np.flatnonzero(motion["status"] == "reference")[0] >= 6


def test_distance_between_poses():
    """Against the rms displacement of points drawn from the ball."""
    rng = np.random.default_rng(3)
    a, b = (phantom.rigid(rng.normal(size=3) * 5, rng.normal(size=3) * 8) for _ in range(2))
    centre = np.array([5.0, -20.0, 30.0])
    points = rng.uniform(-1, 1, (200_000, 3))
    points = points[(points**2).sum(axis=1) <= 1] * geometry.HEAD_RADIUS_MM + centre
    moved = points @ (a - b)[:3, :3].T + (a - b)[:3, 3]
    places = geometry.pose_places_mm(np.array([a, b]), centre)
    found = np.sqrt(((places[0] - places[1]) ** 2).sum())
    assert found == pytest.approx(np.sqrt((moved**2).sum(axis=1).mean()), rel=0.01)


def test_a_single_band_reference_is_found_by_its_name(tmp_path):
    bold = tmp_path / "sub-01_task-rest_echo-1_bold.nii.gz"
    assert find_sbref(bold) is None and find_sbref(tmp_path / "any.nii") is None
    shared = tmp_path / "sub-01_task-rest_sbref.nii.gz"
    shared.write_bytes(b"x")
    assert find_sbref(bold) == shared
    beside = tmp_path / "sub-01_task-rest_echo-1_sbref.nii"
    beside.write_bytes(b"x")
    assert find_sbref(bold) == beside
    settings = RealignSettings(reference="sbref")
    assert with_sbref(settings, beside).reference == str(beside)
    assert with_sbref(settings, None) == settings
    assert with_sbref(RealignSettings(), beside) == RealignSettings()


def test_a_table_names_single_band_references(tmp_path):
    for name in ("a.nii", "b.nii", "s.nii"):
        (tmp_path / name).write_bytes(b"x")
    table = tmp_path / "runs.tsv"
    table.write_text("path\tsubject\tsbref\na.nii\t01\ts.nii\nb.nii\t02\t\n")
    found = read_run_table(table)
    assert [run.sbref for run in found] == [tmp_path / "s.nii", None]
