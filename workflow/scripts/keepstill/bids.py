"""BIDS: the runs of a data set, their sidecars, and the names of what is made of them."""

import collections
import difflib
import itertools
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

from keepstill.errors import InputError
from keepstill.misnamed import Misnamed, misnamed_files

BOLD_EXTENSIONS = (".nii", ".nii.gz")
FILTERS = {"participants": "sub", "sessions": "ses", "tasks": "task", "runs": "run"}
DESCRIPTION = "dataset_description.json"
MAX_SHOWN = 12  # names in an error's line

Filters = Mapping[str, Sequence[str | int] | None]


@dataclass(frozen=True)
class Run:
    """One BOLD file of a study.

    Attributes
    ----------
    name : str
        The file's name without ``_bold`` and extension, as in ``sub-01_task-rest_run-1``.
    source : Path
        The file itself.
    subject : str
        Label without ``sub-``.
    session : str or None
        Label without ``ses-``.
    entities : dict
        Every entity of the name with its label as written: ``{"sub": "01", "run": "02", ...}``.
    sidecar : Path or None
        The one JSON of a run outside BIDS, which need not exist; None for a run of a data set,
        whose sidecars are looked for.
    echoes : tuple of str
        Names of a multi-echo run's echoes, whose motion is estimated on `source`.
    mean_of : tuple of (str, Path)
        Name and file of each echo, where motion is estimated on the mean of all.
    leader : str or None
        Name of the multi-echo run that this is an echo of.
    sbref : Path or None
        The single-band reference that a table names.
    """

    name: str
    source: Path
    subject: str
    session: str | None
    entities: Mapping[str, str]
    sidecar: Path | None = None
    echoes: tuple[str, ...] = ()
    mean_of: tuple[tuple[str, Path], ...] = ()
    leader: str | None = None
    sbref: Path | None = None


@dataclass(frozen=True)
class Origin:
    """What a run is part of.

    Attributes
    ----------
    bids_dir : Path or None
        Root of its data set.
    sidecar : Path or None
        The JSON of a run that a table lists, which need not exist. Such a run is part of no data
        set, wherever it lies.
    is_multi_echo : bool
        Whether the run's motion serves echoes, whose files are made by themselves.
    """

    bids_dir: Path | None = None
    sidecar: Path | None = None
    is_multi_echo: bool = False

    def folder(self, run: str) -> str:
        """Folder of the run's outputs; none for a run that is part of no study."""
        return derivative_folder(run).as_posix() if self.bids_dir or self.sidecar else ""

    def data_set(self, source: Path) -> Path | None:
        """Root of the data set that sidecars are looked for in, absolute; None if in none."""
        if self.sidecar:
            return None
        return Path(os.path.abspath(self.bids_dir)) if self.bids_dir else find_bids_dir(source)

    def metadata(self, source: Path, run: str) -> dict[str, Any]:
        """What the run's sidecars say."""
        if self.sidecar:
            return lone_metadata(self.sidecar, run)
        return sidecar_metadata(source, self.data_set(source))


def find_sbref(source: Path) -> Path | None:
    """The single-band reference beside a run: its name with ``_sbref``; None if there is none.

    An echo without one of its own has that of all echoes, whose name lacks ``echo``.
    """
    stem = _stem(source.name)
    if not stem.endswith("_bold"):
        return None
    run = stem.removesuffix("_bold")
    shared = "_".join(part for part in run.split("_") if not part.startswith("echo-"))
    names = (f"{name}_sbref{ending}" for name in (run, shared) for ending in BOLD_EXTENSIONS)
    beside = (source.with_name(name) for name in names)
    return next((path for path in beside if path.exists()), None)


class Sidecars:
    """The JSON sidecars of one data set; each folder is listed once.

    Parameters
    ----------
    bids_dir : Path or None
        Root of the data set; None for files outside any, which have the JSON beside them only.
    """

    def __init__(self, bids_dir: Path | None) -> None:
        self.bids_dir = bids_dir
        self._listed: dict[Path, list[tuple[dict[str, str], Path]]] = {}

    def metadata(self, path: Path) -> dict[str, Any]:
        """Metadata of `path`, the nearer and the more specific sidecar overriding (BIDS 1.11).

        Raises
        ------
        InputError
            If a sidecar is not a JSON object.
        """
        if self.bids_dir is None or not path.is_relative_to(self.bids_dir):
            beside = sidecar_beside(path)
            return _read_object(beside) if beside.is_file() else {}
        wanted = _entities(path.name)
        merged: dict[str, Any] = {}
        for folder in _folders_down_to(path.parent, self.bids_dir):
            for entities, sidecar in self._sidecars_in(folder):
                if entities.items() <= wanted.items():
                    merged |= _read_object(sidecar)
        return merged

    def _sidecars_in(self, folder: Path) -> list[tuple[dict[str, str], Path]]:
        """Entities and path of every sidecar in a folder, the least specific first."""
        if folder not in self._listed:
            sidecars = ((_entities(path.name), path) for path in folder.glob("*.json"))
            self._listed[folder] = sorted(sidecars, key=lambda pair: (len(pair[0]), pair[1]))
        return self._listed[folder]


class Index(NamedTuple):
    """What was found in a data set.

    Attributes
    ----------
    runs : list of Run
        Sorted by name.
    misnamed : Misnamed
        Files that look like runs and are not named like them, whatever the filters.
    """

    runs: list[Run]
    misnamed: Misnamed


def index_runs(bids_dir: Path, filters: Filters | None = None) -> Index:
    """BOLD runs of a data set that pass the filters, and what was passed over.

    Derivatives are not entered. Phase images (``part-phase``) are left out: they are never
    realigned by themselves.

    Parameters
    ----------
    bids_dir : Path
    filters : mapping, optional
        ``participants``, ``sessions``, ``tasks``, ``runs`` -> the labels to keep, with or
        without ``sub-`` and the like; None or a missing key keeps all.

    Raises
    ------
    InputError
        If there is no run, a label matches none, or one name stands for two files.
    """
    if not bids_dir.is_dir():
        raise InputError(f"{bids_dir}: no such folder; bids_dir must be a BIDS data set")
    images = _images(bids_dir)
    misnamed = misnamed_files(bids_dir, [path for path, suffix in images if suffix == "bold"])
    try:
        runs = _named_runs(bids_dir, images, misnamed)
        kept = filter_runs(runs, filters or {}, bids_dir)
    except InputError as error:
        raise InputError("; ".join([str(error), *misnamed.in_words()])) from None
    _refuse_twins(kept)
    return Index(kept, misnamed)


def _named_runs(
    bids_dir: Path, images: Sequence[tuple[PurePosixPath, str]], misnamed: Misnamed
) -> list[Run]:
    """The runs among the images of a data set, sorted by name."""
    if not any(bids_dir.glob("sub-*")):
        raise InputError(
            f"{bids_dir}: no sub-* folder; bids_dir must be the folder that holds {DESCRIPTION}"
        )
    left_out = {PurePosixPath(path) for path, _ in misnamed.left_out}
    bold = [path for path, suffix in images if suffix == "bold" and path not in left_out]
    if not bold:
        counts = collections.Counter(suffix for path, suffix in images if path not in left_out)
        found = _shown([f"{number} {suffix}" for suffix, number in sorted(counts.items())])
        raise InputError(
            f"{bids_dir}: no run found (images found: {found}); needs files "
            "sub-*/[ses-*/]func/*_bold.nii[.gz]"
        )
    runs = sorted(
        (file_run(bids_dir / path) for path in bold), key=lambda run: (run.name, run.source)
    )
    kept = [run for run in runs if run.entities.get("part") != "phase"]
    if not kept:
        raise InputError(
            f"{bids_dir}: only phase images found ({len(runs)}, part-phase), which are never "
            "realigned by themselves; add the magnitude images"
        )
    return kept


def filter_runs(runs: Sequence[Run], filters: Filters, where: Path) -> list[Run]:
    """Runs that pass the filters, in their order.

    Parameters
    ----------
    runs : sequence of Run
    filters : mapping
        As of `index_runs`.
    where : Path
        What the runs were found in, for errors.

    Raises
    ------
    InputError
        If a label matches no run, or no run passes.
    """
    kept = list(runs)
    for name, labels in filters.items():
        if labels is None:
            continue
        wanted = [str(label).removeprefix(f"{FILTERS[name]}-") for label in labels]
        _refuse_unknown(wanted, name, runs, where)
        before = kept
        kept = [run for run in kept if _passes(run, FILTERS[name], wanted)]
        if not kept:
            raise InputError(
                f"{where}: {len(runs)} runs found, {len(before)} left before {name} "
                f"{', '.join(wanted)}, none after; widen that filter (left were: "
                f"{_shown([run.name for run in before])})"
            )
    return kept


def sidecar_metadata(path: Path, bids_dir: Path | None = None) -> dict[str, Any]:
    """Metadata of a BIDS file, its JSON sidecars merged by inheritance.

    Without `bids_dir` the data set is looked for above the file; outside any data set the JSON
    beside the file counts alone, and a file without one has no metadata.
    """
    return Sidecars(bids_dir or find_bids_dir(path)).metadata(path)


def lone_metadata(sidecar: Path, run: str) -> dict[str, Any]:
    """Metadata of a run outside BIDS: what its JSON says, if there is one, and its task's name."""
    values = _read_object(sidecar) if os.path.lexists(sidecar) else {}
    return {"TaskName": _entities(run)["task"]} | values


def sidecar_beside(path: Path) -> Path:
    """The JSON of the same name in the same folder, whether or not there is one."""
    return path.with_name(_stem(path.name) + ".json")


def find_bids_dir(path: Path) -> Path | None:
    """Nearest folder above `path` with a data set description, or None."""
    folders = path.absolute().parents
    return next((folder for folder in folders if (folder / DESCRIPTION).is_file()), None)


def bids_uri(path: Path, bids_dir: Path) -> str:
    """BIDS URI of a file in the data set that `DatasetLinks` calls ``raw``."""
    return f"bids:raw:{percent_encoded(path.relative_to(bids_dir).as_posix())}"


def relative_reference(path: Path, folder: Path) -> str:
    """URI reference of a file or folder from a folder (RFC 3986, 4.2), percent-encoded.

    Links in the folders' paths are followed: ``..`` leads out of the folder where it really is.
    """
    parent = os.path.realpath(path.parent)
    relative = os.path.relpath(os.path.join(parent, path.name), os.path.realpath(folder))
    return percent_encoded(Path(relative).as_posix())


def percent_encoded(path: str) -> str:
    """A relative path as it stands in a URI; ``+``, which BIDS names may have, stays as it is."""
    return quote(path, safe="/+")


def run_name(path: Path) -> str:
    """Name of the run in a BOLD file: without extension and ``_bold``."""
    return _stem(path.name).removesuffix("_bold")


def run_file(run: Run) -> Path:
    """The BOLD file that a run is named after; a multi-echo run has none, but one could be there.

    It says where what lies beside the raw data, such as the truth of a simulated run, is looked
    for.
    """
    ending = run.source.name[len(_stem(run.source.name)) :]
    return run.source.with_name(f"{run.name}_bold{ending}")


def derivative_folder(run: str) -> PurePosixPath:
    """Folder of a run's outputs, relative to the output directory: ``sub-01/ses-a/func``."""
    parts = run.split("_")
    levels = [part for part in parts[:2] if part.startswith(("sub-", "ses-"))]
    return PurePosixPath(*levels, "func")


def derivative_name(
    run: str, ending: str, entities: Mapping[str, str], *, without: Iterable[str] = ()
) -> str:
    """File name of one of a run's outputs.

    Parameters
    ----------
    run : str
        Name of the run; need not be BIDS.
    ending : str
        Suffix and extension, as in ``bold.nii.gz``.
    entities : mapping
        Entities to add, in the order of the name, which is BIDS's: ``{"desc": "hmc"}``.
    without : iterable of str
        Entities of the run that the output does not have (``echo`` of what all echoes share).

    Examples
    --------
    >>> derivative_name("sub-01_task-rest_echo-1", "boldref.nii.gz", {"desc": "hmc"},
    ...                 without=["echo"])
    'sub-01_task-rest_desc-hmc_boldref.nii.gz'
    """
    dropped = tuple(f"{entity}-" for entity in (*without, *entities))
    kept = [part for part in run.split("_") if not part.startswith(dropped)]
    added = [f"{entity}-{label}" for entity, label in entities.items()]
    return "_".join([*kept, *added, ending])


def _images(bids_dir: Path) -> list[tuple[PurePosixPath, str]]:
    """Images that bids2table finds, relative to the data set, and the suffix of each.

    It refuses folders with a dot in their name and searches with a glob, so it is shown a link
    with a plain name instead of the folder.
    """
    if not any(bids_dir.glob("sub-*")):
        return []
    from bids2table import index_dataset

    _silence_libraries()
    with tempfile.TemporaryDirectory(prefix="keepstill-") as scratch:
        link = Path(scratch) / "study"
        link.symlink_to(bids_dir.absolute(), target_is_directory=True)
        rows = index_dataset(link).select(["path", "suffix", "ext"]).to_pylist()
    return [
        (PurePosixPath(row["path"]), row["suffix"]) for row in rows if row["ext"] in BOLD_EXTENSIONS
    ]


def _silence_libraries() -> None:
    """What they tell is not for our users; once imported, for an import sets their levels."""
    for library in ("bids2table", "bidsschematools"):
        logging.getLogger(library).setLevel(logging.ERROR)


def file_run(path: Path) -> Run:
    """The run in a BOLD file, by the file's name; a name outside BIDS has no subject."""
    name = run_name(path)
    entities = _entities(name)
    return Run(name, path, entities.get("sub", ""), entities.get("ses"), entities)


def _refuse_twins(runs: Sequence[Run]) -> None:
    """Refuse two files of one name, such as .nii and .nii.gz; `runs` are sorted."""
    twins = [pair for pair in itertools.pairwise(runs) if pair[0].name == pair[1].name]
    if twins:
        run, other = twins[0]
        more = f" (first of {len(twins)} such runs)" if len(twins) > 1 else ""
        raise InputError(
            f"{run.name}: two files found, {run.source} and {other.source}{more}; remove one, "
            "or leave the run out by a filter"
        )


def _refuse_unknown(wanted: Iterable[str], name: str, runs: Sequence[Run], where: Path) -> None:
    entity = FILTERS[name]
    found = sorted({run.entities[entity] for run in runs if entity in run.entities})
    for label in wanted:
        if not any(_same_label(entity, label, other) for other in found):
            raise InputError(f"{where}: {name}: {_none_such(label, found)}")


def _passes(run: Run, entity: str, wanted: Iterable[str]) -> bool:
    label = run.entities.get(entity)
    return label is not None and any(_same_label(entity, other, label) for other in wanted)


def _same_label(entity: str, one: str, other: str) -> bool:
    """Equal as written; a run's label is a number, so 1 is 01."""
    if entity == "run" and one.isdigit() and other.isdigit():
        return int(one) == int(other)
    return one == other


def _none_such(label: str, found: Sequence[str]) -> str:
    near = difflib.get_close_matches(label, found, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"no run has {label}{hint or '; choose from those found'} (found: {_shown(found)})"


def _shown(names: Sequence[str]) -> str:
    """The first names, and how many there are besides."""
    rest = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + rest or "none"


def _stem(name: str) -> str:
    """File name without ``.nii``, ``.nii.gz`` or any other extension."""
    return name.removesuffix(".gz").rsplit(".", 1)[0] if "." in name else name


def _entities(name: str) -> dict[str, str]:
    """Entities of a file name and its suffix, labels as written.

    As bids2table's own parser has them, whose import takes 0.1 s: a single run needs no more of it.
    """
    parts = name.partition(".")[0].split("_")
    found = dict(part.split("-", 1) for part in parts if "-" in part)
    return found if "-" in parts[-1] else found | {"suffix": parts[-1]}


def _folders_down_to(folder: Path, root: Path) -> list[Path]:
    """Folders from `root` to `folder`, both included."""
    below = folder.relative_to(root).parts
    return [root.joinpath(*below[:depth]) for depth in range(len(below) + 1)]


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"{digits} is too large")
    return float(digits)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(values, ensure_ascii=False).encode()  # half a character cannot be written again
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: not there; fetch it (datalad get {path.name}) or mend the link"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); mend the sidecar") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: {type(values).__name__} found; a sidecar needs an object {{}}")
    return values
