"""Files that look like BOLD runs, and what is wrong with their names.

The index passes over a file whose name it does not understand, without a word; a run that is
missing from a study's results should not be found out months later.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# Entities of a BOLD file, in the order that BIDS 1.11 wants.
ORDER = ("sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo", "part", "chunk")
# Entities of what is made of runs: outputs would take the names of another run's.
_DERIVED = (
    *("space", "atlas", "seg", "scale", "res", "den", "label", "desc"),
    *("from", "to", "mode", "stat", "meas"),
)
_INDICES = ("run", "echo", "chunk")
# Suffixes of images that are no runs, in whatever folder they lie.
_NO_RUNS = (
    *(
        "cbv",
        "sbref",
        "phase",
        "boldref",
        "boldmap",
        "noRF",
        "epi",
        "mask",
        "T1w",
        "T2w",
        "fieldmap",
    ),
    *("phasediff", "phase1", "phase2", "magnitude", "magnitude1", "magnitude2"),
)
_FOREIGN = (".img", ".hdr", ".mgz", ".mgh", ".head", ".brik", ".nii.bz2", ".nii.xz", ".nii.zst")
_IMAGE = re.compile(rf"(?i)(\.nii(\.gz)?|{'|'.join(re.escape(ending) for ending in _FOREIGN)})\Z")
_SUBJECT_FOLDER = re.compile(r"sub-[a-zA-Z0-9+]+")
_LIKE_A_SUBJECT = re.compile(r"(?i)(sub|subj|subject)[-_ ]?.*\d.*|sub-.*")
_SESSION_FOLDER = re.compile(r"ses-[a-zA-Z0-9+]+")
_NAME = re.compile(r"[A-Za-z0-9+_-]+")
_LABEL = re.compile(r"[a-zA-Z0-9+]+")
_SHOWN = 3


class Misnamed(NamedTuple):
    """Files whose names do not fit, each with what is wrong.

    Attributes
    ----------
    left_out : tuple of (str, str)
        Path relative to the data set, and why it is no run.
    taken : tuple of (str, str)
        Likewise, of runs that are realigned all the same.
    """

    left_out: tuple[tuple[str, str], ...] = ()
    taken: tuple[tuple[str, str], ...] = ()

    def in_words(self) -> Iterator[str]:
        """A line for each kind, if there are any."""
        if self.left_out:
            yield f"left out for their names: {_listed(self.left_out)}"
        if self.taken:
            yield f"taken, though their names are not BIDS: {_listed(self.taken)}"


NONE_MISNAMED = Misnamed()


def misnamed_files(bids_dir: Path, found: Iterable[PurePosixPath]) -> Misnamed:
    """Files of a data set that look like BOLD runs and are not named like them.

    Parameters
    ----------
    bids_dir : Path
    found : iterable of path
        BOLD files that the index has found, relative to the data set.
    """
    found = set(found)
    left_out, taken = [], []
    for path in sorted(_candidates(bids_dir) | found):
        is_found, fault = path in found, why_left_out(path)
        if fault:
            left_out.append((path.as_posix(), fault))
        elif is_found and (fault := _why_odd(path)):
            taken.append((path.as_posix(), fault))
        elif not is_found:
            left_out.append((path.as_posix(), "not a BIDS name"))
    return Misnamed(tuple(left_out), tuple(taken))


def why_left_out(path: PurePosixPath) -> str:
    """What keeps a file from being a run; empty if nothing does.

    Parameters
    ----------
    path : path
        Relative to the data set.
    """
    stem, ending = _split(path.name)
    if ending not in (".nii", ".nii.gz"):
        return f"ends in {ending}; needs .nii or .nii.gz"
    folder = path.parts[0]
    if len(path.parts) == 1:
        return "lies in no subject's folder; needs sub-*/[ses-*/]func"
    if not _SUBJECT_FOLDER.fullmatch(folder):
        return f"folder {folder!r}; needs sub- and letters and digits"
    *parts, suffix = stem.split("_")
    if suffix != "bold":
        return f"suffix {suffix!r}; needs _bold"
    if not _NAME.fullmatch(stem):
        odd = "".join(sorted(set(_NAME.sub("", stem))))
        return f"{odd!r} in its name; needs letters, digits, + and - only"
    return _wrong_place(path, parts) or _derived(parts)


def _wrong_place(path: PurePosixPath, parts: list[str]) -> str:
    """Whether subject and session of the name are those of the folders."""
    subject = path.parts[0]
    if not parts or parts[0] != subject:
        return f"its name begins with {(parts or ['nothing'])[0]}, its folder is {subject}"
    in_folders = [part for part in path.parts[1:-1] if _SESSION_FOLDER.fullmatch(part)]
    in_name = [part for part in parts if part.startswith("ses-")]
    if in_folders and in_folders != in_name:
        return f"its folder is {in_folders[0]}, its name has {(in_name or ['no session'])[0]}"
    return ""


def _derived(parts: list[str]) -> str:
    derived = [part for part in parts if part.split("-", 1)[0] in _DERIVED]
    return f"{derived[0]} is the name of a derivative; needs raw runs" if derived else ""


def _why_odd(path: PurePosixPath) -> str:
    """What BIDS would have otherwise in the name or place of a run; empty if nothing."""
    entities = [part.partition("-")[::2] for part in _split(path.name)[0].split("_")[:-1]]
    names = [name for name, _ in entities]
    if fault := next(filter(None, (_odd_entity(*entity) for entity in entities)), ""):
        return fault
    if names != _in_order(names):
        return f"entities in the order {', '.join(names)}; needs {', '.join(_in_order(names))}"
    if "task" not in names:
        return "has no task"
    if path.parent.name != "func":
        return f"lies in {path.parent.as_posix()}; needs a folder func"
    return ""


def _odd_entity(name: str, label: str) -> str:
    if not _LABEL.fullmatch(label):
        return f"label {label!r} of {name}; needs letters, digits and + only"
    if name not in ORDER:
        return f"{name}-{label} is no entity of a BOLD file"
    if name in _INDICES and not label.isdigit():
        return f"{name}-{label}; needs a number"
    return ""


def _in_order(names: list[str]) -> list[str]:
    return sorted(set(names), key=ORDER.index)


def _candidates(bids_dir: Path) -> set[PurePosixPath]:
    """Images that have bold in their name, or lie in a func folder and are nothing else known."""
    _, folders, files = next(os.walk(bids_dir))
    found = {PurePosixPath(name) for name in files if _is_candidate(name, "")}
    for folder in filter(_LIKE_A_SUBJECT.fullmatch, folders):
        for where, inner, names in os.walk(bids_dir / folder):
            inner[:] = [name for name in inner if not name.startswith(".")]
            relative = PurePosixPath(Path(where).relative_to(bids_dir).as_posix())
            found |= {relative / name for name in names if _is_candidate(name, relative.name)}
    return found


def _is_candidate(name: str, folder: str) -> bool:
    if name.startswith(".") or not _IMAGE.search(name):
        return False
    stem, _ = _split(name)
    suffix = stem.rsplit("_", 1)[-1]
    if suffix in _NO_RUNS:
        return False
    return "bold" in name.lower() or folder.lower() == "func"


def _split(name: str) -> tuple[str, str]:
    """File name without and with only the ending of an image."""
    match = _IMAGE.search(name)
    return (name[: match.start()], match.group()) if match else (name, "")


def _listed(files: tuple[tuple[str, str], ...]) -> str:
    """How many files, and the first of them."""
    first = ", ".join(f"{path} ({fault})" for path, fault in files[:_SHOWN])
    rest = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return f"{len(files)}, {first}{rest}"
