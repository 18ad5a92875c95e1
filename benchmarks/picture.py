"""The benchmark's figures as a picture."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from accuracy import Figures
from cases import CASES, LEAST_BOUNDS, POINT_SPREADS
from cost import Cost

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Colours of Okabe and Ito, which most people can tell apart.
COLOURS = {"mild": "#0072B2", "sharp": "#D55E00"}
LIMIT, WITHIN = "#000000", "#E6F2EA"
_LANE = {"mild": -0.18, "sharp": 0.18}


def draw(path: Path, figures: Sequence[Figures], costs: Sequence[Cost], title: str) -> None:
    """Three panels: multiples of the bound, errors in mm, cost as a part of what is allowed."""
    bounded = [f for f in figures if CASES[f.case].limits.bounds is not None]
    others = [f for f in figures if CASES[f.case].limits.bounds is None]
    required = [c for c in costs if c.required is not None]
    heights = [max(1, len(part)) for part in (names_of(bounded), names_of(others), required)]
    figure, axes = plt.subplots(
        3, 1, figsize=(8.5, 1.9 + 0.42 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    figure.suptitle(textwrap.fill(title, 110), fontsize=8)
    _draw_bounds(axes[0], bounded)
    _draw_mm(axes[1], others)
    _draw_costs(axes[2], required)
    with mpl.rc_context({"svg.hashsalt": "keepstill"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    plt.close(figure)


def names_of(figures: Sequence[Figures]) -> list[str]:
    """Names of the cases, each once, in order."""
    return list(dict.fromkeys(f.case for f in figures))


def _draw_bounds(axes: Axes, figures: Sequence[Figures]) -> None:
    names = names_of(figures)
    for f in figures:
        y, colour = names.index(f.case) + _LANE[f.point_spread], COLOURS[f.point_spread]
        most = CASES[f.case].limits.most_bounds(f.point_spread)
        axes.barh(y, most - LEAST_BOUNDS, 0.32, LEAST_BOUNDS, color=WITHIN)
        axes.plot([most] * 2, [y - 0.16, y + 0.16], color=LIMIT, lw=1.5)
        for (median, high, _), dy, face in (
            (f.raw_bounds, -0.07, colour),
            (f.free_bounds, 0.07, "white"),
        ):
            axes.plot([median, high], [y + dy] * 2, color=colour, lw=1)
            axes.plot(median, y + dy, "o", color=colour, mfc=face, ms=5)
    axes.axvline(1, color="grey", lw=0.8, ls=":")
    axes.set_xscale("log")
    for spread, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=f"point spread {POINT_SPREADS[spread]:g} voxel")
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(-0.5, 1.0), frameon=False)
    _finish(axes, [CASES[name].about for name in names])
    axes.set_title(
        "error, multiples of the Cramér-Rao bound: median to 95th percentile of the volumes\n"
        "filled: raw, open: gauge-free; shaded: where medians must lie",
        fontsize=8,
    )


def _draw_mm(axes: Axes, figures: Sequence[Figures]) -> None:
    names = names_of(figures)
    for f in figures:
        y, colour = names.index(f.case) + _LANE[f.point_spread], COLOURS[f.point_spread]
        limits = CASES[f.case].limits
        axes.plot([f.raw_mm[0], f.raw_mm[2]], [y] * 2, color=colour, lw=1)
        axes.plot(f.raw_mm[0], y, "o", color=colour, ms=5)
        axes.plot(f.raw_mm[2], y, "|", color=colour, ms=9)
        if f.dropped_mm is not None:
            axes.plot(f.dropped_mm, y, "x", color=colour, ms=6)
        for limit, mark in (
            (limits.median_mm, "o"),
            (limits.worst_mm, "|"),
            (limits.dropped_mm, "x"),
            (limits.bent and limits.bent * f.bent_mm, "o"),
        ):
            if limit is not None:
                axes.plot([limit] * 2, [y - 0.16, y + 0.16], color=LIMIT, lw=1.5)
                axes.plot(limit, y - 0.16, mark, color=LIMIT, ms=3)
    axes.set_xscale("log")
    _finish(axes, [CASES[name].about for name in names])
    axes.set_title(
        "raw error, mm: median (dot) to worst (bar), worst that lost slices (cross)\n"
        "black, with the same signs: most allowed",
        fontsize=8,
    )


def _draw_costs(axes: Axes, costs: Sequence[Cost]) -> None:
    """Bars of found over required, or the other way round where more is better."""
    for y, cost in enumerate(costs):
        part = cost.value / (cost.required or 1.0)
        part = 1 / part if cost.more_is_better else part
        axes.barh(y, part, 0.6, color="#009E73" if cost.passes else "#CC3311")
        found = f" {cost.value:.3g} {cost.unit}"
        axes.text(0, y, found, va="center", fontsize=7, color="white")
    axes.axvline(1, color=LIMIT, lw=1.5)
    _finish(axes, [cost.what for cost in costs])
    axes.set_title("cost, as a part of what is allowed", fontsize=8)


def _finish(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylim(max(1, len(labels)) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_xscale() == "log":
        axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
