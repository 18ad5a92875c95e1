"""Choices of how a run is resliced, seen in the files that come out."""

import json

import nibabel as nib
import numpy as np
import pytest
from nitransforms.linear import load as load_transform
from scipy import ndimage

import naive
import runs
from keepstill import phantom
from keepstill.__main__ import main
from keepstill.errors import SettingsError
from keepstill.settings import RealignSettings

AFFINE = phantom.grid_affine((20, 22, 14), (3.0, 3.0, 4.0), "LAS", oblique_deg=11)
XFM = "a_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"
FAILED = 4


def realign(source, out, *options):
    with pytest.raises(SystemExit) as ended:
        main(["realign", str(source), "--out", str(out), "--threads", "1", *options])
    assert ended.value.code == 0
    return out


def series(out):
    """The realigned run, (n, nz, ny, nx)."""
    return nib.load(out / "a_desc-hmc_bold.nii.gz").get_fdata().T


def volume(out, name):
    return nib.load(out / f"a_{name}.nii.gz").get_fdata().T


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with a shift in its middle, a dead volume, and noise about zero in the air."""
    data = runs.ball_run(7).astype(np.float32) - 20
    data[..., 2] = np.roll(data[..., 2], 2, axis=1)
    data[..., FAILED] = 0
    path = tmp_path_factory.mktemp("in") / "a_bold.nii.gz"
    return runs.write_run(path, data, AFFINE)


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    return realign(source, tmp_path_factory.mktemp("plain") / "out")


@pytest.fixture(scope="module")
def maps(plain):
    """Voxel of each volume from voxel of the reference."""
    matrices = load_transform(plain / XFM, fmt="itk").matrix
    return [np.linalg.inv(AFFINE) @ matrix @ AFFINE for matrix in matrices]


@pytest.fixture(scope="module")
def seen(maps):
    """Where each volume has data, by the slow twin."""
    return np.array(
        [naive.clear_outside((14, 22, 20), to_moving, (20, 22, 14)) for to_moving in maps]
    )


def test_nan_is_where_a_volume_has_no_data_and_harms_no_figure(source, plain, seen, tmp_path):
    out = realign(source, tmp_path / "out", "--outside", "nan")
    expected = np.where(seen, series(plain), np.nan)
    np.testing.assert_array_equal(series(out), expected)
    assert 0 < np.isnan(expected).mean() < 0.2
    for name in (
        "desc-confounds_timeseries.tsv",
        "stat-tsnr_desc-hmc_boldmap.nii.gz",
        "desc-coverage_mask.nii.gz",
        "desc-brain_mask.nii.gz",
    ):
        assert (out / f"a_{name}").read_bytes() == (plain / f"a_{name}").read_bytes(), name
    sidecar = json.loads((out / "a_desc-hmc_bold.json").read_text())
    assert sidecar["OutsideFieldOfView"] == "NaN"
    assert sidecar["KeepstillSettings"]["outside"] == "nan"


def test_nearest_is_the_value_at_the_border_of_the_field(source, plain, maps, seen, tmp_path):
    out = realign(source, tmp_path / "out", "--outside", "nearest", "--interpolation-degree", "3")
    found = series(out)
    volumes = nib.load(source).get_fdata().T
    z, y, x = np.indices(found.shape[1:])
    for t in (1, 2, 5):
        position = np.tensordot(maps[t][:3], np.stack([x, y, z, np.ones_like(x)]), 1)
        border = [np.clip(p, 0, n - 1) for p, n in zip(position, (20, 22, 14), strict=True)]
        expected = ndimage.map_coordinates(volumes[t], border[::-1], order=3, mode="mirror")
        assert (~seen[t]).any()
        np.testing.assert_allclose(found[t][~seen[t]], expected[~seen[t]], atol=2e-3)
        # Inside, passes instead of the sum over all taps: a few units of a noise of 8.
        np.testing.assert_allclose(found[t][seen[t]], expected[seen[t]], atol=8)
    cubic = realign(source, tmp_path / "cubic", "--interpolation-degree", "3")
    np.testing.assert_array_equal(found[seen], series(cubic)[seen])
    for name in ("desc-coverage_mask.nii.gz", XFM.removeprefix("a_")):
        assert (out / f"a_{name}").read_bytes() == (plain / f"a_{name}").read_bytes(), name


@pytest.mark.parametrize(("outside", "nothing"), [("zero", 0.0), ("nan", np.nan)])
def test_common_field_is_the_coverage_mask(source, plain, outside, nothing, tmp_path):
    out = realign(source, tmp_path / "out", "--common-field", "--outside", outside)
    covered = volume(out, "desc-coverage_mask") > 0
    assert 0.5 < covered.mean() < 1
    found, expected = series(out), np.where(covered, series(plain), nothing)
    if outside == "nan":  # the dead volume counts for the mask no more than for the figures
        assert np.isnan(found[:, ~covered]).all()
        found, expected = np.delete(found, FAILED, 0), np.delete(expected, FAILED, 0)
    np.testing.assert_array_equal(found, expected)
    name = "a_desc-confounds_timeseries.tsv"
    assert (out / name).read_bytes() == (plain / name).read_bytes()
    sidecar = json.loads((out / "a_desc-hmc_bold.json").read_text())
    assert sidecar["OutsideCommonField"] == {"zero": 0, "nan": "NaN"}[outside]


def test_non_negative_values(source, plain, tmp_path):
    """The reference too, which is not interpolated."""
    out = realign(source, tmp_path / "out", "--non-negative")
    assert all((before < 0).any() for before in np.delete(series(plain), FAILED, 0))
    np.testing.assert_array_equal(series(out), np.maximum(series(plain), 0))
    sidecar = json.loads((out / "a_desc-hmc_bold.json").read_text())
    assert sidecar["NegativeValues"] == "set to 0"


def test_int16_of_the_common_field_keeps_zero(source, tmp_path):
    out = realign(source, tmp_path / "out", "--common-field", "--dtype", "int16")
    covered = volume(out, "desc-coverage_mask") > 0
    assert (series(out)[:, ~covered] == 0).all()


def test_what_lies_outside_moves_no_mean_reference(source, tmp_path):
    for outside in ("zero", "nearest"):
        options = ("--reference", "mean", "--non-negative", "--outside", outside)
        realign(source, tmp_path / outside, *options)
    both = [(tmp_path / outside / XFM).read_bytes() for outside in ("zero", "nearest")]
    assert both[0] == both[1]


def test_each_choice_is_part_of_the_key(source, plain, tmp_path):
    keys = set()
    choices = [(), ("--outside", "nearest"), ("--common-field",), ("--non-negative",)]
    for number, options in enumerate(choices):
        out = realign(source, tmp_path / str(number), *options) if options else plain
        keys.add(json.loads((out / "manifests" / "a.json").read_text())["key"])
    assert len(keys) == len(choices)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"outside": "mirror"}, "'mirror' found; needs zero, nan or nearest"),
        ({"outside": "nan", "output_dtype": "int16"}, "int16 voxels, which have no NaN"),
        ({"outside": "nearest", "common_field": True}, "leaves nothing to fill"),
    ],
)
def test_what_no_file_could_hold_is_refused(settings, words):
    with pytest.raises(SettingsError, match=words):
        RealignSettings(**settings)


def test_a_refusal_is_one_line(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(
            ["realign", str(source), "--out", str(tmp_path), "--outside", "nan", "--dtype", "int16"]
        )
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("keepstill: outside: nan found") and error.count("\n") == 1
