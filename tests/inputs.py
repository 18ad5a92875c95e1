"""Runs as files that are unusual, damaged or no runs at all: each makes one and says where."""

import gzip
import json

import nibabel as nib
import numpy as np

import runs


def good(tmp_path, **options):
    return runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run(), **options)


def truncated(tmp_path):
    path = good(tmp_path)
    path.write_bytes(path.read_bytes()[:-4000])
    return path


def truncated_trailer(tmp_path):
    path = good(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    return path


def bad_crc(tmp_path):
    path = good(tmp_path)
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF
    path.write_bytes(content)
    return path


def compressed_twice(folder):
    source = good(folder)
    source.write_bytes(gzip.compress(source.read_bytes()))
    return source


def text(tmp_path):
    path = tmp_path / "a_bold.nii.gz"
    path.write_text("subject,age\n01,23\n" * 100)
    return path


def plain_text(tmp_path):
    path = tmp_path / "a_bold.nii"
    path.write_text("subject,age\n01,23\n" * 100)
    return path


def gzipped_text(tmp_path):
    path = tmp_path / "a_bold.nii.gz"
    path.write_bytes(gzip.compress(b"no image\n" * 200))
    return path


def empty(tmp_path):
    path = tmp_path / "a_bold.nii.gz"
    path.write_bytes(b"")
    return path


def one_3d_volume(tmp_path):
    return runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run()[..., 0])


def one_volume(tmp_path):
    return runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run(1))


def zeros(tmp_path):
    return runs.write_run(tmp_path / "a_bold.nii.gz", 0 * runs.ball_run())


def not_numbers(tmp_path):
    data = np.full((8, 9, 10, 3), np.nan, np.float32)
    return runs.write_run(tmp_path / "a_bold.nii.gz", data)


def one_slice(tmp_path):
    return runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run()[:, :, 5:6])


def missing(tmp_path):
    return tmp_path / "not_there_bold.nii.gz"


def broken_link(tmp_path):
    path = tmp_path / "a_bold.nii.gz"
    path.symlink_to(tmp_path / ".git" / "annex" / "objects" / "X")
    return path


def longer_than_its_header(tmp_path):
    path = good(tmp_path)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\1" * 70000))
    return path


def terabytes(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_shape((32000, 32000, 32000, 1000))
    header["magic"], header["vox_offset"], header["sform_code"] = b"n+1", 352, 1
    header["srow_x"][0] = header["srow_y"][1] = header["srow_z"][2] = 3
    path = tmp_path / "a_bold.nii"
    path.write_bytes(header.binaryblock + bytes(4))
    return path


def edited(path, **fields):
    """Change header fields of an uncompressed NIfTI-1 file in place."""
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + bytes(content[348:]))
    return path


def small(tmp_path, **options):
    return runs.write_run(tmp_path / "a_bold.nii", runs.ball_run(4), **options)


def position_apart(tmp_path):
    source = small(tmp_path)
    row = nib.load(source).affine[1].copy()
    row[3] += 3
    return edited(source, srow_y=row)


def sheared(tmp_path):
    return edited(small(tmp_path), qform_code=0, srow_x=(3, 1, 0, 0), srow_y=(0, 3, 0, 0))


def singular(tmp_path):
    return edited(small(tmp_path), qform_code=0, srow_z=(0, 0, 0, 0))


def no_unit(tmp_path):
    return edited(small(tmp_path), xyzt_units=8)


def micron(tmp_path):
    return edited(small(tmp_path), xyzt_units=3 | 8)


def lost_geometry(tmp_path):
    affine = np.diag([1.0, 1, 1, 1])
    return edited(small(tmp_path, affine=affine), xyzt_units=0)


def repetition_time(tmp_path, tr, sidecar=None):
    source = small(tmp_path, sidecar=False)
    pixdim = nib.load(source).header["pixdim"].copy()
    pixdim[4] = tr
    if sidecar is not None:
        source.with_name("a_bold.json").write_text(json.dumps(sidecar))
    return edited(source, pixdim=pixdim)


def identical(tmp_path):
    return runs.write_run(tmp_path / "a_bold.nii", np.repeat(runs.ball_run(1), 4, axis=3))


def complex_numbers(tmp_path):
    return runs.write_run(tmp_path / "a_bold.nii", runs.ball_run(3).astype(np.complex64))


def broken_sidecar(tmp_path):
    source = small(tmp_path)
    source.with_name("a_bold.json").write_text("{RepetitionTime: 2}")
    return source


def other_grid(tmp_path, name):
    """A volume that a run is to be taken to, whose voxels are more and smaller."""
    affine = np.diag([2.0, 2.0, 2.5, 1.0])
    return runs.write_run(tmp_path / name, np.ones((30, 32, 20), np.int16), affine)
