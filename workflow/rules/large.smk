# A dry run of 10,000 runs: Snakemake would work out the parameters of 40,001 jobs, and format the
# command of each three times, to show none of them: a third of its processor time (82 to 56 s).
from snakemake.dag import DAG
from snakemake.jobs import Job
from snakemake.settings.enums import Quietness
from snakemake.settings.types import DeploymentMethod


def shows_jobs():
    """Whether this call says anything of single jobs."""
    output = workflow.output_settings
    return output.printshellcmds or not {Quietness.RULES, Quietness.ALL} & set(output.quiet or ())


if workflow.output_settings.dryrun and not shows_jobs():
    Job.log_info = lambda job, *args, **kwargs: None
    if DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method:
        DAG.update_conda_envs = lambda dag: None
