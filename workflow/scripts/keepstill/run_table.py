"""Runs outside BIDS: a table says where each lies, and what it is called."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from keepstill.bids import BOLD_EXTENSIONS, Run, sidecar_beside
from keepstill.errors import InputError

TABLE_ENDING = ".tsv"
COLUMNS = ("path", "subject", "session", "task", "run", "echo", "json", "sbref")
REQUIRED = COLUMNS[:2]
# Column -> entity, in the order of a BIDS name.
ENTITIES = {"subject": "sub", "session": "ses", "task": "task", "run": "run", "echo": "echo"}
NUMBERED = ("run", "echo")
# BIDS wants a task in the name of every BOLD file.
UNNAMED_TASK = "unnamed"
MISSING = ("", "n/a")
_LABEL = re.compile(r"[a-zA-Z0-9]+")


def read_run_table(table: Path) -> list[Run]:
    """The runs that a table lists, sorted by name.

    Parameters
    ----------
    table : Path
        Tab-separated, UTF-8, with a header: `COLUMNS`, of which `REQUIRED` must be there. An
        empty cell or ``n/a`` stands for nothing. Paths are relative to the table's folder.

    Raises
    ------
    InputError
        If it is no such table, a file is missing, or two lines make one name. The line is named,
        counted from 1, which is the header.
    """
    header, *lines = _lines(table)
    columns = _columns(header, table)
    found: dict[str, tuple[int, Run]] = {}
    problems = []
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        try:
            run = _run(_cells(line, columns), table.parent)
            _refuse_twin(run, found)
            found[run.name] = number, run
        except InputError as error:
            problems.append(f"{table}, line {number}: {error}")
    if problems:
        more = f" (first of {len(problems)} lines to mend)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)
    if not found:
        raise InputError(f"{table}: no run found; needs a line for each below the header")
    return [found[name][1] for name in sorted(found)]


def _lines(table: Path) -> list[str]:
    """Lines of a text; a byte order mark and the ends of lines of any system are taken off."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{table}: not readable ({reason}); needs a table of runs") from error
    return text.split("\n")


def _columns(header: str, table: Path) -> list[str]:
    columns = [name.strip() for name in header.split("\t")]
    hint = "; columns are separated by tabs" if "," in header or " " in header.strip() else ""
    for name in columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            right = f"did you mean {near[0]}?" if near else f"known: {', '.join(COLUMNS)}"
            raise InputError(f"{table}, line 1: column {name!r} is unknown; {right}{hint}")
        if columns.count(name) > 1:
            raise InputError(f"{table}, line 1: column {name!r} stands there twice; remove one")
    for name in REQUIRED:
        if name not in columns:
            raise InputError(f"{table}, line 1: column {name!r} is missing; add it{hint}")
    return columns


def _cells(line: str, columns: Sequence[str]) -> dict[str, str]:
    """Column -> cell, of the cells that hold something."""
    cells = [cell.strip() for cell in line.rstrip("\r").split("\t")]
    if any(cells[len(columns) :]):
        raise InputError(f"{len(cells)} cells found; needs {len(columns)}, as the header has")
    return {name: cell for name, cell in zip(columns, cells, strict=False) if cell not in MISSING}


def _run(cells: Mapping[str, str], folder: Path) -> Run:
    for column in REQUIRED:
        if column not in cells:
            raise InputError(f"no {column} found; every run needs one")
    cells = {"task": UNNAMED_TASK, **cells}
    entities = {
        entity: _label(cells[column], column, entity)
        for column, entity in ENTITIES.items()
        if column in cells
    }
    source = _existing(cells["path"], folder)
    if not source.name.endswith(BOLD_EXTENSIONS):
        raise InputError(f"{source} found; needs a .nii or .nii.gz file")
    sidecar = _existing(cells["json"], folder) if "json" in cells else sidecar_beside(source)
    name = "_".join(f"{entity}-{label}" for entity, label in entities.items())
    sbref = _existing(cells["sbref"], folder) if "sbref" in cells else None
    return Run(name, source, entities["sub"], entities.get("ses"), entities, sidecar, sbref=sbref)


def _label(cell: str, column: str, entity: str) -> str:
    """A label without its entity: ``01`` of ``sub-01``."""
    label = cell.removeprefix(f"{entity}-")
    if not _LABEL.fullmatch(label):
        raise InputError(f"{column} {cell!r} found; needs letters a to z and digits only")
    if column in NUMBERED and not label.isdigit():
        raise InputError(f"{column} {cell!r} found; needs a whole number")
    return label


def _existing(cell: str, folder: Path) -> Path:
    """Absolute path of a file; a link whose file is yet to be fetched is left to stage."""
    path = Path(os.path.abspath(folder / os.path.expanduser(cell)))
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file; paths are relative to the table's folder")
    if path.is_dir():
        raise InputError(f"{path} is a folder; needs a file")
    return path


def _refuse_twin(run: Run, found: Mapping[str, tuple[int, Run]]) -> None:
    if run.name in found:
        raise InputError(
            f"{run.name} is what line {found[run.name][0]} is called too; "
            "tell them apart by session, task, run or echo"
        )
