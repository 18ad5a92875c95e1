"""NIfTI headers, checked before anything believes them, and made for what we write."""

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from keepstill.errors import InputError

# Bytes that hold the header of either version of NIfTI, extensions aside.
HEADER_BYTES = 540
_KEPT = (
    *("qform_code", "sform_code", "xyzt_units", "descrip"),
    *("intent_code", "intent_name", "intent_p1", "intent_p2", "intent_p3"),
)
_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}


@dataclass(frozen=True)
class Layout:
    """What a NIfTI file's header says, checked.

    Attributes
    ----------
    header : nibabel header
    shape : tuple of int
        (nx, ny, nz) or (nx, ny, nz, n).
    dtype : numpy dtype
        Of the stored voxels, byte order included.
    offset : int
        Bytes before the first voxel.
    slope, inter : float
        Intensity = stored value * slope + inter.
    affine : (4, 4) float64
        World mm (RAS+) from voxel (x, y, z): the sform, else the qform, else the zooms.
    """

    header: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    affine: NDArray[np.float64]

    @property
    def n_bytes(self) -> int:
        """Size of the uncompressed file."""
        n_voxels = 1
        for size in self.shape:
            n_voxels *= size
        return self.offset + n_voxels * self.dtype.itemsize

    @property
    def header_tr_s(self) -> float:
        """Repetition time in seconds, by the header's unit (none given: seconds); 0 if absent."""
        unit = self.header.get_xyzt_units()[1]
        return float(self.header["pixdim"][4]) * _SECONDS.get(unit, 1.0)


def parse_layout(first_bytes: bytes, run: str) -> Layout:
    """Layout of a NIfTI file from its first bytes.

    Parameters
    ----------
    first_bytes : bytes
        At least the header; 540 bytes hold either version's.
    run : str
        Named in errors.

    Raises
    ------
    InputError
        If this is no single-file NIfTI header, or one that no file can satisfy.
    """
    header = _parse_header(first_bytes, run)
    n_axes = int(header["dim"][0])
    sizes = [int(size) for size in header["dim"][1 : n_axes + 1]]
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) < 3 or min(sizes) < 1:
        raise InputError(f"{run}: axes {tuple(sizes)} found; a run needs x, y, z and time")
    try:
        dtype = header.get_data_dtype()
    except HeaderDataError:
        dtype = None
    if dtype is None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(
            f"{run}: data type code {int(header['datatype'])} found; needs real numbers, "
            "8 to 64 bits; convert the file"
        )
    offset = float(header["vox_offset"])
    if not HEADER_BYTES - 192 <= offset <= 2**31:
        raise InputError(f"{run}: voxels begin at byte {offset:g}; the header is damaged")
    slope, inter = header.get_slope_inter()
    affine = header.get_best_affine()
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{run}: the affine is singular; set sform or qform to the true position")
    return Layout(
        header=header,
        shape=tuple(sizes),
        dtype=dtype,
        offset=int(offset),
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
        affine=affine.astype(np.float64),
    )


def check_run_shape(layout: Layout, run: str) -> None:
    """Refuse what is not a series of volumes.

    Raises
    ------
    InputError
    """
    shape = layout.shape
    if len(shape) == 3:
        raise InputError(
            f"{run}: one volume found, axes {shape}; a run needs x, y, z and at least 2 volumes; "
            "take the file out of the study or join its volumes"
        )
    if len(shape) > 4:
        raise InputError(f"{run}: {len(shape)} axes {shape} found; a run needs x, y, z and time")
    if min(shape[:3]) < 2:
        raise InputError(
            f"{run}: axes {shape} found; rigid motion needs at least 2 voxels along x, y and z"
        )


def made_header(
    source: Any, affine: NDArray[np.float64], shape: tuple[int, ...], dtype: str
) -> Any:
    """NIfTI-1 header (NIfTI-2 if the source is, or the shape asks for it) of an output.

    The source's codes, units, intent and repetition time survive; on the source's own grid also
    sform, qform, the axes of encoding and, for a series, the order of slices.

    Parameters
    ----------
    source : nibabel header
        Of the run.
    affine : (4, 4) float64
        World mm from voxel of the output grid.
    shape : tuple of int
        (nx, ny, nz) or (nx, ny, nz, n).
    dtype : str
        Of the stored voxels.
    """
    is_large = isinstance(source, nib.Nifti2Header) or max(shape) > 32767
    header = (nib.Nifti2Header if is_large else nib.Nifti1Header)()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    same_grid = np.array_equal(source.get_best_affine(), affine)
    for field in _KEPT:
        header[field] = source[field]
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        header["sform_code"] = 2  # "aligned": the position that we were left to assume
    if same_grid:
        _copy_position(source, header)
        _copy_acquisition(source, header)
    else:
        header.set_qform(affine, int(source["qform_code"]))
        header.set_sform(affine, int(source["sform_code"]) or 2)
    header["pixdim"][4] = source["pixdim"][4] if len(shape) == 4 else 0
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["magic"] = b"n+1" if not is_large else header["magic"]
    header["vox_offset"] = 544 if is_large else 352
    return header


def _copy_position(source: Any, header: Any) -> None:
    """Position, bit for bit: a quaternion made anew from a matrix differs in its last digits."""
    for field in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
        header[field] = source[field]
    for field in ("srow_x", "srow_y", "srow_z"):
        header[field] = source[field]
    header["pixdim"][:4] = source["pixdim"][:4]
    if int(source["sform_code"]) == 0 and int(header["sform_code"]) == 2:
        header.set_sform(source.get_best_affine(), 2)


def _copy_acquisition(source: Any, header: Any) -> None:
    """Which axes were encoded how, and for a series when each slice was taken."""
    header["dim_info"] = source["dim_info"]
    if int(header["dim"][0]) == 4:
        for field in ("slice_code", "slice_start", "slice_end", "slice_duration", "toffset"):
            header[field] = source[field]


def _parse_header(first_bytes: bytes, run: str) -> Any:
    size = int.from_bytes(first_bytes[:4], "little"), int.from_bytes(first_bytes[:4], "big")
    kind = nib.Nifti2Header if 540 in size else nib.Nifti1Header
    if len(first_bytes) < kind.sizeof_hdr or not {348, 540} & set(size):
        raise InputError(
            f"{run}: no NIfTI header found (the file begins with {first_bytes[:8]!r}); "
            "copy the file again or convert it from the scanner's"
        )
    header = kind(first_bytes[: kind.sizeof_hdr], check=False)
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise InputError(
            f"{run}: NIfTI magic {bytes(header['magic'])!r} found; needs one file, .nii or .nii.gz"
        )
    if not 1 <= int(header["dim"][0]) <= 7:
        raise InputError(f"{run}: {int(header['dim'][0])} axes found; the header is damaged")
    return header
