# keepstill: realigns the BOLD runs of a BIDS data set. A run goes through stage (into memory),
# realign (MPI), collect (onto disk) and page_run; page_study lists them all. Before, there is
# make_reference, where runs share one.
from pathlib import Path

from snakemake.utils import min_version

min_version("9.20")


configfile: Path(workflow.basedir) / "config" / "config.yaml"


include: "workflow/rules/start.smk"
include: "workflow/rules/ladder.smk"


if not is_called_for("ladder"):

    include: "workflow/rules/common.smk"
    include: "workflow/rules/cluster.smk"
    include: "workflow/rules/reference.smk"
    include: "workflow/rules/stage.smk"
    include: "workflow/rules/realign.smk"
    include: "workflow/rules/collect.smk"
    include: "workflow/rules/echoes.smk"
    include: "workflow/rules/report.smk"
    include: "workflow/rules/large.smk"

    localrules:
        all,

    rule all:
        default_target: True
        input:
            wanted_flags(),

    onstart:
        start_study()

    onsuccess:
        end_study()

    onerror:
        end_study(failed=True)
