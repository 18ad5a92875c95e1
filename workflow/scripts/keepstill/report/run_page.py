"""A run's page: its motion as a picture, its figures, settings, warnings and files."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill.files import put_text
from keepstill.report.against_truth import TruthError, error_against
from keepstill.report.render import number, render
from keepstill.report.run_record import (
    MOTION_COLUMNS,
    Confounds,
    RunRecord,
    consecutive,
    finite_mean,
    flatten,
    read_confounds,
    read_run,
)
from keepstill.settings import RealignSettings

FIT_COLUMNS = ("iterations", "cost", "overlap")
ERROR_COLUMN = "expected_error"


def write_run_page(manifest: Path, output_dir: Path, truth: Path | None = None) -> None:
    """Write ``pages/<run>.html`` below `output_dir`, and its pictures in ``figures``.

    Parameters
    ----------
    manifest, output_dir : Path
    truth : Path, optional
        True transforms of a simulated run.

    Raises
    ------
    InputError
        If the manifest, the table of confounds that it names, or the truth cannot be read.
    """
    # matplotlib: 0.5 s, needed only here
    from keepstill.report.figures import motion_svg, picture_height
    from keepstill.report.slices import find_images, slices_svg

    record = read_run(manifest)
    confounds = read_confounds(
        output_dir / record.confounds, MOTION_COLUMNS + FIT_COLUMNS, (ERROR_COLUMN,)
    )
    error = error_against(truth, record, confounds, output_dir) if truth else None
    images = find_images(output_dir, record.outputs)
    page = render(
        "run.html.j2",
        record=record,
        alternative=describe(record, confounds, error),
        picture_height=round(96 * picture_height(5 if error else 4)),
        has_slices=bool(images),
        figures=_summary_figures(record, confounds) + _error_figures(error),
        failures=_failures(record, confounds),
        failed_volumes=name_volumes(confounds.failed),
        outlier_volumes=name_volumes(confounds.outliers),
        non_steady_volumes=name_volumes(confounds.non_steady),
        settings=flatten(record.settings),
        defaults=flatten(asdict(RealignSettings())),
        manifest_name=manifest.name,
    )
    figures = output_dir / "figures"
    put_text(figures / f"{record.run}.svg", motion_svg(record, confounds, error))
    if images:
        put_text(figures / f"{record.run}_slices.svg", slices_svg(record.run, images))
    put_text(output_dir / "pages" / f"{record.run}.html", page)


def name_volumes(volumes: NDArray[np.intp]) -> str:
    """Ascending volume numbers in words, neighbours as a stretch: ``7, 12–15``."""
    return ", ".join(
        str(first) if first == last else f"{first}–{last}" for first, last in consecutive(volumes)
    )


def describe(record: RunRecord, confounds: Confounds, error: TruthError | None = None) -> str:
    """Say what the picture shows, for those who cannot see it."""
    summary = record.summary
    panels = (
        "four panels: translation, rotation, framewise displacement and standardised DVARS. "
        if error is None
        else "five panels: translation, rotation, framewise displacement, standardised DVARS and "
        f"error against truth, mean {number(error.mean_mm, 4)} mm. "
    )
    return (
        f"Head motion of {record.run} over {len(confounds.status)} volumes in {panels}"
        f"Mean framewise displacement {number(summary['mean_fd_mm'], 3)} mm, "
        f"largest {number(summary['max_fd_mm'], 3)} mm; {summary['n_outliers']} outlier volumes; "
        f"failed volumes: {name_volumes(confounds.failed) or 'none'}."
    )


def _failures(record: RunRecord, confounds: Confounds) -> list[tuple[str, ...]]:
    """Volume, time (s), iterations, cost and overlap of each failed volume."""
    tr_s = record.summary["tr_s"]
    iterations, cost, overlap = (confounds.columns[name] for name in FIT_COLUMNS)
    return [
        (
            str(volume),
            number(tr_s and volume * tr_s, 1),
            number(iterations[volume]),
            f"{cost[volume]:.4g}" if np.isfinite(cost[volume]) else number(None),
            number(100 * overlap[volume]),
        )
        for volume in confounds.failed
    ]


def _summary_figures(record: RunRecord, confounds: Confounds) -> list[tuple[str, str, str]]:
    """Name, value, and unit or share, of each figure on the page."""
    summary, columns = record.summary, confounds.columns
    n_volumes, tr_s = summary["n_volumes"], summary["tr_s"]
    good = confounds.status != "failed"
    outliers, failed = summary["n_outliers"], summary["n_failed"]
    return [
        ("Volumes", str(n_volumes), ""),
        ("Repetition time", number(tr_s, 3), "s"),
        ("Duration", number(tr_s and n_volumes * tr_s / 60, 1), "min"),
        ("Mean framewise displacement", number(summary["mean_fd_mm"], 3), "mm"),
        *_filtered_figure(summary),
        ("Largest framewise displacement", number(summary["max_fd_mm"], 3), "mm"),
        ("Largest translation", number(_largest(columns, "trans", good), 2), "mm"),
        ("Largest rotation", number(float(np.rad2deg(_largest(columns, "rot", good))), 2), "°"),
        ("Outlier volumes", str(outliers), f"({number(100 * outliers / n_volumes, 1)} %)"),
        ("Failed volumes", str(failed), f"({number(100 * failed / n_volumes, 1)} %)"),
        ("Mean expected error", number(finite_mean(columns[ERROR_COLUMN][good]), 4), "mm"),
        *_check_figures(summary),
        ("Mean standardised DVARS", number(summary.get("mean_std_dvars"), 3), ""),
        ("Brain in every volume", number(_percent(summary.get("brain_coverage")), 1), "%"),
        (
            "Temporal SNR before → after",
            f"{number(summary['tsnr_before'], 1)} → {number(summary['tsnr_after'], 1)}",
            "",
        ),
    ]


def _filtered_figure(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """As `_summary_figures`, of displacement without breathing, where that was asked for."""
    mean_mm = summary.get("mean_fd_filtered_mm")
    return [] if mean_mm is None else [("… without breathing", number(mean_mm, 3), "mm")]


def _check_figures(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """As `_summary_figures`, of how far ITK is from what was found, where it was asked."""
    check = summary.get("check")
    if not check:
        return []
    median, worst = (number(check[name], 3) for name in ("median_mm", "worst_mm"))
    return [(f"{check['engine']} differs by (median, worst)", f"{median}, {worst}", "mm")]


def _error_figures(error: TruthError | None) -> list[tuple[str, str, str]]:
    """As `_summary_figures`, of a simulated run's error."""
    if error is None:
        return []
    return [
        ("Mean error against truth", number(error.mean_mm, 4), "mm"),
        ("Worst error against truth", number(error.worst_mm, 4), "mm"),
        ("Cramér–Rao bound of the mean", number(error.bound_mm, 4), "mm"),
    ]


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _largest(columns: dict[str, NDArray[np.float64]], kind: str, good: NDArray[np.bool_]) -> float:
    values = np.abs([columns[f"{kind}_{axis}"][good] for axis in "xyz"])
    return float(np.max(values, initial=-np.inf, where=np.isfinite(values)))
