"""What a run asks of a cluster's scheduler, and how many runs go into one of its jobs.

Everything comes from the headers of the runs, and errs on the side of too much: a job that takes
more than it asked for is killed.
"""

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from keepstill.errors import InputError
from keepstill.nifti import Layout
from keepstill.preflight import CPU_S_PER_RUN, Images, Needs, needs_of, read_layout
from keepstill.settings import RealignSettings
from keepstill.study import Study

# Two Snakemakes are in a cluster job, of 131 MB each, and a launcher. Both know all runs of the
# study: 10,000 took 149 MB more of each.
JOB_BYTES, JOB_BYTES_PER_RUN = 600e6, 30e3
# Of a rank, beside the run, which all ranks map: 113 MB at 64 x 64 x 36 voxels a volume and 182 at
# 104 x 104 x 72.
RANK_BYTES, RANK_BYTES_PER_VOXEL = 150e6, 150.0
# With ITK besides: 177 MB of its own and 254 there, and 240 MB of libraries that ranks share.
ITK_RANK_BYTES, ITK_RANK_BYTES_PER_VOXEL = 220e6, 150.0
# Before the first run of a cluster job and after its last, by Snakemake (docs/cluster.md).
JOB_OVERHEAD_S = 13.0
MOST_OVERHEAD = 0.1  # of a job's time
# What is asked for, as a multiple of what is expected, and for a job to start on a busy cluster;
# the runs of a job share the latter, ten at most, since its last job may have fewer than others.
RUNTIME_MARGIN, START_S, MOST_SHARES = 3.0, 600.0, 10
MB, S_PER_MIN = 1e6, 60
N_SAMPLED = 200  # headers that tell how many runs go into a job


@dataclass(frozen=True)
class Request:
    """What one run asks for.

    Attributes
    ----------
    mem_mb : int
        Memory of all of its processes and of what it has staged, MB.
    runtime_min : int
        Whole minutes.
    """

    mem_mb: int
    runtime_min: int


def run_request(study: Study, name: str, n_ranks: int, n_runs: int = 1) -> Request:
    """What a run asks for, as one of so many in a cluster job.

    A run that cannot be read asks for as much as an empty one: staging says what is wrong.

    Parameters
    ----------
    study : Study
    name : str
        Of the run, or of an echo.
    n_ranks : int
    n_runs : int
        That follow one another in the job.
    """
    return _request(study, _needs(study, name), n_ranks, n_runs)


def reference_request(study: Study, scope: str, n_threads: int) -> Request:
    """What the making of a scope's reference asks for: as its first run, alone in its job."""
    run, settings = study.firsts[scope], study.settings.for_sharing
    try:
        layout = read_layout(run.source, run.name, settings.affine_source)
    except InputError:
        return _request(study, (Needs(cpu_s=CPU_S_PER_RUN), RANK_BYTES), n_threads, 1)
    needs = needs_of(run, layout, settings), _rank_bytes(layout, settings)
    return _request(study, needs, n_threads, 1)


def _rank_bytes(layout: Layout, settings: RealignSettings) -> float:
    """Memory of one rank, beside the run that all ranks map."""
    n_voxels = math.prod(layout.shape[:3])
    own = RANK_BYTES + RANK_BYTES_PER_VOXEL * n_voxels
    return own + settings.uses_itk * (ITK_RANK_BYTES + ITK_RANK_BYTES_PER_VOXEL * n_voxels)


def _request(study: Study, needed: tuple[Needs, float], n_ranks: int, n_runs: int) -> Request:
    needs, rank_bytes = needed
    job_bytes = JOB_BYTES + JOB_BYTES_PER_RUN * len(study.runs)
    run_bytes = needs.lane_bytes + n_ranks * rank_bytes
    expected_s = RUNTIME_MARGIN * run_s(needs, n_ranks) + START_S / min(n_runs, MOST_SHARES)
    return Request(
        mem_mb=math.ceil((job_bytes + run_bytes) / MB),
        runtime_min=math.ceil(expected_s / S_PER_MIN),
    )


def retried(amount: int, attempt: int) -> int:
    """An amount, doubled for each attempt after the first."""
    return amount * 2 ** (attempt - 1)


def run_s(needs: Needs, n_ranks: int) -> float:
    """Seconds that a run is expected to take; its ranks share all but the start of programs."""
    start_s = min(CPU_S_PER_RUN, needs.cpu_s)
    return start_s + (needs.cpu_s - start_s) / n_ranks


def runs_a_job(study: Study, names: Sequence[str], n_ranks: int) -> int:
    """So many runs that Snakemake's own work is a tenth of a cluster job; jobs as even as can be.

    Parameters
    ----------
    study : Study
    names : sequence of str
        Runs to do; a sample of their headers is read.
    n_ranks : int
    """
    sample = names[:: len(names) // N_SAMPLED + 1]
    if not sample:
        return 1
    median_s = statistics.median(run_s(_needs(study, name)[0], n_ranks) for name in sample)
    wanted = math.ceil(JOB_OVERHEAD_S * (1 / MOST_OVERHEAD - 1) / max(median_s, 1.0))
    n_jobs = math.ceil(len(names) / wanted)
    return math.ceil(len(names) / n_jobs)


def _needs(study: Study, name: str) -> tuple[Needs, float]:
    """What a run will take, and the memory of each of its ranks, bytes."""
    run = study.runs[name]
    try:
        layout = read_layout(run.source, name, study.settings.affine_source)
    except InputError:
        return Needs(cpu_s=CPU_S_PER_RUN), RANK_BYTES
    image = None
    with contextlib.suppress(InputError):  # stage or realign says what is wrong
        image = Images(study).layout(name)
    settings = study.settings_of(name)
    return needs_of(run, layout, settings, image), _rank_bytes(layout, settings)
