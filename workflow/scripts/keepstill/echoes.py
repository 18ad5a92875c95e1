"""One echo of a multi-echo run: resliced once, with the motion that its run was found to have."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill import __version__, write
from keepstill.apply import Wanted, Work, prepare_work, resliced_volumes
from keepstill.bids import Origin, sidecar_beside
from keepstill.collect import describe_dataset, writing
from keepstill.errors import InputError, counted
from keepstill.manifest import (
    Manifest,
    describe_outputs,
    read_manifest,
    remember_inputs,
    withdraw_manifest,
    write_manifest,
)
from keepstill.maps import Moments, MomentSums
from keepstill.nifti import made_header
from keepstill.read import StagedRun, open_staged, read_volume
from keepstill.realigned import output_name, output_uri
from keepstill.settings import RealignSettings
from keepstill.sidecars import carried_fields, input_uri, reslicing_fields
from keepstill.stage import remove_stage, stage_run

_OUTPUTS = ("bold", "tsnr_after")


@dataclass(frozen=True)
class Echo:
    """One echo of a multi-echo run.

    Attributes
    ----------
    source : Path
    name : str
        The echo's name as a run, ``echo`` included.
    leader : str
        Name of the multi-echo run.
    origin : Origin or None
        As `stage.stage_run` takes it.
    """

    source: Path
    name: str
    leader: str
    origin: Origin | None = None


def realign_echo(
    echo: Echo, stage_dir: Path, output_dir: Path, settings: RealignSettings, n_threads: int = 1
) -> str:
    """Stage an echo, reslice it as `reslice_echo` does, and free the stage.

    Returns
    -------
    line : str
        For people: what was done.
    """
    # No room is wanted for a result: volumes are written as they are resliced.
    staging = replace(
        settings,
        reference="first",
        shared_reference="",
        reslice=False,
        estimate=replace(settings.estimate, model_volumes=0),
    )
    stage_run(echo.source, echo.name, echo.origin, stage_dir, staging)
    n_volumes = reslice_echo(stage_dir, output_dir, echo.leader, settings, n_threads)
    remove_stage(stage_dir)
    volumes = counted(n_volumes, "volume")
    return f"{echo.name}: {volumes} resliced with the motion of {echo.leader}"


def reslice_echo(
    stage_dir: Path, output_dir: Path, leader: str, settings: RealignSettings, n_threads: int = 1
) -> int:
    """Reslice a staged echo with its leader's transforms onto its leader's reference, and write it.

    The transforms are read from their file, which holds them to the last bit, and the manifest
    comes last.

    Parameters
    ----------
    stage_dir : Path
        Of the echo.
    output_dir : Path
        Root of the derivatives, in which the leader is complete.
    leader : str
        Name of the multi-echo run.
    settings : RealignSettings
    n_threads : int
        The bytes do not depend on it.

    Returns
    -------
    n_volumes : int

    Raises
    ------
    InputError
        If the leader is not there, or the echo has not as many volumes.
    OutputError
        If the echo cannot be written.
    """
    run = open_staged(stage_dir)
    led_by = read_manifest(output_dir, leader)
    if led_by is None:
        raise InputError(
            f"{run.run}: the motion of {leader} is not in {output_dir}; realign that run first"
        )
    folder = output_dir / PurePosixPath(run.found["folder"])
    work = _prepared(run, folder, leader, settings)
    with writing(run.run, output_dir, _paths(work, folder)):
        if run.found["folder"]:
            describe_dataset(output_dir, run.found["bids_dir"])
        _write_all(work, output_dir, (leader, led_by["key"]), n_threads)
    return run.n_volumes


def _paths(work: Work, folder: Path) -> set[Path]:
    """An echo's outputs and their sidecars."""
    made = [folder / output_name(work.run.run, output, work.settings) for output in _OUTPUTS]
    return {path for one in made for path in (one, sidecar_beside(one))}


def _write_all(work: Work, output_dir: Path, leader: tuple[str, str], n_threads: int) -> None:
    """Write the echo, its sidecar and its manifest; `leader` is its leader's name and key."""
    name, key = leader
    folder = output_dir / PurePosixPath(work.run.found["folder"])
    bold, tsnr = (folder / output_name(work.run.run, output, work.settings) for output in _OUTPUTS)
    outdated = withdraw_manifest(output_dir, work.run.run, is_echo=True)
    written = _paths(work, folder)
    try:
        moments = _write(work, bold, _compared(work, folder, name), n_threads)
        write.put_json(sidecar_beside(bold), _sidecar(work, name, folder, output_dir))
        figures = {"tsnr_after": _write_tsnr(moments, work, tsnr, name)}
        _complete(work, output_dir, describe_outputs(output_dir, sorted(written)), (key, figures))
    except BaseException:
        outdated, written = outdated | written, set()  # a part would pass for the whole
        raise
    finally:
        for old in outdated - written:
            old.unlink(missing_ok=True)  # made by other settings, and no longer true


def _prepared(run: StagedRun, folder: Path, leader: str, settings: RealignSettings) -> Work:
    transforms = folder / output_name(leader, "transforms", settings)
    reference = folder / output_name(leader, "boldref", settings)
    try:
        return prepare_work(run, Wanted(transforms, reference, None, settings))
    except InputError as error:
        raise InputError(f"{run.run}: {str(error).removeprefix(f'{run.run}: ')}") from error


def _compared(work: Work, folder: Path, leader: str) -> NDArray[np.intp]:
    """Volumes that tell how steady the echo is: those that tell it of its leader."""
    of_leader = _of_leader(folder, leader, "tsnr_after", work.settings)
    every = np.arange(work.run.n_volumes)
    chosen = np.setdiff1d(every, of_leader["VolumesLeftOut"])
    return chosen if chosen.size else every


def _of_leader(folder: Path, leader: str, output: str, settings: RealignSettings) -> dict[str, Any]:
    """The JSON beside one of the leader's files."""
    path = sidecar_beside(folder / output_name(leader, output, settings))
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _write(work: Work, path: Path, compared: NDArray[np.intp], n_threads: int) -> Moments:
    """Write the echo; its moments over some volumes."""
    run, shape = work.run, (*work.grid.shape, work.run.n_volumes)
    header = made_header(run.layout.header, work.grid.affine, shape, work.settings.output_dtype)
    header["pixdim"][4] = run.found["tr_s"] or 0
    passes: list[MomentSums] = []

    def volumes() -> Iterator[NDArray[np.float32]]:
        passes.append(MomentSums(compared))
        for t, volume in enumerate(resliced_volumes(work, n_threads)):
            if t in compared:
                passes[-1].add(np.array([t]), volume[None])
            yield volume

    write.put_series(path, header, volumes, n_threads)
    return passes[-1].moments()


def _write_tsnr(moments: Moments, work: Work, path: Path, leader: str) -> float | None:
    """Write the echo's map of tSNR; its median in the masks of the leader."""
    run, settings, folder = work.run, work.settings, path.parent
    brain, covered = (
        read_volume(folder / output_name(leader, mask, settings), settings.affine_source)[0] > 0
        for mask in ("brain", "coverage")
    )
    header = made_header(run.layout.header, work.grid.affine, work.grid.shape, "float32")
    write.put_volume(path, header, moments.tsnr() * covered)
    sources = [(run.run, "bold"), (leader, "coverage")]
    uris = [output_uri(run, output_name(name, output, settings)) for name, output in sources]
    of_leader = _of_leader(folder, leader, "tsnr_after", settings)
    write.put_json(sidecar_beside(path), of_leader | {"Sources": uris})
    within = moments.within(brain & covered)
    return float(f"{within[0]:.9g}") if within else None


def _sidecar(work: Work, leader: str, folder: Path, output_dir: Path) -> dict[str, Any]:
    run, settings = work.run, work.settings
    found, transforms = run.found, output_name(leader, "transforms", settings)
    raw = input_uri(Path(found["source"]), found["bids_dir"], output_dir)
    of_leader = _of_leader(folder, leader, "transforms", settings)
    return (
        carried_fields(run)
        | reslicing_fields(settings)
        | {name: of_leader[name] for name in ("Engine", "KeepstillSettings", "Reference")}
        | {
            "Description": "One echo with every volume in the pose and on the grid of the run's "
            "reference, interpolated once by a B-spline",
            "KeepstillVersion": __version__,
            "Sources": [raw, output_uri(run, transforms)],
            "SpatialReference": output_uri(run, output_name(leader, "boldref", settings)),
        }
    )


def _complete(
    work: Work,
    output_dir: Path,
    outputs: Mapping[str, Mapping[str, Any]],
    known: tuple[str, Mapping[str, Any]],
) -> None:
    """Write the manifest; `known` are the leader's key and the echo's figures."""
    found, (leader_key, figures) = work.run.found, known
    manifest = Manifest(
        run=work.run.run,
        input_sha256=found["input"]["sha256"],
        input_bytes=found["input"]["bytes"],
        metadata=found["metadata"],
        settings=work.settings,
        outputs=outputs,
        summary={"n_volumes": work.run.n_volumes, **figures},
        warnings=tuple(found["warnings"]),
        leader_key=leader_key,
    )
    if found["folder"]:
        remember_inputs(output_dir, work.run.run, found["input"])
    write_manifest(output_dir, manifest)
