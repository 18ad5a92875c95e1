"""The reference that all runs of a session or subject end in, made of the first of them."""

from pathlib import Path
from typing import Any

from keepstill import __version__, write
from keepstill.bids import sidecar_beside
from keepstill.collect import as_output_error, describe_dataset
from keepstill.manifest import (
    Manifest,
    describe_outputs,
    remember_inputs,
    shared_entry,
    withdraw_manifest,
    write_manifest,
)
from keepstill.nifti import made_header
from keepstill.ranks import Alone, own_target
from keepstill.read import StagedRun, open_staged
from keepstill.realign import Crew, Target
from keepstill.realigned import shared_reference_path
from keepstill.settings import RealignSettings
from keepstill.sidecars import input_uri, named_settings


def make_shared_reference(
    stage_dir: Path, scope: str, output_dir: Path, settings: RealignSettings, crew: Crew
) -> str:
    """Write the reference of a staged run as that of a scope, and its manifest last.

    It has the voxels that the run would have as its own reference. Ranks are not needed: their
    number changes no byte.

    Parameters
    ----------
    stage_dir : Path
        Of the first run of the scope, staged with these settings.
    scope : str
        ``sub-01`` or ``sub-01_ses-1``.
    output_dir : Path
        Root of the derivatives.
    settings : RealignSettings
        Those of `RealignSettings.for_sharing`.
    crew : Crew

    Returns
    -------
    line : str
        For people: what was done.

    Raises
    ------
    InputError
        If the run has no usable reference.
    OutputError
        If it cannot be written.
    """
    run = open_staged(stage_dir)
    target = own_target(run, settings, Alone(), crew)
    path = output_dir / shared_reference_path(scope)
    with as_output_error(scope, output_dir):
        describe_dataset(output_dir, run.found["bids_dir"])
        outdated = withdraw_manifest(output_dir, shared_entry(scope))
        for old in outdated - {path, sidecar_beside(path)}:
            old.unlink(missing_ok=True)
        reference = target.reference
        shape = reference.volume.shape[::-1]
        header = made_header(run.layout.header, reference.affine, shape, "float32")
        write.put_volume(path, header, reference.volume)
        write.put_json(sidecar_beside(path), _sidecar(run, target, settings, output_dir))
        _complete(run, scope, output_dir, settings)
    return f"{scope}: reference made, {_origin(run, target, settings)}"


def _origin(run: StagedRun, target: Target, settings: RealignSettings) -> str:
    """What of which run it is."""
    if target.volume is not None:
        return f"volume {target.volume} of {run.run}"
    return f"the {settings.reference} of the realigned volumes of {run.run}"


def _sidecar(
    run: StagedRun, target: Target, settings: RealignSettings, output_dir: Path
) -> dict[str, Any]:
    found = run.found
    sources = found.get("sources", [found["source"]])  # several, if a mean of echoes
    return {
        "Description": "The reference in whose space all runs of its session or subject end",
        "Sources": [input_uri(Path(path), found["bids_dir"], output_dir) for path in sources],
        "KeepstillVersion": __version__,
        "KeepstillSettings": named_settings(settings),
        "Reference": _origin(run, target, settings),
        "SkullStripped": False,
    }


def _complete(run: StagedRun, scope: str, output_dir: Path, settings: RealignSettings) -> None:
    found, path = run.found, output_dir / shared_reference_path(scope)
    manifest = Manifest(
        run=shared_entry(scope),
        input_sha256=found["input"]["sha256"],
        input_bytes=found["input"]["bytes"],
        metadata=found["metadata"],
        settings=settings,
        outputs=describe_outputs(output_dir, [path, sidecar_beside(path)]),
        summary={"first_run": run.run},
        warnings=tuple(found["warnings"]),
    )
    remember_inputs(output_dir, run.run, found["input"])
    write_manifest(output_dir, manifest)
