"""Compiling every kernel once for a kind of processor, before ranks would do so side by side."""

from dataclasses import replace

import numpy as np

from keepstill import geometry
from keepstill.activity import Activity
from keepstill.estimate import estimate_motion
from keepstill.figures import series_figures
from keepstill.kernels.cache import WARM, cache_dir, held
from keepstill.last_step import residuals_of, take_last_step
from keepstill.maps import temporal_moments
from keepstill.masks import brain_mask
from keepstill.moving import Coefficients, Moving, prepare_moving
from keepstill.reference import Acquisition, Reference, prepare_reference
from keepstill.reslice import coverage, extend_volume, reslice_volume
from keepstill.run_model import RunModel, fit_run_model, fitted_to
from keepstill.scanner_effects import ScannerEffects
from keepstill.settings import EstimateSettings
from keepstill.team import Team
from keepstill.write import as_int16


def ensure_warm() -> bool:
    """Compile all kernels for this kind of processor, unless that was done before.

    Of several processes one does it, and the others wait.

    Returns
    -------
    has_compiled : bool
    """
    folder = cache_dir()
    if folder is None or (folder / WARM).exists():
        return False
    with held(folder):
        if (folder / WARM).exists():
            return False
        warm_kernels()
        (folder / WARM).touch()
    return True


def warm_kernels() -> None:
    """Estimate, reslice, mask and map one small blurred ball."""
    from keepstill.phantom.ball import soft_ball  # here: once compiled, no rank needs the phantom

    volume = soft_ball((20, 18, 12)).T.copy()
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    settings = EstimateSettings()
    reference = prepare_reference(volume, affine, settings, Acquisition(ghost_axis=1))
    lost = np.array([5], np.int64)
    moving = prepare_moving(volume, settings.degree, Coefficients(volume.shape), lost)
    estimate = estimate_motion(moving, affine, reference, settings)
    model = _model(moving, reference)
    estimate = take_last_step(moving, affine, reference, estimate, model)
    out = np.empty_like(volume)
    for turn_rad in (0.0, 0.02, 0.6):  # unmoved, by passes, and turned too far for these
        turned = geometry.rigid_step(np.array([0, 0, 0, turn_rad, 0, 0]))
        reslice_volume(out, moving, affine, turned, affine)
    extend_volume(out, moving, affine, geometry.translation(np.array([9.0, 0, 0])), affine)
    brain = brain_mask(volume)
    grid = affine, (volume.shape[2], volume.shape[1], volume.shape[0])
    coverage(estimate.moving_from_reference[None], grid, affine, out.shape)
    as_int16(out, 1.0, 0.0)
    temporal_moments(lambda t, z: np.stack([out, out])[t, z], np.arange(2), out.shape)
    series_figures(np.stack([volume, out, volume + out]), np.arange(3), brain)


def _model(moving: Moving, reference: Reference) -> RunModel:
    """A model of one volume's residuals."""
    residuals, spans = residuals_of(moving, np.eye(4), reference.last, 1.0)
    some = np.linspace(0.0, 1.0, residuals.size, dtype=np.float32)
    fitted = fitted_to(reference, residuals[None] + some, [0], [spans], [np.eye(4)])
    team = Team(range(len(reference.blocks) - 1), 1, lambda value: [value])
    model = fit_run_model(reference, fitted, team)
    effects = ScannerEffects(np.full((4, 4), 1e-9), 1e-9)
    return replace(model, effects=effects, activity=Activity(some, some))
