"""Runs of a session or subject in one space: where they end, what is done again and refused."""

import gzip
import json
import re
import shutil
import time
import unittest.mock
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import runs
from keepstill import geometry, phantom
from keepstill.collect import collect_run
from keepstill.config_files import load_config
from keepstill.errors import InputError, SettingsError
from keepstill.preflight import preflight, study_needs
from keepstill.ranks import join_world, realign_staged
from keepstill.realign import Crew
from keepstill.settings import RealignSettings
from keepstill.shared_reference import make_shared_reference
from keepstill.stage import stage_run
from keepstill.study import read_study
from keepstill.transforms.itk import read_itk

CLONE = Path(__file__).parents[2]
SHAPE, AFFINE = (48, 52, 28), phantom.grid_affine((48, 52, 28), (4.2, 4.2, 4.5))
FINE_SHAPE, FINE_AFFINE = (56, 60, 32), phantom.grid_affine((56, 60, 32), (3.6, 3.6, 3.9), "RAS")
FIRST, SECOND, TENTH, LATER = (
    "sub-01_ses-1_task-rest_run-1",
    "sub-01_ses-1_task-rest_run-2",
    "sub-01_ses-1_task-rest_run-10",
    "sub-01_ses-2_task-rest_run-1",
)
# Where the head is put down for each run.
PLACES = {
    FIRST: np.eye(4),
    SECOND: phantom.rigid((0.6, -0.4, 0.8), (0.5, 0.7, -0.4)),
    TENTH: phantom.rigid((-0.8, 0.9, 0.3), (-0.6, 0.2, 0.9)),
    LATER: phantom.rigid((3.5, -3.0, 4.0), (-2.5, 2.0, 3.0)),
}
N_VOLUMES = 3


def folder_of(root: Path, run: str) -> Path:
    return root / run[:6] / run[7:12] / "func"


def source_of(root: Path, run: str) -> Path:
    return folder_of(root, run) / f"{run}_bold.nii.gz"


@pytest.fixture(scope="module")
def images(head):
    """Poses and volumes of each run; the tenth run of the session has finer voxels."""
    made = {}
    for seed, (name, place) in enumerate(PLACES.items(), 1):
        poses = phantom.drawn_poses("spikes", N_VOLUMES, seed) @ place
        grid = (FINE_SHAPE, FINE_AFFINE) if name == TENTH else (SHAPE, AFFINE)
        run, volumes = runs.head_run(head, list(poses), *grid, seed=seed)
        made[name] = poses, np.stack([volume.T for volume in volumes], axis=-1), run.brain_mm
    return made


class Place:
    """A study in a folder, and what the workflow would do with it."""

    def __init__(self, root, images, names):
        self.root, self.images = root, images
        self.raw, self.out = root / "raw", root / "out"
        for name in names:
            self.add(name)
        (self.raw / "dataset_description.json").write_text("{}")

    def add(self, name, data=None):
        affine = FINE_AFFINE if name == TENTH else AFFINE
        runs.write_run(source_of(self.raw, name), self.images[name][1] if data is None else data,
                       affine)  # fmt: skip

    def study(self, **config):
        given = {"bids_dir": str(self.raw), "output_dir": str(self.out), "pages": False,
                 "stage_root": str(self.root), "reference_scope": "subject", **config}  # fmt: skip
        shipped, _ = load_config([], [], CLONE)
        return read_study(shipped | given, given, CLONE)

    def call(self, **config):
        """References made and runs realigned; the first error ends it."""
        study = self.study(**config)
        plan = study.make_plan()
        for scope in plan.references:
            first, settings = study.firsts[scope], study.settings.for_sharing
            stage_dir = self.root / "stage" / f"reference-{scope}"
            stage_run(first.source, first.name, runs.Origin(self.raw), stage_dir, settings)
            make_shared_reference(stage_dir, scope, self.out, settings, Crew(2))
        for run in plan.runs:
            self.realign(study, run)
        return list(plan.references), list(plan.runs)

    def realign(self, study, run):
        stage_dir, settings = self.root / "stage" / run, study.settings_of(run)
        stage_run(study.runs[run].source, run, runs.Origin(self.raw), stage_dir, settings)
        realign_staged(stage_dir, settings, join_world(), Crew())
        collect_run(stage_dir, self.out, settings)

    def made(self, run, ending):
        return folder_of(self.out, run) / f"{run}_{ending}"

    def found(self, run):
        name = "from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"
        return read_itk(self.made(run, name))

    def error_mm(self, run, reference_pose=None):
        """Largest over the volumes, in the space of the first run's first volume, or of a pose."""
        poses, first_poses = self.images[run][0], self.images[FIRST][0]
        reference = first_poses[0] if reference_pose is None else reference_pose
        truth = np.array([pose @ geometry.inverse(reference) for pose in poses])
        back = reference @ geometry.inverse(first_poses[0])
        brain_mm = geometry.world(back, self.images[FIRST][2])
        return geometry.displacement_mm(self.found(run), truth, brain_mm).max()


@pytest.fixture(scope="module")
def done(tmp_path_factory, images):
    """A subject of two sessions in one space."""
    place = Place(tmp_path_factory.mktemp("shared"), images, (FIRST, SECOND, LATER))
    assert place.call() == (["sub-01"], [FIRST, SECOND, LATER])
    return place


def table(place, run):
    return runs.read_table(place.made(run, "desc-confounds_timeseries.tsv"))


def test_all_runs_end_in_one_space(done):
    """Heads 6 mm and 5 degrees apart, voxels of 4.2 mm: off by 0.05, 0.07 and 0.05 mm."""
    errors_mm = {run: done.error_mm(run) for run in (FIRST, SECOND, LATER)}
    assert max(errors_mm.values()) < 0.12, errors_mm
    shared = nib.load(done.out / "sub-01" / "func" / "sub-01_desc-shared_boldref.nii.gz")
    for run in (FIRST, SECOND, LATER):
        for ending in ("desc-hmc_boldref.nii.gz", "desc-hmc_bold.nii.gz"):
            image = nib.load(done.made(run, ending))
            assert image.shape[:3] == SHAPE
            np.testing.assert_array_equal(image.affine, shared.affine)
        boldref = nib.load(done.made(run, "desc-hmc_boldref.nii.gz"))
        np.testing.assert_array_equal(boldref.dataobj, shared.dataobj)
    np.testing.assert_array_equal(shared.dataobj, done.images[FIRST][1][..., 0])


def test_motion_within_a_run_is_what_it_is_alone(done, images, tmp_path):
    """Byte for byte in the table, but for what depends on the resliced voxels."""
    alone = Place(tmp_path, images, (FIRST, LATER))
    alone.call(reference_scope="run")
    for run in (FIRST, LATER):
        shared, own = table(done, run), table(alone, run)
        columns = [name for name in own if name.startswith(("trans", "rot", "frame", "rmsd"))]
        assert len(columns) == 6 * 4 + 2
        assert {name: shared[name] for name in columns} == {name: own[name] for name in columns}
        assert not any(name.startswith("run_") for name in own)
    # The first run is in its own space: its files are those of the run alone.
    for ending in ("desc-hmc_bold.nii.gz", "desc-hmc_boldref.nii.gz",
                   "from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"):  # fmt: skip
        assert done.made(FIRST, ending).read_bytes() == alone.made(FIRST, ending).read_bytes()


def test_the_table_holds_where_the_run_lies(done):
    """Six numbers, the same in every row; with those within the run they make the transforms."""
    assert {table(done, FIRST)[f"run_{name}"][0] for name in ("trans_x", "rot_z")} == {"0"}
    columns = table(done, LATER)
    described = json.loads(done.made(LATER, "desc-confounds_timeseries.json").read_text())
    for name in (f"run_{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"):
        assert len(set(columns[name])) == 1 and columns[name][0] != "0"
        assert (
            "sub-01_desc-shared_boldref.nii.gz, the same for all" in described[name]["Description"]
        )
    shift_mm = [float(columns[f"run_trans_{axis}"][0]) for axis in "xyz"]
    turn_deg = np.rad2deg([float(columns[f"run_rot_{axis}"][0]) for axis in "xyz"])
    assert 4 < np.linalg.norm(shift_mm) < 9 and 3 < np.linalg.norm(turn_deg) < 6


def test_sidecars_name_the_shared_reference(done):
    boldref = json.loads(done.made(LATER, "desc-hmc_boldref.json").read_text())
    assert boldref["Sources"] == ["bids::sub-01/func/sub-01_desc-shared_boldref.nii.gz"]
    assert boldref["Reference"].startswith("sub-01_desc-shared_boldref.nii.gz (sha256:")
    shared = json.loads((done.out / "sub-01/func/sub-01_desc-shared_boldref.json").read_text())
    assert shared["Reference"] == f"volume 0 of {FIRST}"
    assert shared["Sources"] == [f"bids:raw:sub-01/ses-1/func/{FIRST}_bold.nii.gz"]


def test_only_what_must_be_is_done_again(images, tmp_path):
    """Nothing; a run that is added; one that changed; the first one; one that comes first."""
    place = Place(tmp_path, images, (SECOND, LATER))
    assert place.call() == (["sub-01"], [SECOND, LATER])
    assert place.call() == ([], [])
    third = LATER.replace("run-1", "run-2")
    place.images = images | {third: images[LATER]}
    place.add(third)
    assert place.call() == ([], [third])
    place.add(LATER, images[LATER][1] * 1.01)
    assert place.call() == ([], [LATER])
    place.add(SECOND, images[SECOND][1] * 1.01)
    assert place.call() == (["sub-01"], [SECOND, LATER, third])
    place.add(FIRST)
    assert place.call() == (["sub-01"], [FIRST, SECOND, LATER, third])
    assert place.call() == ([], [])
    (place.out / "sub-01" / "func" / "sub-01_desc-shared_boldref.nii.gz").unlink()
    assert place.study().make_plan().references == ("sub-01",)


@pytest.mark.parametrize("damage", ["moved", "flipped"])
def test_a_reference_of_another_content_and_the_same_size_is_made_again(images, tmp_path, damage):
    """It was taken as it was: runs ended 7 mm off, or none could be staged."""
    place = Place(tmp_path, images, (FIRST,))
    place.call()
    path = place.out / "sub-01" / "func" / "sub-01_desc-shared_boldref.nii.gz"
    whole = path.read_bytes()
    content = bytearray(gzip.decompress(whole) if damage == "moved" else whole)
    if damage == "moved":  # an image whose position was changed, padded to the size it had
        for field in (268, 280):  # qoffset_x, srow_x[3]
            content[field : field + 4] = np.float32(7).tobytes()
        content = gzip.compress(content)[: len(whole)].ljust(len(whole), b"\0")
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    place.add(SECOND)
    assert place.study().make_plan().references == ("sub-01",)
    references, done_runs = place.call()
    assert references == ["sub-01"] and SECOND in done_runs
    assert path.read_bytes() == whole and place.error_mm(SECOND) < 0.12
    assert place.call() == ([], [])
    with unittest.mock.patch("keepstill.manifest.file_sha256") as hashing:
        assert place.study().has_reference("sub-01")
    hashing.assert_not_called()


def test_settings_that_do_not_change_the_reference_leave_it(done):
    plan = done.study(output_dtype="int16", fd_radius_mm=40.0).make_plan()
    assert (len(plan.runs), plan.references) == (3, ())
    assert done.study(reference="middle").make_plan().references == ("sub-01",)


def test_filters_do_not_choose_the_space(done):
    """A call for the other session alone ends in the same space, and finds it complete."""
    study = done.study(sessions=["2"])
    assert list(study.runs) == [LATER] and study.firsts["sub-01"].name == FIRST
    assert not any(study.make_plan())


def test_what_lies_in_another_session_does_not_stop_a_session(images, tmp_path):
    """Two files of one name, which would be refused if they could be the first run."""
    place = Place(tmp_path, images, (FIRST, SECOND, LATER))
    shutil.copy(source_of(place.raw, LATER), source_of(place.raw, LATER).with_suffix(""))
    study = place.study(reference_scope="session", sessions=["1"], runs=["2"])
    assert study.firsts["sub-01_ses-1"].name == FIRST
    with pytest.raises(InputError, match=f"{LATER}: two files found"):
        place.study(sessions=["1"], runs=["2"])


def test_scopes_and_their_first_runs(images, tmp_path):
    place = Place(tmp_path, images, (SECOND, TENTH, LATER))
    firsts = {scope: run.name for scope, run in place.study().firsts.items()}
    assert firsts == {"sub-01": SECOND}  # 2 before 10
    study = place.study(reference_scope="session")
    firsts = {scope: run.name for scope, run in study.firsts.items()}
    assert firsts == {"sub-01_ses-1": SECOND, "sub-01_ses-2": LATER}
    name = "sub-01/ses-2/func/sub-01_ses-2_desc-shared_boldref.nii.gz"
    assert study.settings_of(LATER).shared_reference == str(place.out / name)
    for config in ({"reference_scope": "run"}, {"reference": str(source_of(place.raw, LATER))}):
        assert not place.study(**config).firsts


@pytest.mark.parametrize("reference", ["middle", "mean", "median", "lowest-motion"])
def test_the_reference_is_the_first_run_s_own(images, tmp_path, reference):
    """Whatever is named: what the run has by itself, voxel for voxel, if another thread helps."""
    place, alone = (Place(tmp_path / name, images, (FIRST, SECOND)) for name in ("a", "b"))
    place.call(reference=reference)
    alone.call(reference=reference, reference_scope="run")
    own, shared = (
        nib.load(at.made(FIRST, "desc-hmc_boldref.nii.gz")).get_fdata() for at in (alone, place)
    )
    np.testing.assert_array_equal(shared, own)
    np.testing.assert_array_equal(place.found(FIRST), alone.found(FIRST))
    at = {"middle": 1, "mean": 0, "median": 0}.get(reference)
    if at is None:
        (at,) = np.flatnonzero([s == "reference" for s in table(alone, FIRST)["status"]])
    assert place.error_mm(SECOND, images[FIRST][0][at]) < 0.13


def test_the_first_run_s_sbref_is_all_runs_(head, images, tmp_path):
    """In another contrast, and elsewhere; the others' are not used."""
    place = Place(tmp_path, images, (FIRST, LATER))
    pose = phantom.rigid((1.5, -1.0, 2.0), (1.0, -2.0, 1.5))
    _, (volume,) = runs.head_run(head, [pose], SHAPE, AFFINE, tsnr=200, seed=9)
    sbref = source_of(place.raw, FIRST).with_name(f"{FIRST}_sbref.nii.gz")
    nib.save(nib.Nifti1Image(np.sqrt(np.clip(volume, 0, None)).T, AFFINE), sbref)
    assert place.call(reference="sbref") == ([], [FIRST, LATER])
    errors_mm = [place.error_mm(run, pose) for run in (FIRST, LATER)]
    assert max(errors_mm) < 0.16, errors_mm
    assert table(place, FIRST)["trans_x"][0] == "0" != table(place, FIRST)["run_trans_x"][0]
    assert place.call(reference="sbref") == ([], [])
    nib.save(nib.Nifti1Image(np.clip(volume, 0, None).T, AFFINE), sbref)
    assert place.study(reference="sbref").make_plan().runs == (FIRST, LATER)
    sbref.unlink()
    study = place.study(reference="sbref")
    assert dict(study_needs(study, study.runs).refused)[LATER] == (
        f"no {FIRST}_sbref.nii.gz, in whose space it is to end: it is not in {sbref.parent}; add "
        "it, or choose another reference"
    )
    with pytest.raises(InputError, match=rf"{FIRST}: {FIRST}_sbref\.nii\.gz, in whose space it is"):
        place.call(reference="sbref")


def test_other_voxels_are_refused_unless_asked_for(images, tmp_path):
    """In one line, which keepstill plan tells before; what went well stays."""
    place = Place(tmp_path, images, (FIRST, TENTH))
    with pytest.raises(InputError, match="grid") as met:
        place.call()
    refusal = (
        f"{TENTH}: 56 x 60 x 32 voxels of 3.6 x 3.6 x 3.9 mm found, 48 x 52 x 28 voxels of 4.2 x "
        "4.2 x 4.5 mm in sub-01_desc-shared_boldref.nii.gz, in whose space it is to end; set grid: "
        "reference to put it on that grid, or grid: own to leave it on its own (keepstill realign: "
        "--grid)"
    )
    assert str(met.value) == refusal
    study = place.study()
    assert study.is_complete(FIRST) and not study.is_complete(TENTH)
    assert study_needs(study, study.runs).refused == ((TENTH, refusal.removeprefix(f"{TENTH}: ")),)
    told = list(preflight(study, study.make_plan()))
    assert told[-1].startswith(
        f"to be refused, and not in these figures: 1 run, {TENTH}; the first"
    )


@pytest.mark.parametrize(("grid", "shape"), [("reference", SHAPE), ("own", FINE_SHAPE)])
def test_other_voxels_in_one_space(images, tmp_path, grid, shape):
    place = Place(tmp_path, images, (FIRST, TENTH))
    place.call(grid=grid)
    bold, boldref = (
        nib.load(place.made(TENTH, f"desc-hmc_{kind}.nii.gz")) for kind in ("bold", "boldref")
    )
    assert bold.shape[:3] == boldref.shape == shape
    affine = FINE_AFFINE if grid == "own" else AFFINE
    np.testing.assert_allclose(bold.affine, affine, atol=1e-4)
    assert place.error_mm(TENTH) < 0.1
    covered = boldref.get_fdata() > 0.3 * boldref.get_fdata().max()
    for volume in np.moveaxis(bold.get_fdata(), 3, 0):
        both = covered & (volume != 0)
        assert np.corrcoef(volume[both], boldref.get_fdata()[both])[0, 1] > 0.9
    study = place.study(grid=grid)
    assert not any(study.make_plan()) and not study_needs(study, study.runs).refused


@pytest.mark.parametrize("true", ["sform", "qform"])
@pytest.mark.parametrize("reference", ["first", "sbref"])
def test_the_position_that_is_said_to_be_true_is_that_of_the_reference(
    images, tmp_path, reference, true
):
    """Of runs and SBRefs whose other position is 5 mm off; such references were refused."""
    place = Place(tmp_path, images, (FIRST, SECOND))
    sbref = source_of(place.raw, FIRST).with_name(f"{FIRST}_sbref.nii.gz")
    first = nib.load(source_of(place.raw, FIRST))
    nib.save(nib.Nifti1Image(np.asarray(first.dataobj)[..., 0], AFFINE), sbref)
    off = geometry.compose(geometry.translation(np.array([5.0, 0, 0])), AFFINE)
    for path in (source_of(place.raw, FIRST), source_of(place.raw, SECOND), sbref):
        image = nib.load(path)
        image = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
        image.set_sform(AFFINE if true == "sform" else off, 1)
        image.set_qform(AFFINE if true == "qform" else off, 1)
        nib.save(image, path)
    config = {"reference": reference, "affine_source": true}
    study = place.study(**config)
    assert not study_needs(study, study.runs).refused
    place.call(**config)
    assert max(place.error_mm(run) for run in (FIRST, SECOND)) < 0.12
    assert not any(place.study(**config).make_plan())


@pytest.mark.parametrize("shift_mm", [25.0, 80.0])
def test_an_own_grid_that_lies_elsewhere_cuts_the_head_off(images, tmp_path, caplog, shift_mm):
    """Nothing said so, and brain_coverage is near 1: of what is left of the brain."""
    place = Place(tmp_path, images, (FIRST, SECOND))
    affine = geometry.compose(geometry.translation(np.array([0, 0, shift_mm])), AFFINE)
    runs.write_run(source_of(place.raw, SECOND), images[SECOND][1], affine)
    told = (
        r"its own grid holds \d\d% of its head in the pose of sub-01_desc-shared_boldref\.nii\.gz"
    )
    if shift_mm > 50:
        with pytest.raises(InputError, match=rf"{SECOND}: {told} \(needs 50%\); set grid: ref"):
            place.call(grid="own")
        return
    place.call(grid="own")
    (warning,) = json.loads((place.out / "manifests" / f"{SECOND}.json").read_text())["warnings"]
    assert re.match(rf"{SECOND}: {told}; the rest is cut off", warning)
    assert warning in caplog.messages
    assert not json.loads((place.out / "manifests" / f"{FIRST}.json").read_text())["warnings"]


def test_a_reference_that_fails_is_told_once(images, tmp_path):
    """For all runs that follow it; a run that fails by itself is told by itself."""
    place = Place(tmp_path, images, (FIRST, SECOND, LATER))
    study = place.study()
    plan, since_s = study.make_plan(), time.time() - 10
    log = study.log_path("stage_reference", "sub-01")
    log.parent.mkdir(parents=True)
    log.write_text(
        f"keepstill: {FIRST}: the gzip stream is damaged; copy it again\nexit status 2\n"
    )
    assert study.failures(plan, since_s) == [
        f"sub-01: no reference from {FIRST}, so 3 runs not begun: the gzip stream is damaged; copy "
        "it again"
    ]
    source_of(place.raw, FIRST).write_bytes(b"no run")
    refused = dict(study_needs(study, study.runs).refused)
    assert list(refused) == [FIRST, SECOND, LATER]
    assert refused[LATER] == (
        "no sub-01_desc-shared_boldref.nii.gz, in whose space it is to end: it is made of the "
        f"first run of sub-01, {FIRST}: {refused[FIRST]}"
    )
    log.write_text("keepstill: sub-01: reference made\n")
    assert study.failures(plan, since_s) == ["3 runs not finished; the next call goes on with them"]


def test_two_images_at_once_are_refused():
    with pytest.raises(SettingsError, match=r"reference: a\.nii found beside a shared reference"):
        RealignSettings(reference="a.nii", shared_reference="b.nii")
    with pytest.raises(SettingsError, match="grid: 'mine' found; needs auto, reference, own"):
        replace(RealignSettings(), grid="mine")
