"""The ladder as a bar chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepstill.ladder.measure import Figures
from keepstill.ladder.rungs import numbered
from keepstill.ladder.table import rounded, rounded_s, speed_up

# Colours of Okabe and Ito, which most people can tell apart.
COLOURS = {"cpu_s": "#0072B2", "wall_s": "#D55E00"}
_NAMES = {"cpu_s": "processor time, s a volume", "wall_s": "wall time, s a volume"}
_PART = "* some slices run, the loop's seconds multiplied up"
_LANE = {"cpu_s": -0.19, "wall_s": 0.19}
_TITLE = "The ladder: time to realign a volume"
_AXIS = "seconds a volume, logarithmic   (× 40: that many times less than rung 1)"


def draw(path: Path, figures: Sequence[Figures], shared: str) -> None:
    """Seconds a volume of each rung, on a logarithmic axis; below it, what all of them share."""
    import textwrap

    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 2.2 + 0.6 * len(figures)), layout="constrained")
    figure.suptitle(_TITLE, fontsize=11)
    for name, colour in COLOURS.items():
        _draw_lane(axes, figures, name, colour)
    axes.set_xscale("log")
    everything = [seconds for line in figures for seconds in line.cost[:2]]
    axes.set_xlim(min(everything) / 3, max(everything) * 4)
    labels = [_label(number, line) for number, line in enumerate(figures, 1)]
    axes.set_yticks(range(len(figures)), labels, fontsize=8)
    axes.set_ylim(len(figures) - 0.5, -0.5)
    axes.set_xlabel(_AXIS, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    _draw_keys(axes, figures)
    figure.supxlabel(textwrap.fill(shared, 130), fontsize=6.5, color="#555555")
    with mpl.rc_context({"svg.hashsalt": "keepstill"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    plt.close(figure)


def _draw_lane(axes: Any, figures: Sequence[Figures], name: str, colour: str) -> None:
    """One bar a rung, of processor or wall time; those of rungs that ran in part are hatched."""
    lanes = [y + _LANE[name] for y in range(len(figures))]
    seconds = [getattr(line.cost, name) for line in figures]
    hatches = ["////" if _is_part(line) else "" for line in figures]
    style = {"color": colour, "edgecolor": "white", "linewidth": 0}
    axes.barh(lanes, seconds, 0.34, hatch=hatches, **style)
    for y, value, line in zip(lanes, seconds, figures, strict=True):
        gain = rounded(speed_up(figures, line)[name == "wall_s"])
        axes.text(value, y, f" {rounded_s(value)} s (× {gain})", va="center", fontsize=7.5)


def _draw_keys(axes: Any, figures: Sequence[Figures]) -> None:
    """What the colours are, and the hatching where there is any."""
    from matplotlib.patches import Patch

    keys = [Patch(color=COLOURS[name], label=_NAMES[name]) for name in COLOURS]
    part = Patch(facecolor="#888888", edgecolor="white", linewidth=0, hatch="////", label=_PART)
    keys += [part] * any(map(_is_part, figures))
    # Above the bars, where it covers none of them however long they are.
    axes.legend(
        handles=keys, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False
    )


def _is_part(line: Figures) -> bool:
    """Whether a rung resliced some of the slices, and was multiplied up."""
    return line.slices[0] < line.slices[1]


def _label(number: int, line: Figures) -> str:
    part = f"; * {line.slices[0]} of {line.slices[1]} slices run" if _is_part(line) else ""
    name = f"{numbered(number)}  {line.name}{'*' if _is_part(line) else ''}".strip()
    return f"{name}\nmedian error {line.error_mm[0]:.4f} mm{part}"
