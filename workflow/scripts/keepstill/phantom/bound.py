"""The least error that any unbiased estimator of the motion can have (Cramér 1946, Rao 1945)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.phantom.run import Run, shading
from keepstill.phantom.scanner import exposed

# Steps of the central differences: small against a voxel, large against float32's last digit.
_STEP_MM, _STEP_RAD = 0.05, 0.0008
_N_DIRECTIONS = 200


@dataclass(frozen=True)
class Bound:
    """Cramér-Rao bound of a run's volumes.

    Attributes
    ----------
    covariance : (6, 6) float64
        Of shifts (mm) and rotations (rad) about `centre_mm`, for a known template.
    centre_mm : (3,) float64
    template_known_mm : float
        Mean displacement error over the brain, by a Gaussian error of that covariance.
    noisy_reference_mm : float
        The same where the reference is a volume of the run, with noise of its own.
    """

    covariance: NDArray[np.float64]
    centre_mm: NDArray[np.float64]
    template_known_mm: float
    noisy_reference_mm: float


def cramer_rao(run: Run) -> Bound:
    """Bound of a run, from the derivatives of its noise-free reference.

    The derivatives are those of the fine head: the head is moved a little either way and sampled
    anew, so that no voxel is interpolated. The volume's intensity scale is unknown and is fitted
    along. The noise counts as Gaussian, which Rician noise nearly is wherever there is tissue.

    Notes
    -----
    With J the derivatives of all voxels by the seven unknowns, the covariance is the motion's part
    of noise_sd^2 (J'J)^-1. Two volumes of equal noise have twice that.
    """
    centre = run.brain_mm.mean(axis=0)
    columns = [(_moved(run, centre, a, 1) - _moved(run, centre, a, -1)).ravel() for a in range(6)]
    steps = np.array([_STEP_MM] * 3 + [_STEP_RAD] * 3)
    jacobian = np.stack([*columns, _moved(run, centre, 0, 0).ravel()]).astype(np.float64)
    jacobian[:6] /= 2 * steps[:, None]
    normal = jacobian @ jacobian.T
    covariance = np.array(run.noise_sd**2 * np.linalg.inv(normal)[:6, :6], np.float64)
    known = mean_displacement_mm(covariance, run.brain_mm - centre)
    return Bound(covariance, centre, known, float(np.sqrt(2)) * known)


def _moved(run: Run, centre_mm: NDArray[np.float64], axis: int, sign: int) -> NDArray[np.float32]:
    """Noise-free reference, moved a little along one of the six."""
    six = np.zeros(6)
    six[axis] = sign * (_STEP_MM if axis < 3 else _STEP_RAD)
    step = geometry.compose(
        geometry.translation(centre_mm),
        geometry.rigid_step(six),
        geometry.translation(-centre_mm),
    )
    volume = exposed(run.camera, geometry.compose(step, run.poses[0]))
    return volume * shading(run.scanner, run.effects.shading) if run.effects.shading else volume


def mean_displacement_mm(covariance: NDArray[np.float64], arms_mm: NDArray[np.float64]) -> float:
    """Mean distance by which (m, 3) points move under a Gaussian (6, 6) error of the motion.

    A point's displacement is Gaussian with a covariance S of its own. Its mean length is
    sqrt(8 / pi) times the mean of sqrt(u' S u) over unit vectors u, here 200 even ones.
    """
    n = len(arms_mm)
    by_motion = np.zeros((n, 3, 6))
    by_motion[:, :, :3] = np.eye(3)
    x, y, z = arms_mm.T
    by_motion[:, 0, 4], by_motion[:, 0, 5] = z, -y
    by_motion[:, 1, 3], by_motion[:, 1, 5] = -z, x
    by_motion[:, 2, 3], by_motion[:, 2, 4] = y, -x
    own = np.einsum("pia,ab,pjb->pij", by_motion, covariance, by_motion, optimize=True)
    k = np.arange(_N_DIRECTIONS) + 0.5
    height = 1 - 2 * k / _N_DIRECTIONS
    radius, angle = np.sqrt(1 - height**2), np.pi * (3 - np.sqrt(5)) * k
    u = np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)
    spread = np.sqrt(np.einsum("ui,pij,uj->pu", u, own, u, optimize=True))
    return float(np.sqrt(8 / np.pi) * spread.mean())
