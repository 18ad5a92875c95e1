"""Applying given transforms to a run, in one interpolation, on any grid."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill import __version__, geometry, write
from keepstill.bids import derivative_name, relative_reference, sidecar_beside
from keepstill.errors import OutputError, SettingsError
from keepstill.masks import dilated
from keepstill.moving import Coefficients, prepare_moving
from keepstill.nifti import made_header
from keepstill.read import StagedRun, read_volume
from keepstill.reslice import coverage, extend_volume, reslice_volume
from keepstill.settings import RealignSettings
from keepstill.sidecars import carried_fields, reslicing_fields
from keepstill.smooth import fill_missing
from keepstill.transforms import Space, read_any

ENDINGS = (".nii", ".nii.gz")
# A grid of more voxels fits in no memory that a volume may take.
_MOST_VOXELS = 1 << 30
_SHAPING = ("interpolation_degree", "output_dtype", "outside", "common_field", "non_negative")


@dataclass(frozen=True)
class Grid:
    """Where the resliced volumes lie.

    Attributes
    ----------
    affine : (4, 4) float64
        World mm from voxel.
    shape : (nx, ny, nz)
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Wanted:
    """What the caller asks for.

    Attributes
    ----------
    transforms : Path
    reference : Path or None
        A 3-D NIfTI file whose grid the volumes are put on; None for the run's own grid.
    voxel_mm : three floats or None
        Edges of the voxels, if they are to be others than the grid's.
    settings : RealignSettings
        Those of reslicing count.
    """

    transforms: Path
    reference: Path | None
    voxel_mm: tuple[float, ...] | None
    settings: RealignSettings


@dataclass(frozen=True)
class Work:
    """A run with its transforms, ready to be resliced.

    Attributes
    ----------
    run : StagedRun
    moving_from_reference : (n, 4, 4) float64
    grid : Grid
    settings : RealignSettings
    common : (nz, ny, nx) bool or None
        Where all volumes have data, if only that is wanted.
    """

    run: StagedRun
    moving_from_reference: NDArray[np.float64]
    grid: Grid
    settings: RealignSettings
    common: NDArray[np.bool_] | None


def prepare_work(run: StagedRun, wanted: Wanted) -> Work:
    """A staged run with the transforms and on the grid that are wanted.

    Raises
    ------
    InputError
        If the transforms or the reference cannot be read, or do not belong to the run.
    SettingsError
        If the voxels that are asked for are of no use.
    """
    own = _own_grid(run)
    space = Space(own.affine, own.shape, run.n_volumes, lambda t: fill_missing(run.volume(t))[0])
    matrices = read_any(wanted.transforms, space)
    grid = own
    if wanted.reference is not None:
        volume, affine = read_volume(wanted.reference, wanted.settings.affine_source)
        nz, ny, nx = volume.shape
        grid = Grid(affine, (nx, ny, nz))
    if wanted.voxel_mm is not None:
        grid = with_voxels(grid, np.array(wanted.voxel_mm))
    common = None
    if wanted.settings.common_field:
        failed = _failed_volumes(wanted.transforms)
        kept = [t for t in range(run.n_volumes) if t not in failed]
        common = _common_field(run, matrices[kept], grid)
    return Work(run, matrices, grid, wanted.settings, common)


def with_voxels(grid: Grid, voxel_mm: NDArray[np.float64]) -> Grid:
    """A grid with other voxels about the same centre.

    It reaches as far as there are whole voxels between the centres of the old grid's first and
    last ones, so that no value has to be made up beyond them.

    Raises
    ------
    SettingsError
        If the edges are no lengths, or there would be too many voxels.
    """
    sizes_mm, shape = geometry.voxel_sizes_mm(grid.affine), np.array(grid.shape)
    listed = " ".join(f"{edge:g}" for edge in voxel_mm)
    if not (np.isfinite(voxel_mm).all() and (voxel_mm > 0).all()):
        raise SettingsError(f"voxel_mm: {listed} found; needs three edges above 0 mm")
    if np.allclose(voxel_mm, sizes_mm, rtol=1e-6, atol=0):
        return grid
    sizes = np.floor((shape - 1) * sizes_mm / voxel_mm + 1e-6) + 1
    if float(np.prod(sizes)) > _MOST_VOXELS:
        raise SettingsError(
            f"voxel_mm: {listed} makes {np.prod(sizes):.3g} voxels a volume; needs larger edges"
        )
    affine = grid.affine.copy()
    affine[:3, :3] *= voxel_mm / sizes_mm
    centre_mm = geometry.field_centre_mm(grid.affine, grid.shape)
    affine[:3, 3] = centre_mm - affine[:3, :3] @ ((sizes - 1) / 2)
    return Grid(affine, (int(sizes[0]), int(sizes[1]), int(sizes[2])))


def resliced_volumes(work: Work, n_threads: int) -> Iterator[NDArray[np.float32]]:
    """All volumes in their order, (nz, ny, nx); a few are under way at once."""
    local = threading.local()

    def resliced(t: int) -> NDArray[np.float32]:
        if not hasattr(local, "coefficients"):
            nz, ny, nx = work.run.voxels.shape[1:]
            local.coefficients = Coefficients((nz, ny, nx))
        return _resliced(work, t, local.coefficients)

    with ThreadPoolExecutor(n_threads) as pool:
        yield from write.ahead(pool, resliced, range(work.run.n_volumes), n_threads)


def _resliced(work: Work, t: int, coefficients: Coefficients) -> NDArray[np.float32]:
    run, settings, grid = work.run, work.settings, work.grid
    moving = prepare_moving(
        fill_missing(run.volume(t))[0], settings.interpolation_degree, coefficients
    )
    out = np.empty(grid.shape[::-1], np.float32)
    matrix, affine = work.moving_from_reference[t], run.layout.affine
    reslice_volume(out, moving, affine, matrix, grid.affine)
    if settings.outside == "nearest":
        extend_volume(out, moving, affine, matrix, grid.affine)
    if settings.non_negative:
        np.maximum(out, np.float32(0), out=out)
    nothing = np.float32(np.nan if settings.outside == "nan" else 0)
    if settings.outside == "nan":
        out[~_seen(run, matrix[None], grid)] = nothing
    if work.common is not None:
        out[~work.common] = nothing
    return out


def write_resliced(work: Work, wanted: Wanted, path: Path, n_threads: int) -> None:
    """Write the resliced run and its sidecar.

    Raises
    ------
    OutputError
        If they cannot be written, or would be written over an input.
    """
    run, settings, grid = work.run, work.settings, work.grid
    inputs = [Path(run.found["source"]), wanted.transforms, wanted.reference]
    if any(given and path.exists() and path.samefile(given) for given in inputs):
        raise OutputError(f"{run.run}: {path} is an input; choose another name")
    shape = (*grid.shape, run.n_volumes)
    header = made_header(run.layout.header, grid.affine, shape, settings.output_dtype)
    header["pixdim"][4] = run.found["tr_s"] or 0
    try:
        write.put_series(path, header, lambda: resliced_volumes(work, n_threads), n_threads)
        write.put_json(sidecar_beside(path), _sidecar(work, wanted, path.parent))
    except OSError as error:
        raise OutputError(
            f"{run.run}: cannot write {path} ({error.strerror or error}); free space there or "
            "choose another name"
        ) from error


def output_path(out: Path, run: str) -> Path:
    """The file that is asked for, or one in the folder that is."""
    if out.name.endswith(ENDINGS) and not out.is_dir():
        return out
    return out / derivative_name(run, "bold.nii.gz", {"desc": "hmc"})


def _sidecar(work: Work, wanted: Wanted, folder: Path) -> dict[str, Any]:
    run, settings = work.run, work.settings
    inputs = [Path(run.found["source"]), wanted.transforms]
    fields: dict[str, Any] = {}
    if wanted.reference is not None:
        inputs.append(wanted.reference)
        fields["SpatialReference"] = relative_reference(wanted.reference.absolute(), folder)
    return (
        carried_fields(run)
        | reslicing_fields(settings)
        | fields
        | {
            "Description": "The run with given transforms applied, interpolated once by a B-spline",
            "Sources": [relative_reference(path.absolute(), folder) for path in inputs],
            "KeepstillVersion": __version__,
            "KeepstillSettings": {name: getattr(settings, name) for name in _SHAPING},
        }
    )


def _own_grid(run: StagedRun) -> Grid:
    nx, ny, nz = run.layout.shape[:3]
    return Grid(run.layout.affine, (nx, ny, nz))


def _seen(run: StagedRun, matrices: NDArray[np.float64], grid: Grid) -> NDArray[np.bool_]:
    """Where all of some volumes have data, (nz, ny, nx)."""
    own, (nx, ny, nz) = _own_grid(run), grid.shape
    return coverage(matrices, (own.affine, own.shape), grid.affine, (nz, ny, nx))


def _common_field(run: StagedRun, matrices: NDArray[np.float64], grid: Grid) -> NDArray[np.bool_]:
    """Where all volumes have data, as the coverage mask of a realigned run says."""
    covered = _seen(run, matrices, grid)
    own = _own_grid(run)
    if grid.shape != own.shape or not np.array_equal(grid.affine, own.affine):
        return covered
    holes = (fill_missing(run.volume(t))[1] for t in range(run.n_volumes))
    for missing in holes:
        if missing is not None and not missing.all():
            covered &= ~dilated(missing, 1)
    return covered


def _failed_volumes(transforms: Path) -> frozenset[int]:
    """Volumes that could not be realigned, if keepstill's JSON beside the transforms says so."""
    try:
        values = json.loads(transforms.with_suffix(".json").read_text(encoding="utf-8"))
        return frozenset(values["FailedVolumes"])
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()
