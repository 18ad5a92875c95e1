"""The ladder: its rungs agree with each other and with the truth, and lose no volume."""

import io
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstill.errors import LaunchError, OutputError, SettingsError
from keepstill.ladder import itk_bridge, results
from keepstill.ladder.climb import MOTION, REALIGNED, Job, climb
from keepstill.ladder.measure import (
    Compared,
    Cost,
    Figures,
    Trial,
    checked_motion,
    cost_of,
    figures_of,
    run_job,
)
from keepstill.ladder.rungs import RUNGS, slices_run
from keepstill.ladder.table import (
    agreement,
    from_json,
    full_table,
    heading,
    rounded_s,
    short_table,
    to_json,
    verdict,
)
from keepstill.ladder.teams import shares
from keepstill.settings import RealignSettings
from keepstill.simulate import StudyPlan, simulate_study
from keepstill.stage import stage_run
from keepstill.truth import read_truth, truth_path

CLONE = Path(__file__).parents[2]
MPIRUN = str(Path(sys.executable).with_name("mpirun"))
N_VOLUMES, SHAPE = 5, (32, 36, 24)
# Points 24 mm apart are few for a small head: the classic rungs are 0.05 to 0.15 mm off.
MOST_ERROR_MM = 0.25


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small simulated run of five volumes, staged: (source, stage directory)."""
    folder = tmp_path_factory.mktemp("ladder")
    plan = StudyPlan(subjects=1, volumes=N_VOLUMES, shape=SHAPE, voxel_mm=(6.0, 6.0, 6.0))
    simulate_study(folder / "study", plan)
    (source,) = (folder / "study").glob("sub-*/func/*_bold.nii.gz")
    stage_run(source, "run", None, folder / "staged", RealignSettings())
    return source, folder / "staged"


def job_of(made, rung, folder, n_ranks=1):
    source, staged = made
    folder.mkdir()
    shape = (N_VOLUMES, *SHAPE[::-1])
    np.memmap(folder / REALIGNED, np.float32, "w+", shape=shape)[:] = np.nan
    return Job(rung, staged, folder, tuple(range(N_VOLUMES)), n_ranks, source)


def error_mm(made, motion):
    source, _ = made
    return read_truth(truth_path(source.parents[2], source)).error_mm(motion, 0)[1:]


def voxels(job):
    return np.fromfile(job.folder / REALIGNED, np.float32).reshape(N_VOLUMES, *SHAPE[::-1])


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    """What each way of reslicing gives in this process: {loop: (job, motion)}."""
    found = {}
    for rung in (RUNGS[0], RUNGS[2], RUNGS[3], RUNGS[5]):
        one = replace(rung, has_ranks=False, every_slice=8 if rung.is_classic else 1)
        job = job_of(made, one, tmp_path_factory.mktemp(rung.loop) / "rung")
        climb(Job.from_json(job.to_json()))
        found[rung.loop] = job, checked_motion(job)
    return found


def test_rungs_agree_with_each_other_and_with_the_truth(made, alone):
    first = alone["inverting"][1]
    assert 0.005 < error_mm(made, first).max() < MOST_ERROR_MM
    for loop in ("hoisted", "compiled"):
        np.testing.assert_array_equal(alone[loop][1], first)
    assert error_mm(made, alone["keepstill"][1]).max() < error_mm(made, first).max()


def test_compiled_loop_gives_what_itk_gives_point_by_point(alone):
    slices = slices_run(SHAPE[2], 8)
    expected, *others = (voxels(alone[loop][0]) for loop in ("inverting", "hoisted", "compiled"))
    assert np.isnan(np.delete(expected, slices, axis=1)).all()
    assert expected[:, slices].max() > 500
    for found in others:
        np.testing.assert_allclose(found[:, slices], expected[:, slices], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_return_every_volume(n_ranks, made, alone, tmp_path):
    """Neither 2 nor 3 divides 5: what is left over is done by all ranks together."""
    rung = replace(RUNGS[2], every_slice=8)
    job = job_of(made, rung, tmp_path / "rung", n_ranks)
    cost = run_job(job, Trial(made[0], n_ranks, f"{MPIRUN}"))
    np.testing.assert_allclose(checked_motion(job), alone["hoisted"][1], atol=1e-9)
    slices = slices_run(SHAPE[2], 8)
    np.testing.assert_allclose(
        voxels(job)[:, slices], voxels(alone["hoisted"][0])[:, slices], atol=1e-3
    )
    assert 0 < cost.wall_s < cost.cpu_s * 50 and cost.start_up_cpu_s > 0


def test_a_volume_that_no_rank_returns_is_told(alone, tmp_path):
    job, _ = alone["hoisted"]
    copied = replace(job, folder=tmp_path)
    shutil.copy(job.folder / MOTION, tmp_path / MOTION)
    lost = voxels(job)
    lost[3] = np.nan
    lost.tofile(tmp_path / REALIGNED)
    with pytest.raises(OutputError, match=r"no voxels of volumes \[3\]; a rank lost them"):
        checked_motion(copied)


@given(st.integers(0, 300), st.integers(1, 40))
def test_shares_are_every_volume_once(n, size):
    parts = [shares(n, size, rank) for rank in range(size)]
    own = sorted(t for part in parts for t in part.own)
    (joint,) = {part.joint for part in parts}
    assert [*own, *joint] == list(range(n)) and len(joint) < size
    assert len({len(part.own) for part in parts}) == 1


def test_a_launcher_of_another_library_is_told_and_gets_the_flags(made, tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$1 $2 $3 $4" > {tmp_path}/flags\nshift 4\nexec "$@"\n')
    launcher.chmod(0o755)
    job = job_of(made, RUNGS[4], tmp_path / "rung", 2)
    with pytest.raises(LaunchError, match="MPI core binding: 2 ranks asked for, 1 found by MPI"):
        run_job(job, Trial(made[0], 2, str(launcher), "-bind-to hwthread"))
    assert (tmp_path / "flags").read_text() == "-n 2 -bind-to hwthread\n"
    with pytest.raises(LaunchError, match="no-such-mpirun: No such file"):
        run_job(job, Trial(made[0], 2, "no-such-mpirun"))


def spent(rest_s, loop_s):
    watch = {"rest": rest_s, "loop": loop_s}
    watches = {name: {"cpu_s": s, "wall_s": 1.5 * s} for name, s in watch.items()}
    return watches | {"start_up_cpu_s": 3.0}


def test_a_loop_that_ran_in_part_is_multiplied_up():
    """Two ranks, ten volumes, one slice in eighteen; start-up is what the ranks did not work."""
    cost = cost_of([spent(2.0, 1.0), spent(4.0, 0.5)], scale=18, n_volumes=10, seconds=20.0)
    assert cost == pytest.approx(((20 + 13) / 10, 1.5 * 20 / 10, 6.0, 20 - 1.5 * 4.5))


@pytest.mark.parametrize(("n", "every", "expected"), [(36, 18, [9, 27]), (16, 18, [9]),
                                                      (5, 18, [4]), (3, 1, [0, 1, 2])])  # fmt: skip
def test_slices_that_are_run(n, every, expected):
    assert list(slices_run(n, every)) == expected


def test_figures_are_medians_and_say_what_was_run(made, alone):
    source, _ = made
    truth, motion = read_truth(truth_path(source.parents[2], source)), alone["inverting"][1]
    of = Compared(truth, motion, (N_VOLUMES, *SHAPE[::-1]), Trial(source, 2, every_volume=2))
    of = of._replace(first=motion[::2])
    costs = [Cost(3.0, 2.0, 1.0, 1.0), Cost(9.0, 1.0, 1.0, 1.0), Cost(4.0, 3.0, 1.0, 1.0)]
    line = figures_of(RUNGS[1], costs, motion[::2], of)
    assert line.cost[:2] == (4.0, 2.0) and line.n_ranks == 2 and line.apart_mm == 0
    assert line.volumes == (3, 5) and line.slices == (1, 24)  # of every 18
    assert line.error_mm[1] == error_mm(made, motion)[[1, 3]].max()
    assert figures_of(RUNGS[5], costs, motion[::2], of).volumes == (5, 5)
    unbound = [figures_of(rung, costs, motion[::2], of).name for rung in RUNGS]
    bound = of._replace(trial=replace(of.trial, binding="-bind-to core"))
    names = [figures_of(rung, costs, motion[::2], bound).name for rung in RUNGS]
    assert names == [rung.name for rung in RUNGS]
    without = {"MPI core binding (not bound: no flags in the profile)"}
    assert set(unbound) - set(names) == without


def figures(cpu_s=0.01, apart_mm=0.03):
    rungs = (("classic", 3.0, (2, 36), 0.0), ("keepstill", cpu_s, (36, 36), apart_mm))
    return [
        Figures(name, 2, Cost(s, s / 2, 5.0, 6.0), (40, 200), slices, (0.02 / i, 0.04 / i), apart)
        for i, (name, s, slices, apart) in enumerate(rungs, 1)
    ]


SETTING = {
    **{
        "cpu": "EPYC",
        "cores": 2,
        "load": 0.1,
        "ranks": 2,
        "repeats": 3,
        "binding": "",
        "date": "2026-11-20",
    },
    "versions": {"keepstill": "0.1.0", "itk": "5.4.7"},
}


def test_tables():
    rows = [line.split(" | ") for line in full_table(figures()).splitlines()]
    assert {len(row) for row in rows[:4]} == {11}
    assert rows[2][5:10] == ["1.0", "1.0", "0.0200, 0.0400", "0.0000",
                             "40 of 200 volumes, 2 of 36 slices"]  # fmt: skip
    assert rows[3][:6] == ["| 2", "keepstill", "2", "0.0100", "0.00500", "300"]
    assert rows[3][9] == "40 of 200 volumes"
    assert rows[-1] == ["All rungs agree on the motion of every volume within 0.05 mm."]
    (*_, short) = short_table(figures()).splitlines()
    assert short == "| 2 | keepstill | 0.0100 | 300 | 0.00500 | 0.0100 |"
    assert [rounded_s(s) for s in (5.0034, 99.96, 1234.5)] == ["5.00", "100", "1234"]
    machine = "EPYC, 2 cores, load 0.1 beforehand; 2026-11-20"
    how = "median of 3 repeats; ranks bound by nothing"
    assert heading(SETTING) == f"{machine}; {how}; keepstill 0.1.0, itk 5.4.7"
    assert "load 7 beforehand, so processor time is the figure" in heading(SETTING | {"load": 7.0})


def test_a_rung_that_is_apart_is_told_with_the_reason():
    (line,) = agreement(figures(apart_mm=0.06))
    assert line.startswith("keepstill: 0.060 mm from the first rung in its worst volume; ")
    assert line.endswith("0.020 mm and 0.040 mm at worst, so this one is the farther off.") is False
    assert "the first rung is the farther off" in line


def test_verdict():
    assert verdict(figures()).startswith("pass: keepstill takes 300 times less processor time")
    assert verdict(figures(cpu_s=0.02)).startswith("FAIL: keepstill takes 150 times less")
    assert "meant for" not in verdict(figures())
    short = [replace(line, volumes=(7, 7)) for line in figures()]
    assert verdict(short).endswith("is meant for runs of 200 volumes, this one has 7")


def test_results_and_documentation_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "measure", lambda trial, tell: figures())
    clone = tmp_path / "clone"
    (clone / "docs").mkdir(parents=True)
    for name in ("README.md", "docs/ladder.md"):
        marked = "before\n<!-- snakemake ladder -->\nold\n<!-- end -->\nafter\n"
        (clone / name).write_text(marked)
    said = results.put_ladder(Trial(tmp_path, 2), tmp_path / "out", clone, io.StringIO())
    assert said.startswith("keepstill: ladder: pass: ") and "\n" not in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("table.md", "ladder.json", "ladder.svg")
    }
    assert from_json(json.loads((clone / "docs" / "ladder.json").read_text())) == figures()
    before, table, after = (clone / "README.md").read_text().split("<!--")
    assert short_table(figures()) in table and before == "before\n" and after.endswith("after\n")
    assert full_table(figures()) in (clone / "docs" / "ladder.md").read_text()
    (clone / "README.md").write_text("no place")
    with pytest.raises(OutputError, match=r"README.md: 0 places for the table found"):
        results.renew_docs(clone)


def test_the_documentation_has_the_figures_of_its_json():
    for path, text in results.documented(CLONE).items():
        assert f"<!-- snakemake ladder -->\n{text}<!-- end -->" in path.read_text()
    made = json.loads((CLONE / "docs" / "ladder.json").read_text())
    assert json.loads(json.dumps(to_json(from_json(made), made["setting"]))) == made


def test_without_itk(monkeypatch):
    monkeypatch.setitem(sys.modules, "itk", None)
    with pytest.raises(SettingsError, match=r"ITK is not installed; .* make itk, or pip install"):
        itk_bridge.require_itk()


def snakemake(folder, *arguments, python_path=""):
    """A call in a folder without a study or a place for its results: other targets refuse that."""
    names = ("bids_dir", "ladder_dir")
    return subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", "--snakefile", str(CLONE / "Snakefile")),
            *("--cores", "1", *arguments, "--config", *(f"{n}={folder / n}" for n in names)),
            *("ladder={every_volume: 7, docs: true}", "--", "ladder"),
        ],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": f"{python_path}{os.pathsep}{CLONE / 'workflow' / 'scripts'}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_workflow_hands_on_what_profile_and_configuration_say(tmp_path, monkeypatch):
    """The rule's command, as a dry run shows it, through the script to the trial."""
    told = snakemake(tmp_path, "-n", "-p", "--quiet", "host").stdout
    (command,) = (line for line in told.splitlines() if "ladder_run.py" in line)
    script, *arguments = shlex.split(command.split(" python ", 1)[1])
    (tmp_path / "ladder_dir" / "study-200" / "sub-01" / "func").mkdir(parents=True)
    source = tmp_path / "ladder_dir" / "study-200" / "sub-01" / "func" / "a_bold.nii.gz"
    source.touch()
    given = []
    monkeypatch.setattr(results, "put_ladder", lambda *given_: given.extend(given_))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(script, run_name="__main__")
    flags = "-bind-to hwthread -map-by core"
    assert given[0] == Trial(source, 1, "mpirun", flags, 7, 3, Path("/dev/shm"))
    assert given[1:3] == [tmp_path / "ladder_dir", CLONE]


def test_the_workflow_without_itk_says_so_and_reads_no_study(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['itk'] = None\n")
    done = snakemake(tmp_path, python_path=tmp_path)
    own = [line for line in done.stderr.splitlines() if line.startswith("keepstill: ")]
    assert done.returncode == 2 and len(own) == 1, done.stderr
    assert "ladder_study" not in done.stderr  # before a job is started
    assert own[0].startswith("keepstill: ITK is not installed; the ladder needs it: make itk, or")
    assert not list((tmp_path / "ladder_dir").glob("study*"))
