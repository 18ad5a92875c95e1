"""Compiling every kernel once, into numba's cache, before ranks could race for it."""

import numpy as np

from keepstill.estimate import estimate_motion
from keepstill.maps import temporal_moments
from keepstill.masks import brain_mask
from keepstill.moving import Coefficients, prepare_moving
from keepstill.reference import prepare_reference
from keepstill.reslice import coverage, reslice_volume
from keepstill.settings import EstimateSettings


def warm_kernels() -> None:
    """Estimate, reslice, mask and map one small blurred ball."""
    # Not the phantom's ball: no rank needs the kernels that draw it.
    z, y, x = np.meshgrid(*(np.linspace(-1.5, 1.5, n) for n in (12, 18, 20)), indexing="ij")
    volume = (1000 / (1 + np.exp(8 * (x**2 + y**2 + z**2 - 1)))).astype(np.float32)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    settings = EstimateSettings()
    reference = prepare_reference(volume, affine, settings)
    moving = prepare_moving(volume, settings.degree, Coefficients(volume.shape))
    estimate = estimate_motion(moving, affine, reference, settings)
    out = np.empty_like(volume)
    reslice_volume(out, moving, affine, estimate.moving_from_reference, affine)
    brain_mask(volume)
    grid = affine, (volume.shape[2], volume.shape[1], volume.shape[0])
    coverage(estimate.moving_from_reference[None], grid, affine, out.shape)
    temporal_moments(lambda t: out, np.arange(2))
