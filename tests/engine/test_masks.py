"""Head and brain are found on the phantom."""

import numpy as np
import pytest

import naive
import runs
from keepstill import masks, phantom


def test_masks(head):
    shape = (64, 64, 36)
    affine = phantom.grid_affine(shape, (3.4, 3.4, 3.5))
    run, volumes = runs.head_run(head, [np.eye(4)] * 2, shape, affine, seed=2)
    first = volumes[0]
    brain = masks.brain_mask(first)
    inside = phantom.clean_volume(run, 0) > 600
    assert (brain & inside).sum() > 0.97 * inside.sum()
    assert not brain[0, 0].any() and not brain[:, 0].any()
    assert brain[18, 32, 32]  # a dark ventricle or a hole is filled
    whole = masks.head_mask(first, rim_voxels=3)
    assert whole[brain].all()
    assert whole.sum() > 1.15 * brain.sum()


def test_nothing_is_found_in_nothing():
    assert masks.clip_level(np.zeros((3, 3, 3), np.float32)) == 0
    assert not masks.head_mask(np.zeros((3, 3, 3), np.float32), 1).any()


@pytest.mark.parametrize("reach", [0, 1, 3, 20])
def test_dilated(reach):
    mask = np.random.default_rng(1).random((6, 9, 8)) < 0.03
    before = mask.copy()
    np.testing.assert_array_equal(masks.dilated(mask, reach), naive.dilated(mask, reach))
    np.testing.assert_array_equal(mask, before)
