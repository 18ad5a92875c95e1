"""Reading a staged run, volume by volume, without ever holding the series."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepstill.errors import InputError
from keepstill.nifti import HEADER_BYTES, Layout, layout_of, parse_image_layout
from keepstill.stage import (
    REALIGNED_VOXELS,
    STAGED,
    STAGED_VOXELS,
    Chunks,
    map_volumes,
    refuse_impossible_size,
)


@dataclass(frozen=True)
class StagedRun:
    """A run in its stage directory.

    Attributes
    ----------
    run : str
    layout : Layout
    voxels : (n, nz, ny, nx) memory map
        As stored, without slope and intercept.
    realigned_path : Path
        Raw float32 of the result, a volume after the other.
    found : dict
        What ``staged.json`` says: source, metadata, tr_s, warnings.
    """

    run: str
    layout: Layout
    voxels: NDArray[Any]
    realigned_path: Path
    found: dict[str, Any]

    @property
    def n_volumes(self) -> int:
        """Number of volumes."""
        return int(self.voxels.shape[0])

    @property
    def n_dummy(self) -> int:
        """Number of first volumes before the signal was steady."""
        return int(self.found["n_dummy"])

    @property
    def ghost_axis(self) -> int:
        """Voxel axis along which an echo-planar image has its ghost: that of phase encoding.

        By the sidecar; y, as nearly everywhere, where it does not say.
        """
        direction = str(self.found["metadata"].get("PhaseEncodingDirection", "j"))
        return {"i": 0, "j": 1, "k": 2}.get(direction[:1], 1)

    def volume(self, t: int) -> NDArray[np.float32]:
        """Volume t, (nz, ny, nx) float32, in the units that slope and intercept give.

        What is no number there, or too large for a float32, is none here.
        """
        return self._scaled(self.voxels[t])

    def slab(self, volumes: NDArray[np.intp], slices: slice) -> NDArray[np.float32]:
        """Some slices of some volumes, (m, n_slices, ny, nx) float32, as `volume` gives them."""
        return self._scaled(self.voxels[volumes, slices])

    def _scaled(self, voxels: NDArray[Any]) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):
            stored = voxels.astype(np.float32)
            if self.layout.slope != 1.0:
                stored *= np.float32(self.layout.slope)
            if self.layout.inter != 0.0:
                stored += np.float32(self.layout.inter)
        return stored


def open_staged(stage_dir: Path) -> StagedRun:
    """The run in a stage directory; its voxels are mapped, not read."""
    return _opened(json.loads((stage_dir / STAGED).read_text()))


def open_arriving(known: dict[str, Any], n_dummy: int) -> StagedRun:
    """A run of which not all voxels are there; those that are not are 0.

    Parameters
    ----------
    known : dict
        What `arrivals.Arrivals.known` says.
    n_dummy : int
        Dummy volumes that are taken for granted.
    """
    return _opened(known | {"n_dummy": n_dummy})


def _opened(found: dict[str, Any]) -> StagedRun:
    voxels_dir = Path(found["voxels_dir"])
    path = voxels_dir / STAGED_VOXELS
    with path.open("rb") as file:
        layout = layout_of(file.read(HEADER_BYTES), found["layout"])
    voxels = map_volumes(path, layout)
    return StagedRun(found["run"], layout, voxels, voxels_dir / REALIGNED_VOXELS, found)


def read_volume(
    path: Path, affine_source: str = "auto"
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A 3-D NIfTI file whole.

    Parameters
    ----------
    path : Path
    affine_source : str
        Which affine is true, as in the settings, where the file has both.

    Returns
    -------
    volume : (nz, ny, nx) float32
        In the units that slope and intercept give.
    affine : (4, 4) float64
        World mm from voxel.

    Raises
    ------
    InputError
        If it is not one volume.
    """
    name = path.name
    try:
        chunks = Chunks(path, name)
        layout = parse_image_layout(chunks.peek(HEADER_BYTES), name, affine_source)
        refuse_impossible_size(layout, path.stat().st_size, name)
        if any(n != 1 for n in layout.shape[3:]) or len(layout.shape) < 3:
            raise InputError(f"{name}: axes {layout.shape} found; a reference needs one volume")
        content = b"".join(chunks)
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); check the path") from error
    if len(content) != layout.n_bytes:
        raise InputError(f"{name}: {len(content)} bytes found, {layout.n_bytes} promised")
    stored = np.frombuffer(content, layout.dtype, offset=layout.offset).reshape(layout.shape[2::-1])
    with np.errstate(over="ignore", invalid="ignore"):
        volume = stored.astype(np.float32) * np.float32(layout.slope) + np.float32(layout.inter)
    return volume, layout.affine
