# The reference that all runs of a session or subject end in: of the first of them, made once.
# Not in the runs' group, which else would join all runs of a scope into one cluster job.
rule stage_reference:
    output:
        temp(shared_staged("staged.json"), group_jobs=True),
    log:
        log_of("stage_reference", "{scope}"),
    benchmark:
        benchmark_of("stage_reference", "{scope}")
    priority: 0
    group:
        REFERENCE_GROUP
    conda:
        "../../envs/keepstill.yaml"
    threads: 1
    resources:
        **SHARED_STEP_REQUEST,
    params:
        guard=script("guard.sh"),
        script=script("stage_run.py"),
        run=lambda wildcards: STUDY.firsts[wildcards.scope].name,
        bold=lambda wildcards: str(STUDY.firsts[wildcards.scope].source),
        origin=lambda wildcards: STUDY.origin(STUDY.firsts[wildcards.scope]),
        stage_dir=shared_stage_dir,
        settings=STUDY.settings.for_sharing.to_json(),
    shell:
        "bash {params.guard:q} {log:q} {params.stage_dir:q} "
        "python {params.script:q} --bold {params.bold:q} --run {params.run:q} "
        "{params.origin:q} --stage-dir {params.stage_dir:q} --settings {params.settings:q}"


rule make_reference:
    input:
        shared_staged("staged.json"),
    output:
        temp(flag("shared", "{scope}")),
    log:
        log_of("make_reference", "{scope}"),
    benchmark:
        benchmark_of("make_reference", "{scope}")
    priority: 20
    group:
        REFERENCE_GROUP
    conda:
        "../../envs/keepstill.yaml"
    threads: 1
    resources:
        **SHARED_REQUEST,
    params:
        guard=script("guard.sh"),
        launch=script("launch.py"),
        script=script("make_reference.py"),
        stage_dir=shared_stage_dir,
        output_dir=lambda wildcards: str(STUDY.output_dir),
        settings=STUDY.settings.for_sharing.to_json(),
        threads=lambda wildcards, threads: on_hand(threads),
    shell:
        "bash {params.guard:q} {log:q} {params.stage_dir:q} "
        "python {params.launch:q} --run {wildcards.scope:q} --ranks 1 "
        "--threads-per-rank {params.threads} -- "
        "python {params.script:q} --stage-dir {params.stage_dir:q} --scope {wildcards.scope:q} "
        "--output-dir {params.output_dir:q} --settings {params.settings:q} "
        "&& touch {output:q}"
