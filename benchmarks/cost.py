"""Cost of realigning: processor time in units that any machine has, memory, reslicing.

    python benchmarks/cost.py [--repeats 5] [--cache DIR]

1 G is the processor time of `gzip -dc RUN | gzip -1 > /dev/null` on the same .nii.gz, measured in
turn with the others. Processor time is that of whole processes and all their children, kernel
caches warm, the least of a few calls. Ranks have one thread each.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from cases import CASES, POINT_SPREADS
from keepstill import write
from made_runs import default_folder, made_run, plan_of
from reslicing import Resliced, resliced
from spent import Spent, idle_part, least, peak_anonymous_mb, spent

VOLUMES, MANY_VOLUMES = 200, 1200
# Grids that are compared by voxel, each on so many volumes and four times as many.
FEW_BIG = 25
# Wall times are judged where at least this part of the cores is idle before they are measured.
LEAST_IDLE = 0.95
# What an idle python must have imported, to compare memory with.
IMPORTS = "nibabel, keepstill.__main__, keepstill.collect, keepstill.ranks, keepstill.stage"


@dataclass(frozen=True)
class Cost:
    """Line of the table.

    Attributes
    ----------
    what : str
    value : float
    unit : str
    required : float or None
        Most, or least where `more_is_better`.
    elsewhere : str
        What other tools need.
    """

    what: str
    value: float
    unit: str
    required: float | None = None
    more_is_better: bool = False
    elsewhere: str = ""

    @property
    def passes(self) -> bool:
        """Whether the requirement is met."""
        if self.required is None:
            return True
        return self.value >= self.required if self.more_is_better else self.value <= self.required


def costs(cache: Path, n_repeats: int) -> Iterator[Cost]:
    """All lines, as they come."""
    run = made_run(cache, plan_of(CASES["drift"], POINT_SPREADS["sharp"], VOLUMES, 1))
    many = repeated(run, MANY_VOLUMES // VOLUMES)
    realign(run, 2)  # kernels compile, caches of files fill
    idle = idle_part()
    fast = in_turn({"G": lambda: gzip(run), "1": lambda: realign(run, 1),
                    "2": lambda: realign(run, 2)}, n_repeats)  # fmt: skip
    slow = in_turn({"1": lambda: realign(many, 1), "2": lambda: realign(many, 2)},
                   max(1, n_repeats // 2))  # fmt: skip
    yield from _by_gzip(fast, slow)
    if len(os.sched_getaffinity(0)) > 1:
        yield from _by_wall(fast, slow, idle)
    slope_s = (slow["1"].cpu_s - fast["1"].cpu_s) / (MANY_VOLUMES - VOLUMES)
    yield _per_voxel(cache, slope_s / voxels(run), n_repeats)
    yield from _memory(run, many)
    yield from _reslicing(resliced(POINT_SPREADS))


def _by_gzip(fast: dict[str, Spent], slow: dict[str, Spent]) -> Iterator[Cost]:
    g = fast["G"].cpu_s
    further = (slow["1"].cpu_s - fast["1"].cpu_s) / (MANY_VOLUMES - VOLUMES) * VOLUMES
    yield Cost("gzip -dc | gzip -1, CPU: 1 G", g, "s")
    yield Cost(f"keepstill realign, {VOLUMES} volumes, 1 rank", fast["1"].cpu_s / g, "G", 2.2,
               elsewhere="3dvolreg 4.6, mcflirt 13, SPM 19")  # fmt: skip
    yield Cost(f"keepstill realign, {VOLUMES} volumes, 2 ranks", fast["2"].cpu_s / g, "G", 2.7)
    yield Cost(f"{VOLUMES} further volumes, of {MANY_VOLUMES}", further / g, "G", 1.4,
               elsewhere="3dvolreg 4.2")  # fmt: skip


def _by_wall(fast: dict[str, Spent], slow: dict[str, Spent], idle: float) -> Iterator[Cost]:
    """What a second core saves; not judged where others use the cores."""
    for n, cost, most in ((VOLUMES, fast, 0.80), (MANY_VOLUMES, slow, 0.62)):
        what = f"wall time, 2 ranks against 1, {n} volumes"
        ratio = cost["2"].wall_s / cost["1"].wall_s
        if idle >= LEAST_IDLE:
            yield Cost(what, ratio, "x", most)
        else:
            about = f"needs {most:g} on idle cores; these were {idle:.0%} idle"
            yield Cost(what, ratio, "x", elsewhere=about)


def _per_voxel(cache: Path, small_s: float, n_repeats: int) -> Cost:
    """Processor time of a further voxel of a finer grid, against that of the standard one."""
    plan = plan_of(CASES["drift-2mm"], POINT_SPREADS["mild"], 4 * FEW_BIG, 1)
    big = made_run(cache, plan)
    few = repeated(big, 1, FEW_BIG)
    found = in_turn({"few": lambda: realign(few, 1), "all": lambda: realign(big, 1)}, n_repeats)
    further_s = (found["all"].cpu_s - found["few"].cpu_s) / (3 * FEW_BIG)
    ratio = further_s / voxels(big) / small_s
    return Cost("CPU of a further voxel, 104x104x72 against 64x64x36", ratio, "x", 1.3)


def _memory(run: Path, many: Path) -> Iterator[Cost]:
    """Anonymous memory of a rank, above that of an idle python."""
    idle = f"import {IMPORTS}, time; time.sleep(0.5)"
    idle_mb = peak_anonymous_mb([sys.executable, "-c", idle])
    for n, source in ((VOLUMES, run), (MANY_VOLUMES, many)):
        with tempfile.TemporaryDirectory() as out:
            peak_mb = peak_anonymous_mb(realign_command(source, 1, out))
        yield Cost(f"anonymous memory of a rank, {n} volumes", peak_mb - idle_mb, "MB", 60)


def _reslicing(ways: list[Resliced]) -> Iterator[Cost]:
    for way in ways:
        required = 150 if way.name.startswith("keepstill") else None
        yield Cost(f"reslice: {way.name}", way.mvoxels_per_s, "Mvoxel/s", required, True)
    for spread in POINT_SPREADS:
        scipy = {way.name: way.error_percent[spread] for way in ways}
        for way in ways:
            # No worse than scipy at the same degree, to the last digit shown.
            limit = scipy.get(way.name.replace("keepstill, degree", "scipy, order"))
            required = None if way.name.startswith("scipy") or limit is None else 1.005 * limit
            what = f"reslicing error, {spread} aliasing: {way.name}"
            yield Cost(what, way.error_percent[spread], "%", required)


def realign_command(source: Path, n_ranks: int, out: str) -> list[str]:
    """Command line that realigns a run on ranks of one thread each."""
    python = Path(sys.executable)
    launcher = [str(python.parent / "mpirun"), "-n", str(n_ranks)] if n_ranks > 1 else []
    command = [str(python), "-m", "keepstill", "realign", str(source), "--out", out]
    return [*launcher, *command, "--dtype", "int16", "--threads", "1"]


def realign(source: Path, n_ranks: int) -> Spent:
    """Cost of realigning a run: .nii.gz in, int16 .nii.gz and all tables out."""
    with tempfile.TemporaryDirectory() as out:
        return spent(realign_command(source, n_ranks, out))


def gzip(source: Path) -> Spent:
    """The yardstick."""
    return spent(["sh", "-c", 'gzip -dc "$0" | gzip -1 > /dev/null', str(source)])


def in_turn(works: dict[str, Callable[[], Spent]], n_repeats: int) -> dict[str, Spent]:
    """Least cost of each, measured in turn so that a slow minute of the machine hits all."""
    found: dict[str, list[Spent]] = {name: [] for name in works}
    for _ in range(n_repeats):
        for name, work in works.items():
            found[name].append(work())
            print(f"{name}: {found[name][-1]}", file=sys.stderr)
    return {name: least(each) for name, each in found.items()}


def repeated(source: Path, n_times: int, n_volumes: int | None = None) -> Path:
    """A run's first volumes, one time after the other, in a folder beside it; made once."""
    image = nib.load(source)
    data = np.asarray(image.dataobj.get_unscaled())[..., :n_volumes]
    n = data.shape[3] * n_times
    path = source.parents[2] / f"of-{n}" / source.name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        header = image.header.copy()
        header.set_data_shape((*data.shape[:3], n))
        header["vox_offset"] = 352
        volumes = [data[..., t].tobytes(order="F") for t in range(data.shape[3])]
        write.put_nifti(path, header, (volume for _ in range(n_times) for volume in volumes))
        sidecar = source.name.replace(".nii.gz", ".json")
        path.with_name(sidecar).write_text(source.with_name(sidecar).read_text())
    return path


def voxels(source: Path) -> int:
    """Voxels of a volume of a run."""
    return int(np.prod(nib.load(source).shape[:3]))


HEADER = f"{'cost':<58}{'found':>9} {'unit':<9}{'required':>10}  verdict"


def in_words(cost: Cost) -> str:
    """Line of the table."""
    sign = "≥" if cost.more_is_better else "≤"
    needs = "" if cost.required is None else f"{sign} {cost.required:.3g}"
    verdict = "" if cost.required is None else "pass" if cost.passes else "FAIL"
    end = f"  ({cost.elsewhere})" if cost.elsewhere else ""
    return f"{cost.what:<58}{cost.value:>9.3g} {cost.unit:<9}{needs:>10}  {verdict}{end}".rstrip()


def main() -> None:
    """Print the table; exit with 1 if anything falls short."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="the least counts")
    parser.add_argument("--cache", type=Path, default=default_folder(), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    args = parser.parse_args()
    print(HEADER)
    found = []
    for cost in costs(args.cache, args.repeats):
        print(in_words(cost), flush=True)
        found.append(cost)
    if args.json:
        args.json.write_text(json.dumps([asdict(cost) for cost in found], indent=1) + "\n")
    sys.exit(not all(cost.passes for cost in found))


if __name__ == "__main__":
    main()
