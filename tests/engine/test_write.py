"""What is written is valid, whole and the same every time."""

import gzip
import hashlib
import io
import json
import zlib

import itk
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstill import phantom, write
from keepstill.files import put_file


@given(st.lists(st.binary(max_size=3000), max_size=6))
@settings(max_examples=40, deadline=None)
def test_gzip_member_is_one_and_the_same_for_any_threads(parts):
    one = b"".join(write.gzip_member(parts, 1))
    assert one == b"".join(write.gzip_member(parts, 3))
    assert gzip.decompress(one) == b"".join(parts)
    stream = zlib.decompressobj(wbits=31)
    assert stream.decompress(one) == b"".join(parts)
    assert stream.eof and not stream.unused_data  # one member, nothing after it
    assert one[4:8] == bytes(4) and not one[3]  # no time, no name


@pytest.mark.parametrize("size", [0, 1, 257, 70_000, 300_000])
@pytest.mark.parametrize("kind", ["noise", "series", "runs", "one value"])
def test_compressed_as_by_zlib(kind, size):
    """Byte for byte: what zlib-ng makes of it is no matter of the processor that it runs on."""
    rng = np.random.default_rng(size)
    part = {
        "noise": rng.bytes(size),
        "series": (1000 + rng.normal(size=size // 2) * 20).astype("<i2").tobytes(),
        "runs": np.repeat(rng.integers(0, 9, size), rng.integers(1, 400, size))[:size],
        "one value": bytes(size),
    }[kind]
    stream = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    part = bytes(part.astype(np.uint8)) if kind == "runs" else part
    expected = stream.compress(part) + stream.flush(zlib.Z_FULL_FLUSH)
    found = b"".join(write.gzip_member([part], 1))
    assert found[10:-10] == expected and found[-8:-4] == zlib.crc32(part).to_bytes(4, "little")


def test_what_was_written_is_told(tmp_path):
    path = tmp_path / "file"
    written = put_file(path, [b"some", b"", b" and more"])
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written.bytes == path.stat().st_size == 13


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_series_has_the_same_bytes_for_any_threads(name, dtype, tmp_path):
    rng = np.random.default_rng(3)
    series = (900 + 40 * rng.normal(size=(7, 3, 4, 5))).astype(np.float32)
    series.setflags(write=False)
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(series.shape[::-1])
    header["vox_offset"] = 352
    written = [
        write.put_series(tmp_path / f"{n}" / name, header.copy(), lambda: iter(series), n)
        for n in (1, 2, 3)
    ]
    assert len({what.sha256 for what in written}) == 1
    image = nib.load(tmp_path / "3" / name)
    slope = image.dataobj.slope if dtype == "int16" else 0
    np.testing.assert_allclose(image.get_fdata().T, series, atol=0.51 * slope)


def test_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "there" / "file"
    put_file(target, [b"old"])

    def parts():
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        put_file(target, parts())
    assert target.read_bytes() == b"old"
    assert [p.name for p in target.parent.iterdir()] == ["file"]


@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_int16_scaling_spreads_and_never_wraps(low, span, seed):
    volume = (low + span * np.random.default_rng(seed).random((3, 4, 5))).astype(np.float32)
    slope, inter = write.int16_scaling([volume])
    stored = write.as_int16(volume, slope, inter)
    back = stored.astype(np.float64) * slope + inter
    rounding = abs(slope) * 0.51 + 4e-7 * np.abs(volume).max()
    assert np.abs(back - volume).max() <= rounding
    assert np.abs(stored.astype(int)).max() <= 32767


@given(st.floats(-1e5, 0), st.floats(1e-3, 1e5), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_int16_keeps_zero_exactly(low, high, seed):
    """0 says that a voxel has no data; both ways of multiplying out give it back."""
    volume = (low + (high - low) * np.random.default_rng(seed).random((3, 4, 5))).astype(np.float32)
    volume[0, 0, :2], volume[1, 1, :2] = 0, (low, high)
    slope, inter = write.int16_scaling([volume])
    stored = write.as_int16(volume, slope, inter)
    assert slope == np.float32(slope) and inter == np.float32(inter)
    assert (stored[0, 0, :2] * slope + inter == 0).all()
    assert (stored[0, 0, :2] * np.float32(slope) + np.float32(inter) == 0).all()
    assert np.abs(stored.astype(int)).max() <= 32767
    assert slope <= 1.005 * (high - low) / 65534
    back = stored.astype(np.float64) * slope + inter
    assert np.abs(back - volume).max() <= slope * 0.51 + 4e-7 * np.abs(volume).max()


def test_int16_of_a_constant():
    volume = np.full((2, 2, 2), 7.5, np.float32)
    slope, inter = write.int16_scaling([volume])
    back = write.as_int16(volume, slope, inter) * slope + inter
    np.testing.assert_allclose(back, 7.5, atol=slope)


def test_table_cells(tmp_path):
    columns = {"a": [float("nan"), 1 / 3], "b": ["ok", "failed"], "c": [-0.0, 12]}
    write.put_table(tmp_path / "t.tsv", columns)
    assert (tmp_path / "t.tsv").read_text() == "a\tb\tc\nn/a\tok\t0\n0.333333333\tfailed\t12\n"


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write.put_json(tmp_path / "x.json", {"a": float("nan")})
    write.put_json(tmp_path / "x.json", {"b": 1, "a": "µ"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "µ", "b": 1}


def test_itk_text_reads_back(tmp_path):
    """nitransforms and ITK both find the master matrices again."""
    from nitransforms.linear import load

    masters = phantom.drawn_poses("spikes", 3, 2)
    path = tmp_path / "xfm.txt"
    path.write_text(write.itk_transforms(masters))
    read = load(path, fmt="itk")
    np.testing.assert_allclose(read.matrix, masters, atol=1e-9)
    transforms = list(itk.transformread(str(path)))
    assert len(transforms) == 3
    for transform, master in zip(transforms, masters, strict=True):
        parameters = np.array(transform.GetParameters())
        lps = np.diag([-1.0, -1, 1, 1])
        lps_master = lps @ master @ lps
        np.testing.assert_allclose(parameters[:9].reshape(3, 3), lps_master[:3, :3], atol=1e-12)
        np.testing.assert_allclose(parameters[9:], lps_master[:3, 3], atol=1e-9)


def test_nifti_reads_back(tmp_path):
    from keepstill.nifti import made_header

    source = nib.Nifti1Header()
    affine = phantom.grid_affine((5, 6, 7), (2, 2, 3), "LAS", 10)
    source.set_data_shape((5, 6, 7, 2))
    source.set_sform(affine, 1)
    source.set_qform(affine, 2)
    source.set_xyzt_units("mm", "sec")
    source["pixdim"][4] = 2.5
    source.set_intent("t test", (3,), name="what")
    volumes = np.random.default_rng(0).normal(size=(2, 7, 6, 5)).astype(np.float32)
    best = source.get_best_affine()
    header = made_header(source, best, (5, 6, 7, 2), "float32")
    write.put_nifti(tmp_path / "a.nii.gz", header, (v.tobytes() for v in volumes))
    image = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), volumes.T)
    np.testing.assert_array_equal(image.affine, best)
    assert image.header.get_zooms()[3] == 2.5
    assert image.header.get_xyzt_units() == ("mm", "sec")
    assert image.header.get_intent() == source.get_intent()
    for field in ("sform_code", "qform_code", "quatern_b", "qoffset_x", "srow_x"):
        np.testing.assert_array_equal(image.header[field], source[field])
    array = itk.array_from_image(itk.imread(str(tmp_path / "a.nii.gz"), itk.F))
    np.testing.assert_array_equal(array, volumes)
    assert io.BytesIO((tmp_path / "a.nii.gz").read_bytes()).read(2) == b"\x1f\x8b"


def test_two_that_write_one_file_at_once(tmp_path):
    """As on two nodes, where two processes may have the same number: the later one counts."""
    target = tmp_path / "dataset_description.json"

    def slow():
        yield b"first"
        put_file(target, [b"meanwhile"])
        assert target.read_bytes() == b"meanwhile"
        yield b" and whole"

    put_file(target, slow())
    assert target.read_bytes() == b"first and whole"
    assert list(tmp_path.iterdir()) == [target]
