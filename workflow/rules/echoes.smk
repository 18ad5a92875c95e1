# One echo of a multi-echo run: staged, resliced with the motion of its run, and written. It leases no
# cores, as collect does not: its threads are free to go where lanes leave some idle.
rule reslice_echo:
    input:
        collected_flag,
    output:
        temp(flag("resliced")),
    log:
        log_of("reslice_echo"),
    benchmark:
        benchmark_of("reslice_echo")
    priority: 25
    group:
        GROUP
    conda:
        "../../envs/keepstill.yaml"
    threads: 1
    resources:
        **RUN_REQUEST,
    params:
        guard=guard,
        script=script("reslice_echo.py"),
        bold=lambda wildcards: str(STUDY.runs[wildcards.run].source),
        leader=lambda wildcards: STUDY.moved_by(wildcards.run),
        origin=lambda wildcards: STUDY.origin(STUDY.runs[wildcards.run]),
        stage_dir=stage_dir,
        output_dir=lambda wildcards: str(STUDY.output_dir),
        settings=settings,
    shell:
        "bash {params.guard:q} {log:q} {params.stage_dir:q} "
        "python {params.script:q} --bold {params.bold:q} --run {wildcards.run:q} "
        "--leader {params.leader:q} {params.origin:q} --stage-dir {params.stage_dir:q} "
        "--output-dir {params.output_dir:q} --settings {params.settings:q} --threads {threads} "
        "&& touch {output:q}"
