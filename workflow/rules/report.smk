rule page_run:
    input:
        collected_flag,
    output:
        temp(flag("paged")),
    log:
        log_of("page_run"),
    priority: 30
    group:
        GROUP
    conda:
        "../../envs/keepstill.yaml"
    resources:
        **PAGE_REQUEST,
    params:
        guard=script("guard.sh"),
        script=script("page_run.py"),
        manifest=lambda wildcards: str(manifest_path(STUDY.output_dir, wildcards.run)),
        output_dir=lambda wildcards: str(STUDY.output_dir),
        truth=lambda wildcards: STUDY.truth(wildcards.run),
    shell:
        "bash {params.guard:q} {log:q} '' "
        "python {params.script:q} --manifest {params.manifest:q} "
        "--output-dir {params.output_dir:q} {params.truth:q} "
        "&& touch {output:q}"


# Outside the group, which else would join all runs into one cluster job.
rule page_study:
    input:
        paged_flags,
    output:
        temp(flag("paged", "study")),
    log:
        log_of("page_study", "study"),
    localrule: True
    conda:
        "../../envs/keepstill.yaml"
    params:
        guard=script("guard.sh"),
        script=script("page_study.py"),
        output_dir=lambda wildcards: str(STUDY.output_dir),
    shell:
        "bash {params.guard:q} {log:q} '' "
        "python {params.script:q} --output-dir {params.output_dir:q} "
        "&& touch {output:q}"
