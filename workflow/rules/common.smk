# What all steps share: the study, what is to do, names of files, the ranks' command.
import atexit
import subprocess
import sys
import time
from pathlib import Path

from keepstill.config_files import refuse_templates
from keepstill.errors import counted
from keepstill.itk_bridge import require_itk
from keepstill.lanes import launch_command
from keepstill.manifest import manifest_path
from keepstill.preflight import preflight
from keepstill.study import Plan, begin_call, clear_stage, hold_stage, plan_study, read_study

STARTED_S = time.time()
HELD = []  # the lock that says that this study's stage directory is in use


def tell(text):
    """Say something on the terminal, in the main process only: jobs say it in their logs."""
    if workflow.is_main_process:
        print(f"keepstill: {text}", file=sys.stderr, flush=True)


def read_plan():
    """What is to do. A job on a cluster node is told its targets and needs no plan."""
    if not workflow.is_main_process:
        return Plan((), (), False)
    or_refuse(refuse_templates, map(Path, workflow.configfiles))
    begin_call(STUDY)
    plan = plan_study(STUDY)
    if plan.runs and STUDY.settings.uses_itk and not workflow.deployment_settings.deployment_method:
        or_refuse(require_itk)  # conda would bring it with the rule
    for line in preflight(STUDY, plan, lanes_here()):
        tell(line)
    return plan


def lanes_here():
    """Runs that are worked on at a time on this machine; a cluster's jobs have one each."""
    threads = workflow.resource_settings.overwrite_threads.get("stage", 1)
    n_threads = int(getattr(threads, "value", threads))
    n_cores = workflow.resource_settings.cores or 1
    return max(1, n_cores // n_threads) if workflow.local_exec else 1


STUDY = or_refuse(read_study, config, workflow.config_settings.overwrite_config, CLONE)
PLAN = read_plan()
TO_DO = frozenset(PLAN.runs)


wildcard_constraints:
    run="sub-[^/]+",
    scope="sub-[^/]+",


def staged(name):
    return f"{STUDY.stage_dir}/{{run}}/{name}"


def flag(step, run="{run}"):
    return str(STUDY.flag_path(run, step))


def log_of(rule_name, run="{run}"):
    return str(STUDY.log_path(rule_name, run))


def benchmark_of(rule_name, run="{run}"):
    return f"{STUDY.output_dir}/logs/benchmark/{rule_name}/{run}.tsv"


def stage_dir(wildcards):
    return str(STUDY.stage_dir / wildcards.run)


def shared_staged(name):
    return f"{STUDY.shared_stage_dir('{scope}')}/{name}"


def shared_stage_dir(wildcards):
    return str(STUDY.shared_stage_dir(wildcards.scope))


def settings(wildcards):
    return STUDY.settings_of(wildcards.run).to_json()


def on_hand(n_cores):
    """So many cores, on this machine no more than there are; a cluster gives what is asked."""
    is_local = workflow.is_main_process and workflow.local_exec
    return min(n_cores, N_CPUS, workflow.cores) if is_local else n_cores


def start_study():
    HELD.append(or_refuse(hold_stage, STUDY))
    if workflow.local_exec and workflow.cores > N_CPUS:
        tell(f"there are {N_CPUS} cores here; --cores {N_CPUS} would keep fewer runs in memory")


def rank_count(wildcards, resources):
    return on_hand(int(resources.get("tasks", 1))) if resources.get("mpi") else 1


def threads_per_rank(wildcards, threads, resources):
    return max(1, on_hand(threads) // rank_count(wildcards, resources))


def rank_command(wildcards, resources):
    launcher, flags = resources.get("mpi", ""), resources.get("mpi_args", "")
    return launch_command(launcher, flags, rank_count(wildcards, resources))


def shared_flag(wildcards):
    """What stage waits for: the reference of a run's scope, if it is to make."""
    settle()
    scope = STUDY.made_for(wildcards.run)
    if workflow.is_main_process:
        return flag("shared", scope) if scope in PLAN.references else []
    return flag("shared", scope) if scope and not STUDY.has_reference(scope) else []


def collected_flag(wildcards):
    """What page and echoes wait for: a run, or the run that an echo is of, if it is to do."""
    settle()
    run = STUDY.moved_by(wildcards.run)
    is_to_do = run in TO_DO if workflow.is_main_process else not STUDY.is_complete(run)
    return flag("collected", run) if is_to_do else []


def paged_flags(wildcards):
    return [flag("paged", run) for run in (*PLAN.runs, *PLAN.pages)]


def wanted_flags():
    echoes = [flag("resliced", echo) for echo in PLAN.echoes]
    if STUDY.has_pages:
        return echoes + [flag("paged", "study")] * PLAN.study_page
    return echoes + [flag("collected", run) for run in PLAN.runs]


def end_study(failed=False):
    """Clear up; what failed is told as the very last thing, after Snakemake's own words."""
    while HELD:
        HELD.pop().close()
    clear_stage(STUDY, PLAN)
    if failed and PLAN.study_page:
        command = [sys.executable, script("page_study.py"), "--output-dir", str(STUDY.output_dir)]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if failed:
        lines = STUDY.failures(PLAN, STARTED_S)
        atexit.register(lambda: [tell(line) for line in lines])
    elif any(PLAN):
        tell(f"all complete in {STUDY.output_dir}")
