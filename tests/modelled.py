"""A run in memory, taken through the estimator up to the last step."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from keepstill import geometry
from keepstill.estimate import estimate_motion
from keepstill.last_step import residuals_of, take_last_step, to_moving_voxel
from keepstill.lost_slices import filled, find_lost_slices, slice_means
from keepstill.moving import Coefficients, prepare_moving
from keepstill.ranks import share
from keepstill.run_model import NO_MODEL, fit_run_model, fitted_to
from keepstill.settings import EstimateSettings
from keepstill.team import Team

SETTINGS = EstimateSettings()


def moving_of(volume, reference):
    """A volume ready to be sampled, its lost slices filled."""
    lost = find_lost_slices(volume, slice_means(reference.volume))
    return prepare_moving(filled(volume, lost), SETTINGS.degree, Coefficients(volume.shape), lost)


def first_estimates(volumes, affine, reference):
    """Estimates before the last step."""
    return [
        estimate_motion(moving_of(volume, reference), affine, reference, SETTINGS)
        for volume in volumes
    ]


def fitted_of(volumes, affine, reference, estimates):
    """What a model is fitted to, of all volumes."""
    residuals, spans, maps = [], [], []
    for volume, estimate in zip(volumes, estimates, strict=True):
        to_moving = to_moving_voxel(estimate, affine, reference)
        moving = moving_of(volume, reference)
        found = residuals_of(moving, to_moving, reference.last, estimate.scale)
        residuals.append(found[0])
        spans.append(found[1])
        maps.append(to_moving)
    return fitted_to(reference, np.array(residuals), range(len(volumes)), spans, maps)


def copied(fitted):
    """The same with residuals of its own: a fit takes the shading off them."""
    return fitted._replace(residuals=fitted.residuals.copy())


def model_of(reference, fitted):
    """The model that one rank finds."""
    blocks = range(len(reference.blocks) - 1)
    return fit_run_model(reference, copied(fitted), Team(blocks, 1, lambda v: [v]))


def models_of_ranks(reference, fitted, n_ranks, n_threads):
    """The model of each of some ranks: threads that share the residuals and gather by barriers."""
    shared, barrier = copied(fitted), threading.Barrier(n_ranks, timeout=300)
    given = [None] * n_ranks

    def rank_s(rank):
        def gather(value):
            given[rank] = value
            barrier.wait()
            everything = list(given)
            barrier.wait()
            return everything

        blocks = share(len(reference.blocks) - 1, n_ranks, rank)
        return fit_run_model(reference, shared, Team(blocks, n_threads, gather))

    with ThreadPoolExecutor(n_ranks) as pool:
        return list(pool.map(rank_s, range(n_ranks)))


def last_estimates(volumes, affine, reference, estimates, model=NO_MODEL):
    """Estimates after the last step, in the pose of volume 0, which is the reference."""
    last = [
        take_last_step(moving_of(volume, reference), affine, reference, estimate, model)
        for volume, estimate in zip(volumes, estimates, strict=True)
    ]
    own_pose = geometry.inverse(last[0].moving_from_reference)
    return [
        replace(e, moving_from_reference=geometry.compose(e.moving_from_reference, own_pose))
        for e in last
    ]
