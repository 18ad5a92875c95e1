"""How many ranks a run should have on this machine, and how many runs should go side by side.

The workflow realigns simulated runs once for each way to share out the machine; the fastest
becomes a profile.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from keepstill.config_files import find_clone, read_config_file
from keepstill.errors import LaunchError, counted
from keepstill.lanes import CPU_DIR, read_places
from keepstill.preflight import GB, STAGED_BYTES_PER_VOXEL, free_bytes
from keepstill.selftest import SEED, Trial, call_workflow, folder_of_profile
from keepstill.simulate import StudyPlan, simulate_study
from keepstill.stage import private_stage_root, single_stage_dir
from keepstill.warm import ensure_warm

TUNE_VOLUMES = 120  # of a run; fewer would measure how ranks start
MOST_RANKS = 16  # of a run: more have too few volumes each
RUNS_A_LANE = 2  # at least, so that one is staged while another is collected
STAGED_BYTES = 2  # of a voxel of a typical run, int16
RULES = ("stage", "realign", "collect", "reslice_echo")


@dataclass(frozen=True)
class Way:
    """One way to share out a machine.

    Attributes
    ----------
    cores : int
        Hardware threads that are used: all, or one a physical core.
    ranks : int
        Of each run.
    """

    cores: int
    ranks: int

    @property
    def lanes(self) -> int:
        """Number of runs side by side."""
        return self.cores // self.ranks

    def in_words(self) -> str:
        """As in the table."""
        ranks, lanes = counted(self.ranks, "rank"), counted(self.lanes, "lane")
        return f"{ranks} x {lanes} on {counted(self.cores, 'hardware thread')}"


def ways(n_threads: int, n_cores: int) -> list[Way]:
    """Ways to share out a machine of so many hardware threads and physical cores.

    Powers of two up to 16 as ranks of a run, on all threads and on one thread of each core, as many
    lanes as fit; ways that leave a part unused are left out.
    """
    found = []
    for cores in dict.fromkeys((n_threads, n_cores)):
        powers = (1 << power for power in range(MOST_RANKS.bit_length()))
        found += [Way(cores, ranks) for ranks in powers if cores % ranks == 0]
    return found


def tune(trial: Trial) -> Iterator[str]:
    """Lines of a profile: as comments what each way gave, as it comes; then the fastest way.

    Parameters
    ----------
    trial : Trial
        Its profile says how ranks are launched, and `n_cores` how many threads to share out.

    Raises
    ------
    LaunchError
        If no way worked.
    """
    clone = find_clone()
    base = folder_of_profile(trial.profile, clone)
    plan = StudyPlan(subjects=1, volumes=trial.n_volumes, seed=SEED)
    shape = "x".join(map(str, (*plan.shape, plan.volumes)))
    yield f"# Runs an hour of {shape} on this machine, each through the whole workflow, no pages:"
    rates: dict[Way, float] = {}
    told = ""
    ensure_warm()
    with single_stage_dir(private_stage_root(trial.stage_root)) as folder:
        tried = _ways_here(trial)
        simulate_study(folder / "one", plan)
        link_runs(folder, RUNS_A_LANE * max(way.lanes for way in tried))
        for way in tried:
            rate, told = _measured(folder, clone, base, replace(trial, n_cores=way.cores), way)
            yield f"# {way.in_words():<44} {f'{rate:,.0f}' if rate else 'failed'}"
            rates |= {way: rate} if rate else {}
    if not rates:
        raise LaunchError(f"no way to share out the machine worked; the last said: {told}")
    best = max(rates, key=lambda way: rates[way])
    yield f"# About {rates[best]:,.0f} runs an hour are to be expected of this profile."
    yield _memory_in_words(best, trial.stage_root)
    yield profile_text(read_config_file(base / "config.yaml"), best)


def profile_text(base: dict[str, Any], way: Way) -> str:
    """A profile like another, but for how it shares out the machine, YAML."""
    resources = base.get("set-resources", {})
    realign = resources.get("realign", {}) | {"tasks": way.ranks}
    values = base | {
        "cores": way.cores,
        "set-threads": dict.fromkeys(base.get("set-threads", RULES), way.ranks),
        "set-resources": resources | {"realign": realign},
    }
    return str(yaml.safe_dump(values, sort_keys=False, width=100)).rstrip()


def link_runs(folder: Path, n_runs: int) -> None:
    """A study of links to the one run below ``one``, each of a subject of its own."""
    (source,) = (folder / "one").glob("sub-*/func/*_bold.nii.gz")
    sidecar = source.with_name(source.name.replace(".nii.gz", ".json"))
    for number in range(n_runs):
        func = folder / "study" / f"sub-{number:03}" / "func"
        func.mkdir(parents=True)
        for path in (source, sidecar):
            ending = path.name.partition("_")[2]
            (func / f"sub-{number:03}_{ending}").symlink_to(path)
    shutil.copy(folder / "one" / "dataset_description.json", folder / "study")


def _ways_here(trial: Trial) -> list[Way]:
    mask = os.sched_getaffinity(0)
    n_threads = min(trial.n_cores or len(mask), len(mask))
    n_cores = len(set(read_places(mask, CPU_DIR).values()))
    return ways(n_threads, min(n_cores, n_threads))


def _measured(
    folder: Path, clone: Path, base: Path, trial: Trial, way: Way
) -> tuple[float | None, str]:
    """Runs an hour of one way, start of Snakemake apart, and what was told; None if it failed."""
    profile = folder / "profile"
    profile.mkdir(exist_ok=True)
    text = profile_text(read_config_file(base / "config.yaml"), way)
    (profile / "config.yaml").write_text(text + "\n", encoding="utf-8")
    names = sorted(path.name.removeprefix("sub-") for path in (folder / "study").glob("sub-*"))
    n_runs = RUNS_A_LANE * way.lanes
    config = {"pages": False, "participants": names[:n_runs]}
    first = call_workflow(folder, clone, profile, trial, config)
    again = call_workflow(folder, clone, profile, trial, config)
    shutil.rmtree(folder / "results", ignore_errors=True)
    if first.status or again.status:
        own = [line for line in first.told.splitlines() if line.startswith("keepstill: ")]
        return None, (own or first.told.splitlines() or [""])[-1]
    return 3600 * n_runs / max(first.seconds - again.seconds, 1e-3), ""


def _memory_in_words(way: Way, stage_root: Path) -> str:
    """Comment on the size of runs that so many lanes have room for."""
    parts = way.lanes * (STAGED_BYTES + STAGED_BYTES_PER_VOXEL) / STAGED_BYTES
    largest_gb = free_bytes(stage_root) / parts / GB
    return (
        f"# There is room in {stage_root} for {counted(way.lanes, 'lane')} of runs below "
        f"{largest_gb:.2g} GB\n# uncompressed (int16); for larger ones halve the lanes and double "
        "the ranks."
    )
