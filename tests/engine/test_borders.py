"""Unusual runs work, wrong ones are refused in words: made data, and real data where it is."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import runs
from inputs import edited, small
from keepstill import phantom, survey
from keepstill.__main__ import main
from keepstill.blobs import density
from keepstill.errors import InputError
from keepstill.read import open_staged
from keepstill.settings import RealignSettings
from keepstill.stage import stage_run

# Real runs that the project may read but does not ship.
SHARED = Path(os.environ.get("KEEPSTILL_SHARED", Path(__file__).parents[3] / "shared")) / "data"


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here; it does not come with the project")
    return path


def stage(source, tmp_path, **settings):
    stage_run(source, "r", None, tmp_path / "stage", RealignSettings(**settings))
    return open_staged(tmp_path / "stage")


def realign(source, tmp_path, *options):
    with pytest.raises(SystemExit) as ended:
        main(["realign", str(source), "--out", str(tmp_path / "out"), "--threads", "1", *options])
    return ended.value.code


def manifest(tmp_path):
    (path,) = (tmp_path / "out" / "manifests").iterdir()
    return json.loads(path.read_text())


def column(tmp_path, name):
    (path,) = (tmp_path / "out").glob("*_timeseries.tsv")
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [row[rows[0].index(name)] for row in rows[1:]]


# --- headers ---


def test_nifti2(tmp_path):
    affine = phantom.grid_affine((20, 22, 14), (3.0, 3.0, 4.0))
    image = nib.Nifti2Image(runs.ball_run(4), affine)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "a_bold.nii.gz")
    assert realign(tmp_path / "a_bold.nii.gz", tmp_path) == 0
    made = nib.load(tmp_path / "out" / "a_desc-hmc_bold.nii.gz")
    assert isinstance(made, nib.Nifti2Image)
    np.testing.assert_allclose(made.affine, affine)


def test_positions_that_disagree_are_refused_unless_one_is_chosen(tmp_path):
    source = small(tmp_path)
    moved = nib.load(source).affine.copy()
    moved[1, 3] += 3
    image = nib.load(source)
    image.set_sform(moved, 1)
    nib.save(image, tmp_path / "b_bold.nii")
    with pytest.raises(InputError, match=r"differ by 3\.0 mm.*affine_source"):
        stage(tmp_path / "b_bold.nii", tmp_path)
    for choice, expected in (("sform", moved), ("qform", image.get_qform())):
        run = stage(tmp_path / "b_bold.nii", tmp_path, affine_source=choice)
        np.testing.assert_allclose(run.layout.affine, expected, atol=1e-5)


def test_affine_source_without_code_is_refused(tmp_path):
    source = edited(small(tmp_path), qform_code=0)
    with pytest.raises(InputError, match="its code is 0"):
        stage(source, tmp_path, affine_source="qform")


def test_qform_alone(tmp_path):
    source = small(tmp_path)
    expected = nib.load(source).get_qform()
    run = stage(edited(source, sform_code=0), tmp_path)
    np.testing.assert_allclose(run.layout.affine, expected)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(3, 0, 0, 0), (0, 3, 0, 0), (0, 0, 0, 0)], "singular"),
        ([(3, 1, 0, 0), (0, 3, 0, 0), (0, 0, 4, 0)], "sheared"),
        ([(np.nan, 0, 0, 0), (0, 3, 0, 0), (0, 0, 4, 0)], "damaged"),
        ([(3, 0, 0, 1e18), (0, 3, 0, 0), (0, 0, 4, 0)], r"first voxel lies 1e\+18 mm from"),
    ],
)
def test_affine_that_no_scanner_makes(rows, words, tmp_path):
    source = edited(small(tmp_path), qform_code=0, srow_x=rows[0], srow_y=rows[1], srow_z=rows[2])
    with pytest.raises(InputError, match=words):
        stage(source, tmp_path)


def test_units(tmp_path):
    source = edited(small(tmp_path), xyzt_units=8)
    assert "no unit of length" in stage(source, tmp_path).found["warnings"][0]
    with pytest.raises(InputError, match="micron"):
        stage(edited(source, xyzt_units=3 | 8), tmp_path)


@pytest.mark.parametrize(
    ("tr", "units", "expected_s"),
    [
        *((2000.0, 2 | 8, 2.0), (2000.0, 2 | 16, 2.0), (0.0, 2 | 8, None), (2.5, 2, 2.5)),
        *((1e-27, 2 | 8, None), (1e9, 2 | 8, None), (np.nan, 2 | 8, None)),
    ],
)
def test_repetition_time_without_sidecar(tr, units, expected_s, tmp_path):
    source = small(tmp_path, sidecar=False)
    pixdim = nib.load(source).header["pixdim"].copy()
    pixdim[4] = tr
    run = stage(edited(source, pixdim=pixdim, xyzt_units=units), tmp_path)
    assert run.found["tr_s"] == (None if expected_s is None else pytest.approx(expected_s))
    assert run.found["warnings"]


def test_unknown_repetition_time_goes_all_the_way(tmp_path):
    source = small(tmp_path, sidecar=False)
    pixdim = nib.load(source).header["pixdim"].copy()
    pixdim[4] = 0
    assert realign(edited(source, pixdim=pixdim), tmp_path) == 0
    assert manifest(tmp_path)["summary"]["tr_s"] is None


# --- voxels ---


def test_some_voxels_are_no_numbers(tmp_path):
    data = runs.ball_run(5, dtype=np.float32)
    data[10, 11, 7, 2] = np.nan
    data[9, 10, 6, 3] = np.inf
    clean = runs.write_run(tmp_path / "clean" / "a_bold.nii", runs.ball_run(5, dtype=np.float32))
    source = runs.write_run(tmp_path / "a_bold.nii", data)
    assert realign(source, tmp_path) == 0
    assert "2 values, in 2 voxels, are no numbers" in manifest(tmp_path)["warnings"][0]
    image = nib.load(tmp_path / "out" / "a_desc-hmc_bold.nii.gz")
    assert np.isfinite(image.get_fdata()).all()
    motion = [float(v) for v in column(tmp_path, "trans_y")]
    assert realign(clean, tmp_path / "clean") == 0
    expected = [float(v) for v in column(tmp_path / "clean", "trans_y")]
    np.testing.assert_allclose(motion, expected, atol=0.02)


@pytest.mark.parametrize("value", [1e9, 1e16, 1e25, 3e38, -1e31])
@pytest.mark.parametrize("t", [0, 2])
def test_a_voxel_that_nobody_measured_ends_in_words(value, t, tmp_path):
    """A flipped bit in a float makes 1e30 of 100; a step of 1e20 mm was a singular affine."""
    data = runs.ball_run(4).astype(np.float32)
    data[10, 11, 7, t] = value
    out = tmp_path / "out"
    runs.collected(runs.write_run(tmp_path / "a_bold.nii", data), out, RealignSettings())
    table = runs.read_table(out / "a_desc-confounds_timeseries.tsv")
    good = [status for volume, status in enumerate(table["status"]) if volume != t]
    assert set(good) <= {"reference", "ok"}
    for path in out.glob("*.nii.gz"):
        assert np.isfinite(nib.load(path).get_fdata()).all()


def test_one_volume_is_no_number_at_all(tmp_path):
    data = runs.ball_run(5, dtype=np.float32)
    data[..., 3] = np.nan
    source = runs.write_run(tmp_path / "a_bold.nii", data)
    assert realign(source, tmp_path, "--dtype", "int16") == 0
    assert column(tmp_path, "status")[3] == "failed"


def test_identical_volumes_are_warned_of(tmp_path):
    data = np.repeat(runs.ball_run(1), 4, axis=3)
    run = stage(runs.write_run(tmp_path / "a_bold.nii", data), tmp_path)
    assert "all 4 volumes are identical" in run.found["warnings"][0]


def test_header_that_promises_more_than_the_file_can_hold(tmp_path):
    source = small(tmp_path)
    source = edited(source, dim=[4, 20, 22, 14, 30000, 1, 1, 1])
    with pytest.raises(InputError, match="cannot hold them"):
        stage(source, tmp_path)
    assert not (tmp_path / "stage" / "bold.nii").exists()


# --- dummy volumes ---


@pytest.mark.parametrize("n_bright", [0, 1, 3])
def test_dummies_are_counted(n_bright):
    data = runs.ball_run(12).T.astype(float)
    for t in range(n_bright):
        data[t] *= 1 + 0.45 * 0.6**t
    assert survey.count_dummies(data) == n_bright


def test_a_drift_is_no_dummy():
    data = runs.ball_run(40).T.astype(float)
    data *= np.linspace(1.05, 1.0, 40)[:, None, None, None]
    assert survey.count_dummies(data) == 0


def test_dummies_never_serve_as_reference(tmp_path):
    data = runs.ball_run(8).astype(float)
    data[..., 0] *= 1.45
    data[..., 1] *= 1.2
    source = runs.write_run(tmp_path / "a_bold.nii", data.astype(np.int16))
    assert realign(source, tmp_path) == 0
    assert column(tmp_path, "status") == ["ok", "ok", "reference", *["ok"] * 5]
    assert column(tmp_path, "rot_x")[2] == "0"


def test_dummies_by_number(tmp_path):
    source = runs.write_run(tmp_path / "a_bold.nii", runs.ball_run(6))
    assert realign(source, tmp_path, "--dummy-scans", "1", "--reference", "middle") == 0
    assert column(tmp_path, "status").index("reference") == 3
    with pytest.raises(InputError, match="at least 2 must remain"):
        stage(source, tmp_path, dummy_scans=5)


# --- one slice ---


def test_one_slice_in_plane(tmp_path):
    size = 48
    rng = np.random.default_rng(1)
    blobs = rng.normal(0, 0.4, (60, 2)).clip(-0.9, 0.9), 0.25, rng.uniform(100, 400, 60)
    data = np.empty((size, size, 1, 4))
    truth = [(0, 0, 0), (0.05, -0.03, 0.04), (-0.08, 0.06, -0.07), (0.02, 0.09, 0.1)]
    for t, (dx, dy, angle) in enumerate(truth):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        centres = np.c_[blobs[0] @ turn.T + (dx, dy), np.zeros(60)]
        grid = {"spacing": 3 / (size - 1), "origin": (-1.5, -1.5, 0)}
        data[..., t] = density((size, size, 1), centres, *blobs[1:], **grid)
    affine = phantom.grid_affine((size, size, 1), (3.0, 3.0, 6.0), "RAS", oblique_deg=15)
    source = runs.write_run(tmp_path / "a_bold.nii", data.astype(np.float32), affine)
    with pytest.raises(InputError, match="in_plane: true"):
        stage(source, tmp_path)
    assert realign(source, tmp_path, "--in-plane") == 0
    assert set(column(tmp_path, "status")) == {"reference", "ok"}
    angles = [float(v) for v in column(tmp_path, "rot_z")]
    np.testing.assert_allclose(np.abs(angles), [abs(t[2]) for t in truth], atol=2e-3)
    for name in ("rot_x", "rot_y"):
        np.testing.assert_allclose([float(v) for v in column(tmp_path, name)], 0, atol=1e-6)
    made = nib.load(tmp_path / "out" / "a_desc-hmc_bold.nii.gz").get_fdata()[8:-8, 8:-8]
    residual = (
        np.abs(made[..., 1:] - made[..., :1]).mean()
        / np.abs(data[8:-8, 8:-8, :, 1:] - data[8:-8, 8:-8, :, :1]).mean()
    )
    assert residual < 0.1


def test_long_single_slice_run(tmp_path):
    source = shared("pymvpa-slice/bold.nii.gz")
    with pytest.raises(InputError, match="in_plane: true"):
        stage(source, tmp_path)
    assert realign(source, tmp_path, "--in-plane", "--no-reslice") == 0
    assert len(column(tmp_path, "status")) == 1452


# --- real runs that are unusual ---


@pytest.mark.parametrize(
    ("name", "n_volumes"),
    [
        ("nipy-functional/functional.nii.gz", 20),  # three slices, intercept 3100.8
        ("sct-spine/fmri.nii.gz", 30),  # six thick slices, no head
        ("sct-spine/fmri_r.nii.gz", 30),  # float64
        ("dcmqa-short/Siemens_Rest_fMRI_AP_7.nii.gz", 2),  # uint16
        ("dcmqa-short/Siemens_ep2d_Asc_2.nii.gz", 2),
        ("dcmqa-sag/2_fmri_SagAP.nii.gz", 6),
        ("tedana-3echo/echo1.nii.gz", 5),
        ("nibabel-example4d/example4d.nii.gz", 2),  # "2000 sec"
    ],
)
def test_real_unusual_runs(name, n_volumes, tmp_path):
    source = shared(name)
    assert realign(source, tmp_path, "--dtype", "int16") == 0
    statuses = column(tmp_path, "status")
    assert len(statuses) == n_volumes
    assert statuses.count("failed") == 0
    before, after = nib.load(source), None
    (path,) = (tmp_path / "out").glob("*_desc-hmc_bold.nii.gz")
    after = nib.load(path)
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-4)
    first = statuses.index("reference")
    step = abs(float(after.dataobj.slope))
    np.testing.assert_allclose(
        after.dataobj[..., first], before.dataobj[..., first], atol=0.51 * step + 1e-3
    )


def test_real_first_volumes_not_steady(tmp_path):
    """Volume 0 is 31% and volume 1 still 2% brighter than the three after them."""
    assert stage(shared("tedana-3echo/echo1.nii.gz"), tmp_path).n_dummy == 2


def test_real_header_trap(tmp_path):
    run = stage(shared("nibabel-example4d/example4d.nii.gz"), tmp_path)
    assert run.found["tr_s"] == 2.0
    assert "must be milliseconds" in " ".join(run.found["warnings"])


def test_real_header_without_geometry(tmp_path):
    with pytest.raises(InputError, match="has lost its geometry"):
        stage(shared("pyneal-short/testSeries.nii.gz"), tmp_path)


def test_real_slope(study, tmp_path):
    source = study / "sub-01" / "func" / "sub-01_task-oneback_run-1_bold.nii.gz"
    run = stage(source, tmp_path)
    expected = np.asarray(nib.load(source).dataobj[..., 3], dtype=np.float32).T
    np.testing.assert_allclose(run.volume(3), expected, rtol=1e-6)
    assert run.n_dummy == 0


# --- what a review tried ---


@pytest.mark.parametrize(
    "text", ['{"EchoTime": NaN}', '{"EchoTime": 1e999}', '{"Name": "\\ud800"}', "[" * 100_000]
)
def test_sidecars_that_could_not_be_written_again_are_refused(text, tmp_path):
    source = small(tmp_path, sidecar=False)
    source.with_name("a_bold.json").write_text(text)
    with pytest.raises(InputError, match="mend the sidecar"):
        stage(source, tmp_path)


def test_a_sidecar_may_begin_with_a_byte_order_mark(tmp_path):
    source = small(tmp_path, sidecar=False)
    source.with_name("a_bold.json").write_text('\ufeff{"RepetitionTime": 2.0}')
    assert stage(source, tmp_path).found["warnings"] == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"sform_code": 348}, "sform_code 348"), ({"datatype": 7}, "data type code 7")],
)
def test_codes_that_nifti_does_not_know(fields, words, tmp_path):
    with pytest.raises(InputError, match=words):
        stage(edited(small(tmp_path), **fields), tmp_path)


def test_pixdim_0_of_0_is_1(tmp_path):
    source = small(tmp_path)
    expected = nib.load(source).affine
    pixdim = nib.load(source).header["pixdim"].copy()
    pixdim[0] = 0
    run = stage(edited(source, pixdim=pixdim), tmp_path, affine_source="sform")
    np.testing.assert_allclose(run.layout.affine, expected)


def test_first_volume_without_signal(tmp_path):
    data = runs.ball_run(5)
    data[..., 0] = 0
    assert realign(runs.write_run(tmp_path / "a_bold.nii", data), tmp_path) == 0
    assert column(tmp_path, "status") == ["failed", "reference", "ok", "ok", "ok"]


@pytest.mark.parametrize(("slope", "inter"), [(-1.0, 3000.0), (0.5, -2000.0), (1.0, 0.0)])
def test_dummies_are_counted_in_intensities(slope, inter):
    data = runs.ball_run(12).T.astype(float)
    data[0] *= 1.4
    assert survey.count_dummies((data - inter) / slope, slope, inter) == 1


def test_a_fixed_hole_around_the_brain_is_no_head(tmp_path):
    data = runs.ball_run(5, dtype=np.float32)
    brain = data[..., 0] > 400
    masked = np.where(brain[..., None], data, np.nan).astype(np.float32)
    assert realign(runs.write_run(tmp_path / "a_bold.nii", masked), tmp_path) == 0
    mask = nib.load(tmp_path / "out" / "a_desc-brain_mask.nii.gz").get_fdata() > 0
    assert not (mask & ~brain).any()
    assert "failed" not in column(tmp_path, "status")


def test_a_folder_or_pipe_is_no_run(tmp_path):
    pipe = tmp_path / "a_bold.nii"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="no plain file"):
        stage(pipe, tmp_path)
