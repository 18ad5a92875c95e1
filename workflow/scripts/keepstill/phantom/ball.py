"""Balls: small things to move where a whole head would take too long."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keepstill.blobs import density

_N_BLOBS, _SEED = 160, 1
# Half the field is this many radii of the ball, so that there is air around it.
_FIELD_RADII = 1.6


def ball(shape: tuple[int, int, int], shift: ArrayLike = 0.0) -> NDArray[np.float32]:
    """A ball with structure, (nx, ny, nz), about 1000 inside and nothing around.

    Parameters
    ----------
    shape : (nx, ny, nz)
        The ball's radius is 5/16 of each side.
    shift : one number or (3,)
        Along x, y, z, in radii.
    """
    rng = np.random.default_rng(_SEED)
    centres = rng.normal(size=(_N_BLOBS, 3))
    radius = rng.random(_N_BLOBS) ** (1 / 3) * 0.85
    centres *= (radius / np.linalg.norm(centres, axis=1))[:, None]
    brights = rng.uniform(50, 300, _N_BLOBS)
    size = np.array(shape)
    spacing = 2 * _FIELD_RADII / np.maximum(size - 1, 1)
    return density(
        shape,
        centres + np.asarray(shift, np.float64),
        0.28,
        brights,
        spacing=spacing,
        origin=-spacing * (size - 1) / 2,
    )


def soft_ball(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """A ball with a soft edge and nothing inside, (nx, ny, nz), 1000 in its middle.

    Its radius is a third of each side. No kernel draws it, so that none is compiled for it.
    """
    x, y, z = np.meshgrid(*(np.linspace(-1.5, 1.5, n) for n in shape), indexing="ij", sparse=True)
    return (1000 / (1 + np.exp(8 * (x**2 + y**2 + z**2 - 1)))).astype(np.float32)
