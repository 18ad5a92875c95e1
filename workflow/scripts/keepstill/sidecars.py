"""What stands beside the files: a JSON for each, and the description of the data set."""

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from keepstill import __version__
from keepstill.bids import bids_uri, relative_reference
from keepstill.confounds import describe_columns
from keepstill.manifest import portable_settings
from keepstill.read import StagedRun
from keepstill.realigned import Realigned, is_shared_reference, shared_reference_uri
from keepstill.settings import RealignSettings

CODE_URL = "https://github.com/keepstill/keepstill"
BIDSIGNORE = (
    "*.html",
    "pages",
    "logs",
    "figures",
    "manifests",
    "*_xfm.*",
    "*_boldref.*",
    "*_timeseries.*",
    "*_boldmap.*",
    "summary.*",
)
README = """\
BOLD runs, realigned by keepstill. Beside each run:

- `*_bold.nii.gz`: every volume in the pose of the reference, interpolated once
- `*_desc-hmc_boldref.nii.gz`: the reference
- `*_desc-brain_mask.nii.gz`, `*_desc-coverage_mask.nii.gz`: the brain; where all volumes have data
- `*_stat-tsnr_desc-raw_boldmap.nii.gz`, `*_stat-tsnr_desc-hmc_boldmap.nii.gz`: temporal
  signal-to-noise ratio before and after
- `*_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt`: a rigid transform a volume
- `*_desc-confounds_timeseries.tsv`: motion and what follows from it, a row a volume

The JSON beside a file says how it was made. `index.html` shows all runs; `manifests` holds the
hash of every file; times, hosts and paths are in `logs` alone.
"""
# Fields of the raw sidecar that are not true of a realigned run, or are ours to say.
_NOT_CARRIED_OVER = ("Description", "Sources", "RawSources", "SkullStripped", "SpatialReference")
_TEXTS = {
    "bold": "The run with every volume in the pose and on the grid of the reference, interpolated "
    "once by a B-spline",
    "boldref": "The volume that the run was realigned to",
    "brain": "Brain, found in the reference by brightness and shape",
    "coverage": "Voxels that lie in the field of view of every volume that could be realigned",
    "tsnr_before": "Temporal signal-to-noise ratio of the run as it came",
    "tsnr_after": "Temporal signal-to-noise ratio of the realigned run, in the coverage mask",
    "transforms": "Rigid motion of every volume",
    "confounds": "Motion and what follows from it, a row a volume",
}
# What a voxel holds whose source lies outside the field of view.
_OUTSIDE = {"zero": 0, "nan": "NaN", "nearest": "value at the nearest point of the field"}
_TSNR_TEXT = (
    ": mean over standard deviation about a straight line over time, without failed volumes and "
    "those before the steady state"
)
_SOURCES = {
    "bold": ("raw", "transforms"),
    "boldref": ("raw",),
    "brain": ("boldref",),
    "coverage": ("transforms",),
    "tsnr_before": ("raw",),
    "tsnr_after": ("bold", "coverage"),
    "transforms": ("raw", "boldref"),
    "confounds": ("transforms", "boldref", "bold", "brain", "coverage"),
}


def dataset_description(output_dir: Path, bids_dir: str | None) -> dict[str, Any]:
    """Content of the derivative data set's description; links are relative to `output_dir`."""
    description: dict[str, Any] = {
        "Name": "keepstill: realigned BOLD runs",
        "BIDSVersion": "1.11.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "keepstill", "Version": __version__, "CodeURL": CODE_URL}],
    }
    if bids_dir:
        raw = relative_reference(Path(bids_dir), output_dir)
        description["DatasetLinks"] = {"raw": raw}
        description["SourceDatasets"] = [{"URL": raw}]
    return description


def sidecar(
    result: Realigned, output: str, output_dir: Path, columns: Iterable[str] = ()
) -> dict[str, Any]:
    """Content of the JSON beside an output.

    Parameters
    ----------
    result : Realigned
    output : str
        One of `OUTPUTS`.
    output_dir : Path
        Root of the derivatives, from which sources in no data set are named.
    columns : iterable of str
        Of the table, for ``confounds``.
    """
    fields = _FIELDS[output](result) if output in _FIELDS else describe_columns(result, columns)
    return _provenance(result, output, output_dir) | fields


def _provenance(result: Realigned, output: str, output_dir: Path) -> dict[str, Any]:
    """What made the file: sources, and every setting that entered the run's key."""
    text = _TEXTS[output] + (_TSNR_TEXT if output.startswith("tsnr") else "")
    return {
        "Description": text,
        "Sources": _sources(result, output, output_dir),
        "KeepstillVersion": __version__,
        "Engine": result.engine,
        "KeepstillSettings": named_settings(result.settings),
        "Reference": _reference(result),
    }


def _sources(result: Realigned, output: str, output_dir: Path) -> list[str]:
    found, settings = result.run.found, result.settings
    if output == "boldref" and settings.image:
        if is_shared_reference(settings.image):
            return [shared_reference_uri(settings.image)]
        return [input_uri(settings.image, found["bids_dir"], output_dir)]
    inputs = found.get("sources", [found["source"]])  # several, if a mean of echoes
    raw = [input_uri(Path(path), found["bids_dir"], output_dir) for path in inputs]
    sources = list(_SOURCES[output])
    if not result.writes_series and "bold" in sources:  # of a multi-echo run: made, but not kept
        sources[sources.index("bold")] = "raw" if result.series is not None else ""
    made = [[result.uri(source)] if source != "raw" else raw for source in sources if source]
    return [uri for uris in made for uri in uris]


def named_settings(settings: RealignSettings) -> dict[str, Any]:
    """Settings as sidecars show them: files by their names alone."""
    names = ("reference", "shared_reference")
    return asdict(settings) | {name: Path(getattr(settings, name)).name for name in names}


def input_uri(path: Path, bids_dir: str | None, output_dir: Path) -> str:
    """BIDS URI of an input in the raw data set; of any other, how to get there."""
    path = Path(os.path.abspath(path))
    if bids_dir and path.is_relative_to(bids_dir):
        return bids_uri(path, Path(bids_dir))
    return relative_reference(path, output_dir)


def _reference(result: Realigned) -> str:
    """Which image the run was realigned to."""
    settings = result.settings
    if settings.image:
        values = portable_settings(settings)
        return f"{settings.image.name} ({values['shared_reference'] or values['reference']})"
    volumes = np.flatnonzero(result.per_volume["status"] == "reference")
    if volumes.size:
        return f"volume {volumes[0]}"
    return f"{settings.reference} of the realigned volumes"


def _in_space(result: Realigned) -> dict[str, Any]:
    return {"SpatialReference": result.uri("boldref")}


def _bold_fields(result: Realigned) -> dict[str, Any]:
    """Fields of the raw run that stay true, and ours."""
    return carried_fields(result.run) | _in_space(result) | reslicing_fields(result.settings)


def carried_fields(run: StagedRun) -> dict[str, Any]:
    """Fields of a raw run's sidecar that stay true of the run resliced, and those BIDS wants."""
    metadata = run.found["metadata"]
    carried = {name: value for name, value in metadata.items() if name not in _NOT_CARRIED_OVER}
    tasks = [part[5:] for part in run.run.split("_") if part.startswith("task-")]
    if tasks:
        carried.setdefault("TaskName", tasks[0])
    ours: dict[str, Any] = {"SkullStripped": False}
    if run.found["tr_s"] is not None:
        ours["RepetitionTime"] = run.found["tr_s"]
    if run.n_dummy:
        ours["NumberOfVolumesNotSteady"] = run.n_dummy
    return carried | ours


def reslicing_fields(settings: RealignSettings) -> dict[str, Any]:
    """What a resliced run holds where there are no data, and below 0."""
    return {
        "OutsideFieldOfView": _OUTSIDE[settings.outside],
        "OutsideCommonField": _OUTSIDE[settings.outside] if settings.common_field else "kept",
        "NegativeValues": "set to 0" if settings.non_negative else "kept",
    }


def _map_fields(result: Realigned) -> dict[str, Any]:
    left_out = np.flatnonzero(result.failed | result.non_steady)
    return {"SkullStripped": False, "Units": "1", "VolumesLeftOut": left_out.tolist()}


def _transforms_fields(result: Realigned) -> dict[str, Any]:
    return {
        "Format": "ITK text, one affine transform a volume, in the order of the volumes",
        "Direction": "a point of the reference -> the point of the volume (pull)",
        "CoordinateSystem": "LPS+ (ITK)",
        "TranslationUnits": "mm",
        "RotationCentre": "world origin",
        "FailedVolumes": np.flatnonzero(result.failed).tolist(),
    } | _check_fields(result)


def _check_fields(result: Realigned) -> dict[str, Any]:
    """What ITK said of some volumes, where it was asked."""
    if result.check is None:
        return {}
    check = result.check
    return {
        "Check": {
            "Engine": f"ITK {result.itk_version}",
            "Description": "Mean distance over the brain between where both engines see a voxel",
            "Units": "mm",
            "Volumes": check["volumes"],
            "Differences": check["difference_mm"],
            "Median": check["median_mm"],
            "Worst": check["worst_mm"],
            "WarningAbove": check["warn_mm"],
            "FailedVolumes": check["failed_volumes"],
            "VolumesOfItAlone": check["itk_only_volumes"],
        }
    }


_FIELDS: dict[str, Callable[[Realigned], dict[str, Any]]] = {
    "bold": _bold_fields,
    "boldref": lambda result: {"SkullStripped": False},
    "brain": lambda result: _in_space(result) | {"Type": "Brain"},
    "coverage": lambda result: _in_space(result) | {"Type": "ROI"},
    "tsnr_before": lambda result: _map_fields(result) | {"SpatialReference": "orig"},
    "tsnr_after": lambda result: _map_fields(result) | _in_space(result),
    "transforms": _transforms_fields,
}
