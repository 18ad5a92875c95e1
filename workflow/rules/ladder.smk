# `snakemake ladder`: the ways to realign a run, from the classic one upwards, timed on one simulated
# run (docs/ladder.md). Called for it alone, the workflow does not even read the study.
from keepstill.config import effective_config

CHECKED = or_refuse(effective_config, config, workflow.config_settings.overwrite_config, CLONE)
LADDER_DIR, LADDER = CHECKED["ladder_dir"], CHECKED["ladder"]
# None where Snakemake is to do nothing with jobs, as for --unlock.
LADDER_RANKS = min(workflow.resource_settings.cores or 1, N_CPUS)


rule ladder_study:
    output:
        directory(f"{LADDER_DIR}/study-{LADDER['volumes']}"),
    log:
        f"{LADDER_DIR}/logs/ladder_study.log",
    conda:
        "../../envs/itk.yaml"
    threads: LADDER_RANKS
    params:
        guard=script("guard.sh"),
        script=script("ladder_study.py"),
        volumes=LADDER["volumes"],
    shell:
        "bash {params.guard:q} {log:q} '' "
        "python {params.script:q} --volumes {params.volumes} --threads {threads} {output:q}"


# What it makes is no output of the rule, so it is measured anew at every call. The launcher and the
# flags that bind its ranks to cores are the profile's: set-resources, ladder, with mpi and mpi_args.
rule ladder:
    input:
        rules.ladder_study.output,
    log:
        f"{LADDER_DIR}/logs/ladder.log",
    conda:
        "../../envs/itk.yaml"
    threads: LADDER_RANKS
    resources:
        mpi="mpirun",
        mpi_args="",
    params:
        guard=script("guard.sh"),
        script=script("ladder_run.py"),
        out=lambda wildcards: LADDER_DIR,
        stage_root=CHECKED["stage_root"],
        every_volume=LADDER["every_volume"],
        repeats=LADDER["repeats"],
        docs=["--docs", str(CLONE)] if LADDER["docs"] else [],
    shell:
        "bash {params.guard:q} {log:q} '' "
        "python {params.script:q} --study {input:q} --out {params.out:q} --ranks {threads} "
        "--launcher {resources.mpi:q} --binding={resources.mpi_args:q} "
        "--every-volume {params.every_volume} --repeats {params.repeats} "
        "--stage-root {params.stage_root:q} {params.docs:q}"
