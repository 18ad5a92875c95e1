"""Applying transforms: as realign does, on other grids, and to other images."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import foreign
import runs
from keepstill import phantom
from keepstill.__main__ import main
from keepstill.read import read_volume
from keepstill.write import itk_transforms

SHAPE = (20, 22, 14)
AFFINE = phantom.grid_affine(SHAPE, (3.0, 3.0, 4.0), "LAS", oblique_deg=11)


def call(*arguments, code=0):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == code


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with a shift in its middle, a dead volume, and a hole."""
    data = runs.ball_run(7).astype(np.float32)
    data[..., 2] = np.roll(data[..., 2], 2, axis=1)
    data[..., 4] = 0
    data[7, 8, 6, 5] = np.nan
    folder = tmp_path_factory.mktemp("in")
    source = runs.write_run(folder / "sub-01_task-rest_bold.nii.gz", data, AFFINE)
    nib.save(nib.load(source).slicer[..., 1], folder / "ref.nii.gz")
    return source


def moved_run(folder, affine=AFFINE):
    """A run of noise, its motion, and where its voxels come from on a grid."""
    volumes = np.random.default_rng(1).normal(size=(5, 14, 22, 20)).astype(np.float32)
    volumes = np.array([ndimage.gaussian_filter(volume, 1.2) for volume in volumes]) * 1000
    return runs.write_run(folder / "n_bold.nii.gz", volumes.T, affine), volumes


def expected_volume(volume, moving_from_reference, grid, shape):
    """A volume on another grid, by scipy; NaN outside its field."""
    matrix = np.linalg.inv(AFFINE) @ moving_from_reference @ grid
    z, y, x = np.indices(shape[::-1])
    source = np.tensordot(matrix[:3], np.stack([x, y, z, np.ones_like(x)]), 1)
    inside = [(p > -1e-6) & (p < n - 1 + 1e-6) for p, n in zip(source, SHAPE, strict=True)]
    sampled = ndimage.map_coordinates(volume, source[::-1], order=5, mode="mirror")
    return np.where(np.logical_and.reduce(inside), sampled, np.nan)


@pytest.mark.parametrize(
    ("of_realign", "options"),
    [
        ((), ()),
        (("--reference", "middle"), ("--dtype", "int16", "--interpolation-degree", "3")),
        (("--reference", "mean"), ("--outside", "nearest", "--non-negative")),
        ((), ("--outside", "nan", "--common-field")),
        (("--reference", "ref.nii.gz"), ("--outside", "nan")),
    ],
)
def test_own_transforms_give_the_bytes_of_realign(source, of_realign, options, tmp_path):
    of_realign = [source.parent / o if o.startswith("ref.") else o for o in of_realign]
    call("realign", source, "--out", tmp_path / "a", *of_realign, *options)
    (transforms,) = (tmp_path / "a").glob("*_xfm.txt")
    call("apply", source, "--xfm", transforms, "--out", tmp_path / "b", *options)
    name = "sub-01_task-rest_desc-hmc_bold"
    one, other = (tmp_path / folder / f"{name}.nii.gz" for folder in "ab")
    assert one.read_bytes() == other.read_bytes()
    fields = json.loads((tmp_path / "b" / f"{name}.json").read_text())
    of_one = json.loads((tmp_path / "a" / f"{name}.json").read_text())
    said = ("OutsideFieldOfView", "OutsideCommonField", "NegativeValues", "RepetitionTime")
    assert {key: fields[key] for key in said} == {key: of_one[key] for key in said}
    assert [(tmp_path / "b" / path).resolve() for path in fields["Sources"]] == [source, transforms]


def test_reference_on_another_grid_is_that_of_realign(source, tmp_path):
    grid = phantom.grid_affine((26, 26, 18), (2.6, 2.6, 3.2), "RAS")
    from nibabel.processing import resample_from_to

    first = nib.Nifti1Image(nib.load(source).get_fdata()[..., 0], AFFINE)
    reference = tmp_path / "ref.nii.gz"
    nib.save(resample_from_to(first, ((26, 26, 18), grid), order=3), reference)
    call("realign", source, "--out", tmp_path / "a", "--reference", reference)
    (transforms,) = (tmp_path / "a").glob("*_xfm.txt")
    (boldref,) = (tmp_path / "a").glob("*_boldref.nii.gz")
    out = tmp_path / "b.nii.gz"
    call("apply", source, "--xfm", transforms, "--out", out, "--reference", boldref)
    (realigned,) = (tmp_path / "a").glob("*hmc_bold.nii.gz")
    assert out.read_bytes() == realigned.read_bytes()
    fields = json.loads((tmp_path / "b.json").read_text())
    assert fields["SpatialReference"] == f"a/{boldref.name}"


@pytest.mark.parametrize("form", ["itk", "mat", "par", "rp", "aff12"])
def test_every_format_moves_the_volumes(form, tmp_path):
    source, volumes = moved_run(tmp_path)
    poses = foreign.poses()
    paths = foreign.put_all(tmp_path, poses, AFFINE)
    if form == "par":  # about the centre of gravity of this run's own volume
        ball = foreign.space_of(AFFINE).volume_at(foreign.STILL)
        volumes[foreign.STILL] = ball
        runs.write_run(source, volumes.T, AFFINE)
    call("apply", source, "--xfm", paths[form], "--out", tmp_path / "o.nii", "--outside", "nan")
    found = nib.load(tmp_path / "o.nii").get_fdata().T
    for t, volume in enumerate(volumes):
        expected = expected_volume(volume, poses[t], AFFINE, SHAPE)
        np.testing.assert_array_equal(np.isnan(found[t]), np.isnan(expected))
        # Three passes are not the sum over all taps: a part of a standard deviation of 60.
        assert np.nanstd(found[t] - expected) < 0.05 * np.nanstd(expected)


@pytest.mark.parametrize(
    ("given", "voxel_mm", "shape"),
    [
        (["2"], (2, 2, 2), (29, 32, 27)),
        (["1.5", "3", "8"], (1.5, 3, 8), (39, 22, 7)),
    ],
)
def test_other_voxels_about_the_same_centre(given, voxel_mm, shape, tmp_path):
    source, volumes = moved_run(tmp_path)
    (tmp_path / "x.txt").write_text(itk_transforms(np.tile(np.eye(4), (5, 1, 1))))
    out = tmp_path / "o.nii.gz"
    call("apply", source, "--xfm", tmp_path / "x.txt", "--out", out, "--voxel-mm", *given)
    image = nib.load(out)
    assert image.shape == (*shape, 5)
    np.testing.assert_allclose(image.header.get_zooms(), (*voxel_mm, 2.0), rtol=1e-6)
    centre = AFFINE @ [*(np.array(SHAPE) - 1) / 2, 1]
    np.testing.assert_allclose(image.affine @ [*(np.array(shape) - 1) / 2, 1], centre, atol=1e-4)
    for t, volume in enumerate(volumes):
        expected = expected_volume(volume, np.eye(4), image.affine, shape)
        assert np.isfinite(expected).all()  # nothing had to be made up at the borders
        np.testing.assert_allclose(image.get_fdata().T[t], expected, atol=0.2)


def test_another_echo(source, tmp_path):
    """Transforms of one echo, another one's voxels; they are that run's, with its own noise."""
    poses = foreign.poses()
    echo, volumes = moved_run(tmp_path)
    (tmp_path / "x.txt").write_text(itk_transforms(poses))
    out = tmp_path / "out"
    call("apply", echo, "--xfm", tmp_path / "x.txt", "--out", out, "--reference",
         source.parent / "ref.nii.gz")  # fmt: skip
    found = nib.load(out / "n_desc-hmc_bold.nii.gz").get_fdata().T
    _, grid = read_volume(source.parent / "ref.nii.gz")
    expected = expected_volume(volumes[1], poses[1], grid, SHAPE)
    assert np.nanstd(found[1] - expected) < 0.05 * np.nanstd(expected)


def test_same_bytes_for_any_threads(source, tmp_path):
    (tmp_path / "x.txt").write_text(itk_transforms(phantom.drawn_poses("spikes", 7, 3)))
    for threads in (1, 3):
        call("apply", source, "--xfm", tmp_path / "x.txt", "--out", tmp_path / f"{threads}.nii.gz",
             "--threads", threads, "--dtype", "int16", "--voxel-mm", "2.5")  # fmt: skip
    assert (tmp_path / "1.nii.gz").read_bytes() == (tmp_path / "3.nii.gz").read_bytes()


def test_a_single_slice(tmp_path):
    data = runs.ball_run(4)[:, :, 6:7]
    source = runs.write_run(tmp_path / "s_bold.nii.gz", data, AFFINE)
    (tmp_path / "x.txt").write_text(itk_transforms(np.tile(np.eye(4), (4, 1, 1))))
    call("apply", source, "--xfm", tmp_path / "x.txt", "--out", tmp_path / "o.nii.gz")
    np.testing.assert_array_equal(nib.load(tmp_path / "o.nii.gz").get_fdata(), data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--voxel-mm", "0"), "voxel_mm: 0 0 0 found; needs three edges above 0 mm"),
        (("--voxel-mm", "0.01"), "makes 1.87e+11 voxels a volume; needs larger edges"),
        (("--voxel-mm", "1", "2"), "--voxel-mm: 2 numbers found; needs one or three"),
        (("--outside", "nan", "--dtype", "int16"), "outside: nan found with int16"),
        (("--reference", "x.txt"), "no NIfTI header found"),
        (("--out", "n_bold.nii.gz"), "is an input; choose another name"),
        (("--xfm", "short.txt"), "4 transforms found, the run has 5 volumes"),
    ],
)
def test_what_cannot_be_done_is_one_line(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    moved_run(tmp_path)
    before = (tmp_path / "n_bold.nii.gz").read_bytes()
    (tmp_path / "x.txt").write_text(itk_transforms(foreign.poses()))
    (tmp_path / "short.txt").write_text(itk_transforms(foreign.poses()[:4]))
    capsys.readouterr()
    call("apply", "n_bold.nii.gz", "--xfm", "x.txt", "--out", "o.nii.gz", *options, code=2)
    error = capsys.readouterr().err
    assert error.startswith("keepstill: ") and words in error and error.count("\n") == 1
    assert (tmp_path / "n_bold.nii.gz").read_bytes() == before
    assert not (tmp_path / "o.nii.gz").exists()


def test_ranks_would_write_over_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PMI_SIZE", "2")
    call("apply", "a_bold.nii.gz", "--xfm", "x.txt", "--out", tmp_path, code=2)
    assert "works with threads, not with ranks" in capsys.readouterr().err
