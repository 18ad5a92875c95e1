"""References of another contrast, grid and pose: where a run ends, and when it is refused."""

import nibabel as nib
import numpy as np
import pytest

import runs
from keepstill import phantom
from keepstill.errors import InputError
from keepstill.other_contrast import place_volume
from keepstill.ranks import join_world, realign_staged
from keepstill.read import open_staged
from keepstill.realign import Crew, open_realigned
from keepstill.settings import RealignSettings
from keepstill.stage import MOTION, stage_run

SHAPE, AFFINE = (64, 64, 36), phantom.grid_affine((64, 64, 36), (3.4, 3.4, 3.5))
OTHER_SHAPE = (72, 76, 50)
OTHER_AFFINE = phantom.grid_affine(OTHER_SHAPE, (2.8, 2.8, 2.8), "RAS", 15.0)
POSE = phantom.rigid((4, -6, 3), (6, -4, 8))
N_VOLUMES = 5


def in_contrast(volume, kind):
    """A volume whose intensities go another way; all are positive where there is tissue."""
    z, _, x = np.indices(volume.shape)
    shading = 1 + 0.4 * (x / volume.shape[2] - 0.5) + 0.3 * (z / volume.shape[0] - 0.5)
    part = np.clip(volume / np.percentile(volume, 99), 0, None)
    made = {"root": part**0.5, "square": part**2, "shaded": shading * part**0.6, "same": part}
    return (900 * made[kind]).astype(np.float32)


@pytest.fixture(scope="module")
def made(head, tmp_path_factory):
    """A restless run, as a file; and the head in another pose, on another grid."""
    poses = [np.eye(4), *phantom.drawn_poses("spikes", N_VOLUMES - 1, 3)]
    run, volumes = runs.head_run(head, poses, SHAPE, AFFINE)
    _, (other,) = runs.head_run(head, [POSE], OTHER_SHAPE, OTHER_AFFINE, tsnr=100, seed=3)
    data = np.stack([volume.T for volume in volumes], axis=-1)
    path = tmp_path_factory.mktemp("other") / "sub-01_task-rest_bold.nii"
    return run, runs.write_run(path, data, AFFINE), volumes, other


def staged(source, stage_dir, reference, **settings):
    chosen = RealignSettings(reference=str(reference), **settings)
    stage_run(source, "sub-01_task-rest", None, stage_dir, chosen)
    realign_staged(stage_dir, chosen, join_world(), Crew(1))
    with np.load(stage_dir / MOTION) as saved:
        motion = {name: saved[name] for name in saved.files}
    return motion, open_realigned(open_staged(stage_dir), motion["reference"].shape)


def written(path, volume, affine):
    nib.save(nib.Nifti1Image(volume.T, affine), path)
    return path


@pytest.mark.parametrize("kind", ["same", "root", "square", "shaded"])
def test_a_volume_is_placed(made, kind):
    """Least squares of intensities err by 0.7 to 1.3 mm here, unless contrast is the same.

    Units of intensity have nothing to do with each other.
    """
    run, _, volumes, other = made
    image = in_contrast(other, kind)
    placed = place_volume((volumes[0], AFFINE), (image / 200, OTHER_AFFINE), np.eye(8))
    truth = run.truth[:1] @ np.linalg.inv(POSE)
    found = placed.volume_from_image[None]
    points = np.c_[run.brain_mm, np.ones(len(run.brain_mm))] @ POSE.T
    assert phantom.displacement_mm(found, truth, points[:, :3]).max() < 0.12
    assert placed.overlap > 0.9 and placed.correlation > 0.9


def test_a_misaligned_reference_of_another_contrast(made, tmp_path):
    """No run of zeros, in its space; motion within the run is as exact as without it.

    Others measure motion against the misaligned image, or resample outside of the field of view.
    """
    run, source, _, other = made
    image = in_contrast(other, "shaded")
    tilted = phantom.rigid((25, -20, 15), (12, 5, -15)) @ OTHER_AFFINE
    reference = written(tmp_path / "a_sbref.nii", image, tilted)
    motion, series = staged(source, tmp_path / "stage", reference)
    assert motion["status"].tolist() == ["ok"] * N_VOLUMES
    np.testing.assert_array_equal(motion["reference"], image)
    np.testing.assert_allclose(motion["affine"], tilted, atol=1e-4)
    within = motion["moving_from_reference"] @ np.linalg.inv(motion["moving_from_reference"][0])
    assert phantom.displacement_mm(within, run.truth, run.brain_mm).max() < 0.04
    head = image > 0.3 * image.max()
    for volume in series:
        assert (volume[head] > 0).mean() > 0.85
        assert np.corrcoef(volume[head & (volume != 0)], image[head & (volume != 0)])[0, 1] > 0.8
    assert np.isfinite(motion["covariance"]).all()


def test_outside_the_run_stands_what_was_asked_for(made, tmp_path):
    """On the reference's grid, not the run's: inside, the same values, none of them negative."""
    _, source, _, other = made
    reference = written(tmp_path / "a_sbref.nii", in_contrast(other, "root"), OTHER_AFFINE)
    _, plain = staged(source, tmp_path / "plain", reference)
    options = {"outside": "nearest", "non_negative": True}
    _, extended = staged(source, tmp_path / "extended", reference, **options)
    inside = plain != 0
    assert 0.1 < inside.mean() < 0.9 and plain.min() < 0
    np.testing.assert_array_equal(extended[inside], np.maximum(plain[inside], 0))
    assert (extended[~inside] > 0).mean() > 0.5


def test_an_inverted_contrast_is_refused_and_says_so(made, tmp_path):
    """Bright fluid, dark tissue, as in a T2-like SBRef whose order of brightness is the reverse."""
    _, source, _, other = made
    part = np.clip(other / np.percentile(other, 99), 0, None)
    inverted = np.where(part > 0.2, 900 * np.clip(1.3 - part, 0.05, None), part * 100)
    reference = written(tmp_path / "a_sbref.nii", inverted.astype(np.float32), OTHER_AFFINE)
    with pytest.raises(InputError, match=r"correlation 0\.\d+ \(needs 0\.5\)"):
        staged(source, tmp_path / "stage", reference)


def test_nothing_in_common_is_refused_with_figures(made, tmp_path):
    _, source, _, other = made
    far = phantom.rigid((400, 0, 0), (0, 0, 0)) @ OTHER_AFFINE
    reference = written(tmp_path / "far_sbref.nii", other, far)
    with pytest.raises(InputError, match=r"not found in .*overlap .*needs 50%.*correlation") as met:
        staged(source, tmp_path / "stage", reference)
    assert "\n" not in str(met.value)


def test_half_a_head_is_refused(made, tmp_path):
    """A slab at the top of the run's field of view, of a head that the reference shows whole."""
    _, _, volumes, other = made
    slab = np.stack([volume[26:].T for volume in volumes], axis=-1)
    affine = AFFINE.copy()
    affine[:3, 3] = (AFFINE @ [0, 0, 26, 1])[:3]
    source = runs.write_run(tmp_path / "slab_bold.nii", slab, affine)
    at = np.linalg.inv(POSE) @ OTHER_AFFINE
    reference = written(tmp_path / "whole_sbref.nii", in_contrast(other, "root"), at)
    with pytest.raises(InputError, match=r"overlap [1-4]?\d%"):
        staged(source, tmp_path / "stage", reference)


def test_another_head_is_refused(study, tmp_path):
    """It overlaps well and the fit settles; the correlation says that it is none."""
    turned = study / "sub-02" / "func" / "sub-02_task-headturn_run-1_bold.nii.gz"
    other = nib.load(study / "sub-01" / "func" / "sub-01_task-oneback_run-1_bold.nii.gz")
    volume = np.asarray(other.dataobj[..., 0], np.float32).T
    reference = written(tmp_path / "other.nii", volume, other.affine)
    with pytest.raises(InputError, match=r"correlation 0\.[0-4]\d \(needs 0\.5\)"):
        staged(turned, tmp_path / "stage", reference)


def test_a_reference_without_a_head_is_refused(made, tmp_path):
    _, source, _, other = made
    reference = written(tmp_path / "empty_sbref.nii", np.zeros_like(other), OTHER_AFFINE)
    with pytest.raises(InputError, match=r"empty_sbref\.nii: it shows no head"):
        staged(source, tmp_path / "stage", reference)


def test_a_volume_of_the_run_as_a_file(made, tmp_path):
    """The same grid and contrast: as exact as a volume named by its number, nearly."""
    run, source, volumes, _ = made
    reference = written(tmp_path / "own.nii", volumes[3], AFFINE)
    motion, _ = staged(source, tmp_path / "stage", reference, reslice=False)
    truth = run.truth @ np.linalg.inv(run.truth[3])
    found = motion["moving_from_reference"]
    assert phantom.displacement_mm(found, truth, run.brain_mm).max() < 0.08
