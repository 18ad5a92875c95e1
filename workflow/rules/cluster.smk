# On a cluster: what jobs ask for, how many runs go into one, and what they do on their node.
# On one machine none of it is looked at, and no header is read for it.
import atexit
import functools

from keepstill.job_requests import reference_request, retried, run_request, runs_a_job
from keepstill.study import sweep_study

PAGE_MB = 1000  # where pages alone are to do
SUBMITS = workflow.resource_settings.nodes is not None
IS_SUBMITTING = workflow.is_main_process and SUBMITS
# All rules of a run are part of one cluster job, within which they are plain jobs.
GROUP = "run" if SUBMITS else None
REFERENCE_GROUP = "reference" if GROUP else None


def end_job():
    """On a node: let go of the stage directory, and clear it up."""
    while HELD:
        HELD.pop().close()
    sweep_study(STUDY)


if not workflow.is_main_process:
    HELD.append(or_refuse(hold_stage, STUDY))
    atexit.register(end_job)


@functools.cache
def runs_of_a_job():
    """How many runs follow one another in a cluster job: the profile's number, else by size."""
    chosen = workflow.group_settings.group_components.get("run")
    runs = PLAN.runs or PLAN.echoes or PLAN.pages
    return chosen or (runs_a_job(STUDY, runs, workflow.cores) if IS_SUBMITTING else 1)


@functools.cache
def settle():
    """What can be settled only once Snakemake has its settings, and before it plans jobs.

    That is when it calls input functions, which all runs have one of.
    """
    if IS_SUBMITTING and not workflow.local_exec:  # it is with snakemake -j and in a dry run
        settings = workflow.group_settings
        settings.group_components = {**settings.group_components, "run": runs_of_a_job()}
        tell(f"cluster: {counted(runs_of_a_job(), 'run')} a job")
    elif not workflow.is_main_process:
        # What Snakemake does not tell its jobs: other runs go on when one fails, and all are for
        # one further Snakemake to do, not each for its own.
        workflow.execution_settings.keep_going = True
        workflow.group_settings.group_components = {"run": sys.maxsize}


@functools.cache
def request(run, n_ranks):
    return run_request(STUDY, run, n_ranks, runs_of_a_job())


@functools.cache
def request_of_scope(scope, n_threads):
    return reference_request(STUDY, scope, n_threads)


def mem_mb(wildcards, threads, attempt):
    return retried(request(wildcards.run, threads).mem_mb, attempt)


def runtime_min(wildcards, threads, attempt):
    return retried(request(wildcards.run, threads).runtime_min, attempt)


def shared_mem_mb(wildcards, threads, attempt):
    return retried(request_of_scope(wildcards.scope, threads).mem_mb, attempt)


def shared_runtime_min(wildcards, threads, attempt):
    return retried(request_of_scope(wildcards.scope, threads).runtime_min, attempt)


def page_mb(wildcards):
    """Memory of a page: part of its run's, if that is to do."""
    return 0 if wildcards.run in TO_DO else PAGE_MB


def page_min(wildcards):
    """Minutes of a page: part of its run's, if that is to do."""
    return 0 if wildcards.run in TO_DO else 1


def guard(wildcards):
    """What a run's command is put behind; a job's second attempt skips what the first did."""
    is_done = workflow.attempt > 1 and STUDY.is_complete(wildcards.run)
    return script("skip_done.sh" if is_done else "guard.sh")


# Snakemake adds up the minutes of a job's steps, so a run's stand at one of them.
STEP_REQUEST = {"mem_mb": mem_mb} if IS_SUBMITTING else {}
RUN_REQUEST = {"mem_mb": mem_mb, "runtime": runtime_min} if IS_SUBMITTING else {}
SHARED_STEP_REQUEST = {"mem_mb": shared_mem_mb} if IS_SUBMITTING else {}
SHARED_REQUEST = SHARED_STEP_REQUEST | ({"runtime": shared_runtime_min} if IS_SUBMITTING else {})
PAGE_REQUEST = {"mem_mb": page_mb, "runtime": page_min} if IS_SUBMITTING else {}
