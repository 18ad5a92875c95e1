"""Error and processor time of other tools from PyPI, on the benchmark's own drift with spikes.

    python benchmarks/peers.py --python .venv-peers/bin/python [--volumes 100] [--cache DIR]

Each tool realigns the same run with its defaults, against the first volume. keepstill reslices and
writes too; the others estimate, and ants reslices in memory.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from accuracy import errors_of, read_columns
from cases import CASES, POINT_SPREADS
from cost import gzip, realign_command
from keepstill.transforms.itk import read_itk
from made_runs import default_folder, made_run, plan_of
from spent import Spent, spent

PEER_REALIGN = Path(__file__).with_name("peer_realign.py")


def by_keepstill(source: Path, folder: Path) -> tuple[np.ndarray, Spent]:
    """Matrices (n, 4, 4) that keepstill finds, and what it cost."""
    cost = spent(realign_command(source, 1, str(folder)))
    (transforms,) = folder.rglob("*_xfm.txt")
    (confounds,) = folder.rglob("*_desc-confounds_timeseries.tsv")
    assert read_columns(confounds)["status"][0] == "reference"
    return read_itk(transforms), cost


def by_peer(python: Path, tool: str, source: Path, folder: Path) -> tuple[np.ndarray, Spent]:
    """The same for another tool."""
    out = folder / "found.npy"
    cost = spent([str(python), str(PEER_REALIGN), tool, str(source), str(out)])
    return np.load(out), cost


def line(tool: str, spread: str, source: Path, python: Path) -> str:
    """Line of the table: a tool on a run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if tool == "keepstill":
            found, cost = by_keepstill(source, folder)
        else:
            found, cost = by_peer(python, tool, source, folder)
    errors = errors_of(source, found, {"status": ["reference", *["ok"] * (len(found) - 1)]})
    median, high, worst = np.percentile(errors.raw_mm, [50, 95, 100])
    bounds = np.median(errors.raw_bounds)
    in_g = cost.cpu_s / gzip(source).cpu_s
    return (
        f"{tool:<12}{spread:<8}{median:>10.4f}{high:>9.4f}{worst:>9.4f}{bounds:>9.1f}"
        f"{cost.cpu_s:>9.1f}{in_g:>7.1f}"
    )


def main() -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--python", type=Path, required=True, help="of an environment with both")
    parser.add_argument("--volumes", type=int, default=100, metavar="N")
    parser.add_argument("--cache", type=Path, default=default_folder(), metavar="DIR")
    args = parser.parse_args()
    print(f"{'tool':<12}{'spread':<8}{'median mm':>10}{'95%':>9}{'worst':>9}{'x bound':>9}"
          f"{'CPU s':>9}{'G':>7}")  # fmt: skip
    for spread, width in POINT_SPREADS.items():
        source = made_run(args.cache, plan_of(CASES["drift"], width, args.volumes, 1))
        for tool in ("keepstill", "nipy", "ants"):
            print(line(tool, spread, source, args.python), flush=True)


if __name__ == "__main__":
    main()
