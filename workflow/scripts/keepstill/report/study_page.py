"""The study's page: every run with its figures, the run that moved most on top."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill.files import put_text
from keepstill.manifest import MANIFESTS
from keepstill.report.render import render
from keepstill.report.run_record import (
    Confounds,
    RunRecord,
    flatten,
    read_confounds,
    read_run,
)

SPARK_WIDTH, SPARK_HEIGHT = 120, 22  # px
SPARK_POINTS = 60  # a run of any length costs the page at most about 400 bytes
SPARK_TOP = 2.0  # top of the sparkline, in thresholds; higher values are cut off


@dataclass(frozen=True)
class StudyRow:
    """A run in the table.

    Attributes
    ----------
    record : RunRecord
    mean_std_dvars : float or None
    displacement, failures : str
        SVG path data of the sparkline: framewise displacement, and ticks at failed volumes.
    """

    record: RunRecord
    mean_std_dvars: float | None
    displacement: str
    failures: str


def write_study_page(output_dir: Path) -> None:
    """Write ``index.html`` of all runs with a manifest in ``manifests`` below `output_dir`.

    Raises
    ------
    InputError
        If a manifest, or the table of confounds that it names, cannot be read.
    """
    manifests = sorted((output_dir / MANIFESTS).glob("*.json"))
    rows = sorted((_study_row(path, output_dir) for path in manifests), key=_most_motion_first)
    records = [row.record for row in rows]
    page = render(
        "study.html.j2",
        rows=rows,
        totals=_totals([record.summary for record in records]),
        differences=name_differences(records),
        spark=(SPARK_WIDTH, SPARK_HEIGHT, SPARK_TOP),
    )
    put_text(output_dir / "index.html", page)


def _study_row(manifest: Path, output_dir: Path) -> StudyRow:
    record = read_run(manifest)
    confounds = read_confounds(output_dir / record.confounds, ("framewise_displacement",))
    return StudyRow(
        record=record,
        mean_std_dvars=record.summary.get("mean_std_dvars"),
        displacement=sparkline(_in_thresholds(record, confounds)),
        failures=_failure_ticks(confounds),
    )


def _most_motion_first(row: StudyRow) -> tuple[float, str]:
    mean_fd_mm = row.record.summary["mean_fd_mm"]
    return (math.inf if mean_fd_mm is None else -mean_fd_mm, row.record.run)


def _in_thresholds(record: RunRecord, confounds: Confounds) -> NDArray[np.float64]:
    displacement_mm = confounds.columns["framewise_displacement"]
    shown = np.where(confounds.status == "failed", np.nan, displacement_mm)
    return shown / float(record.settings["fd_outlier_mm"])


def sparkline(values: NDArray[np.float64]) -> str:
    """SVG path data of a filled curve, the largest of neighbouring values shown.

    Parameters
    ----------
    values : (n,) float64
        In thresholds; NaN counts as 0.

    Returns
    -------
    path : str
        In whole px, relative steps; empty if there are no values.
    """
    if not len(values):
        return ""
    groups = np.array_split(np.nan_to_num(values), min(len(values), SPARK_POINTS))
    peaks = np.array([group.max() for group in groups])
    x = np.rint(np.linspace(0, SPARK_WIDTH, len(peaks) + 1)).astype(int)
    y = np.rint(np.clip(peaks / SPARK_TOP, 0, 1) * SPARK_HEIGHT).astype(int)
    rises = np.diff(y, prepend=0)
    steps = "".join(
        (f"v{-rise}" if rise else "") + f"h{width}"
        for rise, width in zip(rises, np.diff(x), strict=True)
    )
    return f"M0 {SPARK_HEIGHT}{steps}V{SPARK_HEIGHT}"


def _failure_ticks(confounds: Confounds) -> str:
    centres = (confounds.failed + 0.5) * SPARK_WIDTH / max(len(confounds.status), 1)
    return "".join(f"M{x} 0v{SPARK_HEIGHT}" for x in sorted(set(np.rint(centres).astype(int))))


def _totals(summaries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Figures of the whole study: name and value."""
    n_volumes = sum(summary["n_volumes"] for summary in summaries)
    n_outliers = sum(summary["n_outliers"] for summary in summaries)
    n_failed = sum(summary["n_failed"] for summary in summaries)
    n_runs_failed = sum(summary["n_failed"] > 0 for summary in summaries)
    known = [s["mean_fd_mm"] for s in summaries if s["mean_fd_mm"] is not None]
    share = 100 * n_outliers / max(n_volumes, 1)
    return [
        ("runs", f"{len(summaries):,}"),
        ("volumes", f"{n_volumes:,}"),
        ("median of mean framewise displacement", f"{median(known):.3f} mm" if known else "n/a"),
        ("outlier volumes", f"{n_outliers:,} ({share:.1f} %)"),
        ("failed volumes", f"{n_failed:,} (runs: {n_runs_failed:,})"),
    ]


def name_differences(records: list[RunRecord]) -> list[str]:
    """Name the settings and versions that are not the same in all runs, one a line."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        made_by = {name: record.versions[name] for name in ("keepstill_version", "engine")}
        for name, value in (made_by | flatten(record.settings)).items():
            counts.setdefault(name, Counter())[str(value)] += 1
    return [
        f"{name}: " + ", ".join(f"{value} (runs: {n:,})" for value, n in sorted(found.items()))
        for name, found in sorted(counts.items())
        if len(found) > 1
    ]
