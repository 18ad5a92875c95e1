"""Preflight: what is to do and what it will take, before anything starts.

Sizes come from the first bytes of each run, so that thousands of runs cost about a second. They
are estimates of what a run needs at most, rounded upwards where runs differ.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from zlib_ng import zlib_ng

from keepstill.bids import Run
from keepstill.errors import InputError, counted
from keepstill.nifti import (
    GZIP_MAGIC,
    HEADER_BYTES,
    Layout,
    check_run_shape,
    check_same_grid,
    check_units,
    parse_image_layout,
    parse_layout,
)
from keepstill.settings import CHECK_EVERY, RealignSettings
from keepstill.study import Plan, Study

# CPU seconds of a run: 5 to start Python for each step and to draw the page, and 2.9 for the 29.5
# Mvoxel of 64 x 64 x 36 x 200 (2 ranks, degree 5, kernels compiled, AMD EPYC, 2026).
CPU_S_PER_RUN = 5.0
CPU_S_PER_MVOXEL = 0.1
# An echo of a multi-echo run starts Python once, and is resliced and compressed: 1.4 and 1.7 CPU s
# for the same volumes.
CPU_S_PER_ECHO, CPU_S_PER_ECHO_MVOXEL = 1.4, 0.06
# ITK besides, to load and for each volume: 117 CPU s for those of 64 x 64 x 36 x 200.
ITK_CPU_S_PER_RUN, ITK_CPU_S_PER_MVOXEL = 5.0, 4.0
# Written voxels are 0.69 to 0.89 of their size without compression, float32 and int16 alike.
COMPRESSED = 0.9
BYTES_PER_VOXEL = {"float32": 4, "int16": 2}
N_MAPS = 4  # volumes written beside the run, none above float32
TABLE_BYTES_PER_VOLUME = 1000  # confounds and transforms
PAGE_BYTES = 200_000  # page, picture and sidecars
STAGED_BYTES_PER_VOXEL = 4  # of the realigned run, float32, beside the run as it is stored

PEEK_BYTES = 1 << 14
MAX_DEFLATED = 1032  # times; no deflate stream becomes larger (zlib's technical details)
MAX_NAMED = 10
GB, MVOXEL = 1e9, 1e6


@dataclass(frozen=True)
class Needs:
    """What runs will take.

    Attributes
    ----------
    output_bytes : float
        Written to the output directory, all runs together.
    lane_bytes : float
        In the stage root while the largest run is worked on.
    cpu_s : float
        All runs together.
    refused : tuple of (str, str)
        Name of each run that cannot be read or is no series of volumes, and why; not in the
        figures.
    """

    output_bytes: float = 0.0
    lane_bytes: float = 0.0
    cpu_s: float = 0.0
    refused: tuple[tuple[str, str], ...] = ()


def preflight(study: Study, plan: Plan, n_lanes: int = 1) -> Iterator[str]:
    """Lines for the user: runs found, complete and to do, and what those to do will take.

    Parameters
    ----------
    study : Study
    plan : Plan
    n_lanes : int
        Runs that are worked on at a time on this machine, as far as is known.
    """
    yield plan.in_words(study.n_runs)
    yield from study.misnamed.in_words()
    planned = (*plan.runs, *plan.echoes)
    if not planned:
        return
    needs = study_needs(study, planned)
    shared = study.stage_root.parent
    output_free, shared_free = free_bytes(study.output_dir), free_bytes(shared)
    yield f"output: {_gb(needs.output_bytes)}, {_gb(output_free)} free in {study.output_dir}"
    yield f"shared memory: {_gb(needs.lane_bytes)} a lane, {_gb(shared_free)} free in {shared}"
    yield f"time: about {_minutes(needs.cpu_s)}"
    if needs.refused:
        yield _refused_in_words(needs.refused)
    if needs.output_bytes > output_free:
        yield (
            f"warning: the outputs will not fit into {study.output_dir}; free "
            f"{_gb(needs.output_bytes - output_free)} there or choose another output_dir"
        )
    n_lanes = min(n_lanes, len(planned))
    if needs.lane_bytes <= shared_free < n_lanes * needs.lane_bytes:
        yield (
            f"warning: {n_lanes} runs at a time may take {_gb(n_lanes * needs.lane_bytes)} in "
            f"{shared}; what does not fit is staged in {tempfile.gettempdir()}, which is slower; "
            "give each run more cores (config/README.md, ranks and lanes)"
        )
    if needs.lane_bytes > shared_free:
        yield (
            f"warning: the largest run will not fit into {shared}; it is staged in "
            f"{tempfile.gettempdir()} instead, which is slower, if there is room"
        )


def study_needs(study: Study, names: Iterable[str]) -> Needs:
    """What these runs of a study will take."""
    images = Images(study)
    output_bytes = lane_bytes = cpu_s = 0.0
    refused = []
    for name in names:
        try:
            layout = read_layout(study.runs[name].source, name, study.settings.affine_source)
            check_run_shape(layout, name, study.settings.in_plane)
            check_units(layout, name)
            settings, image = study.settings_of(name), images.layout(name)
            _check_shared(layout, image, name, settings)
        except InputError as error:
            refused.append((name, str(error).removeprefix(f"{name}: ")))
            continue
        needs = needs_of(study.runs[name], layout, settings, image)
        output_bytes += needs.output_bytes
        lane_bytes = max(lane_bytes, needs.lane_bytes)
        cpu_s += needs.cpu_s
    return Needs(output_bytes, lane_bytes, cpu_s, tuple(refused))


def _check_shared(
    layout: Layout, image: Layout | None, run: str, settings: RealignSettings
) -> None:
    """Refuse a run whose shared reference is on a grid that was not asked for."""
    name = Path(settings.shared_reference).name
    if name and image and settings.grid == "auto":
        check_same_grid(layout, image, run, name)


def needs_of(
    run: Run, layout: Layout, settings: RealignSettings, image: Layout | None = None
) -> Needs:
    """What one run will take; a multi-echo run and its echoes share out what is written.

    Parameters
    ----------
    run : Run
    layout : Layout
    settings : RealignSettings
    image : Layout, optional
        Of the image in whose space the run ends, if it ends in another than its own.
    """
    grid_voxels = math.prod(image.shape[:3]) if image and settings.grid != "own" else None
    whole = run_needs(layout, settings, grid_voxels)
    if settings.uses_itk and run.leader is None:
        whole = replace(whole, cpu_s=whole.cpu_s + itk_cpu_s(layout, settings))
    if not (run.echoes or run.leader):
        return whole
    without = run_needs(layout, replace(settings, reslice=False), grid_voxels)
    if run.echoes:
        nx, ny, nz, n_volumes = layout.shape
        mean = layout.n_bytes + 4 * nx * ny * nz * n_volumes if run.mean_of else 0  # and an echo
        lane_bytes = whole.lane_bytes + mean
        return replace(whole, output_bytes=without.output_bytes, lane_bytes=lane_bytes)
    mvoxels = (whole.cpu_s - CPU_S_PER_RUN) / CPU_S_PER_MVOXEL
    n_voxels = grid_voxels or math.prod(layout.shape[:3])
    tsnr = n_voxels * BYTES_PER_VOXEL["float32"] * COMPRESSED
    return Needs(
        output_bytes=whole.output_bytes - without.output_bytes + tsnr,
        lane_bytes=without.lane_bytes,
        cpu_s=CPU_S_PER_ECHO + CPU_S_PER_ECHO_MVOXEL * mvoxels,
    )


def run_needs(layout: Layout, settings: RealignSettings, grid_voxels: int | None = None) -> Needs:
    """What one run will take.

    Parameters
    ----------
    layout : Layout
    settings : RealignSettings
    grid_voxels : int, optional
        Voxels of a volume of the output, where its grid is not the run's own.
    """
    nx, ny, nz = layout.shape[:3]
    n_volumes = 1
    for size in layout.shape[3:]:
        n_volumes *= size
    volume_voxels = grid_voxels or nx * ny * nz
    voxels = volume_voxels * n_volumes
    made = voxels * BYTES_PER_VOXEL[settings.output_dtype] if settings.reslice else 0
    maps = N_MAPS * volume_voxels * BYTES_PER_VOXEL["float32"]
    tables = PAGE_BYTES + n_volumes * TABLE_BYTES_PER_VOLUME
    grid = max(volume_voxels, nx * ny * nz)
    n_held = n_volumes  # of the result, or of the residuals that a run's model is fitted to
    if not settings.reslice and not settings.reslices_twice:
        n_held = min(n_volumes, settings.estimate.model_volumes)
    return Needs(
        output_bytes=(made + maps) * COMPRESSED + tables,
        lane_bytes=layout.n_bytes + STAGED_BYTES_PER_VOXEL * grid * n_held,
        cpu_s=CPU_S_PER_RUN + CPU_S_PER_MVOXEL * grid * n_volumes / MVOXEL,
    )


def itk_cpu_s(layout: Layout, settings: RealignSettings) -> float:
    """CPU seconds that ITK adds to a run, as its engine or to check some of its volumes."""
    n_volumes = layout.shape[3] if settings.engine == "itk" else layout.shape[3] / CHECK_EVERY
    mvoxels = math.prod(layout.shape[:3]) * n_volumes / MVOXEL
    return ITK_CPU_S_PER_RUN + ITK_CPU_S_PER_MVOXEL * mvoxels


def read_layout(source: Path, run: str, affine_source: str = "auto") -> Layout:
    """Layout of a run, from the first bytes of its file.

    Raises
    ------
    InputError
        If the file cannot be read, begins with no NIfTI header, or is too small for its header.
    """
    return _read_layout(source, run, lambda peek, name: parse_layout(peek, name, affine_source))


def _read_layout(source: Path, run: str, parse: Callable[[bytes, str], Layout]) -> Layout:
    try:
        if source.is_symlink() and not source.exists():
            raise InputError(
                f"{run}: {source} is a link to a file that is not there; fetch it (datalad get "
                f"{source.name}) or mend the link"
            )
        if not source.is_file() and source.exists():
            raise InputError(f"{run}: {source} is no plain file")
        with source.open("rb", buffering=0) as file:
            first_bytes = file.read(PEEK_BYTES)
            n_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{run}: {source} cannot be read ({error.strerror})") from error
    if first_bytes.startswith(GZIP_MAGIC):
        n_bytes *= MAX_DEFLATED
        first_bytes = _inflated(first_bytes, run)
    layout = parse(first_bytes[:HEADER_BYTES], run)
    if n_bytes < layout.n_bytes:
        raise InputError(
            f"{run}: {_gb(layout.n_bytes)} promised by the header (axes {layout.shape}), at most "
            f"{_gb(n_bytes)} found; the file is truncated or its header is damaged"
        )
    return layout


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder, which need not exist."""
    existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize


def _inflated(first_bytes: bytes, run: str) -> bytes:
    try:
        return bytes(zlib_ng.decompressobj(wbits=31).decompress(first_bytes, HEADER_BYTES))
    except zlib_ng.error as error:  # type: ignore[misc]
        raise InputError(f"{run}: the gzip stream is damaged ({error})") from error


class Images:
    """Headers of the images in whose space runs end, each read once."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._found: dict[str, Layout | str] = {}

    def layout(self, run: str) -> Layout | None:
        """That of a run's image; None if the run ends in its own space.

        Raises
        ------
        InputError
            If it cannot be read, or what it is to be made of cannot.
        """
        scope, image = self._study.made_for(run), self._study.settings_of(run).image
        if image is None:
            return None
        key = scope or str(image)
        if key not in self._found:
            try:
                self._found[key] = self._of_scope(scope) if scope else self._of_file(image)
            except InputError as error:
                self._found[key] = str(error)
        found = self._found[key]
        if isinstance(found, str):
            raise InputError(f"{run}: no {image.name}, in whose space it is to end: {found}")
        return found

    def _of_scope(self, scope: str) -> Layout:
        """Of the first run of a scope, or of the reference that was made while it was readable."""
        first, settings = self._study.firsts[scope], self._study.settings
        try:
            layout = read_layout(first.source, first.name, settings.affine_source)
            check_run_shape(layout, first.name, settings.in_plane)
            check_units(layout, first.name)
        except InputError as error:
            if self._study.has_reference(scope):
                return self._of_file(self._study.reference_path(scope))
            raise InputError(f"it is made of the first run of {scope}, {error}") from error
        return layout

    def _of_file(self, path: Path) -> Layout:
        if not (path.exists() or path.is_symlink()):
            raise InputError(f"it is not in {path.parent}; add it, or choose another reference")
        source = self._study.settings.affine_source
        return _read_layout(
            path, path.name, lambda peek, name: parse_image_layout(peek, name, source)
        )


def _refused_in_words(refused: tuple[tuple[str, str], ...]) -> str:
    names = [name for name, _ in refused[:MAX_NAMED]]
    rest = len(refused) - len(names)
    more = f" and {rest} more" if rest else ""
    return (
        f"to be refused, and not in these figures: {counted(len(refused), 'run')}, "
        f"{', '.join(names)}{more}; the first: {refused[0][1]}"
    )


def _gb(n_bytes: float) -> str:
    """Bytes as GB, with two figures, never fewer than all before the point."""
    gb = n_bytes / GB
    if gb < 0.01:
        return "less than 0.01 GB"
    return f"{gb:,.0f} GB" if gb >= 10 else f"{gb:.2g} GB"


def _minutes(cpu_s: float) -> str:
    minutes = cpu_s / 60
    shown = f"{minutes:,.0f}" if minutes >= 10 else f"{minutes:.1f}"
    return f"{shown} CPU minutes"
