"""`keepstill selftest`: a simulated study through the real workflow, and nothing left of it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from keepstill import tune
from keepstill.errors import LaunchError, SettingsError
from keepstill.selftest import MOST_BOUNDS, MOST_WORST_MM, RunResult, Trial, selftest

BOUND_MM = 0.005


def test_selftest_passes_and_leaves_nothing(tmp_path):
    stage_root = tmp_path / "memory"
    stage_root.mkdir()
    command = [sys.executable, "-m", "keepstill", "selftest", "--volumes", "24", "--cores", "2"]
    done = subprocess.run(
        [*command, "--stage-root", str(stage_root)],
        cwd=tmp_path,
        env=os.environ | {"PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    head, columns, first, second, seconds, cpu, ranks, verdict = done.stdout.splitlines()
    assert head.startswith("2 simulated runs of 64x64x36x24, profile ")
    assert columns.split() == ["run", "mean", "(mm)", "worst", "(mm)", "x", "bound"]
    for line, subject in ((first, "sub-01"), (second, "sub-02")):
        name, mean, worst, times, word = line.split()
        assert (name, word) == (f"{subject}_task-rest_run-1", "pass")
        assert 0 < float(mean) < float(worst) < MOST_WORST_MM and 0.5 < float(times) < MOST_BOUNDS
    assert seconds.startswith("seconds a run: stage ") and "n/a" not in seconds + cpu + ranks
    assert float(cpu.removeprefix("CPU seconds a run: ").split(";")[0]) > 1
    assert ranks.count("(cores ") == 2 and verdict.startswith("pass: ")
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    assert list(stage_root.iterdir()) == []


@pytest.mark.parametrize(
    "error_mm",
    [
        None,
        [0.01, np.nan],
        [2 * MOST_BOUNDS * BOUND_MM] * 2,
        [0.001] * 20 + [2 * MOST_WORST_MM],
    ],
    ids=["not complete", "a failed volume", "far from the truth", "one volume far off"],
)
def test_what_fails(error_mm):
    error_mm = None if error_mm is None else np.array(error_mm)
    result = RunResult("sub-01_task-rest", error_mm, BOUND_MM)
    assert not result.passes and result.in_words().endswith("FAIL")


def test_a_profile_that_is_not_there(tmp_path):
    with pytest.raises(SettingsError, match=r"workflow profile nowhere: no such folder"):
        selftest(Trial(profile=tmp_path.relative_to(tmp_path) / "nowhere", stage_root=tmp_path))


def test_a_workflow_that_fails_is_told(tmp_path):
    """Without the profile's launcher: both runs incomplete, why, and nothing left."""
    profile = tmp_path / "profile"
    profile.mkdir()
    (profile / "config.yaml").write_text(
        "cores: 2\nset-threads:\n  realign: 2\nkeep-going: true\n"
        "set-resources:\n  realign:\n    mpi: no-such-launcher\n    tasks: 2\n"
    )
    stage_root = tmp_path / "memory"
    stage_root.mkdir()
    lines, is_well = selftest(Trial(profile=profile, n_volumes=4, stage_root=stage_root))
    assert not is_well
    assert sum("not complete" in line and line.endswith("FAIL") for line in lines) == 2
    assert any("no-such-launcher" in line for line in lines)
    assert list(stage_root.iterdir()) == []


@pytest.mark.parametrize(
    ("n_threads", "n_cores", "found"),
    [
        (1, 1, [(1, 1)]),
        (2, 2, [(2, 1), (2, 2)]),
        (4, 2, [(4, 1), (4, 2), (4, 4), (2, 1), (2, 2)]),
        (6, 6, [(6, 1), (6, 2)]),
        (64, 64, [(64, 1), (64, 2), (64, 4), (64, 8), (64, 16)]),
    ],
)
def test_ways_to_share_out_a_machine(n_threads, n_cores, found):
    tried = tune.ways(n_threads, n_cores)
    assert [(way.cores, way.ranks) for way in tried] == found
    assert all(way.lanes * way.ranks == way.cores for way in tried)


def test_the_fastest_way_becomes_a_profile(tmp_path, monkeypatch):
    """A way that fails is told and passed over; if all do, why."""
    rates = {1: 700.0, 2: 900.0, 4: None}
    monkeypatch.setattr(tune, "_ways_here", lambda trial: [tune.Way(4, ranks) for ranks in rates])
    monkeypatch.setattr(tune, "simulate_study", lambda folder, plan: None)
    monkeypatch.setattr(tune, "link_runs", lambda folder, n_runs: None)
    monkeypatch.setattr(tune, "_measured", lambda *given: (rates[given[-1].ranks], "no mpirun"))
    lines = list(tune.tune(Trial(stage_root=tmp_path)))
    assert [line.split()[-1] for line in lines[1:4]] == ["700", "900", "failed"]
    assert "About 900 runs an hour" in lines[4]
    values = yaml.safe_load("\n".join(lines))
    assert (values["cores"], values["set-threads"]["stage"]) == (4, 2)
    assert values["set-resources"]["realign"]["tasks"] == 2
    assert values["set-resources"]["realign"]["mpi_args"] == "-bind-to user:{cores}"
    rates.update(dict.fromkeys(rates))
    with pytest.raises(LaunchError, match="no mpirun"):
        list(tune.tune(Trial(stage_root=tmp_path)))


def test_a_tuned_profile_is_one_that_snakemake_takes(tmp_path):
    """All of it, on one core and runs of a few volumes; nothing stays behind."""
    (tmp_path / "memory").mkdir()
    command = [sys.executable, "-m", "keepstill", "selftest", "--tune", "--cores", "1"]
    command += ["--volumes", "4", "--stage-root", str(tmp_path / "memory")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not any((tmp_path / "memory").iterdir())
    measured = done.stdout.splitlines()[1]
    assert measured.startswith("# 1 rank x 1 lane on 1 hardware thread ")
    assert float(measured.split()[-1].replace(",", "")) > 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(done.stdout)
    clone = Path(__file__).parents[2]
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--snakefile"]
    command += [
        str(clone / "Snakefile"),
        "--workflow-profile",
        "mine",
        "--printshellcmds",
        "--quiet",
        "host",
    ]
    config = [f"bids_dir={clone / 'tests' / 'data' / 'study'}", "output_dir=out"]
    planned = subprocess.run(
        [*command, "--config", *config], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert planned.returncode == 0, planned.stderr
    assert "--ranks 1 " in planned.stdout
