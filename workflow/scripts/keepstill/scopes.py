"""Scopes: which runs end in one space, and which of them that space is of."""

import re
from collections.abc import Iterable

from keepstill.bids import Run
from keepstill.multi_echo import ReadMetadata, shared_name, with_leaders

RUN, SESSION = "run", "session"


def scope_name(run: Run, scope: str) -> str:
    """Name of the ``session`` or ``subject`` that a run is of: ``sub-01_ses-1``, ``sub-01``."""
    session = f"_ses-{run.session}" if scope == SESSION and run.session is not None else ""
    return f"sub-{run.subject}{session}"


def first_runs(
    wanted: Iterable[Run],
    known: Iterable[Run],
    scope: str,
    echoes: tuple[str | int, ReadMetadata],
) -> dict[str, Run]:
    """The first run of each scope, by the name of the scope.

    The order is that of the names, numbers in them by their value, whatever a call leaves out by
    filters: or else runs that were realigned by two calls would end in two spaces.

    Parameters
    ----------
    wanted : iterable of Run
        Runs whose scopes count.
    known : iterable of Run
        All runs of these scopes, each echo by itself.
    scope : str
        ``session`` or ``subject``.
    echoes : tuple
        As `with_leaders` takes them: on which echo motion is estimated, and what reads sidecars.
    """
    names = {scope_name(run, scope) for run in wanted}
    firsts: dict[str, list[Run]] = {}
    for run in sorted(known, key=lambda run: (_in_order(shared_name(run)), str(run.source))):
        name = scope_name(run, scope)
        if name in names:
            group = firsts.setdefault(name, [])
            if not group or shared_name(group[0]) == shared_name(run):
                group.append(run)
    return {name: with_leaders(group, *echoes)[0] for name, group in firsts.items()}


def _in_order(name: str) -> list[tuple[int, str]]:
    """A name as a sorting key: run-2 comes before run-10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
