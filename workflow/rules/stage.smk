rule stage:
    input:
        shared_flag,
    output:
        temp(staged("staged.json"), group_jobs=True),
    log:
        log_of("stage"),
    benchmark:
        benchmark_of("stage")
    priority: 0
    group:
        GROUP
    conda:
        "../../envs/keepstill.yaml"
    threads: 1
    resources:
        **STEP_REQUEST,
    params:
        guard=guard,
        script=script("stage_run.py"),
        bold=lambda wildcards: str(STUDY.runs[wildcards.run].source),
        origin=lambda wildcards: STUDY.origin(STUDY.runs[wildcards.run]),
        stage_dir=stage_dir,
        settings=settings,
    shell:
        "bash {params.guard:q} {log:q} {params.stage_dir:q} "
        "python {params.script:q} --bold {params.bold:q} --run {wildcards.run:q} "
        "{params.origin:q} --stage-dir {params.stage_dir:q} --settings {params.settings:q}"
