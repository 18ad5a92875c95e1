rule collect:
    input:
        staged("staged.json"),
        staged("motion.npz"),
    output:
        temp(flag("collected")),
    log:
        log_of("collect"),
    benchmark:
        benchmark_of("collect")
    priority: 20
    group:
        GROUP
    conda:
        "../../envs/keepstill.yaml"
    threads: 1
    resources:
        **STEP_REQUEST,
    params:
        guard=guard,
        script=script("collect_run.py"),
        stage_dir=stage_dir,
        output_dir=lambda wildcards: str(STUDY.output_dir),
        settings=settings,
    shell:
        "bash {params.guard:q} {log:q} {params.stage_dir:q} "
        "python {params.script:q} --stage-dir {params.stage_dir:q} "
        "--output-dir {params.output_dir:q} --settings {params.settings:q} "
        "--threads {threads} "
        "&& touch {output:q}"
