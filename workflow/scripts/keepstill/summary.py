"""One table of all complete runs of a derivative data set, from their manifests alone."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keepstill import write
from keepstill.errors import InputError, OutputError, counted
from keepstill.manifest import MANIFESTS, whole_manifest

TABLE = "summary.tsv"
_log = logging.getLogger(__name__)

_NAMES = {"subject": "sub", "session": "ses", "task": "task", "run": "run", "echo": "echo"}
_OF_BRAIN = "in the voxels that both the brain mask and the coverage mask hold"
_FD = "framewise displacement (Power 2012), failed volumes and those after them left out"
_APART = "Distance over the brain between the motion and that which ITK finds in every 20th volume"
# Columns by name: what a JSON sidecar says of them. Those of a run's figures are the manifest's.
FIGURES: dict[str, dict[str, str]] = {
    "n_volumes": {"Description": "Number of volumes", "Units": "1"},
    "tr_s": {"Description": "Repetition time", "Units": "s"},
    "mean_fd_mm": {"Description": f"Mean {_FD}", "Units": "mm"},
    "max_fd_mm": {"Description": f"Largest {_FD}", "Units": "mm"},
    "mean_fd_filtered_mm": {
        "Description": "Mean framewise displacement without breathing, where that was asked for",
        "Units": "mm",
    },
    "n_outliers": {
        "Description": "Volumes to leave out because of motion (motion_outlier columns), failed "
        "ones not counted",
        "Units": "1",
    },
    "n_failed": {"Description": "Volumes that could not be realigned", "Units": "1"},
    "n_non_steady": {"Description": "First volumes before the steady state", "Units": "1"},
    "mean_std_dvars": {"Description": f"Mean standardised DVARS, {_OF_BRAIN}", "Units": "1"},
    "brain_coverage": {
        "Description": "Part of the brain that lies in the field of view of all volumes, 0 to 1",
        "Units": "1",
    },
    "tsnr_before": {
        "Description": f"Median temporal signal-to-noise ratio of the run as it came, {_OF_BRAIN}",
        "Units": "1",
    },
    "tsnr_after": {
        "Description": f"Median temporal signal-to-noise ratio once realigned, {_OF_BRAIN}",
        "Units": "1",
    },
    "median_expected_error_mm": {
        "Description": "Error bar: median over the realigned volumes of what their motion's error "
        "stays below with a probability of 68% (rms displacement over the head)",
        "Units": "mm",
    },
}
DESCRIPTIONS = {
    "name": {"Description": "Name of the run, as its outputs begin"},
    **{name: {"Description": f"Label of {entity}-"} for name, entity in _NAMES.items()},
    **FIGURES,
    "check_median_mm": {
        "Description": f"{_APART}, median, where the run was checked",
        "Units": "mm",
    },
    "check_worst_mm": {"Description": f"{_APART}, worst volume", "Units": "mm"},
    "failed_volumes": {"Description": "Numbers of the volumes that failed, from 0, with commas"},
}

Columns = dict[str, list[Any]]


def summarise(derivatives: Path) -> Columns:
    """Columns of the table, a row a complete run, in the order of their names.

    A run is complete if its manifest is whole and the files that it names have their sizes; how
    many are not is told. Labels and figures that a run does not have are None.

    Raises
    ------
    InputError
        If there is no complete run.
    """
    names = sorted(path.stem for path in (derivatives / MANIFESTS).glob("*.json"))
    rows = [_row(manifest) for name in names if (manifest := whole_manifest(derivatives, name))]
    if not rows:
        found = f"{counted(len(names), 'manifest')} found, none of a complete run"
        raise InputError(f"{derivatives}: {found}; needs an output_dir of keepstill")
    if len(rows) < len(names):
        left_out = counted(len(names) - len(rows), "run")
        _log.warning("%s: %s left out, whose files are not all there", derivatives, left_out)
    return {name: [row.get(name) for row in rows] for name in DESCRIPTIONS}


def write_summary(table: Columns, path: Path) -> None:
    """Write a table and the JSON that says what its columns are.

    Raises
    ------
    OutputError
        If they cannot be written.
    """
    try:
        write.put_table(path, table)
        write.put_json(path.with_suffix(".json"), DESCRIPTIONS)
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({error.strerror or error}); choose another --out"
        ) from error


def _row(manifest: dict[str, Any]) -> dict[str, Any]:
    """A run's cells; a figure that another version has not written is missing."""
    summary, parts = manifest.get("summary", {}), manifest["run"].split("_")
    entities = dict(part.split("-", 1) for part in parts if "-" in part)
    row = {"name": manifest["run"]}
    row |= {name: entities.get(entity) for name, entity in _NAMES.items()}
    row |= {name: summary.get(name) for name in FIGURES}
    check = summary.get("check") or {}
    row |= {f"check_{name}": check.get(name) for name in ("median_mm", "worst_mm")}
    row["failed_volumes"] = _listed(summary.get("failed_volumes", ())) or None
    return row


def _listed(volumes: Iterable[int]) -> str:
    return ",".join(map(str, volumes))
