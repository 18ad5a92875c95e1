"""The ladder as a bar chart."""

from collections.abc import Sequence
from pathlib import Path

from keepstill.ladder.measure import Figures
from keepstill.ladder.table import times_less

# Colours of Okabe and Ito, which most people can tell apart.
COLOURS = {"cpu_s": "#0072B2", "wall_s": "#D55E00"}
_NAMES = {"cpu_s": "processor time", "wall_s": "wall time"}
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
        axes.barh(lanes, seconds, 0.34, color=colour, label=f"{_NAMES[name]}, s a volume")
        for y, value, line in zip(lanes, seconds, figures, strict=True):
            less = times_less(figures, line)[name == "wall_s"]
            label = f" {value:.3g} s" + (f", {less:.3g} times less" if line != figures[0] else "")
            axes.text(value, y, label, va="center", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(right=8 * max(line.cost.cpu_s for line in figures))
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
