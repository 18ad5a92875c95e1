"""Bad input is refused in one line; good input arrives byte for byte."""

import gzip
import json
import os
import stat

import nibabel as nib
import numpy as np
import pytest

import inputs
import runs
from keepstill import stage as engine_stage
from keepstill.bids import Origin
from keepstill.errors import InputError, StageError
from keepstill.read import open_staged
from keepstill.stage import STAGED, remove_stage, stage_run


def stage(source, tmp_path):
    stage_dir = tmp_path / "stage" / "run"
    stage_run(source, "sub-01_task-rest", None, stage_dir)
    return stage_dir


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (inputs.truncated, "truncated"),
        (inputs.truncated_trailer, "truncated"),
        (inputs.compressed_twice, "compressed twice"),
        (inputs.bad_crc, "gzip stream is damaged"),
        (inputs.text, "is no gzip file"),
        (inputs.plain_text, "no NIfTI header"),
        (inputs.gzipped_text, "no NIfTI header"),
        (inputs.empty, "empty file"),
        (inputs.one_3d_volume, "at least 2 volumes"),
        (inputs.one_volume, "at least 2 volumes"),
        (inputs.zeros, "one and the same value"),
        (inputs.not_numbers, "no voxel is a number"),
        (inputs.one_slice, "at least 2 voxels along"),
        (inputs.missing, "cannot be read"),
        (inputs.broken_link, "datalad get"),
        (inputs.longer_than_its_header, "more than the"),
        (inputs.terabytes, "cannot hold them"),
    ],
)
def test_refused(make, words, tmp_path):
    with pytest.raises((InputError, StageError), match=words) as caught:
        stage(make(tmp_path), tmp_path)
    message = str(caught.value)
    assert message.startswith("sub-01_task-rest: ")
    assert "\n" not in message
    left = [p.name for p in (tmp_path / "stage").rglob("*") if p.is_file()]
    assert left == []


@pytest.mark.parametrize("name", ["a_bold.nii", "a_bold.nii.gz"])
@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, ">i2", np.uint16, np.int32, np.float32, ">f8"]
)
def test_staged_as_stored(name, dtype, tmp_path):
    data = runs.ball_run(3).clip(0, 250).astype(dtype)
    source = runs.write_run(tmp_path / name, data)
    run = open_staged(stage(source, tmp_path))
    assert run.voxels.shape == data.shape[::-1]
    np.testing.assert_array_equal(run.voxels, data.T)
    np.testing.assert_array_equal(run.volume(1), data[..., 1].T.astype(np.float32))
    assert run.found["tr_s"] == 2.0 and run.found["warnings"] == []


def test_slope_and_intercept_are_applied(tmp_path):
    source = inputs.good(tmp_path)
    content = bytearray(gzip.decompress(source.read_bytes()))
    header = nib.Nifti1Header(bytes(content[:348]))
    header["scl_slope"], header["scl_inter"] = 0.5, 100
    source.write_bytes(gzip.compress(header.binaryblock + bytes(content[348:])))
    run = open_staged(stage(source, tmp_path))
    expected = nib.load(source).get_fdata(dtype=np.float32)[..., 2].T
    np.testing.assert_allclose(run.volume(2), expected)


def test_several_gzip_members_are_one_file(tmp_path):
    source = inputs.good(tmp_path)
    content = gzip.decompress(source.read_bytes())
    source.write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]) + bytes(512))
    run = open_staged(stage(source, tmp_path))
    np.testing.assert_array_equal(run.voxels, runs.ball_run().T)


def test_many_small_gzip_members_are_read_but_once(tmp_path, monkeypatch):
    """Each copied the rest of its chunk: two seconds a megabyte."""
    source = inputs.good(tmp_path)
    source.write_bytes(source.read_bytes() + 50_000 * gzip.compress(b""))
    copied = []

    class Counting:
        def __init__(self, **kind):
            self._stream = decompressobj(**kind)

        def __getattr__(self, name):
            value = getattr(self._stream, name)
            if name in ("unused_data", "unconsumed_tail"):
                copied.append(len(value))
            return value

    decompressobj = engine_stage.zlib_ng.decompressobj
    monkeypatch.setattr(engine_stage.zlib_ng, "decompressobj", Counting)
    run = open_staged(stage(source, tmp_path))
    np.testing.assert_array_equal(run.voxels, runs.ball_run().T)
    assert len(copied) > 50_000
    assert sum(copied) < 60 * source.stat().st_size


def test_only_the_user_can_read_what_is_staged(tmp_path):
    stage_dir = stage(inputs.good(tmp_path), tmp_path)
    assert stat.S_IMODE(stage_dir.stat().st_mode) == 0o700
    for path in stage_dir.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_sidecar_wins_over_header(tmp_path):
    source = inputs.good(tmp_path)
    source.with_name("a_bold.json").write_text('{"RepetitionTime": 1.5}')
    found = json.loads((stage(source, tmp_path) / STAGED).read_text())
    assert found["tr_s"] == 1.5
    assert "the sidecar's is taken" in found["warnings"][0]


def test_no_room_overflows_to_disk_and_says_so(tmp_path, monkeypatch, caplog):
    source = inputs.good(tmp_path)
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    allocate, full = os.posix_fallocate, tmp_path / "stage"

    def refuse_in_stage_root(handle, offset, n_bytes):
        if os.readlink(f"/proc/self/fd/{handle}").startswith(str(full)):
            raise OSError(28, "No space left on device")
        allocate(handle, offset, n_bytes)

    monkeypatch.setattr(os, "posix_fallocate", refuse_in_stage_root)
    stage_dir = stage(source, tmp_path)
    assert "staged in" in caplog.text and "No space left" in caplog.text
    run = open_staged(stage_dir)
    np.testing.assert_array_equal(run.voxels, runs.ball_run().T)
    assert str(run.realigned_path).startswith(str(spare))
    remove_stage(stage_dir)
    assert list(spare.iterdir()) == [] and not stage_dir.exists()


def test_a_run_of_a_table_has_its_own_json_and_no_data_set(tmp_path):
    """A data set above the file is not the run's: the table says what it is."""
    (tmp_path / "dataset_description.json").write_text("{}")
    note = tmp_path / "note.json"
    note.write_text(json.dumps({"RepetitionTime": 2.0}))
    stage_dir = tmp_path / "stage" / "run"
    stage_run(inputs.good(tmp_path), "sub-7_ses-1_task-x", Origin(sidecar=note), stage_dir)
    found = json.loads((stage_dir / STAGED).read_text())
    assert found["folder"] == "sub-7/ses-1/func"
    assert found["bids_dir"] is None
    assert found["metadata"] == {"RepetitionTime": 2.0, "TaskName": "x"}
    assert not found["warnings"]
