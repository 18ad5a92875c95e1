"""Multi-echo runs: which files are the echoes of one run, and which of them shows its motion."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from keepstill.bids import Run, file_run, sidecar_metadata
from keepstill.errors import InputError
from keepstill.settings import ALL_MEAN, SHORTEST

ReadMetadata = Callable[[Run], Mapping[str, Any]]


def with_leaders(
    runs: Sequence[Run], estimate_echo: str | int, read_metadata: ReadMetadata
) -> list[Run]:
    """Runs, with one more in front of the echoes of each multi-echo run: its leader.

    The leader has the name of the run without ``echo``. Its file is that of the echo on which
    motion is estimated; what the echoes share is named after it. A run of which there is one echo
    only is a run like any other.

    Parameters
    ----------
    runs : sequence of Run
    estimate_echo : str or int
        ``shortest`` echo time, an echo's number, or ``all-mean``.
    read_metadata : callable
        What a run's sidecars say; asked of echoes only.

    Raises
    ------
    InputError
        If a run has no echo of that number, or a leader's name is another run's.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(shared_name(run), []).append(run)
    found = []
    for name, group in groups.items():
        if len(group) == 1:
            found += group
            continue
        _refuse_unnumbered(name, group)
        chosen = _chosen(name, group, estimate_echo, read_metadata)
        entities = {entity: label for entity, label in chosen.entities.items() if entity != "echo"}
        names = tuple(echo.name for echo in group)
        mean_of = _mean_of(chosen, group) if estimate_echo == ALL_MEAN else ()
        leader = replace(chosen, name=name, entities=entities, echoes=names, mean_of=mean_of)
        found.append(leader)
        found += [replace(echo, leader=name) for echo in group]
    return found


def runs_of_files(paths: Sequence[Path], estimate_echo: str | int) -> list[Run]:
    """The run in a file; of several files, which are the echoes of one run, the leader and them.

    Raises
    ------
    InputError
        If several files are not told apart by ``echo`` alone, or none has the number asked for.
    """
    given = [file_run(path) for path in paths]
    if len(given) == 1:
        return given
    names = {shared_name(run) for run in given}
    if len(names) > 1 or len({run.name for run in given}) < len(given):
        raise InputError(
            f"{', '.join(path.name for path in paths)}: no echoes of one run; needs names that "
            "differ in echo-1, echo-2 and so on, or one file a call"
        )
    return with_leaders(given, estimate_echo, lambda run: sidecar_metadata(run.source))


def shared_name(run: Run) -> str:
    """Name of a run without ``echo``."""
    return "_".join(part for part in run.name.split("_") if not part.startswith("echo-"))


def _refuse_unnumbered(name: str, group: Sequence[Run]) -> None:
    for run in group:
        if not run.entities.get("echo", "").isdigit():
            raise InputError(
                f"{name}: {run.source} found beside files of its echoes; name every echo echo-1, "
                "echo-2 and so on, or leave the run out by a filter"
            )


def _chosen(
    name: str, group: Sequence[Run], estimate_echo: str | int, read_metadata: ReadMetadata
) -> Run:
    """The echo on which motion is estimated."""
    numbered = sorted(group, key=lambda run: int(run.entities["echo"]))
    if estimate_echo not in (SHORTEST, ALL_MEAN):
        for run in numbered:
            if int(run.entities["echo"]) == int(estimate_echo):
                return run
        known = ", ".join(str(int(run.entities["echo"])) for run in numbered)
        raise InputError(f"{name}: estimate_echo: {estimate_echo} found; it has echoes {known}")
    times_s = [_echo_time_s(run, read_metadata) for run in numbered]
    if any(time_s is None for time_s in times_s):
        return numbered[0]  # scanners number echoes by their times
    return min(zip(times_s, numbered, strict=True), key=lambda pair: float(pair[0] or 0))[1]


def _mean_of(first: Run, group: Sequence[Run]) -> tuple[tuple[str, Path], ...]:
    """Name and file of each echo, the shortest first, whose metadata are the run's."""
    numbered = sorted(group, key=lambda run: int(run.entities["echo"]))
    return tuple((run.name, run.source) for run in [first, *(r for r in numbered if r != first)])


def _echo_time_s(run: Run, read_metadata: ReadMetadata) -> float | None:
    """Echo time, s, by the sidecars; None if they do not say, or cannot be read."""
    with contextlib.suppress(InputError):  # stage says what is wrong with them
        value = read_metadata(run).get("EchoTime")
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
    return None
