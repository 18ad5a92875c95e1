"""NIfTI headers, checked before anything believes them, and made for what we write."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import InputError
from keepstill.start import without_extras

# Bytes that hold the header of either version of NIfTI, extensions aside.
HEADER_BYTES = 540
GZIP_MAGIC = b"\x1f\x8b"
# Codes of xyzt_units (nifti1.h); any other value is no unit.
_SPACE_UNITS = {1: "m", 2: "mm", 3: "micron"}
_SECONDS = {8: 1.0, 16: 1e-3, 24: 1e-6}
# Header affines that differ by more than this anywhere in the field place the head elsewhere.
_POSITION_TOLERANCE_MM = 1.0
# Voxels whose edges differ by less than this part are of one grid.
_SIZE_TOLERANCE = 1e-3
_MOST_FORM_CODE = 5  # nifti1.h
# Intensity scales beyond these leave no room in a float32.
_SCALES = (1e-20, 1e20)
# A first voxel farther from the origin lies outside any building that has a scanner.
_FARTHEST_MM = 1e5
# Largest cosine between two axes of a grid; more is shear, which no rigid motion can undo.
_MOST_SHEAR = 0.01
_POSITION = (
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "pixdim"),
)
# Fields that stay true of what is made of a run.
_KEPT = (
    *("qform_code", "sform_code", "xyzt_units", "descrip", "aux_file", "toffset"),
    *("intent_code", "intent_name", "intent_p1", "intent_p2", "intent_p3"),
)


@dataclass(frozen=True)
class Layout:
    """What a NIfTI file's header says, checked.

    Attributes
    ----------
    first_bytes : bytes
        Of the file, with its header.
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

    first_bytes: bytes
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    affine: NDArray[np.float64]

    @functools.cached_property
    def header(self) -> Any:
        """The file's header, as nibabel has it."""
        return _parse_header(self.first_bytes, "")

    def facts(self) -> dict[str, Any]:
        """All but the header, for JSON; `layout_of` makes the same of it, without nibabel."""
        return {
            "shape": self.shape,
            "dtype": self.dtype.str,
            "offset": self.offset,
            "slope": self.slope,
            "inter": self.inter,
            "affine": self.affine.tolist(),
        }

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
        unit = int(self.header["xyzt_units"]) & 0x38
        return float(self.header["pixdim"][4]) * _SECONDS.get(unit, 1.0)

    @property
    def space_unit(self) -> str | None:
        """Unit of length: ``m``, ``mm`` or ``micron``; None if the header gives none."""
        return _SPACE_UNITS.get(int(self.header["xyzt_units"]) & 0x07)


def parse_layout(first_bytes: bytes, run: str, affine_source: str = "auto") -> Layout:
    """Layout of a NIfTI file from its first bytes.

    Parameters
    ----------
    first_bytes : bytes
        At least the header; 540 bytes hold either version's.
    run : str
        Named in errors.
    affine_source : str
        ``sform`` or ``qform``; ``auto`` takes the sform if it has a code, else the qform, and
        refuses two that disagree.

    Raises
    ------
    InputError
        If this is no single-file NIfTI header, or one that no file can satisfy.
    """
    header = _parse_header(first_bytes, run)
    for name in ("sform_code", "qform_code"):
        if not 0 <= int(header[name]) <= _MOST_FORM_CODE:
            raise InputError(f"{run}: {name} {int(header[name])} found; the header is damaged")
    n_axes = int(header["dim"][0])
    sizes = [int(size) for size in header["dim"][1 : n_axes + 1]]
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) < 3 or min(sizes) < 1:
        raise InputError(f"{run}: axes {tuple(sizes)} found; a run needs x, y, z and time")
    try:
        dtype = header.get_data_dtype()
    except (_header_error(), KeyError):  # KeyError: a code that NIfTI does not know
        dtype = None
    if dtype is None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(
            f"{run}: data type code {int(header['datatype'])} found; needs real numbers, "
            "8 to 64 bits; convert the file"
        )
    offset = float(header["vox_offset"])
    if not HEADER_BYTES - 192 <= offset <= 2**31:
        raise InputError(f"{run}: voxels begin at byte {offset:g}; the header is damaged")
    slope, inter = _scaling(header, run)
    with np.errstate(all="ignore"):  # what overflows is refused as damaged
        affine = _affine(header, tuple(sizes), affine_source, run)
    return Layout(
        first_bytes=first_bytes,
        shape=tuple(sizes),
        dtype=dtype,
        offset=int(offset),
        slope=slope,
        inter=inter,
        affine=affine,
    )


def layout_of(first_bytes: bytes, facts: dict[str, Any]) -> Layout:
    """The layout of which `Layout.facts` told, and the file's first bytes."""
    known = facts | {"shape": tuple(facts["shape"]), "dtype": np.dtype(facts["dtype"])}
    return Layout(**known | {"first_bytes": first_bytes, "affine": np.array(facts["affine"])})


def _scaling(header: Any, run: str) -> tuple[float, float]:
    """Slope and intercept; a slope of 0 or none means that there is no scaling."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return 1.0, 0.0
    if not (_SCALES[0] < abs(slope) < _SCALES[1] and abs(inter) < _SCALES[1]):
        raise InputError(
            f"{run}: scl_slope {slope:g} and scl_inter {inter:g} found; the header is damaged"
        )
    return slope, inter


def parse_image_layout(first_bytes: bytes, name: str, affine_source: str) -> Layout:
    """Layout of an image in whose space a run ends, as `parse_layout` has it.

    Which of two affines is true is said for the image as for the run; an image that lacks the one
    that was named has but one position.
    """
    header = _parse_header(first_bytes, name)
    has_it = affine_source != "auto" and int(header[f"{affine_source}_code"]) > 0
    return parse_layout(first_bytes, name, affine_source if has_it else "auto")


def _affine(
    header: Any, shape: tuple[int, ...], affine_source: str, run: str
) -> NDArray[np.float64]:
    """The affine that the header's codes and the user choose, checked."""
    with np.errstate(all="ignore"):
        sform = header.get_sform().astype(np.float64)
        qform = _qform(header)
    n_codes = (int(header["sform_code"]) > 0) + (int(header["qform_code"]) > 0)
    if affine_source == "auto" and n_codes == 2:
        _refuse_disagreement(sform, qform, shape, run)
    if affine_source == "qform" or (affine_source == "auto" and not int(header["sform_code"])):
        affine, code = qform, int(header["qform_code"])
    else:
        affine, code = sform, int(header["sform_code"])
    if n_codes == 0:
        affine = header.get_base_affine().astype(np.float64)
    elif code == 0:
        raise InputError(f"{run}: affine_source {affine_source} asked for, but its code is 0")
    with np.errstate(all="ignore"):
        sizes = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    # The bounds are far beyond any scanner; they keep damaged headers out of the arithmetic.
    if not np.isfinite(affine).all() or not (sizes.min() > 1e-3 and sizes.max() < 1e3):
        raise InputError(
            f"{run}: voxel sizes {_listed(sizes)} mm found in the affine; it is singular or "
            "damaged; set sform or qform to the true position"
        )
    farthest_mm = float(np.abs(affine[:3, 3]).max())
    if farthest_mm > _FARTHEST_MM:
        raise InputError(
            f"{run}: the first voxel lies {farthest_mm:.3g} mm from the origin; the affine is "
            "damaged; set sform or qform to the true position"
        )
    directions = affine[:3, :3] / sizes
    shear = np.abs(directions.T @ directions - np.eye(3)).max()
    if shear > _MOST_SHEAR:
        raise InputError(
            f"{run}: the affine is sheared (cosine {shear:.3f} between two axes); rigid motion "
            "needs a rectangular grid; resample the run, or set affine_source"
        )
    return affine


def _qform(header: Any) -> NDArray[np.float64]:
    try:
        return np.asarray(header.get_qform(), dtype=np.float64)
    except (ValueError, _header_error()):  # a quaternion or pixdim that no header can have
        return np.full((4, 4), np.nan)


def _refuse_disagreement(
    sform: NDArray[np.float64], qform: NDArray[np.float64], shape: tuple[int, ...], run: str
) -> None:
    corners = np.array(
        [
            (x, y, z, 1)
            for x in (0, shape[0] - 1)
            for y in (0, shape[1] - 1)
            for z in (0, shape[2] - 1)
        ],
        dtype=np.float64,
    )
    if not np.isfinite(qform).all():
        raise InputError(f"{run}: the qform is damaged; set affine_source: sform to do without it")
    apart_mm = float(np.sqrt((((sform - qform) @ corners.T)[:3] ** 2).sum(axis=0)).max())
    if not apart_mm <= _POSITION_TOLERANCE_MM:
        raise InputError(
            f"{run}: sform and qform differ by {apart_mm:.1f} mm within the field; say which is "
            "true: affine_source: sform or affine_source: qform (keepstill realign: "
            "--affine-source)"
        )


def check_units(layout: Layout, run: str) -> list[str]:
    """Refuse lengths that are not mm, and headers that lost their geometry.

    Returns
    -------
    warnings : list of str

    Raises
    ------
    InputError
    """
    unit = layout.space_unit
    codes = int(layout.header["sform_code"]), int(layout.header["qform_code"])
    if unit == "mm" and codes == (0, 0):
        return [f"{run}: the header gives no position; the field is taken to be centred"]
    if unit == "mm":
        return []
    if unit is not None:
        raise InputError(f"{run}: lengths are in {unit}; needs mm; convert the header")
    sizes = np.sqrt((layout.affine[:3, :3] ** 2).sum(axis=0))
    if np.allclose(sizes, 1.0):
        raise InputError(
            f"{run}: voxels of 1 x 1 x 1 without a unit: the header has lost its geometry; write "
            "the true voxel sizes and xyzt_units into it"
        )
    return [f"{run}: no unit of length in the header; voxels of {_listed(sizes)} are taken as mm"]


def _nibabel() -> Any:
    """nibabel, which takes 0.1 s to import: ranks that are not the first need none of it."""
    return without_extras("nibabel")


def _header_error() -> type[Exception]:
    error: type[Exception] = _nibabel().spatialimages.HeaderDataError
    return error


def _voxel_sizes_mm(layout: Layout) -> NDArray[np.float64]:
    sizes_mm: NDArray[np.float64] = _nibabel().affines.voxel_sizes(layout.affine)
    return sizes_mm


def _listed(sizes: NDArray[np.float64]) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


def grid_in_words(layout: Layout) -> str:
    """Number and edges of a volume's voxels."""
    sizes_mm = _voxel_sizes_mm(layout)
    return f"{' x '.join(map(str, layout.shape[:3]))} voxels of {_listed(sizes_mm)} mm"


def check_same_grid(layout: Layout, other: Layout, run: str, image: str) -> None:
    """Refuse a run whose voxels are not as many and as large as those of an image.

    Where the two lie does not count: sessions never lie alike.

    Raises
    ------
    InputError
    """
    sizes_mm = _voxel_sizes_mm(layout), _voxel_sizes_mm(other)
    if layout.shape[:3] == other.shape[:3] and np.allclose(*sizes_mm, rtol=_SIZE_TOLERANCE):
        return
    raise InputError(
        f"{run}: {grid_in_words(layout)} found, {grid_in_words(other)} in {image}, in whose space "
        "it is to end; set grid: reference to put it on that grid, or grid: own to leave it on its "
        "own (keepstill realign: --grid)"
    )


def check_run_shape(layout: Layout, run: str, in_plane: bool = False) -> None:
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
    if in_plane and min(shape[:2]) >= 2:
        return
    if in_plane:
        raise InputError(f"{run}: axes {shape} found; needs at least 2 voxels along x and y")
    if min(shape[:3]) < 2:
        raise InputError(
            f"{run}: axes {shape} found; rigid motion needs at least 2 voxels along x, y and z; "
            "for single slices set in_plane: true (keepstill realign: --in-plane)"
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
    nib = _nibabel()
    is_large = isinstance(source, nib.Nifti2Header) or max(shape) > 32767
    header = (nib.Nifti2Header if is_large else nib.Nifti1Header)()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    same_position = np.array_equal(source.get_best_affine(), affine)
    same_grid = same_position or np.array_equal(_qform(source), affine)
    for field in _KEPT:
        header[field] = source[field]
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        header["sform_code"] = 2  # "aligned": the position that we were left to assume
    if same_grid:
        _copy_acquisition(source, header)
    if same_position:
        _copy_position(source, header)
    else:
        header.set_qform(affine, int(source["qform_code"]))
        header.set_sform(affine, int(source["sform_code"]) or 2)
    header.set_xyzt_units(xyz="mm", t="sec")
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
    if not all(np.isfinite(header[field]).all() for field in _POSITION):
        affine, code = source.get_best_affine(), int(source["sform_code"])
        header.set_qform(affine, int(source["qform_code"]))
        header.set_sform(affine, code)
    if int(source["sform_code"]) == 0 and int(header["sform_code"]) == 2:
        header.set_sform(source.get_best_affine(), 2)


def _copy_acquisition(source: Any, header: Any) -> None:
    """Which axes were encoded how, and for a series when each slice was taken."""
    header["dim_info"] = source["dim_info"]
    if int(header["dim"][0]) == 4:
        for field in ("slice_code", "slice_start", "slice_end", "slice_duration", "toffset"):
            header[field] = source[field]


def _parse_header(first_bytes: bytes, run: str) -> Any:
    if first_bytes.startswith(GZIP_MAGIC):
        raise InputError(f"{run}: compressed twice; decompress the file once")
    size = int.from_bytes(first_bytes[:4], "little"), int.from_bytes(first_bytes[:4], "big")
    nib = _nibabel()
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
    if int(header["pixdim"][0]) not in (-1, 1):
        header["pixdim"][0] = 1  # as the standard has it
    return header
