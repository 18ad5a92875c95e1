"""The ladder as a bar chart."""

from collections.abc import Sequence
from pathlib import Path

from keepstill.ladder.measure import Figures
from keepstill.ladder.table import rounded, speed_up

# Colours of Okabe and Ito, which most people can tell apart.
COLOURS = {"cpu_s": "#0072B2", "wall_s": "#D55E00"}
_NAMES = {
    "cpu_s": "processor time, s a volume (× speed-up over the first)",
    "wall_s": "wall time, the same",
}
_LANE = {"cpu_s": -0.19, "wall_s": 0.19}


def draw(path: Path, figures: Sequence[Figures], title: str) -> None:
    """Seconds a volume of each rung, on a logarithmic axis."""
    import textwrap

    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 1.5 + 0.55 * len(figures)), layout="constrained")
    figure.suptitle(textwrap.fill(title, 110), fontsize=8)
    for name, colour in COLOURS.items():
        lanes = [y + _LANE[name] for y in range(len(figures))]
        seconds = [getattr(line.cost, name) for line in figures]
        axes.barh(lanes, seconds, 0.34, color=colour, label=_NAMES[name])
        for y, value, line in zip(lanes, seconds, figures, strict=True):
            gain = rounded(speed_up(figures, line)[name == "wall_s"])
            axes.text(value, y, f" {value:.3g} s (× {gain})", va="center", fontsize=7)
    axes.set_xscale("log")
    everything = [seconds for line in figures for seconds in line.cost[:2]]
    axes.set_xlim(min(everything) / 3, max(everything) * 4)
    axes.set_yticks(range(len(figures)), [_label(line) for line in figures], fontsize=7)
    axes.set_ylim(len(figures) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="lower right", frameon=False)
    with mpl.rc_context({"svg.hashsalt": "keepstill"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    plt.close(figure)


def _label(line: Figures) -> str:
    return f"{line.name}\nmedian error {line.error_mm[0]:.4f} mm"
