"""Staging the mean of a run's echoes, on which motion can be estimated instead of on one."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill.bids import Origin
from keepstill.errors import InputError, StageError
from keepstill.nifti import HEADER_BYTES, made_header, parse_layout
from keepstill.read import StagedRun, open_staged
from keepstill.settings import RealignSettings
from keepstill.stage import STAGED, STAGED_VOXELS, put_staged, remove_stage, stage_run

_MEAN, _ECHO = "mean.nii", "echo"


def stage_mean(
    echoes: Mapping[str, Path], run: str, origin: Origin, stage_dir: Path, settings: RealignSettings
) -> None:
    """Stage the mean of some echoes, float32, as if it were a run in a file of its own.

    Parameters
    ----------
    echoes : mapping
        Name of each echo -> its file, in the order in which they are summed; the metadata are those
        of the first.
    run : str
        Name of the multi-echo run.
    origin : Origin
    stage_dir : Path
    settings : RealignSettings

    Raises
    ------
    InputError
        If one of them is no run, or their grids or numbers of volumes differ.
    StageError
        If there is no room.
    """
    (first, source), *rest = echoes.items()
    stage_run(source, run, origin, stage_dir, settings)
    staged = open_staged(stage_dir)
    mean, inputs = _make_mean(staged), {first: staged.found["input"]}
    for name, path in rest:
        with _staged_echo((name, path), origin, stage_dir / _ECHO, settings) as echo:
            _refuse_other_grid(staged, echo)
            for t in range(staged.n_volumes):
                mean[t] += echo.volume(t)
            inputs[name] = echo.found["input"]
    for t in range(staged.n_volumes):
        mean[t] /= np.float32(len(echoes))
    voxels_dir = Path(staged.found["voxels_dir"])
    os.replace(voxels_dir / _MEAN, voxels_dir / STAGED_VOXELS)
    sources = [os.path.abspath(path) for path in echoes.values()]
    with (voxels_dir / STAGED_VOXELS).open("rb") as file:
        layout = parse_layout(file.read(HEADER_BYTES), run, settings.affine_source)
    found = staged.found | {"input": _joint(inputs), "sources": sources, "layout": layout.facts()}
    put_staged(stage_dir / STAGED, json.dumps(found).encode(), run)


@contextlib.contextmanager
def _staged_echo(
    named: tuple[str, Path], origin: Origin, stage_dir: Path, settings: RealignSettings
) -> Iterator[StagedRun]:
    """One more echo, staged meanwhile, without room for results."""
    plain = replace(settings, reference="first", shared_reference="", reslice=False)
    plain = replace(plain, estimate=replace(settings.estimate, model_volumes=0))
    try:
        stage_run(named[1], named[0], origin, stage_dir, plain)
        yield open_staged(stage_dir)
    finally:
        remove_stage(stage_dir)


def _joint(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What staging says of an input that is several files."""
    return {
        "sha256": joint_sha256([entry["sha256"] for entry in inputs.values()]),
        "bytes": sum(entry["bytes"] for entry in inputs.values()),
        "parts": dict(inputs),
    }


def joint_sha256(hashes: Sequence[str]) -> str:
    """Hash of several inputs, from those of each in their order."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _make_mean(staged: StagedRun) -> NDArray[np.float32]:
    """A file like the staged one, float32 without scaling, mapped; it holds the first echo."""
    header = made_header(staged.layout.header, staged.layout.affine, staged.layout.shape, "float32")
    header["scl_slope"], header["scl_inter"] = 1, 0
    offset = int(header["vox_offset"])
    path = Path(staged.found["voxels_dir"]) / _MEAN
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(handle, 0, offset + 4 * staged.voxels.size)
            os.pwrite(handle, header.binaryblock, 0)
        finally:
            os.close(handle)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StageError(
            f"{staged.run}: {4e-6 * staged.voxels.size:.3g} MB needed in {path.parent} for the "
            f"mean of its echoes ({error.strerror}); free some room, or estimate on one echo"
        ) from error
    mean = np.memmap(path, np.float32, "r+", offset, staged.voxels.shape)
    for t, volume in enumerate(_volumes(staged)):
        mean[t] = volume
    return mean


def _volumes(staged: StagedRun) -> Iterator[NDArray[np.float32]]:
    return (staged.volume(t) for t in range(staged.n_volumes))


def _refuse_other_grid(first: StagedRun, echo: StagedRun) -> None:
    one, other = first.layout, echo.layout
    if one.shape != other.shape or not np.allclose(one.affine, other.affine, atol=1e-3):
        raise InputError(
            f"{first.run}: {echo.run} has axes {other.shape}, another echo {one.shape}, or they "
            "lie elsewhere; a mean of echoes needs one grid; estimate on one echo instead"
        )
