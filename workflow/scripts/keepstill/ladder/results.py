"""What a call of the ladder leaves behind: table, figures, picture, and copies of these in docs."""

import json
import os
import re
from pathlib import Path
from typing import TextIO

from keepstill.errors import OutputError
from keepstill.files import put_text
from keepstill.ladder.measure import Trial, measure
from keepstill.ladder.picture import draw
from keepstill.ladder.table import (
    from_json,
    full_table,
    heading,
    setting_of,
    short_table,
    to_json,
    verdict,
)

FIGURES, PICTURE, TABLE = "ladder.json", "ladder.svg", "table.md"
_BEGIN, _END = "<!-- snakemake ladder -->", "<!-- end -->"
_BETWEEN = re.compile(f"(?<={_BEGIN}\n).*?(?={_END})", re.DOTALL)


def put_ladder(trial: Trial, out: Path, clone: Path | None, terminal: TextIO) -> str:
    """Measure, and write what was found; a last word comes out.

    Parameters
    ----------
    trial : Trial
    out : Path
        Folder of table, figures and picture.
    clone : Path or None
        Whose documentation is renewed as well.
    terminal : file
        Where to say how far it is, and show the table.
    """

    def tell(line: str) -> None:
        print(f"keepstill: ladder: {line}", file=terminal, flush=True)

    setting = setting_of(trial, os.getloadavg()[0])
    figures = measure(trial, tell)
    made = to_json(figures, setting)
    lines = [heading(setting), "", full_table(figures), "", verdict(figures)]
    print("\n".join(lines), file=terminal, flush=True)
    for folder in (out, *([clone / "docs"] if clone else [])):
        folder.mkdir(parents=True, exist_ok=True)
        put_text(folder / FIGURES, json.dumps(made, indent=1) + "\n")
        draw(folder / PICTURE, figures, heading(setting))
    put_text(out / TABLE, "\n".join(lines) + "\n")
    if clone:
        renew_docs(clone)
    return f"keepstill: ladder: {verdict(figures)}; {out / TABLE}"


def renew_docs(clone: Path) -> None:
    """Put the tables of docs/ladder.json into docs/ladder.md and README.md.

    Raises
    ------
    OutputError
        If a file has no place for its table.
    """
    for path, text in documented(clone).items():
        old = path.read_text(encoding="utf-8")
        n_places = len(_BETWEEN.findall(old))
        if n_places != 1:
            raise OutputError(f"{path}: {n_places} places for the table found; needs one, {_BEGIN}")
        put_text(path, _BETWEEN.sub(text.replace("\\", r"\\"), old))


def documented(clone: Path) -> dict[Path, str]:
    """What the files of the documentation say between their marks, by docs/ladder.json."""
    made = json.loads((clone / "docs" / FIGURES).read_text(encoding="utf-8"))
    figures, shared = from_json(made), heading(made["setting"])
    return {
        clone
        / "docs"
        / "ladder.md": f"\n{shared}\n\n{full_table(figures)}\n\n{verdict(figures)}\n",
        clone / "README.md": f"\n{short_table(figures)}\n",
    }
