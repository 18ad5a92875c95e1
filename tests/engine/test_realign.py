"""Staged runs through the whole estimator: short ones, other grids, lost slices, no reslicing."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

import runs
from keepstill import phantom
from keepstill import ranks as engine_ranks
from keepstill.errors import StageError
from keepstill.estimate import Estimate
from keepstill.ranks import join_world, realign_staged
from keepstill.read import open_staged
from keepstill.realign import Crew, Task, choose_target, model_volumes
from keepstill.settings import EstimateSettings, RealignSettings
from keepstill.stage import MOTION, REALIGNED_VOXELS, STAGED_VOXELS, enlarge_staged, stage_run

SHAPE, SIZES_MM = (64, 64, 36), (3.4, 3.4, 3.5)
AFFINE = phantom.grid_affine(SHAPE, SIZES_MM)
N_VOLUMES, LOST_VOLUME, LOST_SLICES = 16, 5, [13, 20]


@pytest.fixture(scope="module")
def made(head, tmp_path_factory):
    """A run of a head, volume 5 with two lost slices, as a file; and its truth."""
    poses = phantom.drawn_poses("drift", N_VOLUMES, 3)
    run, volumes = runs.head_run(head, poses, SHAPE, AFFINE)
    volumes[LOST_VOLUME] = volumes[LOST_VOLUME].copy()
    volumes[LOST_VOLUME][LOST_SLICES] *= 0.25
    data = np.stack([volume.T for volume in volumes], axis=-1)
    path = tmp_path_factory.mktemp("realign") / "sub-01_task-rest_bold.nii"
    return run, runs.write_run(path, data, AFFINE), data


@pytest.fixture
def models(monkeypatch):
    """Models that are fitted, and what they are fitted for."""
    found, fit = [], engine_ranks.fit_run_model

    def noted(reference, fitted, team):
        found.append((fit(reference, fitted, team), reference))
        return found[-1][0]

    monkeypatch.setattr(engine_ranks, "fit_run_model", noted)
    return found


def realigned(source, stage_dir, n_threads=1, **settings):
    """What realignment leaves: arrays, and the realigned series where there is one."""
    chosen = RealignSettings(**settings)
    stage_run(source, "sub-01_task-rest", None, stage_dir, chosen)
    realign_staged(stage_dir, chosen, join_world(), Crew(n_threads))
    with np.load(stage_dir / MOTION) as saved:
        return {name: saved[name] for name in saved.files}


def series_of(stage_dir):
    shape = open_staged(stage_dir).voxels.shape
    return np.fromfile(stage_dir / REALIGNED_VOXELS, np.float32, np.prod(shape)).reshape(shape)


def errors_mm(run, motion, which):
    found = motion["moving_from_reference"][which]
    return phantom.displacement_mm(found, run.truth[which], run.brain_mm)


@pytest.fixture(scope="module")
def usual(made, tmp_path_factory):
    """The run with all settings as they are shipped, and its stage directory."""
    stage_dir = tmp_path_factory.mktemp("usual") / "stage"
    return realigned(made[1], stage_dir), stage_dir


def test_a_run_with_a_lost_slice(made, usual):
    motion, stage_dir = usual
    run, _, data = made
    assert motion["status"].tolist() == ["reference"] + ["ok"] * (N_VOLUMES - 1)
    expected = np.where(np.arange(N_VOLUMES) == LOST_VOLUME, len(LOST_SLICES), 0)
    np.testing.assert_array_equal(motion["n_lost_slices"], expected)
    assert errors_mm(run, motion, np.arange(1, N_VOLUMES)).max() < 0.03
    assert np.isfinite(motion["covariance"]).all()
    series = series_of(stage_dir)
    np.testing.assert_array_equal(series[0], data[..., 0].T.astype(np.float32))
    means = series.mean(axis=(2, 3))  # what was lost is not made up in the result
    assert (means[LOST_VOLUME, LOST_SLICES] < 0.6 * means[4, LOST_SLICES]).all()


def test_the_reference_is_where_it_is(usual):
    motion, _ = usual
    np.testing.assert_array_equal(motion["moving_from_reference"][0], np.eye(4))
    assert (motion["iterations"][0], motion["cost"][0], motion["scale"][0]) == (0, 0, 1)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_without_reslicing_motion_is_the_same(made, usual, models, tmp_path, n_threads):
    """In the room that a run without a result gets; with a model."""
    motion = realigned(made[1], tmp_path / "stage", n_threads, reslice=False)
    assert len(models) == 1
    for name, values in usual[0].items():
        np.testing.assert_array_equal(motion[name], values)


def test_fewer_volumes_for_the_model(made, models, tmp_path):
    """As few as are asked for, in the room for so many."""
    few = EstimateSettings(model_volumes=12)
    motion = realigned(made[1], tmp_path / "stage", reslice=False, estimate=few)
    assert len(models) == 1 and set(motion["status"]) == {"reference", "ok"}
    taken = (tmp_path / "stage" / REALIGNED_VOXELS).stat().st_size
    assert taken == 12 * 4 * np.prod(SHAPE)


@pytest.mark.parametrize("reslice", [True, False])
def test_no_model_where_none_is_wanted(made, models, tmp_path, reslice):
    none = EstimateSettings(model_volumes=0)
    motion = realigned(made[1], tmp_path / "stage", reslice=reslice, estimate=none)
    assert not models and set(motion["status"]) == {"reference", "ok"}
    assert np.isfinite(motion["covariance"]).all()


@pytest.mark.parametrize("n", [2, 3, 4, 11, 12])
@pytest.mark.parametrize("reference", ["first", "middle", "mean"])
def test_short_runs(made, models, tmp_path, n, reference):
    """Too few for a model up to 11; in the second pass of a mean as well."""
    run, _, data = made
    source = runs.write_run(tmp_path / "short_bold.nii", data[..., :n], AFFINE)
    motion = realigned(source, tmp_path / "stage", reference=reference)
    assert set(motion["status"]) <= {"reference", "ok"}
    # Of 12 the volume with lost slices does not count: 11 are left.
    assert not models
    if reference == "first":
        assert errors_mm(run, motion, np.arange(1, n)).max() < 0.03
    assert np.isfinite(motion["covariance"]).all()


def resampled(data, factor):
    """A volume and affine on a grid that is finer by a factor, and about as large."""
    shape = [round(n * factor) for n in data.shape[:3]]
    affine = AFFINE @ np.diag([1 / factor] * 3 + [1.0])
    from scipy import ndimage

    at = np.indices(shape) / factor
    return ndimage.map_coordinates(data[..., 0].astype(float), at, order=3, mode="nearest"), affine


@pytest.mark.parametrize("factor", [0.75, 1.3])
@pytest.mark.parametrize("reslice", [True, False])
def test_a_reference_with_another_grid(made, models, tmp_path, factor, reslice):
    """It says where the run ends; what its volumes are compared with is one of their own."""
    run, source, data = made
    volume, affine = resampled(data, factor)
    path = tmp_path / "reference.nii"
    nib.save(nib.Nifti1Image(volume.astype(np.float32), affine), path)
    motion = realigned(source, tmp_path / "stage", reference=str(path), reslice=reslice)
    (_, reference) = models[0]
    assert len(models) == 1 and reference.volume.shape == SHAPE[::-1]
    np.testing.assert_array_equal(motion["reference"], volume.T.astype(np.float32))
    assert motion["status"].tolist() == ["ok"] * N_VOLUMES
    assert motion["n_lost_slices"].sum() == len(LOST_SLICES)
    assert errors_mm(run, motion, np.arange(N_VOLUMES)).max() < 0.1
    if reslice:
        n_bytes = max(4 * volume.size, data[..., 0].size * 4) * N_VOLUMES
        assert (tmp_path / "stage" / REALIGNED_VOXELS).stat().st_size == n_bytes


def test_a_run_that_repeats_its_reference(made, tmp_path):
    """Residuals are 0, and so are all errors."""
    _, _, data = made
    source = runs.write_run(tmp_path / "a_bold.nii", np.repeat(data[..., :1], 14, axis=3), AFFINE)
    out = runs.collected(source, tmp_path / "out", RealignSettings())
    columns = runs.read_table(out / "a_desc-confounds_timeseries.tsv")
    assert set(columns["expected_error"]) == {"0"}
    assert set(columns["status"]) == {"reference", "ok"}


def test_a_single_slice(head, models, tmp_path):
    """Steps beyond the plane are no columns of any fit; they once made shading of nothing."""
    shape, rng = (64, 64, 36), np.random.default_rng(1)
    affine = phantom.grid_affine(shape, (3.4, 3.4, 3.5))
    poses = [phantom.rigid((*rng.uniform(-1, 1, 2), 0), (0, 0, rng.uniform(-1, 1)))
             for _ in range(N_VOLUMES)]  # fmt: skip
    run, volumes = runs.head_run(head, poses, shape, affine)
    data = np.stack([volume[16:17].T for volume in volumes], axis=-1)
    affine[:3, 3] = (affine @ [0, 0, 16, 1])[:3]
    source = runs.write_run(tmp_path / "slice_bold.nii", data, affine)
    motion = realigned(source, tmp_path / "stage", in_plane=True)
    near = np.abs(run.brain_mm[:, 2] - affine[2, 3]) < 2
    found = motion["moving_from_reference"]
    assert len(models) == 1
    assert phantom.displacement_mm(found, run.truth, run.brain_mm[near]).mean() < 0.04


def test_volumes_that_a_model_is_learnt_from(made, tmp_path):
    """Steady, whole and well fitting ones; evenly over the run; none if they are too few."""
    stage_run(made[1], "run", None, tmp_path / "stage")
    run = open_staged(tmp_path / "stage")
    task = Task(run, choose_target(run, RealignSettings()), RealignSettings())
    good = Estimate(np.eye(4), "ok", 3, 0.01, 1.0, 1.0)
    estimates = [replace(good, status="reference", cost=0.0)] + [good] * (N_VOLUMES - 1)
    assert model_volumes(task, estimates) == list(range(N_VOLUMES))
    estimates[2] = replace(good, status="failed", cost=np.nan)
    estimates[3] = replace(good, lost_slices=(1,))
    estimates[4] = replace(good, cost=0.016)
    assert model_volumes(task, estimates) == [0, 1, *range(5, N_VOLUMES)]
    few = RealignSettings(estimate=EstimateSettings(model_volumes=12))
    chosen = model_volumes(Task(run, task.target, few), [good] * N_VOLUMES)
    assert chosen == [0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15]
    estimates[5:7] = [estimates[2]] * 2
    assert model_volumes(task, estimates) == []
    assert model_volumes(task, [replace(good, status="failed")] * N_VOLUMES) == []


def test_no_room_for_residuals_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / REALIGNED_VOXELS
    path.write_bytes(bytes(100))
    enlarge_staged(path, 60, "run")
    assert path.stat().st_size == 100
    enlarge_staged(path, 5000, "run")
    assert path.stat().st_size == 5000

    def full(handle, first, n_bytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        StageError, match=r"run: 2 MB needed in .*No space left.*finer; free"
    ) as met:
        enlarge_staged(path, 2_000_000, "run")
    assert "\n" not in str(met.value)


def test_what_is_staged_is_not_written_to(usual):
    """Residuals are written into the result's file, and nowhere else."""
    _, stage_dir = usual
    voxels = open_staged(stage_dir).voxels
    assert (stage_dir / STAGED_VOXELS).stat().st_size >= voxels.nbytes
    assert not voxels.flags.writeable
