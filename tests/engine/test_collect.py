"""The output contract: files, headers, sidecars, one master matrix."""

import json

import nibabel as nib
import numpy as np
import pytest
from nitransforms.linear import load as load_transform

import runs
from keepstill import phantom
from keepstill.__main__ import main
from keepstill.write import itk_transforms


def realign(source, out, *options):
    with pytest.raises(SystemExit) as ended:
        main(["realign", str(source), "--out", str(out), "--threads", "1", *options])
    assert ended.value.code == 0
    return out


def table(path):
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return dict(zip(lines[0], zip(*lines[1:], strict=True), strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("made")
    affine = phantom.grid_affine((20, 22, 14), (3.0, 3.0, 4.0), "LAS", oblique_deg=11)
    source = runs.write_run(
        tmp_path / "sub-01_task-rest_bold.nii.gz", runs.ball_run(6), affine, 1.5
    )
    return source, realign(source, tmp_path / "out")


NAMES = {
    "_desc-hmc_bold.nii.gz",
    "_desc-hmc_bold.json",
    "_desc-hmc_boldref.nii.gz",
    "_desc-hmc_boldref.json",
    "_desc-brain_mask.nii.gz",
    "_desc-brain_mask.json",
    "_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt",
    "_from-orig_to-boldref_mode-image_desc-hmc_xfm.json",
    "_desc-confounds_timeseries.tsv",
    "_desc-confounds_timeseries.json",
}


def test_files_lie_in_the_folder_and_manifest_lists_them(made):
    _, out = made
    found = {path.name.removeprefix("sub-01_task-rest") for path in out.iterdir() if path.is_file()}
    assert found == NAMES
    manifest = json.loads((out / "manifests" / "sub-01_task-rest.json").read_text())
    assert {name.removeprefix("sub-01_task-rest") for name in manifest["outputs"]} == NAMES
    assert not list(out.rglob("*.part"))


def test_header_contract(made):
    source, out = made
    before = nib.load(source)
    after = nib.load(out / "sub-01_task-rest_desc-hmc_bold.nii.gz")
    assert after.shape == before.shape
    assert after.get_data_dtype() == np.float32
    np.testing.assert_array_equal(after.affine, before.affine)
    for field in ("sform_code", "qform_code", "quatern_c", "qoffset_y", "srow_z", "pixdim"):
        np.testing.assert_array_equal(after.header[field], before.header[field], err_msg=field)
    assert after.header.get_xyzt_units() == ("mm", "sec")
    assert after.header.get_slope_inter()[0] in (None, 1.0)
    np.testing.assert_array_equal(
        after.get_fdata()[..., 0], before.get_fdata()[..., 0], err_msg="the reference is itself"
    )


@pytest.mark.parametrize("axcodes", ["RAS", "LAS", "LPS", "PSL"])
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_header_contract_for_every_orientation_and_dtype(axcodes, dtype, tmp_path):
    affine = phantom.grid_affine((20, 22, 14), (3.0, 3.0, 4.0), axcodes, oblique_deg=5)
    source = runs.write_run(tmp_path / "a_bold.nii", runs.ball_run(3), affine)
    out = realign(source, tmp_path / "out", "--dtype", dtype)
    image = nib.load(out / "a_desc-hmc_bold.nii.gz")
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    assert nib.aff2axcodes(image.affine) == tuple(axcodes)
    assert image.get_data_dtype() == np.dtype(dtype)
    voxels = image.get_fdata()
    assert np.isfinite(voxels).all()
    original = nib.load(source).get_fdata()
    step = abs(float(image.dataobj.slope))
    np.testing.assert_allclose(
        voxels[..., 0], original[..., 0], atol=0.51 * step * (dtype == "int16")
    )


def test_transforms_are_the_master_matrices(made):
    """Table and transform file come from one matrix: rebuild one from the other."""
    _, out = made
    name = "sub-01_task-rest_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"
    matrices = load_transform(out / name, fmt="itk").matrix
    np.testing.assert_allclose(matrices[0], np.eye(4), atol=1e-12)
    assert np.abs(matrices[3] - np.eye(4)).max() > 0.01
    assert itk_transforms(matrices).count("#Transform") == 6
    columns = table(out / "sub-01_task-rest_desc-confounds_timeseries.tsv")
    angle = np.arccos((np.trace(matrices[3][:3, :3]) - 1) / 2)
    rotation = np.array([float(columns[f"rot_{axis}"][3]) for axis in "xyz"])
    assert np.linalg.norm(rotation) == pytest.approx(angle, rel=0.02, abs=1e-5)


def test_confounds(made):
    _, out = made
    columns = table(out / "sub-01_task-rest_desc-confounds_timeseries.tsv")
    assert list(columns)[:10] == [
        *(f"trans_{axis}" for axis in "xyz"),
        *(f"rot_{axis}" for axis in "xyz"),
        "framewise_displacement",
        "rmsd",
        "dvars",
        "std_dvars",
    ]
    assert columns["framewise_displacement"][0] == columns["dvars"][0] == "n/a"
    assert columns["status"] == ("reference",) + ("ok",) * 5
    motion = np.array([[float(v) for v in columns[name]] for name in list(columns)[:6]]).T
    change = np.abs(np.diff(motion, axis=0))
    fd_mm = change[:, :3].sum(axis=1) + 50 * change[:, 3:].sum(axis=1)
    found = [float(v) for v in columns["framewise_displacement"][1:]]
    np.testing.assert_allclose(found, fd_mm, atol=1e-7)


def test_sidecars(made):
    _, out = made
    bold = json.loads((out / "sub-01_task-rest_desc-hmc_bold.json").read_text())
    assert bold["RepetitionTime"] == 1.5 and bold["TaskName"] == "rest"
    assert bold["SkullStripped"] is False
    assert bold["KeepstillSettings"]["interpolation_degree"] == 5
    assert str(out.parent) not in (out / "sub-01_task-rest_desc-hmc_bold.json").read_text()


def test_no_reslice_leaves_transforms_and_tables(made, tmp_path):
    source, full = made
    out = realign(source, tmp_path / "out", "--no-reslice")
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert not any("desc-hmc_bold." in name for name in names)
    name = "sub-01_task-rest_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"
    assert (out / name).read_bytes() == (full / name).read_bytes()


def test_reference_from_a_file_on_its_own_grid(made, tmp_path):
    """Pose and grid are those of the file."""
    source, out = made
    image = nib.load(source)
    grid = phantom.grid_affine((26, 26, 18), (2.6, 2.6, 3.2), "RAS")
    from nibabel.processing import resample_from_to

    first = nib.Nifti1Image(image.get_fdata()[..., 0], image.affine)
    other = resample_from_to(first, ((26, 26, 18), grid), order=3)
    nib.save(other, tmp_path / "ref.nii.gz")
    made_there = realign(source, tmp_path / "out", "--reference", str(tmp_path / "ref.nii.gz"))
    bold = nib.load(made_there / "sub-01_task-rest_desc-hmc_bold.nii.gz")
    assert bold.shape == (26, 26, 18, 6)
    np.testing.assert_allclose(bold.affine, grid, atol=1e-5)
    name = "sub-01_task-rest_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"
    same = load_transform(out / name, fmt="itk").matrix
    there = load_transform(made_there / name, fmt="itk").matrix
    corners = np.array([[-25.0, -25, -20], [25, 25, 20], [0, 0, 0]])
    assert phantom.displacement_mm(there, same, corners).max() < 0.1


def test_dead_volume_is_reported_by_number(tmp_path, capsys):
    data = runs.ball_run(6)
    data[..., 4] = 0
    source = runs.write_run(tmp_path / "a_bold.nii.gz", data)
    out = realign(source, tmp_path / "out")
    assert "volumes that failed: 4" in capsys.readouterr().out
    columns = table(out / "a_desc-confounds_timeseries.tsv")
    assert columns["status"][4] == "failed"
    assert columns["framewise_displacement"][4:6] == ("n/a", "n/a")
    manifest = json.loads((out / "manifests" / "a.json").read_text())
    assert manifest["summary"]["failed_volumes"] == [4]


def test_output_directory_that_cannot_be_made(tmp_path, capsys):
    source = runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run(3))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit) as ended:
        main(["realign", str(source), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "a: cannot write below" in error and "Traceback" not in error


def test_real_runs_lose_temporal_variance(study, tmp_path):
    for name in ("sub-01/func/sub-01_task-oneback_run-1", "sub-03/func/sub-03_task-rest"):
        out = realign(study / f"{name}_bold.nii.gz", tmp_path, "--dtype", "int16")
        run = name.rsplit("/", 1)[1]
        summary = json.loads((out / "manifests" / f"{run}.json").read_text())["summary"]
        assert summary["variance_after"] < summary["variance_before"]
        assert summary["tsnr_after"] > summary["tsnr_before"]
        assert summary["n_failed"] == 0
