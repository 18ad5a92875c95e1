"""A study: its runs, which of them are to do, where they are staged, and what failed."""

import contextlib
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from keepstill.bids import (
    Filters,
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
    has_content,
    has_key,
    known_sha256,
    manifest_path,
    portable_settings,
    run_key,
    shared_entry,
)
from keepstill.mean_echo import joint_sha256
from keepstill.misnamed import NONE_MISNAMED, Misnamed
from keepstill.multi_echo import with_leaders
from keepstill.realigned import shared_reference_path
from keepstill.run_table import read_run_table
from keepstill.scopes import RUN, SESSION, first_runs, scope_name
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
SHARED_RULES = ("stage_reference", "make_reference")
FLAGS = ("collected", "paged", "resliced", "shared")
WAITING, WARNING = ": waiting for ", ": warning: "  # said by a lane, and no errors
ERROR_PREFIX = "keepstill: "  # of an error's line in a log
EXIT_PREFIX = "exit status "  # of the last line of a failed job's log
KILLED_PREFIX = "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: "  # MPICH's mpirun
MAX_FAILURES_SHOWN = 50
# Ranks of others that start meanwhile have mapped what they share after so long.
_RANKS_START_S = 1.0
# Where Slurm, PBS, LSF and Grid Engine tell a job its number.
_JOB_NUMBERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
# Where the workflow tells the processes that it starts which call they are of.
_CALL_NUMBER = "KEEPSTILL_CALL"


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
    references : tuple of str
        Scopes whose shared reference is to make, before their runs are realigned.
    """

    runs: tuple[str, ...]
    pages: tuple[str, ...]
    study_page: bool
    echoes: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

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
        shared = [f"{counted(len(self.references), 'reference')} to make"] * bool(self.references)
        to_do = ", ".join([f"{len(self.runs)} to do", *echoes, *shared, *pages])
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
    scope : str
        ``run``, ``session`` or ``subject``: what the runs of which end in one space.
    firsts : dict
        Name of each scope -> its first run, in whose space the others end; it need not be among
        `runs`. Empty where every run ends in its own, or all in that of a file.
    """

    bids_dir: Path | None
    output_dir: Path
    stage_root: Path
    settings: RealignSettings
    runs: Mapping[str, Run]
    has_pages: bool
    misnamed: Misnamed = NONE_MISNAMED
    scope: str = RUN
    firsts: Mapping[str, Run] = field(default_factory=dict)

    @functools.cached_property
    def stage_dir(self) -> Path:
        """Folder of this study in the stage root.

        Every call has one of its own, and so has every cluster job: another call may be at work
        on the same runs, or what is left of one that was killed, and would write over what this
        one has staged.
        """
        job = next((os.environ[name] for name in _JOB_NUMBERS if name in os.environ), None)
        settings = portable_settings(self.settings)
        call = os.environ.get(_CALL_NUMBER)
        identity = [job, call, str(self.output_dir), settings, engine_sha256()]
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.stage_root / name[:12]

    def shared_stage_dir(self, scope: str) -> Path:
        """Folder in which the first run of a scope is worked on for its reference."""
        return self.stage_dir / f"reference-{scope}"

    @functools.cached_property
    def _sidecars(self) -> Sidecars:
        return Sidecars(self.bids_dir)

    def metadata(self, name: str) -> dict[str, Any]:
        """What a run's sidecars say."""
        return self._metadata_of(self.runs[name])

    def _metadata_of(self, run: Run) -> dict[str, Any]:
        return metadata_of(run, self._sidecars)

    def origin(self, run: Run) -> list[str]:
        """Arguments that tell stage_run.py what a run is part of."""
        in_data_set = ["--bids-dir", str(self.bids_dir)]
        part = ["--sidecar", str(run.sidecar)] if run.sidecar else in_data_set
        for name, path in run.mean_of:
            part += ["--mean-of", name, str(path)]
        return [*part, "--multi-echo"] if run.echoes else part

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
        run = self.runs[self.moved_by(name)]
        if self.firsts:
            return replace(self.settings, shared_reference=str(self._shared_reference(run)))
        if self.settings.reference != SBREF:
            return self.settings
        return with_sbref(self.settings, run.sbref or find_sbref(run.source))

    def _shared_reference(self, run: Run) -> Path:
        """The image in whose space all runs of the run's scope end, which need not be there."""
        scope = scope_name(run, self.scope)
        if self.settings.reference != SBREF:
            return self.reference_path(scope)
        first = self.firsts[scope]
        missing = first.source.with_name(f"{first.name}_sbref.nii.gz")
        return (first.sbref or find_sbref(first.source) or missing).absolute()

    def reference_path(self, scope: str) -> Path:
        """Where the reference that is made for a scope lies."""
        return self.output_dir / shared_reference_path(scope)

    def made_for(self, run: str) -> str | None:
        """Name of the scope whose reference is made before a run is begun; None if none is."""
        if not self.firsts or self.settings.reference == SBREF:
            return None
        return scope_name(self.runs[run], self.scope)

    def has_reference(self, scope: str) -> bool:
        """Whether a scope's reference is that of its first run as it is now."""
        first = self.firsts[scope]
        try:
            key = self._key_of(first, self._metadata_of(first), self.settings.for_sharing)
        except InputError:
            return False  # stage says what is wrong
        entry, path = shared_entry(scope), shared_reference_path(scope)
        # By its content, not by its size alone: all runs of the scope are to end in it.
        return has_key(entry, key, self.output_dir) and has_content(self.output_dir, entry, path)

    def is_complete(self, run: str) -> bool:
        """Whether a run's files are those of its input, the settings and the engine."""
        return self._is_complete(run, self.has_reference)

    def _is_complete(self, run: str, has_reference: Callable[[str], bool]) -> bool:
        leader = self.runs[run].leader
        if not manifest_path(self.output_dir, run, is_echo=leader is not None).exists():
            return False
        scope = self.made_for(run)
        if scope is not None and not has_reference(scope):
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
        settings = self.settings_of(run)
        if settings.image and not settings.image.is_file():
            return None
        return self._key_of(self.runs[run], metadata, settings)

    def _key_of(
        self, run: Run, metadata: Mapping[str, Any], settings: RealignSettings
    ) -> str | None:
        sources = run.mean_of or ((run.name, run.source),)
        hashes = [known_sha256(self.output_dir, *named) for named in sources]
        known = [sha256 for sha256 in hashes if sha256 is not None]
        if len(known) < len(hashes):
            return None
        sha256 = joint_sha256(known) if run.mean_of else known[0]
        return run_key(sha256, metadata, settings)

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
        has_reference = functools.cache(self.has_reference)  # many runs ask for one scope
        wanting = [
            run for run in self.runs.values() if not self._is_complete(run.name, has_reference)
        ]
        to_do = tuple(run.name for run in wanting if run.leader is None)
        echoes = tuple(run.name for run in wanting if run.leader is not None)
        scopes = {scope for run in to_do if (scope := self.made_for(run)) is not None}
        references = tuple(scope for scope in sorted(scopes) if not has_reference(scope))
        if not self.has_pages:
            return Plan(to_do, (), False, echoes, references)
        paged = {run.name for run in self.runs.values() if run.leader is None}
        complete = paged - set(to_do)
        pages = tuple(run for run in sorted(complete) if not self.has_page(run))
        study_page = bool(to_do or pages) or not self._has_study_page(complete)
        return Plan(to_do, pages, study_page, echoes, references)

    def failures(self, plan: Plan, since_s: float) -> list[str]:
        """One line for each run of the plan that failed since a time (seconds, Unix)."""
        planned = (*plan.runs, *plan.echoes)
        incomplete = {run for run in planned if not self.is_complete(run)}
        pageless = {run for run in (*plan.runs, *plan.pages) if self.has_pages} - incomplete
        failed = incomplete | {run for run in pageless if not self.has_page(run)}
        shared = {scope: self._reason(scope, since_s, SHARED_RULES) for scope in plan.references}
        of_scope = {run: shared.get(self.made_for(run) or "") for run in failed}
        lines = [self._without_reference(scope, why) for scope, why in shared.items() if why]
        reasons = {run: self._reason(run, since_s) for run in sorted(failed) if not of_scope[run]}
        lines += [f"{run}: {reason}" for run, reason in reasons.items() if reason]
        n_waiting = len({self.moved_by(run) for run, reason in reasons.items() if not reason})
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

    def _without_reference(self, scope: str, reason: str) -> str:
        """Why no run of a scope was begun."""
        n_runs = sum(self.made_for(run) == scope for run in self.runs if self.moved_by(run) == run)
        first = self.firsts[scope].name
        reason = reason.removeprefix(f"{first}: ")
        return (
            f"{scope}: no reference from {first}, so {counted(n_runs, 'run')} not begun: {reason}"
        )

    def _reason(self, run: str, since_s: float, rules: Sequence[str] = RULES) -> str | None:
        """Why a run failed; None if none of its logs says that it did."""
        logs = (self.log_path(rule, run) for rule in reversed(rules))
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
        known = read_run_table(table)
        runs = filter_runs(known, filters, table)
    else:
        bids_dir = Path(config["bids_dir"])
        runs, misnamed = index_runs(bids_dir, filters)
        known = _known_runs(bids_dir, filters, runs, config["reference_scope"])
    sidecars, settings, scope = Sidecars(bids_dir), settings_of(config), config["reference_scope"]
    echoes = config["estimate_echo"], lambda run: metadata_of(run, sidecars)
    is_shared = scope != RUN and settings.image is None
    firsts = first_runs(runs, known, scope, echoes) if is_shared else {}
    runs = with_leaders(runs, *echoes)
    if not config["reslice"]:
        runs = [run for run in runs if run.leader is None]  # echoes have nothing else
    return Study(
        bids_dir=bids_dir,
        output_dir=Path(config["output_dir"]),
        stage_root=private_stage_root(Path(config["stage_root"])),
        settings=settings,
        runs={run.name: run for run in runs},
        has_pages=config["pages"],
        misnamed=misnamed,
        scope=scope,
        firsts=firsts,
    )


def _known_runs(bids_dir: Path, filters: Filters, runs: list[Run], scope: str) -> list[Run]:
    """All runs of the scopes that a call is about, if it matters which run is their first."""
    whole = ("participants", "sessions") if scope == SESSION else ("participants",)
    others = [labels for name, labels in filters.items() if name not in whole]
    if scope == RUN or all(labels is None for labels in others):
        return runs
    return index_runs(bids_dir, {name: filters[name] for name in whole}).runs


def begin_call(study: Study) -> None:
    """Sweep away what killed calls have staged, and number this one; what it starts inherits that.

    To be called before `Study.stage_dir` is asked for.
    """
    sweep_stage_root(study.stage_root)
    os.environ[_CALL_NUMBER] = uuid.uuid4().hex


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
        *(study.flag_path(scope, "shared") for scope in plan.references),
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
    for scope in plan.references:
        remove_stage(study.shared_stage_dir(scope))
    for run in (*plan.runs, *plan.echoes, *plan.pages, *plan.references, "study"):
        for step in FLAGS:
            study.flag_path(run, step).unlink(missing_ok=True)
    sweep_study(study)
    with contextlib.suppress(OSError):
        study.flag_dir.rmdir()


def sweep_study(study: Study) -> None:
    """Remove the study's stage directory, unless another call holds it, and an empty stage root.

    Called when a call's or a job's ranks have ended: what these left in /dev/shm goes too.
    """
    sweep_stage_root(study.stage_root, _RANKS_START_S)
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
    lines = [line for line in lines if WAITING not in line and WARNING not in line]
    errors = [line for line in lines if line.startswith(ERROR_PREFIX)]
    if errors:
        return errors[-1].removeprefix(ERROR_PREFIX).removeprefix(f"{run}: ")
    killed = [line for line in lines if line.startswith(KILLED_PREFIX)]
    word = killed[-1].removeprefix(KILLED_PREFIX) if killed else ": ".join(lines[-2:])
    return f"{word}; see {log}"
