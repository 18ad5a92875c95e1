"""The picture of a run's motion, as SVG: four panels over the volumes, a fifth with a truth."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from keepstill.report.against_truth import TruthError
from keepstill.report.render import number
from keepstill.report.run_record import MOTION_COLUMNS, Confounds, RunRecord, consecutive

# Lines: from the colour-blind safe set of Okabe and Ito (2008).
# DARK: what replaces each colour on a dark screen.
PAPER, INK, MUTED, GRID = "#ffffff", "#1f2328", "#59636e", "#d9dee3"
X_LINE, Y_LINE, Z_LINE = "#0072b2", "#d55e00", "#009e73"
FAILED_LINE, FAILED_BAND = "#a8407f", "#f0d3e4"
DARK = {
    PAPER: "#0d1117",
    INK: "#e6edf3",
    MUTED: "#9aa4ae",
    GRID: "#2d343c",
    X_LINE: "#56b4e9",
    Y_LINE: "#f0863a",
    Z_LINE: "#2fc795",
    FAILED_LINE: "#e58fc4",
    FAILED_BAND: "#54283f",
}

STYLE: dict[str, object] = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titley": 1.03,
    "axes.titlepad": 0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.1,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "keepstill",
    "xtick.bottom": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.left": False,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}

SMALLEST_RANGE = 0.1  # mm or degrees: a run that lies still shows a flat line, not its noise
FOUR_PANELS_INCHES, PANEL_INCHES = 9.2, 2.12  # heights: of four panels, of one more
ABOVE_INCHES, BELOW_INCHES = 0.874, 0.506
ALL_MARKED = 60  # up to so many volumes each one carries a dot


@dataclass(frozen=True)
class Panel:
    """One figure of motion against its limit.

    Attributes
    ----------
    title, unit : str
    values : (n,) float64
    threshold : float
        A volume above it is an outlier.
    """

    title: str
    unit: str
    values: NDArray[np.float64]
    threshold: float


def picture_height(n_panels: int) -> float:
    """Height of a picture of so many panels, inches."""
    return FOUR_PANELS_INCHES + (n_panels - 4) * PANEL_INCHES


def motion_svg(record: RunRecord, confounds: Confounds, error: TruthError | None = None) -> str:
    """SVG of a run: translations, rotations, framewise displacement and DVARS per volume.

    Parameters
    ----------
    record : RunRecord
        Gives the title, the thresholds, and the repetition time of the time axis.
    confounds : Confounds
        With the columns `MOTION_COLUMNS`; nothing is drawn at a failed volume, nor what the
        brightness of the first volumes does to DVARS.
    error : TruthError, optional
        Has a panel of its own, below.
    """
    shown = {
        name: np.where(confounds.status == "failed", np.nan, confounds.columns[name])
        for name in MOTION_COLUMNS
    }
    n_first = len(confounds.non_steady)
    shown["std_dvars"][: n_first + 1 if n_first else 0] = np.nan
    with matplotlib.style.context(STYLE, after_reset=True):
        n_panels = 4 if error is None else 5
        height = picture_height(n_panels)
        figure = Figure(figsize=(10, height))
        axes = figure.subplots(n_panels, 1, sharex=True)
        top, bottom = 1 - ABOVE_INCHES / height, BELOW_INCHES / height
        figure.subplots_adjust(left=0.075, right=0.985, top=top, bottom=bottom, hspace=0.3)
        _draw_axes_lines(axes[0], "translation", "mm", [shown[f"trans_{i}"] for i in "xyz"])
        degrees = [np.rad2deg(shown[f"rot_{i}"]) for i in "xyz"]
        _draw_axes_lines(axes[1], "rotation", "degrees", degrees)
        for ax, panel in zip(axes[2:4], _panels(record, shown), strict=True):
            _draw_panel(ax, panel)
        if error is not None:
            _draw_error(axes[4], error)
        _mark_status(axes, confounds)
        _finish_volume_axis(axes, len(confounds.status), record.summary["tr_s"])
        figure.align_ylabels(axes)
        _draw_heading(figure, record.run, confounds)
        return to_svg(figure, record.run)


def _panels(record: RunRecord, shown: dict[str, NDArray[np.float64]]) -> tuple[Panel, Panel]:
    settings = record.settings
    return (
        Panel(
            "framewise displacement",
            "mm",
            shown["framewise_displacement"],
            settings["fd_outlier_mm"],
        ),
        Panel("standardised DVARS", "ratio", shown["std_dvars"], settings["std_dvars_outlier"]),
    )


def _draw_axes_lines(
    ax: Axes, title: str, unit: str, values: Sequence[NDArray[np.float64]]
) -> None:
    for name, color, line in zip("xyz", (X_LINE, Y_LINE, Z_LINE), values, strict=True):
        _draw_line(ax, line, color, name)
    ax.set_title(title)
    ax.set_ylabel(unit)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -SMALLEST_RANGE), max(high, SMALLEST_RANGE))
    _draw_legend(ax)
    _say_if_empty(ax, np.concatenate(values))


def _draw_panel(ax: Axes, panel: Panel) -> None:
    _draw_line(ax, panel.values, X_LINE, None)
    ax.axhline(
        panel.threshold,
        color=INK,
        linewidth=0.9,
        dashes=(5, 3),
        label=f"threshold {panel.threshold:g}",
    )
    outliers = np.flatnonzero(panel.values > panel.threshold)
    ax.plot(
        outliers,
        panel.values[outliers],
        linestyle="none",
        marker="o",
        markersize=3.6,
        markeredgewidth=0,
        color=Y_LINE,
        label=f"above threshold: {len(outliers)}",
    )
    ax.set_title(panel.title)
    ax.set_ylabel(panel.unit)
    highest = np.nanmax(panel.values, initial=panel.threshold)
    ax.set_ylim(-0.02 * highest, 1.12 * highest)  # a line at 0 stays off the frame
    _draw_legend(ax)
    _say_if_empty(ax, panel.values)


def _draw_error(ax: Axes, error: TruthError) -> None:
    mean, worst = number(error.mean_mm, 4), number(error.worst_mm, 4)
    _draw_line(ax, error.volumes_mm, X_LINE, f"mean {mean}, worst {worst}")
    bound = f"Cramér–Rao bound {number(error.bound_mm, 4)}"
    ax.axhline(error.bound_mm, color=INK, linewidth=0.9, dashes=(5, 3), label=bound)
    ax.set_title("error against truth")
    ax.set_ylabel("mm")
    highest = np.nanmax(error.volumes_mm, initial=error.bound_mm)
    ax.set_ylim(-0.02 * highest, 1.12 * highest)
    _draw_legend(ax)
    _say_if_empty(ax, error.volumes_mm)


def _draw_line(ax: Axes, values: NDArray[np.float64], color: str, label: str | None) -> None:
    """Draw a line, and dots where it would not show: few volumes, a value between gaps."""
    finite = np.concatenate(([False], np.isfinite(values), [False]))
    alone = finite[1:-1] & ~finite[:-2] & ~finite[2:]
    marked = np.flatnonzero(finite[1:-1] if len(values) <= ALL_MARKED else alone)
    ax.plot(values, color=color, label=label, solid_joinstyle="round")
    ax.plot(
        marked,
        values[marked],
        linestyle="none",
        marker="o",
        markersize=2.6,
        markeredgewidth=0,
        color=color,
    )


def _draw_legend(ax: Axes, height: float = 1.03) -> None:
    """Put the legend above the panel on the right, its foot at `height` in panels."""
    ax.legend(
        loc="lower right", bbox_to_anchor=(1, height), ncols=3, handlelength=1.6, columnspacing=1.6
    )


def _say_if_empty(ax: Axes, values: NDArray[np.float64]) -> None:
    if not np.isfinite(values).any():
        ax.text(
            0.5, 0.5, "no values", transform=ax.transAxes, ha="center", va="center", color=MUTED
        )


def _mark_status(axes: Sequence[Axes], confounds: Confounds) -> None:
    """Bands, a cross for each failed volume, dotted line for the reference, in every panel."""
    failed = confounds.failed
    bands = ((confounds.non_steady, GRID), (failed, FAILED_BAND))
    for ax in axes:
        for volumes, color in bands:
            for first, last in consecutive(volumes):
                ax.axvspan(first - 0.5, last + 0.5, facecolor=color, edgecolor=color, zorder=0.6)
        ax.plot(
            failed,
            np.full(len(failed), 0.955),
            transform=ax.get_xaxis_transform(),
            linestyle="none",
            marker="x",
            markersize=5,
            markeredgewidth=1.4,
            color=FAILED_LINE,
        )
        for volume in np.flatnonzero(confounds.status == "reference").tolist():
            ax.axvline(volume, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=0.8)


def _finish_volume_axis(axes: Sequence[Axes], n_volumes: int, tr_s: float | None) -> None:
    bottom, top = axes[-1], axes[0]
    bottom.set_xlim(-0.5, n_volumes - 0.5)
    bottom.set_xlabel("volume (the first is 0)")
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    for ax in axes:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    if tr_s:
        convert = (lambda volume: np.multiply(volume, tr_s), lambda time_s: np.divide(time_s, tr_s))
        time = top.secondary_xaxis("top", functions=convert)
        last_s = (n_volumes - 1) * tr_s
        ticks_s = MaxNLocator(nbins=9).tick_values(0, last_s)
        time.set_ticks([second for second in ticks_s if 0 <= second <= last_s])
        time.tick_params(top=True, length=3, pad=2)
        time.set_xlabel("time (s)", labelpad=2)
        above_time = 1.2
        top.set_title(top.get_title(loc="left"), y=above_time)
        _draw_legend(top, above_time)


def _draw_heading(figure: Figure, run: str, confounds: Confounds) -> None:
    """Write the run's name on top, and below right what the marks in all panels mean."""
    figure.text(
        0.075,
        1 - 0.138 / figure.get_figheight(),
        run,
        fontsize=min(12, 900 / len(run)),  # a name of up to 75 letters fits at 12 pt
        fontweight="bold",
        va="top",
        color=INK,
        parse_math=False,
    )
    handles: list[Artist] = []
    for volume in np.flatnonzero(confounds.status == "reference"):
        label = f"reference: volume {volume}"
        handles.append(Line2D([], [], color=MUTED, linestyle=(0, (1, 2)), label=label))
    if len(confounds.non_steady):
        label = f"before the steady state: {len(confounds.non_steady)}"
        handles.append(Patch(facecolor=GRID, label=label))
    if len(confounds.failed):
        label = f"× failed volumes: {len(confounds.failed)}"
        handles.append(Patch(facecolor=FAILED_BAND, label=label))
    if handles:
        figure.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(0.985, 0.074 / figure.get_figheight()),
            ncols=3,
        )


def to_svg(figure: Figure, title: str) -> str:
    """Make SVG with coordinates to 0.01 pt, not indented, and colours for dark screens."""
    stream = io.StringIO()
    metadata = {"Title": title, "Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", metadata=metadata)
    attribute, long_number = re.compile(r'="[^"]*"'), re.compile(r"\d+\.\d{3,}")
    text = attribute.sub(
        lambda value: long_number.sub(lambda found: f"{float(found[0]):.2f}", value[0]),
        re.sub(r"\n\s+", "\n", stream.getvalue()),
    )
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    return text.replace(
        "<defs>", f"<defs>\n<style>@media (prefers-color-scheme:dark){{{rules}}}</style>", 1
    )
