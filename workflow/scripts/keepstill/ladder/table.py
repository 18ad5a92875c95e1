"""The ladder's figures as tables, for people and for machines."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keepstill import __version__
from keepstill.ladder.measure import Cost, Figures, Trial
from keepstill.ladder.rungs import numbered

AGREED_MM = 0.05
REQUIRED_TIMES, STRETCH_TIMES, MEANT_VOLUMES = 200, 500, 200
_PACKAGES = ("itk", "numpy", "numba", "mpi4py")
_COLUMNS = (
    *("", "rung", "ranks", "CPU s a volume", "wall s a volume", "speed-up, CPU"),
    *("speed-up, wall", "error mm: median, worst", "from rung 1, mm", "run on", "start-up CPU s"),
)
_SHORT = ("", "rung", "CPU s a volume", "speed-up, CPU", "wall s a volume", "median error, mm")


def setting_of(trial: Trial, load: float) -> dict[str, Any]:
    """What all figures share: machine, versions, day, how busy the machine was."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(load, 1),
        "ranks": trial.n_ranks,
        "binding": trial.binding,
        "repeats": trial.n_repeats,
        "date": date.today().isoformat(),
        "versions": {"keepstill": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
    }


def to_json(figures: Sequence[Figures], setting: dict[str, Any]) -> dict[str, Any]:
    """All of it, for a file."""
    rungs = [asdict(line) | {"cost": line.cost._asdict()} for line in figures]
    return {"setting": setting, "rungs": rungs}


def from_json(made: dict[str, Any]) -> list[Figures]:
    """`to_json` undone."""
    return [
        Figures(
            **line
            | {"cost": Cost(**line["cost"])}
            | {name: tuple(line[name]) for name in ("volumes", "slices", "error_mm")}
        )
        for line in made["rungs"]
    ]


def heading(setting: dict[str, Any]) -> str:
    """What all figures share, in a line."""
    packages = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    is_busy = setting["load"] > setting["cores"] / 2
    caution = ", so processor time is the figure to look at" * is_busy
    return (
        f"{setting['cpu']}, {setting['cores']} cores, load {setting['load']:g} beforehand"
        f"{caution}; {setting['date']}; median of {setting['repeats']} repeats; "
        f"ranks bound by {setting['binding'] or 'nothing'}; {packages}"
    )


def speed_up(figures: Sequence[Figures], line: Figures) -> tuple[float, float]:
    """How many times less processor and wall time a volume than the first rung."""
    first = figures[0].cost
    return first.cpu_s / line.cost.cpu_s, first.wall_s / line.cost.wall_s


def full_table(figures: Sequence[Figures]) -> str:
    """Markdown table of everything, and what it does not show by itself."""
    rows = []
    for number, line in enumerate(figures, 1):
        gains = speed_up(figures, line)
        run_on = f"{line.volumes[0]} of {line.volumes[1]} volumes"
        if line.slices[0] < line.slices[1]:
            run_on += f", {line.slices[0]} of {line.slices[1]} slices"
        rows.append(
            (
                *(numbered(number), line.name, str(line.n_ranks)),
                *(rounded_s(seconds) for seconds in line.cost[:2]),
                *(rounded(gain) for gain in gains),
                f"{line.error_mm[0]:.4f}, {line.error_mm[1]:.4f}",
                f"{line.apart_mm:.4f}",
                run_on,
                f"{line.cost.start_up_cpu_s:.1f}",
            )
        )
    return "\n".join([*_markdown(_COLUMNS, rows), "", *agreement(figures)])


def short_table(figures: Sequence[Figures]) -> str:
    """Markdown table for a first look."""
    rows = []
    for number, line in enumerate(figures, 1):
        cpu, wall = (rounded_s(seconds) for seconds in line.cost[:2])
        gain, error = rounded(speed_up(figures, line)[0]), f"{line.error_mm[0]:.4f}"
        rows.append((numbered(number), line.name, cpu, gain, wall, error))
    return "\n".join(_markdown(_SHORT, rows))


def agreement(figures: Sequence[Figures]) -> list[str]:
    """Which rungs agree on the motion, and why one that does not is apart."""
    far = [line for line in figures if line.apart_mm > AGREED_MM]
    if not far:
        return [f"All rungs agree on the motion of every volume within {AGREED_MM:g} mm."]
    first = figures[0].error_mm[1]
    return [
        f"{line.name}: {line.apart_mm:.3f} mm from the first rung in its worst volume; errors "
        f"against the known motion are {line.error_mm[1]:.3f} mm and {first:.3f} mm at worst, so "
        f"{'the first rung' if line.error_mm[1] < first else 'this one'} is the farther off."
        for line in far
    ]


def verdict(figures: Sequence[Figures]) -> str:
    """Whether keepstill is as much faster as is required, at a smaller error."""
    line = next(line for line in figures if line.name == "keepstill")
    times = speed_up(figures, line)[0]
    is_well = times >= REQUIRED_TIMES and line.error_mm[0] < figures[0].error_mm[0]
    return (
        f"{'pass' if is_well else 'FAIL'}: keepstill takes {times:.0f} times less processor time a "
        f"volume than the first rung (needs {REQUIRED_TIMES}, better {STRETCH_TIMES}), its median "
        f"error is {line.error_mm[0]:.4f} mm, that of the first rung {figures[0].error_mm[0]:.4f}"
        f"{_caution(line.volumes[1])}"
    )


def _caution(n_volumes: int) -> str:
    """What to think of a short run's factor: keepstill prepares once a run, whatever its length."""
    if n_volumes >= MEANT_VOLUMES:
        return ""
    return (
        f"; the requirement is meant for runs of {MEANT_VOLUMES} volumes, this one has {n_volumes}"
    )


def rounded(times: float) -> str:
    """A speed-up in as many digits as it deserves."""
    return f"{times:.0f}" if times >= 10 else f"{times:.1f}"


def rounded_s(seconds: float) -> str:
    """Seconds in three digits, zeros at the end included."""
    return f"{seconds:.0f}" if seconds >= 99.95 else f"{seconds:#.3g}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
