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
