"""Collecting a realigned run: from the stage root to the output directory, manifest last."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from keepstill import figures, geometry, write
from keepstill.confounds import (
    FILTERED,
    OUTLIER,
    Columns,
    is_known_change,
    is_steady_change,
    make_confounds,
)
from keepstill.errors import OutputError, counted
from keepstill.files import Written, alone, put_file, put_text
from keepstill.manifest import (
    Manifest,
    outputs_of,
    remember_inputs,
    withdraw_manifest,
    write_manifest,
)
from keepstill.maps import Moments, temporal_moments
from keepstill.masks import brain_mask, dilated
from keepstill.nifti import made_header
from keepstill.realigned import OUTPUTS, Realigned, open_result
from keepstill.reslice import carried_mask, coverage
from keepstill.settings import RealignSettings
from keepstill.sidecars import BIDSIGNORE, README, dataset_description, sidecar
from keepstill.team import in_threads

T = TypeVar("T")


@dataclass(frozen=True)
class Findings:
    """What is worked out from a realigned run.

    Attributes
    ----------
    brain, coverage : (nz, ny, nx) bool
        Where the brain is; where every volume that was realigned has data.
    before, after : Moments or None
        Of the run as it came, on its own grid, and realigned; None where nothing was resliced.
    confounds : dict of str to (n,) arrays
        Columns of the table.
    """

    brain: NDArray[np.bool_]
    coverage: NDArray[np.bool_]
    before: Moments | None
    after: Moments | None
    confounds: Columns


def collect_run(
    stage_dir: Path, output_dir: Path, settings: RealignSettings, n_threads: int = 1
) -> dict[str, Any]:
    """Write all outputs of a realigned run and, last, the manifest that makes it complete.

    Parameters
    ----------
    stage_dir : Path
    output_dir : Path
        Root of the derivatives, or any folder for a run outside BIDS.
    settings : RealignSettings
    n_threads : int
        For figures and compression; the bytes do not depend on it.

    Returns
    -------
    summary : dict
        Figures of the run, as in the manifest.

    Raises
    ------
    OutputError
        If an output cannot be written.
    """
    result = open_result(stage_dir, settings)
    folder = result.run.found["folder"]
    _refuse_own_input(result, output_dir, output_dir / PurePosixPath(folder))
    paths_of_run = _possible_paths(result, output_dir / PurePosixPath(folder))
    with writing(result.run.run, output_dir, paths_of_run):
        if folder:
            describe_dataset(output_dir, result.run.found["bids_dir"])
        findings = _find(result, n_threads)
        summary = _summary(result, findings)
        outdated = withdraw_manifest(output_dir, result.run.run)
        written: dict[Path, Written] = {}
        try:
            written = _write_all(result, findings, output_dir, n_threads)
            _complete(result, output_dir, outputs_of(output_dir, written), summary)
        except BaseException:
            outdated |= paths_of_run
            written = {}  # half of a run's files would pass for the run
            raise
        finally:
            for path in outdated - set(written):
                path.unlink(missing_ok=True)  # made by other settings, and no longer true
    return summary


def _possible_paths(result: Realigned, folder: Path) -> set[Path]:
    paths = {folder / result.name(output) for output in OUTPUTS}
    return paths | {_beside(path) for path in paths}


def _refuse_own_input(result: Realigned, output_dir: Path, folder: Path) -> None:
    """Refuse to write over the run itself, or over its reference.

    Raises
    ------
    OutputError
    """
    inputs = [Path(result.run.found["source"]), result.settings.image]
    for output in OUTPUTS:
        path = folder / result.name(output)
        given = [path for path in inputs if path and path.exists()]
        if path.exists() and any(path.samefile(one) for one in given):
            raise OutputError(
                f"{result.run.run}: {path.name} in {output_dir} is the input itself and would be "
                "written over; choose another output folder"
            )


def _complete(
    result: Realigned,
    output_dir: Path,
    outputs: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> None:
    """Write the manifest, and in a data set the note that saves hashing the input again."""
    found = result.run.found
    manifest = Manifest(
        run=result.run.run,
        input_sha256=found["input"]["sha256"],
        input_bytes=found["input"]["bytes"],
        metadata=found["metadata"],
        settings=result.settings,
        outputs=outputs,
        summary=summary,
        warnings=result.warnings,
    )
    if found["folder"]:
        remember_inputs(output_dir, result.run.run, found["input"])
    write_manifest(output_dir, manifest)


@contextlib.contextmanager
def as_output_error(run: str, output_dir: Path) -> Iterator[None]:
    """What the system says of a run's outputs, as an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{run}: cannot write below {output_dir} ({error.strerror or error}); "
            "free space there or choose another output_dir"
        ) from error


@contextlib.contextmanager
def writing(run: str, output_dir: Path, paths: Set[Path]) -> Iterator[None]:
    """Alone in writing a run's outputs, of which a killed call has left no parts.

    Two calls may be at work on one run; else the first to fail would remove what the other wrote.
    """
    lock = output_dir / "logs" / "identity" / f".{run}.lock"
    with as_output_error(run, output_dir), alone(lock):
        for folder in {path.parent for path in paths}:
            for part in folder.glob(".*.part"):  # as `put_file` names them
                if folder / part.name[1:].rsplit(".", 2)[0] in paths:
                    part.unlink(missing_ok=True)
        yield


def describe_dataset(output_dir: Path, bids_dir: str | None) -> None:
    """Write what describes the derivative data set as a whole, the same every time."""
    description = dataset_description(output_dir, bids_dir)
    write.put_json(output_dir / "dataset_description.json", description)
    put_text(output_dir / "README.md", README)
    put_text(output_dir / ".bidsignore", "\n".join(BIDSIGNORE) + "\n")


def _find(result: Realigned, n_threads: int) -> Findings:
    brain, covered = brain_mask(result.reference), _covered(result, n_threads)
    if result.missing is not None and result.is_on_own_grid:
        brain &= ~result.missing
    before = after = series = None
    if result.series is not None:
        resliced = result.series
        chosen, good = _compared(result), np.flatnonzero(~result.failed)
        own, new = result.run.voxels.shape[1:], resliced.shape[1:]
        before = temporal_moments(result.run.slab, chosen, own, n_threads)
        after = temporal_moments(lambda t, z: resliced[t, z], chosen, new, n_threads)
        series = figures.series_figures(resliced, good, brain & covered, n_threads)
    return Findings(brain, covered, before, after, make_confounds(result, series, brain))


def _compared(result: Realigned) -> NDArray[np.intp]:
    """Volumes that tell how steady the images are: realigned, and in the steady state."""
    chosen = np.flatnonzero(~result.failed & ~result.non_steady)
    return chosen if chosen.size else np.arange(result.run.n_volumes)


def _covered(result: Realigned, n_threads: int) -> NDArray[np.bool_]:
    """Where all volumes that were realigned have data: beyond, figures would see the border."""
    good = np.flatnonzero(~result.failed)
    shares = [good[k::n_threads] for k in range(n_threads)]
    covered = np.logical_and.reduce(
        in_threads(n_threads, lambda share: _seen(result, share), shares)
    )
    if result.missing is not None and result.is_on_own_grid:
        covered &= ~dilated(result.missing, 1)
    return covered


def _seen(result: Realigned, volumes: NDArray[Any]) -> NDArray[np.bool_]:
    """Where all of some volumes have data, (nz, ny, nx)."""
    nz, ny, nx = result.reference.shape
    matrices = result.moving_from_reference[volumes]
    return coverage(matrices, result.own_grid, result.affine, (nz, ny, nx))


def _summary(result: Realigned, findings: Findings) -> dict[str, Any]:
    """Figures of the whole run; None for one that is not known."""
    table, mask = findings.confounds, findings.brain & findings.coverage
    fd_mm, tr_s = table["framewise_displacement"], result.run.found["tr_s"]
    steady = is_steady_change(result) & is_known_change(result)
    failed = np.flatnonzero(result.failed)
    flagged = sum(table[name] for name in table if name.startswith(OUTLIER))
    before = findings.before.within(_in_run(mask, result)) if findings.before else None
    after = findings.after.within(mask) if findings.after else None
    return {
        "n_volumes": result.run.n_volumes,
        "tr_s": None if tr_s is None else _number(tr_s),
        "mean_fd_mm": _mean(fd_mm),
        "max_fd_mm": _number(np.nanmax(fd_mm)) if np.isfinite(fd_mm).any() else None,
        "mean_fd_filtered_mm": _mean(table[FILTERED]) if FILTERED in table else None,
        "median_expected_error_mm": _median_error_mm(table),
        "n_outliers": int(np.sum(flagged * ~result.failed)),
        "n_failed": int(failed.size),
        "failed_volumes": failed.tolist(),
        "n_non_steady": int(result.non_steady.sum()),
        "mean_dvars": _mean(table["dvars"][steady]),
        "mean_std_dvars": _mean(table["std_dvars"][steady]),
        "brain_coverage": _number(mask.sum() / max(int(findings.brain.sum()), 1)),
        "tsnr_before": _number(before[0]) if before else None,
        "tsnr_after": _number(after[0]) if after else None,
        "variance_before": _number(before[1]) if before else None,
        "variance_after": _number(after[1]) if after else None,
        "engine": result.engine,
        "check": result.check and {"engine": f"ITK {result.itk_version}"} | result.check,
    }


def _in_run(mask: NDArray[np.bool_], result: Realigned) -> NDArray[np.bool_]:
    """A mask of the result where the run as it came shows the same tissue."""
    if result.is_on_own_grid and np.array_equal(result.run_from_reference, np.eye(4)):
        return mask
    reference_from_run = geometry.inverse(result.run_from_reference)
    return carried_mask(mask, result.affine, result.own_grid, reference_from_run)


def _median_error_mm(table: Columns) -> float | None:
    """Median over the volumes that were realigned to another, the reference left out."""
    errors_mm = table["expected_error"][table["status"] == "ok"]
    known = errors_mm[np.isfinite(errors_mm)]
    return _number(np.median(known)) if known.size else None


def _number(value: float) -> float:
    """Nine significant digits: enough for any use, and the same on every machine."""
    return float(f"{float(value):.9g}")


def _mean(values: NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)]
    return _number(float(finite.mean())) if finite.size else None


def _write_all(
    result: Realigned, findings: Findings, output_dir: Path, n_threads: int
) -> dict[Path, Written]:
    """Write every output and its sidecar."""
    folder = output_dir / PurePosixPath(result.run.found["folder"])
    table = {name: column.tolist() for name, column in findings.confounds.items()}
    put: dict[str, Callable[[Path], Written]] = {}
    if result.writes_series:
        put["bold"] = lambda path: _put_series(result, findings.coverage, path, n_threads)
    put["confounds"] = lambda path: write.put_table(path, table)
    transforms = write.itk_transforms(result.moving_from_reference).encode()
    put["transforms"] = lambda path: put_file(path, [transforms])
    for output, volume in _volumes(result, findings).items():
        header = _header(result, output, volume)
        put[output] = partial(write.put_volume, header=header, volume=volume)

    def put_output(output: str) -> dict[Path, Written]:
        path = folder / result.name(output)
        written = put[output](path)
        fields = sidecar(result, output, output_dir, table if output == "confounds" else ())
        return {path: written, _beside(path): write.put_json(_beside(path), fields)}

    first, *others = put  # the series, if there is one, is by far the largest
    written = _beside_each_other(
        lambda: put_output(first), lambda: [put_output(other) for other in others], n_threads
    )
    return {path: what for each in written for path, what in each.items()}


def _beside_each_other(
    longest: Callable[[], T], others: Callable[[], list[T]], n_threads: int
) -> list[T]:
    """Results of the longest work and of others, which a second thread does if there may be one.

    Writing small files is mostly waiting for the disk. The longest work stays with this thread:
    what interrupts it ends it at once.
    """
    if n_threads == 1:
        return [longest(), *others()]
    with ThreadPoolExecutor(1) as pool:
        meanwhile = pool.submit(others)
        return [longest(), *meanwhile.result()]


def _volumes(result: Realigned, findings: Findings) -> dict[str, NDArray[Any]]:
    """Outputs that are one volume, (nz, ny, nx)."""
    volumes: dict[str, NDArray[Any]] = {
        "boldref": result.reference,
        "brain": findings.brain.astype(np.uint8),
        "coverage": findings.coverage.astype(np.uint8),
    }
    if findings.before and findings.after:
        volumes["tsnr_before"] = findings.before.tsnr()
        volumes["tsnr_after"] = findings.after.tsnr() * findings.coverage
    return volumes


def _put_series(
    result: Realigned, covered: NDArray[np.bool_], path: Path, n_threads: int
) -> Written:
    dtype, shape = result.settings.output_dtype, (result.run.n_volumes, *result.reference.shape)
    header = made_header(result.run.layout.header, result.affine, shape[::-1], dtype)
    header["pixdim"][4] = result.run.found["tr_s"] or 0
    return write.put_series(path, header, lambda: _as_written(result, covered), n_threads)


def _as_written(result: Realigned, covered: NDArray[np.bool_]) -> Iterator[NDArray[np.float32]]:
    """Volumes as the realigned run's file holds them.

    The ranks leave 0 outside a volume's field, for figures of all volumes need numbers; what the
    settings want there is put in their place here.
    """
    settings = result.settings
    assert result.series is not None
    nothing = np.float32(np.nan if settings.outside == "nan" else 0)
    for t, volume in enumerate(result.series):
        has_data = [covered] if settings.common_field else []
        if settings.outside == "nan":
            has_data.append(_seen(result, np.array([t])))
        yield np.where(np.logical_and.reduce(has_data), volume, nothing) if has_data else volume


def _header(result: Realigned, output: str, volume: NDArray[Any]) -> Any:
    """Header of one volume, on the run's own grid for what describes the run as it came."""
    layout = result.run.layout
    affine = layout.affine if output == "tsnr_before" else result.affine
    return made_header(layout.header, affine, volume.shape[::-1], str(volume.dtype))


def _beside(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".gz").rsplit(".", 1)[0] + ".json")


def summary_line(run: str, summary: dict[str, Any]) -> str:
    """One line for people: what the run was like."""
    fd_mm = summary["mean_fd_mm"]
    shown = "n/a" if fd_mm is None else f"{fd_mm:.3f} mm"
    failed = summary["failed_volumes"]
    tail = f"; volumes that failed: {', '.join(map(str, failed))}" if failed else ""
    return (
        f"{run}: {counted(summary['n_volumes'], 'volume')}, mean framewise displacement {shown}, "
        f"{counted(summary['n_outliers'], 'outlier')}, {summary['n_failed']} failed{tail}"
        f"{_check_in_words(summary['check'])}"
    )


def _check_in_words(check: dict[str, Any] | None) -> str:
    """How far ITK is from what was found, for the end of a line."""
    if not check:
        return ""
    failed = check["failed_volumes"]
    tail = f", and could not realign volumes {', '.join(map(str, failed))}" if failed else ""
    if itk_only := check["itk_only_volumes"]:
        tail += f", and could realign {counted(len(itk_only), 'volume')} that failed"
    if not check["volumes"]:
        return f"; {check['engine']} has none to compare{tail}"
    return (
        f"; {check['engine']} differs by {check['median_mm']:.3f} mm (median), "
        f"{check['worst_mm']:.3f} mm (worst, volume {check['worst_volume']}) in "
        f"{counted(len(check['volumes']), 'volume')}{tail}"
    )
