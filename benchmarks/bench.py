"""The whole benchmark: accuracy, nuisances and cost, as a table, JSON and a picture.

    python benchmarks/bench.py [--output docs] [--seeds 10] [--volumes 100] [--jobs 2] [--repeats 5]
                               [--cases drift ...] [--point-spreads sharp] [--cache DIR]

Everything is made with the engine's defaults, of one commit. Exits with 1 if anything that is
required is missed.
"""

import argparse
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accuracy
import cost
import keepstill
import picture
from accuracy import Figures, Options
from cost import Cost
from keepstill import write
from spent import idle_part

CLONE = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy", "numba", "scipy", "mpi4py", "mpich")
# Digits that are kept of a figure.
DIGITS = 4


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "idle": idle_part(),
    }


def versions() -> dict[str, str]:
    """Of what takes part."""
    found = {"keepstill": keepstill.__version__, "commit": commit()}
    found["python"] = platform.python_version()
    return found | {name: version(name) for name in PACKAGES}


def commit() -> str:
    """The clone's commit, and whether files differ from it."""
    words = "git", "-C", str(CLONE)
    found = [
        subprocess.run([*words, *more], capture_output=True, text=True, check=False).stdout.strip()
        for more in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
    ]
    return (found[0] or "unknown") + (" and changes" if found[1] else "")


def heading(setting: dict[str, Any]) -> str:
    """What all figures share, in a line."""
    of, by = setting["machine"], setting["versions"]
    packages = ", ".join(f"{name} {by[name]}" for name in ("python", *PACKAGES))
    return (
        f"keepstill {by['keepstill']} ({by['commit']}); {of['cpu']}, {of['cores']} cores, "
        f"{of['idle']:.0%} idle; {packages}"
    )


def all_figures(options: Options) -> Iterator[Figures]:
    """Print the accuracy table as it comes."""
    print(f"\n{len(options.seeds)} seeds, {options.n_volumes} volumes each\n{accuracy.HEADER}")
    for figures in accuracy.measured(options):
        print(accuracy.in_words(figures), flush=True)
        yield figures


def all_costs(cache: Path, n_repeats: int) -> Iterator[Cost]:
    """Print the table of costs as it comes."""
    print(f"\n{cost.HEADER}")
    for found in cost.costs(cache, n_repeats) if n_repeats else ():
        print(cost.in_words(found), flush=True)
        yield found


def plain(value: Any) -> Any:
    """For JSON: figures rounded, and None for what is no number."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    accuracy.add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of each cost, of "
                        "which the least counts; 0 leaves cost out")  # fmt: skip
    parser.add_argument("--output", type=Path, default=CLONE / "docs", metavar="DIR")
    args = parser.parse_args()
    began_s = time.monotonic()
    setting: dict[str, Any] = {"machine": machine(), "versions": versions()}
    print(heading(setting))
    options = accuracy.options_of(args)
    figures = list(all_figures(options))
    costs = list(all_costs(args.cache, args.repeats))
    args.output.mkdir(parents=True, exist_ok=True)
    made = {"seeds": list(options.seeds), "volumes": options.n_volumes, "repeats": args.repeats}
    tables = {"accuracy": list(map(asdict, figures)), "cost": list(map(asdict, costs))}
    write.put_json(args.output / "bench.json", plain(setting | {"made": made} | tables))
    picture.draw(args.output / "bench.svg", figures, costs, heading(setting))
    n_missed = sum(bool(f.faults) for f in figures) + sum(not c.passes for c in costs)
    minutes = (time.monotonic() - began_s) / 60
    print(f"\n{n_missed} of {len(figures) + len(costs)} lines miss what is required; "
          f"{minutes:.0f} minutes; {args.output / 'bench.json'}, bench.svg")  # fmt: skip
    sys.exit(n_missed > 0)


if __name__ == "__main__":
    main()
