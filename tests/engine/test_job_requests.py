"""What a run asks of a scheduler: from its header, enough, and more when it is tried again."""

import dataclasses
import math
from pathlib import Path

import pytest

import runs
from keepstill.job_requests import (
    JOB_BYTES,
    JOB_OVERHEAD_S,
    RANK_BYTES,
    retried,
    run_request,
    run_s,
    runs_a_job,
)
from keepstill.preflight import CPU_S_PER_RUN, Needs
from keepstill.stage import REALIGNED_VOXELS, STAGED_VOXELS, stage_run
from keepstill.study import Study
from studies import study_of

SMALL, LONG = "sub-01_task-rest", "sub-02_task-rest"


@pytest.fixture
def made(tmp_path: Path) -> Study:
    """A study of a small run and of one whose header promises 3,000 volumes of 1 Mvoxel."""
    bids_dir = tmp_path / "study"
    for run in (SMALL, LONG):
        runs.write_run(bids_dir / run[:6] / "func" / f"{run}_bold.nii", runs.ball_run())
    (bids_dir / "dataset_description.json").write_text("{}")
    long = bids_dir / "sub-02" / "func" / f"{LONG}_bold.nii"
    header = bytearray(long.read_bytes()[:352])
    header[42:50] = b"".join(n.to_bytes(2, "little") for n in (100, 100, 100, 3000))
    with long.open("wb") as file:
        file.write(header)
        file.truncate(352 + 2 * 3 * 10**9)  # as no more than a hole
    return study_of(bids_dir, tmp_path)


def test_memory_holds_what_is_staged_and_every_rank(made: Study, tmp_path: Path) -> None:
    stage_dir = tmp_path / "staged"
    stage_run(made.runs[SMALL].source, SMALL, None, stage_dir)
    staged = sum((stage_dir / name).stat().st_size for name in (STAGED_VOXELS, REALIGNED_VOXELS))
    for n_ranks in (1, 4):
        least = (JOB_BYTES + staged + n_ranks * RANK_BYTES) / 1e6
        assert least < run_request(made, SMALL, n_ranks).mem_mb < least + 2 * n_ranks
    int16, float32, n_voxels = 2, 4, 3e9
    long_bytes = (int16 + float32) * n_voxels
    assert long_bytes < 1e6 * run_request(made, LONG, 4).mem_mb < long_bytes + 4e9


@pytest.mark.parametrize("itk", [{"engine": "itk"}, {"check": "itk"}])
def test_ranks_with_itk_ask_for_what_it_takes(made: Study, itk: dict[str, str]) -> None:
    """A rank had 283 MB of its own at 64 x 64 x 36 voxels, and was given 172."""
    with_itk = dataclasses.replace(made, settings=dataclasses.replace(made.settings, **itk))
    more_mb = [
        run_request(with_itk, SMALL, n_ranks).mem_mb - run_request(made, SMALL, n_ranks).mem_mb
        for n_ranks in (1, 4)
    ]
    assert 180 < more_mb[0] < 300 and more_mb[1] == pytest.approx(4 * more_mb[0], abs=4)


def test_minutes_follow_volumes_ranks_and_runs(made: Study) -> None:
    small, long = run_request(made, SMALL, 1), run_request(made, LONG, 1)
    expected_min = run_s(Needs(cpu_s=CPU_S_PER_RUN + 0.1 * 3000), 1) / 60
    assert 2 * expected_min < long.runtime_min < 5 * expected_min + 11
    four = run_request(made, LONG, 4)
    assert long.runtime_min - small.runtime_min > 3 * (four.runtime_min - small.runtime_min) > 0
    # Each of 20 runs alone would ask for the time that a job takes to start.
    assert run_request(made, SMALL, 1, 20).runtime_min < small.runtime_min / 5
    assert run_request(made, SMALL, 1, 20).runtime_min >= 1


def test_another_attempt_doubles() -> None:
    assert [retried(700, attempt) for attempt in (1, 2, 3)] == [700, 1400, 2800]


def test_ranks_share_all_but_the_start_of_programs() -> None:
    assert run_s(Needs(cpu_s=CPU_S_PER_RUN + 40), 4) == CPU_S_PER_RUN + 10
    assert run_s(Needs(cpu_s=1.0), 4) == 1.0  # an echo starts one program


def test_so_many_runs_that_a_tenth_is_snakemakes(made: Study) -> None:
    one_s = 9 * JOB_OVERHEAD_S
    small_s = CPU_S_PER_RUN  # 5 volumes cost nothing
    assert runs_a_job(made, [SMALL] * 1000, 4) == pytest.approx(one_s / small_s, rel=0.1)
    assert runs_a_job(made, [LONG] * 1000, 1) == 1  # takes minutes
    assert runs_a_job(made, [SMALL], 4) == 1
    assert runs_a_job(made, [], 4) == 1


def test_jobs_are_even(made: Study) -> None:
    wanted = runs_a_job(made, [SMALL] * 10_000, 4)
    n_runs = wanted + 1
    assert runs_a_job(made, [SMALL] * n_runs, 4) == math.ceil(n_runs / 2)


def test_a_run_that_cannot_be_read_asks_for_little(made: Study) -> None:
    made.runs[SMALL].source.write_bytes(b"no image")
    assert run_request(made, SMALL, 1).mem_mb == math.ceil((JOB_BYTES + RANK_BYTES) / 1e6 + 0.06)


def test_snakemake_knows_all_runs_of_the_study(made: Study) -> None:
    """Twice in a job; 149 MB each for 10,000, which 600 MB for all of them would not hold."""
    many = {f"{SMALL}_run-{number}": made.runs[SMALL] for number in range(10_000)}
    large = dataclasses.replace(made, runs=made.runs | many)
    more_mb = run_request(large, SMALL, 1).mem_mb - run_request(made, SMALL, 1).mem_mb
    assert 290 < more_mb < 400
