"""A study: its runs, which of them are to do, where they are staged, and what failed."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from keepstill.bids import (
    Run,
    Sidecars,
    filter_runs,
    find_sbref,
    index_runs,
    lone_metadata,
    run_file,
)
from keepstill.config import Config, effective_config, filters_of, run_table_of, settings_of
from keepstill.errors import InputError, counted
from keepstill.files import claim_output_dir, refuse_foreign_data_set, why_no_room
from keepstill.manifest import (
    engine_sha256,
    has_key,
    known_sha256,
    manifest_path,
    portable_settings,
    run_key,
)
from keepstill.mean_echo import joint_sha256
from keepstill.misnamed import NONE_MISNAMED, Misnamed
from keepstill.multi_echo import with_leaders
from keepstill.run_table import read_run_table
from keepstill.settings import SBREF, RealignSettings, with_sbref
from keepstill.stage import (
    claim_stage_root,
    hold_stage_dir,
    private_stage_root,
    remove_stage,
    sweep_stage_root,
)
from keepstill.truth import truth_path

# In the order a run goes through them; an echo of a multi-echo run has the last one only.
RULES = ("stage", "realign", "collect", "page_run", "reslice_echo")
FLAGS = ("collected", "paged", "resliced")
WAITING = ": waiting for "  # said by a lane, and no error
ERROR_PREFIX = "keepstill: "  # of an error's line in a log
EXIT_PREFIX = "exit status "  # of the last line of a failed job's log
KILLED_PREFIX = "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: "  # MPICH's mpirun
MAX_FAILURES_SHOWN = 50
# Where Slurm, PBS, LSF and Grid Engine tell a job its number.
_JOB_NUMBERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


class Plan(NamedTuple):
    """What is left to do.

    Attributes
    ----------
    runs : tuple of str
        Runs to realign.
    pages : tuple of str
        Complete runs whose page is missing or older than the run.
    study_page : bool
    echoes : tuple of str
        Echoes of multi-echo runs to reslice, once the run's motion is known.
    """

    runs: tuple[str, ...]
    pages: tuple[str, ...]
    study_page: bool
    echoes: tuple[str, ...] = ()

    def in_words(self, n_runs: int) -> str:
        """What is left to do in a study of so many runs, echoes not counted."""
        found = counted(n_runs, "run")
        if not any(self):
            return f"{found}, all complete; nothing to do"
        echoes = [f"{len(self.echoes)} of their echoes to reslice"] * bool(self.echoes)
        pages = [f"{counted(len(self.pages), 'page')} to make"] * bool(self.pages)
        if not self.runs:
            what = ", ".join(echoes + pages) or "the study's page to make"
            return f"{found}, all {'realigned' if echoes else 'complete'}; {what}"
        to_do = ", ".join([f"{len(self.runs)} to do", *echoes, *pages])
        return f"{found} found, {n_runs - len(self.runs)} complete, {to_do}"


@dataclass(frozen=True)
class Study:
    """A data set, where its results go, and how.

    Attributes
    ----------
    bids_dir : Path or None
        Absolute; None for runs that a table lists.
    output_dir : Path
        Absolute.
    stage_root : Path
        Folder of this user alone, below which every study stages its runs.
    settings : RealignSettings
    runs : dict
        Name -> run, sorted by name.
    has_pages : bool
        Whether pages are wanted.
    misnamed : Misnamed
        Files that look like runs and are not named like them.
    """

    bids_dir: Path | None
    output_dir: Path
    stage_root: Path
    settings: RealignSettings
    runs: Mapping[str, Run]
    has_pages: bool
    misnamed: Misnamed = NONE_MISNAMED

    @functools.cached_property
    def stage_dir(self) -> Path:
        """Folder of this study in the stage root.

        Its name is a hash of what must agree for a staged run to be of use again, so what a
        killed study left behind is never taken for the work of another. A cluster job has a
        folder of its own: that of a call that was killed may still be at work on the same node.
        """
        job = next((os.environ[name] for name in _JOB_NUMBERS if name in os.environ), None)
        settings = portable_settings(self.settings)
        identity = [job, str(self.output_dir), settings, engine_sha256()]
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.stage_root / name[:12]

    @functools.cached_property
    def _sidecars(self) -> Sidecars:
        return Sidecars(self.bids_dir)

    def metadata(self, name: str) -> dict[str, Any]:
        """What a run's sidecars say."""
        return metadata_of(self.runs[name], self._sidecars)

    def origin(self, run: str) -> list[str]:
        """Arguments that tell stage_run.py what a run is part of."""
        sidecar = self.runs[run].sidecar
        part = ["--sidecar", str(sidecar)] if sidecar else ["--bids-dir", str(self.bids_dir)]
        for name, path in self.runs[run].mean_of:
            part += ["--mean-of", name, str(path)]
        return [*part, "--multi-echo"] if self.runs[run].echoes else part

    def moved_by(self, run: str) -> str:
        """The run that a run's motion is that of: of an echo, its leader; of any other, itself."""
        known = self.runs.get(run)
        return known.leader if known and known.leader else run

    def truth(self, run: str) -> list[str]:
        """Arguments that tell page_run.py where the truth of a simulated run is, if it is one."""
        if self.bids_dir is None:
            return []
        path = truth_path(self.bids_dir, run_file(self.runs[run]))
        return ["--truth", str(path)] if path.is_file() else []

    def settings_of(self, name: str) -> RealignSettings:
        """A run's settings: a single-band reference is its own; without one, stage says so.

        An echo's are those of the run whose motion it has.
        """
        if self.settings.reference != SBREF:
            return self.settings
        run = self.runs[self.moved_by(name)]
        return with_sbref(self.settings, run.sbref or find_sbref(run.source))

    def is_complete(self, run: str) -> bool:
        """Whether a run's files are those of its input, the settings and the engine."""
        leader = self.runs[run].leader
        if not manifest_path(self.output_dir, run, is_echo=leader is not None).exists():
            return False
        try:
            metadata = self.metadata(run)
        except InputError:
            return False  # stage says what is wrong
        if leader is None:
            return has_key(run, self._run_key(run, metadata), self.output_dir)
        return has_key(run, self._echo_key(run, metadata), self.output_dir, is_echo=True)

    def _run_key(self, run: str, metadata: Mapping[str, Any]) -> str | None:
        """Key of a run, as its input is now; None if that cannot be read."""
        sources = self.runs[run].mean_of or ((run, self.runs[run].source),)
        hashes = [known_sha256(self.output_dir, *named) for named in sources]
        known = [sha256 for sha256 in hashes if sha256 is not None]
        if len(known) < len(hashes):
            return None
        sha256 = joint_sha256(known) if self.runs[run].mean_of else known[0]
        return run_key(sha256, metadata, self.settings_of(run))

    def _echo_key(self, echo: str, metadata: Mapping[str, Any]) -> str | None:
        """Key of an echo, as its input and its leader's are now; None if one cannot be read."""
        leader = self.runs[self.runs[echo].leader or ""]
        try:
            of_leader = self.metadata(leader.name)
        except InputError:
            return None
        leader_key = self._run_key(leader.name, of_leader)
        input_sha256 = known_sha256(self.output_dir, echo, self.runs[echo].source)
        if leader_key is None or input_sha256 is None:
            return None
        return run_key(input_sha256, metadata, self.settings_of(echo), leader_key)

    @property
    def n_runs(self) -> int:
        """Number of runs, the echoes of a multi-echo run counted as one."""
        return sum(run.leader is None for run in self.runs.values())

    def has_page(self, run: str) -> bool:
        """Whether a complete run's page and picture are there and not older than the run."""
        made = (
            self.output_dir / "figures" / f"{run}.svg",
            self.output_dir / "pages" / f"{run}.html",
        )
        return _none_older(made, manifest_path(self.output_dir, run))

    @property
    def flag_dir(self) -> Path:
        """Folder of the flags by which Snakemake sees what this call has done."""
        return self.output_dir / "logs" / "done"

    def flag_path(self, run: str, step: str) -> Path:
        """Flag that a step, ``collected`` or ``paged``, is done for a run or the study."""
        return self.flag_dir / f"{run}.{step}"

    def log_path(self, rule: str, run: str) -> Path:
        """Log of one rule's work on one run."""
        return self.output_dir / "logs" / rule / f"{run}.log"

    def make_plan(self) -> Plan:
        """What is left to do, from what lies in the output directory."""
        wanting = [run for run in self.runs.values() if not self.is_complete(run.name)]
        to_do = tuple(run.name for run in wanting if run.leader is None)
        echoes = tuple(run.name for run in wanting if run.leader is not None)
        if not self.has_pages:
            return Plan(to_do, (), False, echoes)
        paged = {run.name for run in self.runs.values() if run.leader is None}
        complete = paged - set(to_do)
        pages = tuple(run for run in sorted(complete) if not self.has_page(run))
        study_page = bool(to_do or pages) or not self._has_study_page(complete)
        return Plan(to_do, pages, study_page, echoes)

    def failures(self, plan: Plan, since_s: float) -> list[str]:
        """One line for each run of the plan that failed since a time (seconds, Unix)."""
        planned = (*plan.runs, *plan.echoes)
        incomplete = {run for run in planned if not self.is_complete(run)}
        pageless = {run for run in (*plan.runs, *plan.pages) if self.has_pages} - incomplete
        failed = incomplete | {run for run in pageless if not self.has_page(run)}
        reasons = {run: self._reason(run, since_s) for run in sorted(failed)}
        lines = [f"{run}: {reason}" for run, reason in reasons.items() if reason]
        n_waiting = len(reasons) - len(lines)
        if len(lines) > MAX_FAILURES_SHOWN:
            rest = len(lines) - MAX_FAILURES_SHOWN
            lines[MAX_FAILURES_SHOWN:] = [f"and {rest} more; see {self.output_dir / 'logs'}"]
        if n_waiting:
            full = why_no_room(self.output_dir)  # then there are no logs to say so
            why = f": cannot write to {self.output_dir} ({full}); free space there" if full else ""
            lines.append(
                f"{counted(n_waiting, 'run')} not finished{why}; the next call goes on with them"
            )
        return lines

    def _reason(self, run: str, since_s: float) -> str | None:
        """Why a run failed; None if none of its logs says that it did."""
        logs = (self.log_path(rule, run) for rule in reversed(RULES))
        fresh = (log for log in logs if log.exists() and log.stat().st_mtime >= since_s)
        return next(filter(None, (_failure(log, run) for log in fresh)), None)

    def _has_study_page(self, complete: Iterable[str]) -> bool:
        made = (self.output_dir / "index.html",)
        return all(_none_older(made, manifest_path(self.output_dir, run)) for run in complete)


def metadata_of(run: Run, sidecars: Sidecars) -> dict[str, Any]:
    """What a run's sidecars say."""
    if run.sidecar:
        return lone_metadata(run.sidecar, run.name)
    return sidecars.metadata(run.source)


def read_study(config: Config, given: Iterable[str], clone: Path) -> Study:
    """The study that a configuration describes, checked.

    Parameters
    ----------
    config : mapping
        As Snakemake has it.
    given : iterable of str
        Keys that the caller gave, on the command line or in a file of their own.
    clone : Path
        Folder of the Snakefile.

    Raises
    ------
    InputError
        If there is no run to realign.
    SettingsError
        If the configuration has a key or value that is of no use.
    """
    config = effective_config(config, given, clone)
    table, filters = run_table_of(config), filters_of(config)
    if table:
        bids_dir, misnamed = None, NONE_MISNAMED
        runs = filter_runs(read_run_table(table), filters, table)
    else:
        bids_dir = Path(config["bids_dir"])
        runs, misnamed = index_runs(bids_dir, filters)
    sidecars = Sidecars(bids_dir)
    runs = with_leaders(runs, config["estimate_echo"], lambda run: metadata_of(run, sidecars))
    if not config["reslice"]:
        runs = [run for run in runs if run.leader is None]  # echoes have nothing else
    return Study(
        bids_dir=bids_dir,
        output_dir=Path(config["output_dir"]),
        stage_root=private_stage_root(Path(config["stage_root"])),
        settings=settings_of(config),
        runs={run.name: run for run in runs},
        has_pages=config["pages"],
        misnamed=misnamed,
    )


def plan_study(study: Study) -> Plan:
    """What is left to do; flags that a killed call left on it are removed.

    Only flags that were there before a run was found wanting go: another call may be at work.
    """
    flags = list(study.flag_dir.glob("*.*"))
    plan = study.make_plan()
    stale = {
        *(study.flag_path(run, "collected") for run in plan.runs),
        *(study.flag_path(run, "paged") for run in (*plan.runs, *plan.pages)),
        *(study.flag_path(run, "resliced") for run in plan.echoes),
        study.flag_path("study", "paged"),
    }
    for flag in stale.intersection(flags):
        flag.unlink(missing_ok=True)
    return plan


def clear_stage(study: Study, plan: Plan) -> None:
    """Remove what this call has staged and flagged, and the folders that are empty then.

    Other calls may be at work on other runs of the same output directory.
    """
    for run in (*plan.runs, *plan.echoes):
        remove_stage(study.stage_dir / run)
    for run in (*plan.runs, *plan.echoes, *plan.pages, "study"):
        for step in FLAGS:
            study.flag_path(run, step).unlink(missing_ok=True)
    sweep_study(study)
    with contextlib.suppress(OSError):
        study.flag_dir.rmdir()


def sweep_study(study: Study) -> None:
    """Remove the study's stage directory, unless another call holds it, and an empty stage root."""
    sweep_stage_root(study.stage_root)
    with contextlib.suppress(OSError):
        study.stage_root.rmdir()


def hold_stage(study: Study) -> TextIO:
    """Claim the study's output and stage directories, the latter while the file is open."""
    claim_output_dir(study.output_dir, "output_dir")
    refuse_foreign_data_set(study.output_dir, "output_dir")
    claim_stage_root(study.stage_root)
    sweep_stage_root(study.stage_root)
    return hold_stage_dir(study.stage_dir)


def _none_older(made: Iterable[Path], source: Path) -> bool:
    """Whether all made files are there and none is older than its source."""
    try:
        made_ns = source.stat().st_mtime_ns
        return all(path.stat().st_mtime_ns >= made_ns for path in made)
    except FileNotFoundError:
        return False


def _failure(log: Path, run: str) -> str | None:
    """Why a log's job failed: its last error, else its last word; None if it did not fail."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if not lines or not lines[-1].startswith(EXIT_PREFIX):
        return None
    errors = [line for line in lines if line.startswith(ERROR_PREFIX) and WAITING not in line]
    if errors:
        return errors[-1].removeprefix(ERROR_PREFIX).removeprefix(f"{run}: ")
    killed = [line for line in lines if line.startswith(KILLED_PREFIX)]
    word = killed[-1].removeprefix(KILLED_PREFIX) if killed else ": ".join(lines[-2:])
    return f"{word}; see {log}"
