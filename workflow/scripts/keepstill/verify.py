"""Whether the outputs of a derivative data set are what their manifests say that was written."""

import concurrent.futures
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from keepstill.errors import InputError, counted
from keepstill.files import file_sha256
from keepstill.manifest import (
    DAMAGED,
    ECHOES,
    MANIFESTS,
    SHARED,
    manifest_path,
    mark_damaged,
    read_manifest,
    shared_entry,
)


class Checked(NamedTuple):
    """What was found of one run, or of one echo of a multi-echo run.

    Attributes
    ----------
    run : str
    is_echo : bool
    n_outputs : int
        That its manifest names.
    damaged : dict
        Path relative to the data set -> what is wrong with the file.
    """

    run: str
    is_echo: bool
    n_outputs: int
    damaged: Mapping[str, str]


def verify(derivatives: Path, *, is_deep: bool = False, n_threads: int = 1) -> list[Checked]:
    """Compare every output with its manifest, by size or, if `is_deep`, by content too.

    The manifest of a run whose content is not what was written is marked, for size alone would
    not show it to the next call of the workflow; a mark goes once all is well again.

    Parameters
    ----------
    derivatives : Path
        An output directory.
    is_deep : bool
        Whether contents are hashed.
    n_threads : int
        Runs that are looked at side by side.

    Returns
    -------
    checked : list of Checked
        In the order of the runs' names, echoes after them, then what scopes share.

    Raises
    ------
    InputError
        If there is no manifest.
    """
    manifests = derivatives / MANIFESTS
    runs = [(path.stem, False) for path in sorted(manifests.glob("*.json"))]
    runs += [(path.stem, True) for path in sorted((manifests / ECHOES).glob("*.json"))]
    shared = sorted((manifests / SHARED).glob("*.json"))
    runs += [(shared_entry(path.stem), False) for path in shared]
    if not runs:
        raise InputError(f"{derivatives}: no manifest found; needs an output_dir of keepstill")
    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        found = list(pool.map(lambda run: _check(derivatives, *run, is_deep=is_deep), runs))
    return [_marked(derivatives, checked) for checked in found] if is_deep else found


def in_words(checked: Iterable[Checked], *, is_deep: bool) -> list[str]:
    """A line for each damaged file, and one for all."""
    checked = list(checked)
    lines = [f"{one.run}: {path}: {what}" for one in checked for path, what in one.damaged.items()]
    n_outputs, n_checked = sum(one.n_outputs for one in checked), len(_runs(checked))
    compared = "size and sha256" if is_deep else "size"
    total = f"{counted(n_outputs, 'output')} of {counted(n_checked, 'run')} compared by {compared}"
    if not lines:
        return [f"{total}: all as they were written"]
    n_runs = len(_runs(one for one in checked if one.damaged))
    what = counted(n_runs, "run") if n_runs else "what runs share, and them,"
    again = f"the next call of the workflow does {what} again"
    return [*lines, f"{total}: {len(lines)} damaged; {again}"]


def _runs(checked: Iterable[Checked]) -> list[str]:
    """Names of runs and echoes, references left out."""
    return [one.run for one in checked if not one.run.startswith(shared_entry(""))]


def _check(derivatives: Path, run: str, is_echo: bool, *, is_deep: bool) -> Checked:
    values = read_manifest(derivatives, run, is_echo=is_echo) or {}
    outputs = values.get("outputs")
    if not isinstance(outputs, dict) or not outputs:
        return Checked(run, is_echo, 0, {_manifest_name(run, is_echo): "no whole manifest"})
    found = {path: _fault(derivatives / path, entry, is_deep) for path, entry in outputs.items()}
    damaged = {path: what for path, what in found.items() if what}
    if not is_deep:
        damaged = dict.fromkeys(values.get(DAMAGED, ()), "marked as damaged") | damaged
    return Checked(run, is_echo, len(outputs), damaged)


def _marked(derivatives: Path, checked: Checked) -> Checked:
    """What was found, noted in the manifest; a data set that is only read stays as it is."""
    try:
        mark_damaged(derivatives, checked.run, checked.damaged, is_echo=checked.is_echo)
    except OSError as error:
        name = _manifest_name(checked.run, checked.is_echo)
        why = f"cannot be marked ({error.strerror}); remove it, lest the run count as complete"
        return checked._replace(damaged={**checked.damaged, name: why})
    return checked


def _manifest_name(run: str, is_echo: bool) -> str:
    return manifest_path(Path(), run, is_echo=is_echo).as_posix()


def _fault(path: Path, entry: Any, is_deep: bool) -> str:
    """What is wrong with an output; empty if nothing is."""
    try:
        n_bytes, wanted = os.stat(path).st_size, entry["bytes"]
        if n_bytes != wanted:
            return f"{n_bytes} of {wanted} bytes"
        if is_deep and file_sha256(path) != entry["sha256"]:
            return "another content (sha256)"
    except FileNotFoundError:
        return "missing"
    except (KeyError, TypeError):
        return "no size and sha256 in the manifest"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""
