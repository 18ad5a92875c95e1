"""The table of confounds: its columns, other tools' formulas on the files, and nilearn."""

import json
import warnings

import nibabel as nib
import numpy as np
import pytest
from nitransforms.linear import load as load_transform

import runs
from keepstill import phantom
from keepstill.report.run_page import ERROR_COLUMN, FIT_COLUMNS
from keepstill.report.run_record import MOTION_COLUMNS
from keepstill.settings import RealignSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependencies, while it is imported
    from nilearn.interfaces.fmriprep import load_confounds

RUN = "sub-01_task-rest"
PREPROC = RealignSettings(output_desc="preproc")
MOTION = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
N_VOLUMES, N_DUMMY, JUMP, DEAD = 24, 3, 9, 16


def eventful_run(affine):
    """Bright at first, one jump, one volume without signal."""
    data = runs.ball_run(N_VOLUMES, dtype=np.float32)
    still = data[..., :1] + np.random.default_rng(3).normal(size=data.shape) * 4
    still[..., :N_DUMMY] *= np.array([1.6, 1.3, 1.1])
    still[..., JUMP:] = np.roll(still[..., JUMP:], 1, axis=0)
    still[..., DEAD] = 0
    return still.clip(0).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eventful")
    affine = phantom.grid_affine((20, 22, 14), (3.0, 3.0, 4.0), "LAS", oblique_deg=11)
    source = runs.write_run(folder / f"{RUN}_bold.nii.gz", eventful_run(affine), affine)
    return runs.collected(source, folder / "out", PREPROC, n_dummy=N_DUMMY)


@pytest.fixture(scope="module")
def columns(made):
    return runs.read_table(made / f"{RUN}_desc-confounds_timeseries.tsv")


@pytest.fixture(scope="module")
def summary(made):
    return json.loads((made / "manifests" / f"{RUN}.json").read_text())["summary"]


def flagged(columns, name):
    """Volume that each of the named columns stands for."""
    spikes = [runs.numbers(cells) for column, cells in columns.items() if column.startswith(name)]
    assert all(spike.sum() == 1 for spike in spikes)
    return [int(spike.argmax()) for spike in spikes]


def test_columns_have_a_fixed_order(columns):
    expansions = ("derivative1", "power2", "derivative1_power2")
    expected = [
        *MOTION,
        *("framewise_displacement", "rmsd", "dvars", "std_dvars"),
        *("status", "iterations", "cost", "overlap", "scale", "n_lost_slices", "expected_error"),
        *(f"{name}_{kind}" for name in MOTION for kind in expansions),
        *(f"non_steady_state_outlier{k:02d}" for k in range(3)),
        *(f"motion_outlier{k:02d}" for k in range(3)),
    ]
    assert list(columns) == expected


def test_pages_find_their_columns(columns):
    assert {*MOTION_COLUMNS, *FIT_COLUMNS, ERROR_COLUMN} <= columns.keys()


def test_every_column_is_described(made, columns):
    sidecar = json.loads((made / f"{RUN}_desc-confounds_timeseries.json").read_text())
    for name in columns:
        assert sidecar[name]["Description"]
        assert ("Units" in sidecar[name]) != ("Levels" in sidecar[name])
    assert sidecar["trans_x_derivative1"]["Units"] == "mm"
    assert sidecar["rot_z_derivative1_power2"]["Units"] == "rad^2"


def test_expansion_is_fmriprep_s(columns):
    for name in MOTION:
        value = runs.numbers(columns[name])
        change = np.diff(value, prepend=np.nan)
        for kind, expected in (
            ("derivative1", change),
            ("power2", value**2),
            ("derivative1_power2", change**2),
        ):
            found = runs.numbers(columns[f"{name}_{kind}"])
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
        assert columns[f"{name}_derivative1"][0] == "n/a"


def test_spikes(columns, summary):
    """The jump; the dead volume and the one after it; not the fall in brightness at first."""
    assert flagged(columns, "non_steady_state_outlier") == [0, 1, 2]
    assert flagged(columns, "motion_outlier") == [JUMP, DEAD, DEAD + 1]
    assert float(columns["std_dvars"][N_DUMMY]) > 1.5
    assert columns["status"][DEAD] == "failed"
    assert summary["n_outliers"] == 2 and summary["n_failed"] == 1
    assert summary["n_non_steady"] == N_DUMMY


def test_displacement_equals_nipype_s(made, columns):
    """FramewiseDisplacement on the table's own six numbers; rmsd from the transform file."""
    motion = np.array([runs.numbers(columns[name]) for name in MOTION]).T
    motion[:, 3:] *= 50.0
    fd_mm = np.abs(motion[1:] - motion[:-1]).sum(axis=1)
    known = np.ones(N_VOLUMES - 1, bool)
    known[DEAD - 1 : DEAD + 1] = False
    found = runs.numbers(columns["framewise_displacement"])
    np.testing.assert_allclose(found[1:][known], fd_mm[known], rtol=1e-6, atol=1e-7)
    assert np.isnan(found[[0, DEAD, DEAD + 1]]).all()

    name = f"{RUN}_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"
    forward = np.linalg.inv(load_transform(made / name, fmt="itk").matrix)
    image = nib.load(made / f"{RUN}_desc-hmc_boldref.nii.gz")
    centre = image.affine @ [*(np.array(image.shape) - 1) / 2, 1]
    change = forward[1:] @ np.linalg.inv(forward[:-1]) - np.eye(4)
    shift = (change @ centre)[:, :3]
    turn = np.einsum("nij,nij->n", change[:, :3, :3], change[:, :3, :3])
    rmsd_mm = np.sqrt((shift**2).sum(axis=1) + 80.0**2 / 5 * turn)
    found = runs.numbers(columns["rmsd"])[1:]
    np.testing.assert_allclose(found[known], rmsd_mm[known], rtol=1e-6, atol=1e-7)


def masked_series(made, kind):
    mask = [
        nib.load(made / f"{RUN}_desc-{name}_mask.nii.gz").get_fdata() > 0
        for name in ("brain", "coverage")
    ]
    return nib.load(made / f"{RUN}_desc-{kind}_bold.nii.gz").get_fdata()[mask[0] & mask[1]]


def test_dvars_equal_nipype_s(made, columns):
    """compute_dvars (remove_zerovariance, intensity_normalization=1000), without the failed one."""
    data = np.delete(masked_series(made, "preproc"), DEAD, axis=1)
    data = data / np.median(data) * 1000
    low, high = np.percentile(data, [25, 75], axis=1, method="lower")
    sd = (high - low) / 1.349
    data, sd = data[sd > 1e-7], sd[sd > 1e-7]
    centred = data - data.mean(axis=1, keepdims=True)
    lag1 = (centred[:, 1:] * centred[:, :-1]).sum(axis=1) / (centred**2).sum(axis=1)
    dvars = np.sqrt((np.diff(data, axis=1) ** 2).mean(axis=0))
    expected = (np.sqrt(2 * (1 - lag1)) * sd).mean()
    for name, values in (("dvars", dvars), ("std_dvars", dvars / expected)):
        found = runs.numbers(columns[name])
        assert np.isnan(found[0])
        assert min(found[DEAD], found[DEAD + 1]) > 5 * np.median(values)
        np.testing.assert_allclose(found[1:DEAD], values[: DEAD - 1], rtol=1e-6)
        np.testing.assert_allclose(found[DEAD + 2 :], values[DEAD:], rtol=1e-6)


def test_tsnr_leaves_out_what_says_nothing(made, summary):
    """Without the bright volumes and the dead one; the summary is the median of the map."""
    tsnr = nib.load(made / f"{RUN}_stat-tsnr_desc-hmc_boldmap.nii.gz").get_fdata()
    coverage = nib.load(made / f"{RUN}_desc-coverage_mask.nii.gz").get_fdata() > 0
    brain = nib.load(made / f"{RUN}_desc-brain_mask.nii.gz").get_fdata() > 0
    kept = np.delete(np.arange(N_VOLUMES), [0, 1, 2, DEAD])
    data = masked_series(made, "preproc")[:, kept]
    fit = np.polynomial.polynomial.polyfit(kept, data.T, 1)
    rest = data - np.polynomial.polynomial.polyval(kept, fit)
    expected = data.mean(axis=1) / np.sqrt((rest**2).sum(axis=1) / (len(kept) - 2))
    np.testing.assert_allclose(tsnr[brain & coverage], expected, rtol=1e-5)
    assert (tsnr[~coverage] == 0).all() and not coverage.all()
    assert summary["tsnr_after"] == pytest.approx(np.median(expected), rel=1e-6)
    assert summary["brain_coverage"] == (brain & coverage).sum() / brain.sum()
    sidecar = json.loads((made / f"{RUN}_stat-tsnr_desc-hmc_boldmap.json").read_text())
    assert sidecar["VolumesLeftOut"] == [0, 1, 2, DEAD]


def test_nilearn_loads_motion(made, columns):
    image = str(made / f"{RUN}_desc-preproc_bold.nii.gz")
    confounds, kept = load_confounds(image, strategy=("motion",), motion="full", demean=False)
    assert confounds.shape == (N_VOLUMES, 24)
    assert np.isfinite(confounds.to_numpy()).all()
    np.testing.assert_array_equal(kept, np.arange(N_DUMMY, N_VOLUMES))
    for name in MOTION:
        np.testing.assert_allclose(confounds[name], runs.numbers(columns[name]), rtol=1e-9)
    power = confounds["rot_x_derivative1_power2"].to_numpy()
    np.testing.assert_allclose(power, confounds["rot_x_derivative1"].to_numpy() ** 2, rtol=1e-6)


@pytest.mark.parametrize(("scrub", "short"), [(0, set()), (6, {4, 5, 6, 7, 8})])
def test_nilearn_scrubs(made, scrub, short):
    """nilearn sets its own limits on displacement and DVARS: it finds the dead volume by DVARS."""
    image = str(made / f"{RUN}_desc-preproc_bold.nii.gz")
    confounds, kept = load_confounds(
        image,
        strategy=("motion", "scrub"),
        motion="full",
        scrub=scrub,
        fd_threshold=0.5,
        std_dvars_threshold=1.5,
    )
    gone = set(range(N_VOLUMES)) - set(kept.tolist())
    assert gone == {0, 1, 2, N_DUMMY, JUMP, DEAD, DEAD + 1} | short
    assert confounds.shape == (N_VOLUMES, 24)


def test_a_run_without_events_has_no_spikes(tmp_path):
    data = runs.ball_run(1).repeat(8, axis=3)
    data = data + np.random.default_rng(0).integers(0, 9, data.shape)
    source = runs.write_run(tmp_path / f"{RUN}_bold.nii.gz", data.astype(np.int16))
    out = runs.collected(source, tmp_path / "out", PREPROC)
    columns = runs.read_table(out / f"{RUN}_desc-confounds_timeseries.tsv")
    assert not flagged(columns, "motion_outlier") and not flagged(columns, "non_steady")
    image = str(out / f"{RUN}_desc-preproc_bold.nii.gz")
    confounds, kept = load_confounds(image, strategy=("motion", "scrub"))
    assert kept is None and confounds.shape == (8, 24)


def test_without_reslicing_dvars_is_not_known(tmp_path):
    source = runs.write_run(tmp_path / f"{RUN}_bold.nii.gz", runs.ball_run(5))
    out = runs.collected(source, tmp_path / "out", RealignSettings(reslice=False))
    columns = runs.read_table(out / f"{RUN}_desc-confounds_timeseries.tsv")
    assert set(columns["std_dvars"]) == {"n/a"}
    sidecar = json.loads((out / f"{RUN}_desc-confounds_timeseries.json").read_text())
    assert not [source for source in sidecar["Sources"] if source.endswith("_bold.nii.gz")]
    assert not list(out.glob("*boldmap*"))
    assert (out / f"{RUN}_desc-coverage_mask.nii.gz").is_file()
