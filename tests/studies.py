"""Simulated studies, and Snakemake called on them from an environment that is not activated."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from keepstill.__main__ import main
from keepstill.bids import index_runs
from keepstill.settings import RealignSettings
from keepstill.study import Study

CLONE = Path(__file__).parents[1]

# The steps of a run on two cores, and as many ranks. What is set here leaves none of the profile's.
TWO_RANKS = ("--set-threads", "stage=2", "realign=2", "collect=2", "reslice_echo=2",
             "--set-resources", "realign:mpi=mpirun", "realign:mpi_args=-bind-to user:{cores}",
             "realign:tasks=2")  # fmt: skip


def simulate(study: Path, options: str) -> None:
    """A study of heads of known motion."""
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(study), *options.split()])
    assert ended.value.code == 0


def call(root: Path, *config: str, status: int = 0) -> list[str]:
    """Our own lines of Snakemake's call on the study in a folder, which ends with a status."""
    command = [
        *(sys.executable, "-m", "snakemake", "--cores", "2"),
        *("--snakefile", str(CLONE / "Snakefile")),
        *("--workflow-profile", str(CLONE / "profiles" / "default")),
        *("--config", "bids_dir=study", "output_dir=out", f"stage_root={root / 'memory'}"),
        *config,
    ]
    environment = os.environ | {"PATH": os.defpath}
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("keepstill: ")]
    return [line for line in lines if ": waiting for " not in line]


def study_of(bids_dir: Path, root: Path) -> Study:
    """All runs of a data set with default settings, to be realigned below a folder."""
    return Study(
        bids_dir=bids_dir,
        output_dir=root / "out",
        stage_root=root / "keepstill-0",
        settings=RealignSettings(),
        runs={run.name: run for run in index_runs(bids_dir).runs},
        has_pages=True,
    )
