"""The output contract: files, headers, sidecars, one master matrix."""

import json
import threading

import nibabel as nib
import numpy as np
import pytest
from nitransforms.linear import load as load_transform

import naive
import runs
from keepstill import collect, files, phantom
from keepstill.__main__ import main
from keepstill.errors import OutputError
from keepstill.write import itk_transforms


def realign(source, out, *options):
    with pytest.raises(SystemExit) as ended:
        main(["realign", str(source), "--out", str(out), "--threads", "1", *options])
    assert ended.value.code == 0
    return out


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
    "_desc-coverage_mask.nii.gz",
    "_desc-coverage_mask.json",
    "_stat-tsnr_desc-raw_boldmap.nii.gz",
    "_stat-tsnr_desc-raw_boldmap.json",
    "_stat-tsnr_desc-hmc_boldmap.nii.gz",
    "_stat-tsnr_desc-hmc_boldmap.json",
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


POSITION = (
    *("sform_code", "qform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
INTENT = ("intent_code", "intent_name", "intent_p1", "intent_p2", "intent_p3")
VOLUMES = {
    "_desc-hmc_boldref": np.float32,
    "_desc-brain_mask": np.uint8,
    "_desc-coverage_mask": np.uint8,
    "_stat-tsnr_desc-raw_boldmap": np.float32,
    "_stat-tsnr_desc-hmc_boldmap": np.float32,
}


def check_headers(source, out, run, dtype=np.float32):
    """What must survive from the run's header into all that is made of it."""
    before = nib.load(source).header
    after = nib.load(out / f"{run}_desc-hmc_bold.nii.gz").header
    assert after.get_data_shape() == before.get_data_shape()
    assert after.get_data_dtype() == dtype
    np.testing.assert_array_equal(after["pixdim"][:5], before["pixdim"][:5])
    assert after.get_xyzt_units() == ("mm", "sec")
    for field in (*POSITION, *INTENT, "dim_info", "slice_code", "slice_end", "slice_duration"):
        np.testing.assert_array_equal(after[field], before[field], err_msg=field)
    for ending, kind in VOLUMES.items():
        image = nib.load(out / f"{run}{ending}.nii.gz")
        assert image.shape == before.get_data_shape()[:3]
        assert image.get_data_dtype() == kind
        np.testing.assert_array_equal(image.header["pixdim"][:4], before["pixdim"][:4])
        for field in (*POSITION, *INTENT, "dim_info"):
            np.testing.assert_array_equal(image.header[field], before[field], err_msg=field)
        assert np.isfinite(image.get_fdata()).all()


def test_header_contract(made):
    source, out = made
    check_headers(source, out, "sub-01_task-rest")
    before = nib.load(source)
    after = nib.load(out / "sub-01_task-rest_desc-hmc_bold.nii.gz")
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.header.get_slope_inter()[0] in (None, 1.0)
    np.testing.assert_array_equal(
        after.get_fdata()[..., 0], before.get_fdata()[..., 0], err_msg="the reference is itself"
    )


@pytest.mark.parametrize("oblique_deg", [0, 14])
@pytest.mark.parametrize("axcodes", ["RAS", "LAS", "LPS", "PSL"])
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_header_contract_for_every_orientation(axcodes, oblique_deg, dtype, tmp_path):
    affine = phantom.grid_affine((20, 22, 14), (3.0, 3.0, 4.0), axcodes, oblique_deg)
    source = runs.write_stored(tmp_path / "a_bold.nii", runs.ball_run(3), affine)
    out = realign(source, tmp_path / "out", "--dtype", dtype)
    check_headers(source, out, "a", np.dtype(dtype))
    image = nib.load(out / "a_desc-hmc_bold.nii.gz")
    assert nib.aff2axcodes(image.affine) == tuple(axcodes)
    voxels, original = image.get_fdata(), nib.load(source).get_fdata()
    step = float(image.dataobj.slope) if dtype == "int16" else 0.0
    np.testing.assert_allclose(voxels[..., 0], original[..., 0], atol=0.51 * step)


STORED = ("i1", "u1", "<i2", ">i2", "<u2", "<i4", ">i4", "<u4", "<i8", "<f4", ">f4", "<f8", ">f8")


@pytest.mark.parametrize("stored", STORED)
def test_header_contract_for_every_stored_type(stored, tmp_path):
    """The same numbers in any type and byte order give the same realigned run."""
    affine = phantom.grid_affine((20, 22, 14), (3.0, 3.0, 4.0), "LAS", 11)
    data = np.rint(runs.ball_run(3) / 20)
    assert data.max() <= 127
    kind = nib.Nifti2Header if stored in ("<i8", ">f8") else nib.Nifti1Header
    source = runs.write_stored(tmp_path / "a_bold.nii", data.astype(stored), affine, kind)
    out = realign(source, tmp_path / "out", "--dtype", "int16")
    check_headers(source, out, "a", np.int16)
    plain = runs.write_stored(tmp_path / "plain" / "a_bold.nii", data.astype("<f4"), affine, kind)
    there = realign(plain, tmp_path / "plain_out", "--dtype", "int16")
    for ending in ("_desc-hmc_bold.nii.gz", "_stat-tsnr_desc-raw_boldmap.nii.gz"):
        found, expected = (nib.load(folder / f"a{ending}").get_fdata() for folder in (out, there))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scaling", [(75.5, 0.0), (0.0754, 3100.8), (-2.0, 500.0)])
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_slope_and_intercept_of_the_input(scaling, dtype, tmp_path):
    affine = phantom.grid_affine((20, 22, 14), (3.0, 3.0, 4.0))
    source = runs.write_stored(tmp_path / "a_bold.nii", runs.ball_run(3), affine, scaling=scaling)
    out = realign(source, tmp_path / "out", "--dtype", dtype)
    check_headers(source, out, "a", np.dtype(dtype))
    image, original = nib.load(out / "a_desc-hmc_bold.nii.gz"), nib.load(source)
    assert original.dataobj.slope == pytest.approx(scaling[0])
    intensity = original.get_fdata()[..., 0]
    step = abs(float(image.dataobj.slope)) if dtype == "int16" else 0.0
    rounding = 2e-7 * np.abs(intensity).max()
    np.testing.assert_allclose(image.get_fdata()[..., 0], intensity, atol=0.51 * step + rounding)


def test_tsnr_before_is_that_of_the_intensities(tmp_path):
    """Slope and intercept are in it, and a drift is not."""
    affine = phantom.grid_affine((20, 22, 14), (3.0, 3.0, 4.0))
    data = runs.ball_run(7) + 10 * np.arange(7).astype(np.int16)
    path = tmp_path / "a_bold.nii"
    source = runs.write_stored(path, data.astype(np.int16), affine, scaling=(0.0754, 3100.8))
    out = realign(source, tmp_path / "out")
    intensity = nib.load(source).get_fdata().reshape(-1, 7)
    fit = np.polynomial.polynomial.polyfit(np.arange(7), intensity.T, 1)
    rest = intensity - np.polynomial.polynomial.polyval(np.arange(7), fit)
    expected = intensity.mean(axis=1) / np.sqrt((rest**2).sum(axis=1) / 5)
    found = nib.load(out / "a_stat-tsnr_desc-raw_boldmap.nii.gz").get_fdata().ravel()
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # float32 keeps 3e-4 of 3100.8


def test_coverage_is_where_all_volumes_have_data(tmp_path):
    """Against the slow twin, from the transforms that were written; failed volumes do not count."""
    affine = phantom.grid_affine((20, 22, 14), (3.0, 3.0, 4.0), "LAS", oblique_deg=11)
    data = runs.ball_run(5) + 40
    data[..., 2] = np.roll(data[..., 2], 2, axis=1)
    data[..., 3] = 0
    source = runs.write_run(tmp_path / "a_bold.nii.gz", data, affine)
    out = realign(source, tmp_path / "out")
    name = "a_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"
    matrices = load_transform(out / name, fmt="itk").matrix[[0, 1, 2, 4]]
    expected = np.ones((14, 22, 20), bool)
    for matrix in matrices:
        voxel = np.linalg.inv(affine) @ matrix @ affine
        expected &= naive.clear_outside(expected.shape, voxel, (20, 22, 14))
    coverage = nib.load(out / "a_desc-coverage_mask.nii.gz").get_fdata().T > 0
    np.testing.assert_array_equal(coverage, expected)
    assert 0.5 < coverage.mean() < 0.95
    bold = nib.load(out / "a_desc-hmc_bold.nii.gz").get_fdata().T
    assert (bold[2][~coverage] == 0).any() and (bold[[0, 1, 2, 4]][:, coverage] != 0).all()


def test_transforms_are_the_master_matrices(made):
    """Table and transform file come from one matrix: rebuild one from the other."""
    _, out = made
    name = "sub-01_task-rest_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"
    matrices = load_transform(out / name, fmt="itk").matrix
    np.testing.assert_allclose(matrices[0], np.eye(4), atol=1e-12)
    assert np.abs(matrices[3] - np.eye(4)).max() > 0.01
    assert itk_transforms(matrices).count("#Transform") == 6
    columns = runs.read_table(out / "sub-01_task-rest_desc-confounds_timeseries.tsv")
    angle = np.arccos((np.trace(matrices[3][:3, :3]) - 1) / 2)
    rotation = np.array([float(columns[f"rot_{axis}"][3]) for axis in "xyz"])
    assert np.linalg.norm(rotation) == pytest.approx(angle, rel=0.02, abs=1e-5)


def test_confounds(made):
    _, out = made
    columns = runs.read_table(out / "sub-01_task-rest_desc-confounds_timeseries.tsv")
    assert list(columns)[:10] == [
        *(f"trans_{axis}" for axis in "xyz"),
        *(f"rot_{axis}" for axis in "xyz"),
        "framewise_displacement",
        "rmsd",
        "dvars",
        "std_dvars",
    ]
    assert columns["framewise_displacement"][0] == columns["dvars"][0] == "n/a"
    assert columns["status"] == ["reference"] + ["ok"] * 5
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
    texts = {path.name: path.read_text() for path in out.glob("*.json")}
    assert len(texts) == len(NAMES) / 2
    for name, text in texts.items():
        sidecar = json.loads(text)
        assert sidecar["Description"] and sidecar["Sources"], name
        assert sidecar["KeepstillSettings"]["interpolation_degree"] == 5
        assert sidecar["Reference"] == "volume 0"
        assert str(out.parent) not in text


def test_outside_a_data_set_sources_are_relative_references(made):
    """There is nothing that a BIDS URI could start from."""
    source, out = made
    for path in out.glob("*.json"):
        assert "bids:" not in path.read_text()
    brain = json.loads((out / "sub-01_task-rest_desc-brain_mask.json").read_text())
    assert brain["Sources"] == ["sub-01_task-rest_desc-hmc_boldref.nii.gz"]
    boldref = json.loads((out / "sub-01_task-rest_desc-hmc_boldref.json").read_text())
    assert (out / boldref["Sources"][0]).samefile(source)


def test_references_to_odd_names_are_percent_encoded(tmp_path):
    """Of the run, and of a file that serves as reference."""
    source = runs.write_run(tmp_path / "raw data" / "run #1.nii", runs.ball_run(3))
    reference = tmp_path / "50% [mean].nii"
    nib.save(nib.load(source).slicer[..., 0], reference)
    out = realign(source, tmp_path / "out", "--reference", str(reference))
    bold, boldref, brain = (
        json.loads((out / f"run #1_{kind}.json").read_text())
        for kind in ("desc-hmc_bold", "desc-hmc_boldref", "desc-brain_mask")
    )
    assert boldref["Sources"] == ["../50%25%20%5Bmean%5D.nii"]
    assert bold["Sources"][0] == "../raw%20data/run%20%231.nii"
    assert brain["Sources"] == ["run%20%231_desc-hmc_boldref.nii.gz"]


def test_a_run_without_a_task_name_gets_that_of_its_file(tmp_path):
    """BIDS requires the field of every bold file."""
    path = tmp_path / "sub-01_task-nback_bold.nii.gz"
    out = realign(runs.write_run(path, runs.ball_run(3), sidecar=False), tmp_path / "out")
    bold = json.loads((out / "sub-01_task-nback_desc-hmc_bold.json").read_text())
    assert bold["TaskName"] == "nback"


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
    run = "sub-01_task-rest"
    raw_map = nib.load(made_there / f"{run}_stat-tsnr_desc-raw_boldmap.nii.gz")
    assert raw_map.shape == image.shape[:3]
    np.testing.assert_array_equal(raw_map.affine, image.affine)
    summary = json.loads((made_there / "manifests" / f"{run}.json").read_text())["summary"]
    own = json.loads((out / "manifests" / f"{run}.json").read_text())["summary"]
    assert summary["tsnr_before"] == pytest.approx(own["tsnr_before"], rel=0.1)
    assert summary["tsnr_after"] > 1
    boldref = json.loads((made_there / f"{run}_desc-hmc_boldref.json").read_text())
    assert boldref["Reference"].startswith("ref.nii.gz (sha256:")
    assert boldref["Sources"] == ["../ref.nii.gz"]


def test_dead_volume_is_reported_by_number(tmp_path, capsys):
    data = runs.ball_run(6)
    data[..., 4] = 0
    source = runs.write_run(tmp_path / "a_bold.nii.gz", data)
    out = realign(source, tmp_path / "out")
    assert "volumes that failed: 4" in capsys.readouterr().out
    columns = runs.read_table(out / "a_desc-confounds_timeseries.tsv")
    assert columns["status"][4] == "failed"
    assert columns["framewise_displacement"][4:6] == ["n/a", "n/a"]
    manifest = json.loads((out / "manifests" / "a.json").read_text())
    assert manifest["summary"]["failed_volumes"] == [4]


def test_output_directory_that_cannot_be_made(tmp_path, capsys):
    source = runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run(3))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit) as ended:
        main(["realign", str(source), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "a: cannot write to" in error and "Traceback" not in error


def test_real_runs_lose_temporal_variance(study, tmp_path):
    for name in ("sub-01/func/sub-01_task-oneback_run-1", "sub-03/func/sub-03_task-rest"):
        out = realign(study / f"{name}_bold.nii.gz", tmp_path, "--dtype", "int16")
        run = name.rsplit("/", 1)[1]
        summary = json.loads((out / "manifests" / f"{run}.json").read_text())["summary"]
        assert summary["variance_after"] < summary["variance_before"]
        assert summary["tsnr_after"] > summary["tsnr_before"]
        assert summary["n_failed"] == 0


def test_the_input_is_never_written_over(tmp_path, capsys):
    source = runs.write_run(tmp_path / "out" / "a_desc-hmc_bold.nii.gz", runs.ball_run(3))
    content = source.read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["realign", str(source), "--out", str(source.parent)])
    assert ended.value.code == 2
    assert "would be written over" in capsys.readouterr().err
    assert source.read_bytes() == content


@pytest.mark.parametrize("n_written", [0, 3, 9])
def test_full_disk_leaves_nothing_of_the_run(n_written, tmp_path, monkeypatch, capsys):
    """First on a fresh folder, then over the outputs of an earlier call."""
    source = runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run(3))
    write_file, written = files.put_file, []

    def put_file(path, parts):
        if len(written) >= n_written:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write_file(path, parts)

    for before in (False, True):
        if before:
            realign(source, tmp_path / "out")
        with monkeypatch.context() as full, pytest.raises(SystemExit) as ended:
            written.clear()
            full.setattr("keepstill.write.put_file", put_file)
            full.setattr("keepstill.collect.put_file", put_file)
            main(["realign", str(source), "--out", str(tmp_path / "out"), "--dtype", "int16"])
        assert ended.value.code == 2
        assert "No space left on device" in capsys.readouterr().err
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_somebody_else_s_data_set_is_not_written_into(tmp_path):
    (tmp_path / "dataset_description.json").write_text('{"Name": "mine", "GeneratedBy": []}')
    with pytest.raises(OutputError, match="keepstill did not make"):
        files.refuse_foreign_data_set(tmp_path, "output_dir")
    (tmp_path / "dataset_description.json").write_text('{"GeneratedBy": [{"Name": "keepstill"}]}')
    files.refuse_foreign_data_set(tmp_path, "output_dir")


def test_a_run_is_written_by_one_call_at_a_time(tmp_path):
    """Its parts were removed under the hands of another call, and those of a run whose name goes
    on after its own (run-2) with them.
    """
    run, folder, done = "sub-01_task-rest", tmp_path / "sub-01" / "func", []
    path, lock = folder / f"{run}_desc-hmc_bold.nii.gz", tmp_path / "logs/identity" / f".{run}.lock"
    own = folder / f".{path.name}.123.part"
    other = folder / f".{run}_run-2_desc-hmc_bold.nii.gz.123.part"
    folder.mkdir(parents=True)
    own.touch()
    other.touch()

    def write():
        with collect.writing(run, tmp_path, {path}):
            done.append((own.exists(), other.exists()))

    writer = threading.Thread(target=write)
    with files.alone(lock):
        writer.start()
        writer.join(0.5)
        assert writer.is_alive() and own.exists()
    writer.join()
    assert done == [(False, True)] and not lock.exists()


def test_a_lock_that_a_killed_call_left_keeps_nobody_waiting(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    with files.alone(lock):
        assert lock.exists()
    assert not lock.exists()
