"""A complete run as the pages see it: its manifest, and its table of confounds."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import InputError

CONFOUNDS_SUFFIX = "_desc-confounds_timeseries.tsv"
MOTION_COLUMNS = (
    *("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"),
    *("framewise_displacement", "std_dvars"),
)
NON_STEADY, OUTLIER = "non_steady_state_outlier", "motion_outlier"
SETTINGS_SHOWN = ("fd_radius_mm", "fd_outlier_mm", "std_dvars_outlier")
SUMMARY_SHOWN = (
    *("n_volumes", "tr_s", "n_outliers", "n_failed"),
    *("mean_fd_mm", "max_fd_mm", "tsnr_before", "tsnr_after"),
)


@dataclass(frozen=True)
class RunRecord:
    """What a run's manifest says.

    Attributes
    ----------
    run : str
        The run's name, unescaped.
    versions : dict
        ``keepstill_version``, ``engine`` and ``key``.
    settings : dict
        Every setting that entered the key, at least `SETTINGS_SHOWN`.
    source : dict
        ``sha256`` and ``bytes`` of the input.
    outputs : dict
        Path relative to the output directory -> ``sha256`` and ``bytes``.
    summary : dict
        Figures of the whole run, at least `SUMMARY_SHOWN`; one that is not known is None.
    warnings : tuple of str
    """

    run: str
    versions: dict[str, str]
    settings: dict[str, Any]
    source: dict[str, Any]
    outputs: dict[str, dict[str, Any]]
    summary: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def confounds(self) -> str:
        """Path of the table of confounds, relative to the output directory."""
        for path in self.outputs:
            if path.endswith(CONFOUNDS_SUFFIX):
                return path
        raise InputError(
            f"{self.run}: the manifest names {len(self.outputs)} outputs and none ends in "
            f"{CONFOUNDS_SUFFIX}; realign the run again"
        )


@dataclass(frozen=True)
class Confounds:
    """One row a volume.

    Attributes
    ----------
    columns : dict of (n,) float64
        Column name -> values in the units of the table; NaN where the table says ``n/a``.
    status : (n,) str
        ``ok``, ``reference`` or ``failed``.
    non_steady, flagged : ascending numbers of volumes
        Those before the steady state; those to leave out because of motion, failed ones among
        them.
    """

    columns: dict[str, NDArray[np.float64]]
    status: NDArray[np.str_]
    non_steady: NDArray[np.intp]
    flagged: NDArray[np.intp]

    @property
    def failed(self) -> NDArray[np.intp]:
        """Numbers of the failed volumes, from 0, ascending."""
        return np.flatnonzero(self.status == "failed")

    @property
    def outliers(self) -> NDArray[np.intp]:
        """Numbers of the volumes that are flagged and have not failed."""
        return np.setdiff1d(self.flagged, self.failed)


def read_run(manifest: Path) -> RunRecord:
    """Read the run that `manifest` describes.

    Raises
    ------
    InputError
        If the file is not a manifest, or lacks what the pages show.
    """
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        return RunRecord(
            run=values["run"],
            versions={name: values[name] for name in ("keepstill_version", "engine", "key")},
            settings=_with_keys(values["settings"], SETTINGS_SHOWN),
            source=values["input"],
            outputs=values["outputs"],
            summary=_with_keys(values["summary"], SUMMARY_SHOWN),
            warnings=tuple(values.get("warnings", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{manifest.name}: not a manifest ({type(error).__name__}: {error}); "
            "remove it and realign the run again"
        ) from error


def read_confounds(path: Path, names: Iterable[str], optional: Iterable[str] = ()) -> Confounds:
    """Read the columns `names` and the status from a table of confounds.

    Parameters
    ----------
    path : Path
    names : iterable of str
        Numeric columns that the table must have.
    optional : iterable of str
        Numeric columns that are NaN throughout if the table lacks them.

    Raises
    ------
    InputError
        If the table is missing, lacks a column, or has a cell that is no number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(
            f"{path.name}: named by the manifest, but missing; realign the run again"
        ) from error
    header = lines[0].split("\t") if lines else []
    rows = [line.split("\t") for line in lines[1:]]
    try:
        columns = {name: _numbers(rows, header.index(name)) for name in names}
        missing = np.full(len(rows), np.nan)
        for name in optional:
            columns[name] = _numbers(rows, header.index(name)) if name in header else missing
        return Confounds(
            columns=columns,
            status=np.array([row[header.index("status")] for row in rows], dtype=np.str_),
            non_steady=_spikes(header, rows, NON_STEADY),
            flagged=_spikes(header, rows, OUTLIER),
        )
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{path.name}: {len(header)} columns, {len(rows)} rows, unreadable ({error}); "
            "realign the run again"
        ) from error


def consecutive(volumes: NDArray[np.intp]) -> list[tuple[int, int]]:
    """First and last volume of each unbroken stretch of ascending `volumes`."""
    breaks = np.flatnonzero(np.diff(volumes) != 1) + 1
    return [(int(s[0]), int(s[-1])) for s in np.split(volumes, breaks) if len(s)]


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: ``estimate.degree``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def finite_mean(values: NDArray[np.float64]) -> float:
    """Mean of the finite `values`; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _with_keys(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    missing = [name for name in names if name not in values]
    if missing:
        raise KeyError(", ".join(missing))
    return values


def _numbers(rows: list[list[str]], column: int) -> NDArray[np.float64]:
    return np.array(
        [np.nan if row[column] == "n/a" else float(row[column]) for row in rows], dtype=np.float64
    )


def _spikes(header: list[str], rows: list[list[str]], prefix: str) -> NDArray[np.intp]:
    """Numbers of the volumes that columns of 0 and 1 stand for."""
    places = [place for place, name in enumerate(header) if name.startswith(prefix)]
    volumes = (t for t, row in enumerate(rows) if any(row[place] == "1" for place in places))
    return np.array(list(volumes), dtype=np.intp)
