"""The profiles as Snakemake reads them."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import yaml
from snakemake.cli import parse_args

CLONE = Path(__file__).parents[2]
SLURM = CLONE / "profiles" / "slurm"

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
    reason="needs snakemake_executor_plugin_slurm (envs/slurm.txt)",
)


def read(clone: Path, *arguments: str) -> dict[str, str]:
    """Snakemake's settings in a clone, in words; those that name the clone itself are left out."""
    _, args = parse_args(["--snakefile", str(clone / "Snakefile"), *arguments])
    del args.snakefile, args.workflow_profile, args.profile
    return {name: re.sub(r" at 0x\w+", "", repr(value)) for name, value in vars(args).items()}


@needs_plugin
def test_no_key_of_the_default_profile_leaks_into_slurm(tmp_path: Path) -> None:
    """The settings are those of a clone that has no profiles/default."""
    bare = tmp_path / "clone"
    shutil.copytree(SLURM, bare / "profiles" / "slurm")
    shutil.copy(CLONE / "Snakefile", bare)
    expected = read(bare, "--workflow-profile", str(bare / "profiles" / "slurm"))
    assert read(CLONE, "--workflow-profile", str(SLURM)) == expected
    assert expected["executor"] == "'slurm'" and "tasks" in expected["set_resources"]
    # As a bare --profile it would be overridden, which this test must be able to see.
    assert read(CLONE, "--profile", str(SLURM)) != expected


@pytest.mark.parametrize("name", ["default", "workstation", "slurm", "cluster-generic"])
def test_steps_of_a_run_take_the_same_cores(name: str) -> None:
    """That is what bounds the runs in memory; and no rank is without a core."""
    profile = yaml.safe_load((CLONE / "profiles" / name / "config.yaml").read_text())
    (n_threads,) = set(profile["set-threads"].values())
    steps = {"stage", "realign", "collect", "reslice_echo", "stage_reference", "make_reference"}
    assert set(profile["set-threads"]) == steps
    realign, ladder = (profile["set-resources"][rule] for rule in ("realign", "ladder"))
    assert "-bind-to" in ladder["mpi_args"] and "{" not in ladder["mpi_args"]  # it leases no cores
    assert n_threads % realign["tasks"] == 0
    assert profile.get("cores", n_threads) % n_threads == 0
    if "executor" in profile:
        assert profile["cores"] == n_threads == realign["tasks"]
    if profile.get("executor") == "slurm":
        assert realign["cpus_per_task"] == realign["nodes"] == 1
        assert {name: ladder[name] for name in ("tasks", "cpus_per_task", "nodes")} == {
            name: realign[name] for name in ("tasks", "cpus_per_task", "nodes")
        }
