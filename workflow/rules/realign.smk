# The launcher, its flags and the number of ranks are the profile's: set-resources, realign, with
# mpi, mpi_args and tasks. Without mpi there is one rank and no launcher.
rule realign:
    input:
        staged("staged.json"),
    output:
        temp(staged("motion.npz"), group_jobs=True),
    log:
        log_of("realign"),
    benchmark:
        benchmark_of("realign")
    priority: 10
    group:
        GROUP
    conda:
        "../../envs/itk.yaml" if STUDY.settings.uses_itk else "../../envs/keepstill.yaml"
    threads: 1
    resources:
        **RUN_REQUEST,
    params:
        guard=guard,
        launch=script("launch.py"),
        script=script("realign_run.py"),
        stage_dir=stage_dir,
        settings=settings,
        ranks=rank_count,
        threads_per_rank=threads_per_rank,
        rank_command=rank_command,
    shell:
        "bash {params.guard:q} {log:q} {params.stage_dir:q} "
        "python {params.launch:q} --run {wildcards.run:q} --ranks {params.ranks} "
        "--threads-per-rank {params.threads_per_rank} -- "
        "{params.rank_command:q} {params.script:q} --stage-dir {params.stage_dir:q} "
        "--settings {params.settings:q} --ranks {params.ranks}"


# A profile in which only one of the two was changed would ask for too little memory on a cluster,
# and stage more runs on one machine than it works on.
if workflow.is_main_process and PLAN.runs:
    asked = rules.realign.rule.resources
    n_ranks, n_threads = (asked[name].value if name in asked else 1 for name in ("tasks", "_cores"))
    if isinstance(n_ranks, int) and isinstance(n_threads, int) and n_ranks > n_threads:
        tell(
            f"warning: {n_ranks} ranks a run (set-resources, realign: tasks) on "
            f"{counted(n_threads, 'core')} (set-threads); set-threads of all steps should be {n_ranks}"
        )
