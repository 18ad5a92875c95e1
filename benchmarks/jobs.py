"""What a run takes in a cluster job that several runs share, on a real Slurm of this machine.

    python benchmarks/jobs.py [--runs-a-job 1 5 20] [--jobs 2]

Needs root and slurm-wlm, like the tests in tests/slurm, whose node it starts: two cores, so a job
of two ranks at a time. Seconds are those that Slurm notes of a job, shared by its runs; those of a
run's own steps are Snakemake's benchmarks of them. What is left is Snakemake, starting and ending.
"""

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import yaml

from cases import CASES, POINT_SPREADS
from made_runs import default_folder, made_run, plan_of
from scale import make_study, names_of

CLONE = Path(__file__).parents[1]
sys.path.insert(0, str(CLONE / "tests"))
from slurm_node import Node, slurm_node, why_not  # noqa: E402

VOLUMES, CORES = 40, 2


class Shared(NamedTuple):
    """Line of the table."""

    runs_a_job: int
    n_jobs: int
    seconds_a_run: float
    own_seconds_a_run: float


def profile_text(runs_a_job: int) -> str:
    """The Slurm profile as shipped, but for the size of this node and the runs a job."""
    profile = yaml.safe_load((CLONE / "profiles" / "slurm" / "config.yaml").read_text())
    profile["set-threads"] = dict.fromkeys(profile["set-threads"], CORES)
    profile["set-resources"]["realign"] |= {"tasks": CORES}
    own = {"cores": CORES, "group-components": [f"run={runs_a_job}"], "latency-wait": 5}
    return yaml.safe_dump(profile | own)


def shared(node: Node, folder: Path, source: Path, runs_a_job: int, n_jobs: int) -> Shared:
    """Realign so many runs, so many a job, and see what jobs and steps took."""
    study, out = folder / "study", folder / "out"
    make_study(study, source, names_of(runs_a_job * n_jobs))
    (folder / "profile").mkdir()
    (folder / "profile" / "config.yaml").write_text(profile_text(runs_a_job))
    before = len(node.completed())
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(CLONE / "Snakefile")),
        *("--workflow-profile", str(folder / "profile")),
        *("--config", f"bids_dir={study}", f"output_dir={out}", "pages=false"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    node.wait_until_idle()
    jobs = [_seconds(job) for job in node.completed()[before:]]
    if len(jobs) != n_jobs:
        raise SystemExit(f"{len(jobs)} jobs found; {n_jobs} were to be")
    own = sum(_steps_s(out)) / (runs_a_job * n_jobs)
    return Shared(runs_a_job, n_jobs, median(jobs) / runs_a_job, own)


def _seconds(job: dict[str, str]) -> float:
    began, ended = (datetime.fromisoformat(job[name]) for name in ("StartTime", "EndTime"))
    return (ended - began).total_seconds()


def _steps_s(out: Path) -> Iterator[float]:
    """Seconds of each step of each run."""
    for path in (out / "logs" / "benchmark").rglob("*.tsv"):
        with path.open() as file:
            yield mean(float(row["s"]) for row in csv.DictReader(file, delimiter="\t"))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs-a-job", default=[1, 5, 20], type=int, nargs="+", metavar="N")
    parser.add_argument("--jobs", default=2, type=int, metavar="N", help="of each size")
    parser.add_argument("--cache", default=default_folder(), type=Path, help="for the run")
    args = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"jobs.py: {reason}")
    source = made_run(args.cache, plan_of(CASES["drift"], POINT_SPREADS["sharp"], VOLUMES, 1))
    print("runs a job  jobs  seconds a run  of its own steps", flush=True)
    root = Path(tempfile.mkdtemp(prefix="keepstill-jobs-"))
    try:
        (root / "node").mkdir()
        with slurm_node(root / "node") as node:
            for n in args.runs_a_job:
                (root / str(n)).mkdir()
                found = shared(node, root / str(n), source, n, args.jobs)
                print(f"{found.runs_a_job:>10}{found.n_jobs:>6}{found.seconds_a_run:>15.1f}"
                      f"{found.own_seconds_a_run:>18.1f}", flush=True)  # fmt: skip
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
