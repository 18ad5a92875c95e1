"""Studies of any size: what planning costs, and what the workflow adds to the work itself.

    python benchmarks/scale.py [--runs 10000] [--batch 24] [--folder DIR]

The large study is links to one small file. Of it are measured an index with a dry run, and a call
with all runs complete: one run is realigned, and the others' results are links to its files under
their own names. The batch is realigned twice: by the workflow on two cores, pages off, and by
`xargs -P 2 keepstill realign`. Processor time is that of whole processes with all their children.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import CASES, POINT_SPREADS
from cost import HEADER, Cost, in_words
from keepstill.errors import InputError
from made_runs import default_folder, made_run, plan_of

CLONE = Path(__file__).parents[1]
RUNS_A_SUBJECT = 4
BATCH_VOLUMES = 120
STEPS = ("stage", "realign", "collect", "reslice_echo", "stage_reference", "make_reference")
# What is set here leaves none of the profile's own resources.
MPI = ("realign:mpi=mpirun", "realign:mpi_args=-bind-to user:{cores}", "realign:tasks=2")
TWO_RANKS = ("--set-threads", *(f"{step}=2" for step in STEPS), "--set-resources", *MPI)
DESCRIPTION = {"Name": "links", "BIDSVersion": "1.10.0"}


@dataclass(frozen=True)
class Watched:
    """What a command took: processor and wall seconds, and most memory of one process, GB."""

    cpu_s: float
    wall_s: float
    peak_gb: float


def watched(command: Sequence[str], cwd: Path) -> Watched:
    """What a command and all its children take."""
    began_s = time.perf_counter()
    with (cwd / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed\n{(cwd / 'log').read_text()[-2000:]}")
    wall_s = time.perf_counter() - began_s
    return Watched(usage.ru_utime + usage.ru_stime, wall_s, usage.ru_maxrss / 1e6)


def make_study(folder: Path, source: Path, names: Sequence[str]) -> None:
    """A BIDS study of links to one run."""
    folder.mkdir(parents=True)
    (folder / "dataset_description.json").write_text(json.dumps(DESCRIPTION))
    sidecar = {"RepetitionTime": 2.0, "TaskName": "rest"}
    for name in names:
        func = folder / name.split("_")[0] / "func"
        func.mkdir(parents=True, exist_ok=True)
        (func / f"{name}_bold.nii.gz").symlink_to(source.resolve())
        (func / f"{name}_bold.json").write_text(json.dumps(sidecar))


def names_of(n_runs: int) -> list[str]:
    """Names of so many runs, four a subject."""
    numbers = (divmod(number, RUNS_A_SUBJECT) for number in range(n_runs))
    return [f"sub-{subject:05}_task-rest_run-{run + 1}" for subject, run in numbers]


def workflow(study: Path, out: Path, *arguments: str) -> list[str]:
    """Command that realigns a study on two cores, without pages."""
    return [
        *(sys.executable, "-m", "snakemake", "--cores", "2"),
        *("--snakefile", str(CLONE / "Snakefile")),
        *("--workflow-profile", str(CLONE / "profiles" / "default"), *arguments),
        *("--config", f"bids_dir={study}", f"output_dir={out}", "pages=false"),
    ]


def complete(out: Path, done: str, names: Sequence[str]) -> None:
    """Results of other runs: links to those of one, and its manifest and note under their names."""
    manifest = (out / "manifests" / f"{done}.json").read_text()
    note = (out / "logs" / "identity" / f"{done}.json").read_text()
    outputs = list(json.loads(manifest)["outputs"])
    subject = done.partition("_")[0]
    for name in names:
        to = name.partition("_")[0]
        (out / to / "func").mkdir(parents=True, exist_ok=True)
        for output in outputs:
            os.link(out / output, out / output.replace(done, name).replace(subject, to))
        renamed = manifest.replace(done, name).replace(f"{subject}/func", f"{to}/func")
        (out / "manifests" / f"{name}.json").write_text(renamed)
        (out / "logs" / "identity" / f"{name}.json").write_text(note)


def size_costs(folder: Path, source: Path, n_runs: int) -> Iterator[Cost]:
    """Cost of planning a large study, and of a call that finds it complete."""
    names, study, out = names_of(n_runs), folder / "many", folder / "many-results"
    make_study(study, source, names)
    dry = watched(workflow(study, out, "--dry-run"), folder)
    yield Cost(f"index and dry run of {n_runs} runs, CPU", dry.cpu_s, "s", 90)
    yield Cost(f"index and dry run of {n_runs} runs, memory", dry.peak_gb, "GB", 2)
    first = workflow(study, out)
    watched([*first, f"participants=[{names[0].split('_')[0]}]", "runs=[1]"], folder)
    complete(out, names[0], names[1:])
    again = watched(workflow(study, out), folder)
    if "all complete; nothing to do" not in (folder / "log").read_text():
        raise InputError(f"{out}: not complete; see {folder / 'log'}")
    yield Cost(f"call with {n_runs} runs complete, CPU", again.cpu_s, "s", 90)
    yield Cost(f"call with {n_runs} runs complete, memory", again.peak_gb, "GB", 2)


def batch_costs(folder: Path, source: Path, n_runs: int) -> Iterator[Cost]:
    """Wall time of a batch through the workflow, against the same runs without it."""
    study = folder / "batch"
    make_study(study, source, names_of(n_runs))
    (folder / "list").write_text("".join(f"{path}\n" for path in sorted(study.rglob("*.gz"))))
    realign = f"{sys.executable} -m keepstill realign {{}} --out {folder / 'batch-alone'}"
    alone = watched(["xargs", "-a", "list", "-P", "2", "-I{}", "sh", "-c", realign], folder)
    yield Cost(f"{n_runs} runs by xargs -P 2 keepstill realign, wall", alone.wall_s, "s")
    ways = (("profiles/default", (), 2.0), ("two ranks a run", TWO_RANKS, None))
    for how, arguments, required in ways:
        command = workflow(study, folder / f"batch-{len(arguments)}", *arguments)
        through = watched(command, folder)
        wall, cpu = through.wall_s / alone.wall_s, through.cpu_s / alone.cpu_s
        yield Cost(f"by snakemake --cores 2, {how}, wall", wall, "x", required)
        yield Cost(f"by snakemake --cores 2, {how}, CPU", cpu, "x")


def main() -> None:
    """Measure and print a table; exit with 1 if anything required is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default=10_000, type=int, help="of the large study; 0: none")
    parser.add_argument("--batch", default=24, type=int, help="runs of the batch; 0: none")
    parser.add_argument("--folder", default=default_folder(), type=Path, help="for all of it")
    args = parser.parse_args()
    plan = plan_of(CASES["drift"], POINT_SPREADS["sharp"], BATCH_VOLUMES, 1)
    folder, costs = args.folder / "scale", []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        if args.runs:
            small = CLONE / "tests/data/study/sub-03/func/sub-03_task-rest_bold.nii.gz"
            costs += size_costs(folder, small, args.runs)
        if args.batch:
            costs += batch_costs(folder, made_run(args.folder, plan), args.batch)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(HEADER)
    for cost in costs:
        print(in_words(cost))
    sys.exit(not all(cost.passes for cost in costs))


if __name__ == "__main__":
    main()
