"""Error of realigned simulated runs against their truth, beside the Cramér-Rao bound.

    python benchmarks/accuracy.py [--cases drift steps] [--point-spreads sharp] [--seeds 10]
                                  [--volumes 100] [--jobs 2] [--cache DIR]

Each run goes through `keepstill realign` with its defaults. Raw errors are against the volume that
served as reference; gauge-free errors are what is left when the offset that all volumes of a run
share, one draw of the reference's noise, is removed. An error is the mean distance over the brain.
Multiples are of the bound with a noisy reference for raw errors, with a known template for
gauge-free ones. Figures are taken over the volumes of all seeds together.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from cases import (
    CASES,
    LEAST_BOUNDS,
    LEAST_COVERED,
    MOST_COVERED,
    POINT_SPREADS,
    Case,
    Limits,
)
from keepstill import geometry
from keepstill.phantom import numbers_of, pose_of
from keepstill.transforms.itk import read_itk
from keepstill.truth import BOUND, read_truth, truth_path
from made_runs import default_folder, made_run, plan_of

Array = np.ndarray
# The column of the confounds that is the engine's error bar: an expected displacement error, mm.
ERROR_BAR = "expected_error"


@dataclass(frozen=True)
class Options:
    """Which cases, and how much of each."""

    cases: tuple[str, ...]
    point_spreads: tuple[str, ...]
    seeds: tuple[int, ...]
    n_volumes: int
    n_jobs: int
    cache: Path


@dataclass(frozen=True)
class Errors:
    """Errors of volumes, the reference left out; (n,) each.

    Attributes
    ----------
    raw_mm, free_mm
        Against the reference, and with the offset removed that volumes of a run share.
    raw_bounds, free_bounds
        As multiples of their bound.
    bar_mm
        The engine's expected error; NaN if it gives none.
    bent_mm
        What the best rigid map leaves where slices move apart, of the reference and the volume.
    is_dropped, is_failed
        Volumes that lost slices; volumes that were marked as failed.
    """

    raw_mm: Array
    free_mm: Array
    raw_bounds: Array
    free_bounds: Array
    bar_mm: Array
    bent_mm: Array
    is_dropped: Array
    is_failed: Array


@dataclass(frozen=True)
class Figures:
    """Line of the table: a case seen with one point spread.

    Attributes
    ----------
    raw_mm, free_mm : (median, 95th percentile, worst)
    raw_bounds, free_bounds : (median, 95th percentile, worst)
    raw_covered, free_covered : float or None
        Part of the volumes whose error is within the error bar.
    dropped_mm : float or None
        Worst of those that lost slices.
    bent_mm : float
        Median of what the best rigid map leaves.
    n_volumes, n_failed : int
    faults : list of str
        What is required and not met, in words.
    """

    case: str
    point_spread: str
    about: str
    needs: str
    raw_mm: tuple[float, float, float]
    free_mm: tuple[float, float, float]
    raw_bounds: tuple[float, float, float]
    free_bounds: tuple[float, float, float]
    raw_covered: float | None
    free_covered: float | None
    dropped_mm: float | None
    bent_mm: float
    n_volumes: int
    n_failed: int
    faults: list[str]


def measured(options: Options) -> Iterator[Figures]:
    """Figures of each case and point spread, as they come."""
    spawning = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.n_jobs, mp_context=spawning)
    try:
        spreads, seeds = options.point_spreads, options.seeds
        left = [pool.submit(errors_of_seed, options, *key) for key in product(spreads, seeds)]
        for spread in spreads:
            found = [left.pop(0).result() for _ in seeds]
            for name in options.cases:
                yield figures_of(CASES[name], spread, joined([errors[name] for errors in found]))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nothing more is begun


def errors_of_seed(options: Options, spread: str, seed: int) -> dict[str, Errors]:
    """Errors of a run of each case.

    Runs of one voxel size follow each other, since they share a head, which is drawn once.
    """
    found, n_threads = {}, max(1, len(os.sched_getaffinity(0)) // options.n_jobs)
    for name in sorted(options.cases, key=lambda name: "voxel_mm" in CASES[name].plan):
        plan = plan_of(CASES[name], POINT_SPREADS[spread], options.n_volumes, seed)
        found[name] = run_errors(made_run(options.cache, plan, n_threads), n_threads)
        print(f"{name}, {spread}, seed {seed}: done", file=sys.stderr)
    return found


def run_errors(source: Path, n_threads: int) -> Errors:
    """Realign a run by the command line, and compare it with its truth."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "keepstill", "realign", str(source), "--no-reslice"]
        command += ["--threads", str(n_threads)]
        done = subprocess.run(
            [*command, "--out", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{source}: keepstill realign failed\n{done.stderr}")
        (transforms,) = Path(folder).rglob("*_xfm.txt")
        (confounds,) = Path(folder).rglob("*_desc-confounds_timeseries.tsv")
        return errors_of(source, read_itk(transforms), read_columns(confounds))


def errors_of(source: Path, found: Array, confounds: dict[str, list[str]]) -> Errors:
    """Errors of what was found, (n, 4, 4), for a simulated run."""
    path = truth_path(source.parents[2], source)
    truth, table = read_truth(path), read_columns(next(path.parent.glob("*_timeseries.tsv")))
    status = np.array(confounds["status"])
    (reference,) = np.flatnonzero(status == "reference")
    others = np.arange(len(found)) != reference
    steady = others & (status != "failed")
    raw_mm = truth.error_mm(found, int(reference))[others]
    to_first = geometry.inverse(truth.moving_from_first[reference])
    exact = np.array([matrix @ to_first for matrix in truth.moving_from_first])
    offset = shared_offset(found[steady], exact[steady])
    free_mm = truth.error_mm(found @ geometry.inverse(offset), int(reference))[others]
    bounds_mm = json.loads(source.with_name(source.name[:-7] + ".json").read_text())[BOUND]
    bent_mm = _numbers(table["bent"])
    bar = confounds.get(ERROR_BAR, ["n/a"] * len(found))
    return Errors(
        raw_mm=raw_mm,
        free_mm=free_mm,
        raw_bounds=raw_mm / bounds_mm["NoisyReference"],
        free_bounds=free_mm / bounds_mm["TemplateKnown"],
        bar_mm=_numbers(bar)[others],
        bent_mm=np.hypot(bent_mm[others], bent_mm[reference]),
        is_dropped=_numbers(table["dropped_slices"])[others] > 0,
        is_failed=(status == "failed")[others],
    )


def shared_offset(found: Array, exact: Array) -> Array:
    """The rigid map that (n, 4, 4) maps share before the exact ones: the gauge.

    The median of each of its six numbers, so that a few volumes gone astray do not move it.
    """
    apart = [numbers_of(geometry.inverse(e) @ f) for f, e in zip(found, exact, strict=True)]
    return pose_of(np.median(apart, axis=0))


def read_columns(path: Path) -> dict[str, list[str]]:
    """Columns of a table, as text."""
    names, *rows = (line.split("\t") for line in path.read_text().splitlines())
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _numbers(cells: Iterable[str]) -> Array:
    return np.array([np.nan if cell == "n/a" else float(cell) for cell in cells])


def joined(parts: Sequence[Errors]) -> Errors:
    """Errors of several runs, one after the other."""
    return Errors(*(np.concatenate(arrays) for arrays in zip(*map(_arrays, parts), strict=True)))


def _arrays(errors: Errors) -> list[Array]:
    return list(vars(errors).values())


def figures_of(case: Case, spread: str, errors: Errors) -> Figures:
    """What the table says of a case."""
    good = ~errors.is_failed
    dropped_mm = None
    if errors.is_dropped.any() and case.limits.dropped_mm is not None:
        dropped_mm = float(errors.raw_mm[errors.is_dropped & good].max(initial=0.0))
        good &= ~errors.is_dropped
    figures = Figures(
        case=case.name,
        point_spread=spread,
        about=case.about,
        needs=needs_in_words(case.limits, spread),
        raw_mm=_three(errors.raw_mm[good]),
        free_mm=_three(errors.free_mm[good]),
        raw_bounds=_three(errors.raw_bounds[good]),
        free_bounds=_three(errors.free_bounds[good]),
        raw_covered=_covered(errors.raw_mm, errors.bar_mm),
        free_covered=_covered(errors.free_mm, errors.bar_mm),
        dropped_mm=dropped_mm,
        bent_mm=float(np.median(errors.bent_mm)),
        n_volumes=errors.raw_mm.size,
        n_failed=int(errors.is_failed.sum()),
        faults=[],
    )
    figures.faults.extend(faults(figures, case.limits))
    return figures


def _three(values: Array) -> tuple[float, float, float]:
    median, most, worst = np.percentile(values, [50, 95, 100]) if values.size else [np.nan] * 3
    return float(median), float(most), float(worst)


def _covered(errors_mm: Array, bar_mm: Array) -> float | None:
    """Part of the errors that are within their bar, of those that have one."""
    known = np.isfinite(bar_mm)
    return float((errors_mm[known] <= bar_mm[known]).mean()) if known.any() else None


def faults(figures: Figures, limits: Limits) -> Iterator[str]:
    """What is required and not met."""
    if figures.n_failed:
        yield f"{figures.n_failed} failed"
    if limits.bounds is not None:
        most = limits.most_bounds(figures.point_spread)
        for name, found in (("raw", figures.raw_bounds), ("gauge-free", figures.free_bounds)):
            if not LEAST_BOUNDS <= found[0] <= most:
                yield f"{name} {found[0]:.2f}x"
    for name, value, limit in (
        ("median", figures.raw_mm[0], limits.median_mm),
        ("worst", figures.raw_mm[2], limits.worst_mm),
        ("dropped", figures.dropped_mm, limits.dropped_mm),
        ("error", figures.raw_mm[0], limits.bent and limits.bent * figures.bent_mm),
    ):
        if limit is not None and value is not None and not value <= limit:
            yield f"{name} {value:.4f} mm"
    if figures.raw_covered is not None and not LEAST_COVERED <= figures.raw_covered <= MOST_COVERED:
        yield f"covers {figures.raw_covered:.0%}"


def needs_in_words(limits: Limits, spread: str) -> str:
    """What is required, in few words."""
    words = []
    if limits.bounds is not None:
        words.append(f"{LEAST_BOUNDS:g}-{limits.most_bounds(spread):g}x")
    for name, limit in (("", limits.median_mm), ("worst ", limits.worst_mm)):
        if limit is not None:
            words.append(f"{name}{limit:g} mm")
    if limits.dropped_mm is not None:
        words.append(f"dropped {limits.dropped_mm:g} mm")
    if limits.bent is not None:
        words.append(f"{limits.bent:g} of what the best rigid map leaves")
    return ", ".join(words)


HEADER = (
    f"{'case':<12}{'spread':<7}"
    f"{'raw mm: median':>15}{'95%':>8}{'worst':>8}{'x bound':>8}"
    f"{'free mm: median':>17}{'95%':>8}{'worst':>8}{'x bound':>8}"
    f"{'covered':>9}  {'needs':<34} verdict"
)


def in_words(figures: Figures) -> str:
    """Line of the table."""
    parts = [f"{figures.case:<12}{figures.point_spread:<7}"]
    for widths, mm, bounds in (
        ((15, 8), figures.raw_mm, figures.raw_bounds),
        ((17, 8), figures.free_mm, figures.free_bounds),
    ):
        parts.append(f"{mm[0]:>{widths[0]}.4f}{mm[1]:>8.4f}{mm[2]:>8.4f}{bounds[0]:>8.2f}")
    covered = "n/a" if figures.raw_covered is None else f"{figures.raw_covered:.0%}"
    parts.append(f"{covered:>9}  {figures.needs:<34}")
    parts.append("FAIL: " + ", ".join(figures.faults) if figures.faults else "pass")
    return "".join(parts[:-1]) + " " + parts[-1]


def options_of(args: argparse.Namespace) -> Options:
    """What was asked for on the command line."""
    seeds = tuple(range(args.first_seed, args.first_seed + args.seeds))
    return Options(
        tuple(args.cases), tuple(args.point_spreads), seeds, args.volumes, args.jobs, args.cache
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that the whole benchmark has too."""
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
                        help=", ".join(CASES))  # fmt: skip
    parser.add_argument(
        "--point-spreads", nargs="+", choices=POINT_SPREADS, default=list(POINT_SPREADS)
    )
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="runs of each case")
    parser.add_argument("--first-seed", type=int, default=1, metavar="N")
    parser.add_argument("--volumes", type=int, default=100, metavar="N", help="of a run")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="seeds at a time, which share the cores")  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, default=default_folder(), metavar="DIR", help="for simulated runs"
    )


def main() -> None:
    """Print the table; exit with 1 if anything falls short."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    args = parser.parse_args()
    print(HEADER)
    found = []
    for figures in measured(options_of(args)):
        print(in_words(figures), flush=True)
        found.append(figures)
    if args.json:
        args.json.write_text(json.dumps([asdict(figures) for figures in found], indent=1) + "\n")
    sys.exit(any(figures.faults for figures in found))


if __name__ == "__main__":
    main()
