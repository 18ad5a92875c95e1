"""ITK as the engine and as a check: as good as it has to be, honest, and known by its name."""

import json
from dataclasses import replace

import numpy as np
import pytest

import runs
from keepstill import __main__ as command_line
from keepstill import geometry, itk_bridge, phantom
from keepstill.collect import summary_line
from keepstill.errors import InputError, KeepstillError, SettingsError
from keepstill.estimate import Estimate
from keepstill.itk_bridge import Image, Sampler, gradient, lowpassed
from keepstill.itk_engine.check import WARN_MM, check_volumes, checked_volumes, disagreement
from keepstill.itk_engine.points import bright_part
from keepstill.itk_engine.run import realign_by_itk
from keepstill.manifest import read_manifest
from keepstill.masks import brain_mask
from keepstill.ranks import join_world, realign_staged
from keepstill.read import open_staged
from keepstill.realign import Crew, Task, choose_target, open_realigned
from keepstill.reference import world_gradient
from keepstill.settings import RealignSettings
from keepstill.stage import MOTION, stage_run
from keepstill.summary import summarise

SHAPE = (56, 60, 34)
AFFINE = phantom.grid_affine(SHAPE, (3.7, 3.7, 3.7))  # a point spread of 0.84 voxel: sharp
N_VOLUMES, LOST, TURNED, NOISE, EMPTY = 18, 14, 15, 16, 17
# What is required where the head has moved by less than 2 mm, and of phantoms.
MEDIAN_MM, WORST_MM, MOST_PART = 0.02, 0.05, 0.005


class Both:
    """A run realigned by the native engine, and some of its volumes by ITK."""

    def __init__(self, source, stage_dir, volumes):
        settings = RealignSettings()
        stage_run(source, source.name.split("_bold")[0], None, stage_dir, settings)
        realign_staged(stage_dir, settings, join_world(), Crew())
        run, self.volumes = open_staged(stage_dir), np.array(volumes)
        with np.load(stage_dir / MOTION) as saved:
            self.native = {name: saved[name] for name in saved.files}
        self.task = Task(run, choose_target(run, settings), settings)
        reference = self.native["reference"]
        self.brain = brain_mask(reference)
        series = open_realigned(run, reference.shape)
        by_native = np.array(series[self.volumes][:, self.brain], np.float64)
        self.found = realign_by_itk(self.task, volumes, Crew(2))
        self.itk = self.found.estimates
        by_itk = np.array(series[self.volumes][:, self.brain], np.float64)
        seen = (by_native != 0) & (by_itk != 0)
        squares = np.where(seen, by_native - by_itk, 0) ** 2
        self.part_of_mean = np.sqrt(squares.mean(axis=1)) / reference[self.brain].mean()
        self.n_seen_by_one = (seen != ((by_native != 0) | (by_itk != 0))).sum(axis=1)

    @property
    def matrices(self):
        return np.array([self.itk[t].moving_from_reference for t in self.volumes])

    def apart_mm(self):
        voxels = np.argwhere(self.brain)[:, ::-1].astype(np.float64)
        points_mm = geometry.world(self.native["affine"], voxels)
        ours = self.native["moving_from_reference"][self.volumes]
        return geometry.displacement_mm(ours, self.matrices, points_mm)


@pytest.fixture(scope="module")
def made(head, tmp_path_factory):
    """A run of a head that drifts; then lost slices, a large turn, noise, and nothing."""
    poses = phantom.drawn_poses("drift", N_VOLUMES, 3)
    poses[TURNED] = phantom.rigid((12.0, -9.0, 6.0), (-20.0, 10.0, 40.0)) @ poses[TURNED]
    run, volumes = runs.head_run(head, poses, SHAPE, AFFINE)
    data = np.stack([volume.T for volume in volumes], axis=-1)
    data[:, :, [10, 16], LOST] *= 0.25
    data[..., NOISE] = np.random.default_rng(1).normal(size=SHAPE) * 100 + 300
    data[..., EMPTY] = 0
    data[40, 30, 20, 2] = np.nan
    folder = tmp_path_factory.mktemp("itk")
    source = runs.write_run(folder / "sub-01_task-rest_bold.nii", data, AFFINE)
    return run, Both(source, folder / "stage", [2, 5, 9, LOST, TURNED, NOISE, EMPTY])


def test_phantoms_motion_is_that_of_the_native_engine(made):
    run, both = made
    apart_mm, well = both.apart_mm(), slice(0, 4)
    assert np.median(apart_mm[well]) <= MEDIAN_MM and apart_mm[well].max() <= WORST_MM
    assert both.part_of_mean[:3].max() <= MOST_PART
    assert both.itk[LOST].lost_slices == (10, 16)
    errors_mm = phantom.displacement_mm(
        both.matrices[:5], run.truth[both.volumes[:5]], run.brain_mm
    )
    assert errors_mm.max() < 0.05  # turned by 40 degrees, too
    assert [both.itk[t].status for t in both.volumes[:5]] == ["ok"] * 5
    expected = [np.sqrt(np.trace(both.itk[t].covariance[:3, :3])) for t in both.volumes[:5]]
    assert min(expected) > 1e-4 and max(expected) < 0.05


def test_what_cannot_be_realigned_is_said_to_have_failed(made):
    _, both = made
    assert (both.itk[NOISE].status, both.itk[EMPTY].status) == ("failed", "failed")


def test_where_a_volume_has_no_data_both_have_0(made):
    """A voxel on the border may fall to either side; NaN voxels were filled, and counted."""
    _, both = made
    assert both.n_seen_by_one[:5].max() < 0.001 * both.brain.sum()
    assert both.found.n_missing == 1 and both.found.missing[20, 30, 40]


def test_the_demo_study_s_still_run(study, tmp_path):
    source = study / "sub-01" / "func" / "sub-01_task-oneback_run-1_bold.nii.gz"
    both = Both(source, tmp_path / "stage", [1, 14, 27, 41])
    apart_mm = both.apart_mm()
    assert np.median(apart_mm) <= MEDIAN_MM and apart_mm.max() <= WORST_MM
    assert both.part_of_mean.max() <= MOST_PART


@pytest.mark.parametrize(
    ("run", "volumes", "most_mm"),
    [
        ("sub-02/func/sub-02_task-headturn_run-2", [1, 3, 9], 0.3),
        ("sub-03/func/sub-03_task-rest", [2], 0.5),
    ],
)
def test_large_turns_are_found(study, tmp_path, run, volumes, most_mm):
    """By up to 44 mm; the differences of all volumes are in docs/itk.md."""
    both = Both(study / f"{run}_bold.nii.gz", tmp_path / "stage", volumes)
    assert {both.itk[t].status for t in volumes} == {"ok"}
    assert both.apart_mm().max() < most_mm


def test_its_derivatives_and_samples_are_those_of_the_splines(rng):
    """On an oblique grid with both flips: against our own, and against the samples themselves."""
    volume = rng.normal(size=(12, 14, 16)).astype(np.float32)
    affine = np.array([[-3.0, 0, 0, 5], [0, 2.9, 0.5, -4], [0, -0.6, 3.4, 8], [0, 0, 0, 1.0]])
    image = Image(volume, affine)
    np.testing.assert_allclose(Sampler(image, image, 5)(np.eye(4)), volume, atol=2e-5)
    thin = Sampler(image, image, 3, (2, 3, 1))(np.eye(4))
    np.testing.assert_allclose(thin, volume[:, ::3, ::2], atol=2e-5)
    one_voxel = affine @ geometry.translation(np.array([1.0, 0, 2])) @ geometry.inverse(affine)
    moved = Sampler(image, image, 5)(one_voxel)
    np.testing.assert_allclose(moved[:-2, :, :-1], volume[2:, :, 1:], atol=2e-4)
    smooth = lowpassed(image, (1.5, 1.5, 1.5))
    inner = np.s_[:, 4:-4, 4:-4, 4:-4]
    expected = np.stack(world_gradient(smooth.array(), affine))
    np.testing.assert_allclose(gradient(smooth)[inner], expected[inner], atol=2e-3)


def test_bright_part():
    volume = np.full((4, 5, 6), 10.0, np.float32)
    assert not bright_part(volume).any()
    volume[1:3, 2:4, 2:5] = 100
    volume += np.random.default_rng(2).normal(size=volume.shape).astype(np.float32)
    np.testing.assert_array_equal(bright_part(volume), volume > 50)


def test_every_twentieth_volume_is_checked():
    assert checked_volumes(200) == list(range(19, 200, 20))
    assert checked_volumes(42) == [1, 21, 41] and checked_volumes(2) == [1]


def test_a_check_tells_how_far_the_two_are_apart(made):
    _, both = made
    found = [Estimate(m, "ok", 1, 0, 1, 1) for m in both.native["moving_from_reference"]]
    by_itk = check_volumes(both.task, [5, EMPTY], Crew())
    np.testing.assert_array_equal(
        by_itk[5].moving_from_reference, both.itk[5].moving_from_reference
    )
    record = disagreement(both.task, found, by_itk)
    assert record["volumes"] == [5] and record["failed_volumes"] == [EMPTY]
    assert record["median_mm"] == record["worst_mm"] < 0.03 and record["worst_volume"] == 5
    (warning,) = record["warnings"]
    assert f"ITK could not realign these volumes: {EMPTY}" in warning
    off = phantom.rigid((WARN_MM + 0.1, 0, 0), (0, 0, 0))
    found[5] = replace(found[5], moving_from_reference=found[5].moving_from_reference @ off)
    record = disagreement(both.task, found, {5: by_itk[5]})
    assert record["worst_mm"] == pytest.approx(0.2, abs=0.03)
    assert (
        "more than 0.1 mm away from where they were realigned to: 5 (0.2" in record["warnings"][0]
    )


def test_a_check_that_had_nothing_to_compare_says_so(made, collected):
    """Whoever failed; and what ITK alone could realign is counted."""
    _, both = made
    found = [Estimate(m, "ok", 1, 0, 1, 1) for m in both.native["moving_from_reference"]]
    none = [replace(e, status="failed") for e in found]
    ours = disagreement(both.task, none, {t: both.itk[t] for t in (2, 5, EMPTY)})
    assert (ours["volumes"], ours["median_mm"], ours["failed_volumes"]) == ([], None, [])
    assert ours["itk_only_volumes"] == [2, 5]
    only, nothing = ours["warnings"]
    assert "ITK could realign 2 volumes that failed: 2, 5; look" in only
    assert "nothing to compare" in nothing and "every 20th volume 3 failed; take" in nothing
    summary = read_manifest(collected["check"], "a")["summary"]
    line = summary_line("a", summary | {"check": ours | {"engine": "ITK 5"}})
    assert line.endswith("; ITK 5 has none to compare, and could realign 2 volumes that failed")
    theirs = disagreement(both.task, found, {EMPTY: both.itk[EMPTY]})
    assert (theirs["volumes"], theirs["itk_only_volumes"]) == ([], [])
    assert "every 20th volume ITK could not realign 1; take" in theirs["warnings"][1]
    found[5] = replace(found[5], status="reference")  # the run's only checked one, say
    itself = disagreement(both.task, found, {5: both.itk[5]})
    (warning,) = itself["warnings"]
    assert "nothing to compare" in warning and "there is the reference only" in warning


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Folders of one small run: as it is, by ITK, and checked by it."""
    folder = tmp_path_factory.mktemp("collected")
    source = runs.write_run(folder / "a_bold.nii.gz", runs.ball_run(4))
    return {
        name: runs.collected(source, folder / name, RealignSettings(**settings))
        for name, settings in {
            "native": {},
            "itk": {"engine": "itk"},
            "check": {"check": "itk", "reference": "mean"},
        }.items()
    }


def test_outputs_have_the_same_form_and_name_the_engine(collected):
    native, itk, check = (collected[name] for name in ("native", "itk", "check"))
    names = [sorted(path.name for path in folder.rglob("*")) for folder in (native, itk, check)]
    assert names[0] == names[1] == names[2]
    tables = [runs.read_table(next(folder.glob("*.tsv"))) for folder in (native, itk)]
    assert list(tables[0]) == list(tables[1])
    assert tables[1]["status"] == ["reference", "ok", "ok", "ok"]
    assert "n/a" not in tables[1]["expected_error"]
    version = f"ITK {itk_bridge.require_itk()}"
    for sidecar in itk.glob("*.json"):
        assert json.loads(sidecar.read_text())["Engine"] == version
    manifests = [read_manifest(folder, "a") for folder in (native, itk, check)]
    assert len({manifest["key"] for manifest in manifests}) == 3
    assert manifests[1]["summary"]["engine"] == version
    assert manifests[0]["summary"]["engine"].startswith("keepstill ")
    assert manifests[0]["summary"]["check"] is None
    assert manifests[2]["summary"]["check"]["volumes"] == [3]
    table = summarise(check)
    assert table["check_median_mm"] == table["check_worst_mm"]
    assert summarise(native)["check_worst_mm"] == [None]
    told = json.loads(next(check.glob("*_xfm.json")).read_text())["Check"]
    assert told["Engine"] == version and 0 < told["Worst"] == table["check_worst_mm"][0] < WARN_MM
    line = summary_line("a", manifests[2]["summary"])
    assert line.endswith("mm (worst, volume 3) in 1 volume") and f"; {version} differs by 0" in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "spm"}, "engine: 'spm' found; needs native or itk"),
        ({"check": "native"}, "check: 'native' found; needs none or itk"),
        ({"engine": "itk", "reference": "mean"}, "mean found; engine: itk needs first or middle"),
        ({"engine": "itk", "check": "itk"}, "check: itk found with engine: itk"),
        ({"engine": "itk", "outside": "nearest"}, "outside: nearest found; engine: itk needs"),
        ({"check": "itk", "in_plane": True}, "in_plane: true found"),
    ],
)
def test_what_itk_does_not_do_here_is_refused(settings, words):
    with pytest.raises(SettingsError, match=words):
        RealignSettings(**settings)


def test_several_echoes_are_refused(tmp_path):
    paths = [tmp_path / f"sub-1_task-x_echo-{echo}_bold.nii.gz" for echo in (1, 2)]
    for path in paths:
        runs.write_run(path, runs.ball_run(3))
    arguments = ["realign", *map(str, paths), "--engine", "itk", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        command_line.main(arguments)
    assert end.value.code == 2 and not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("options", [("--engine", "itk"), ("--check", "itk")])
def test_without_itk_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(itk_bridge, "find_spec", lambda name: None)
    source = runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run(2))
    with pytest.raises(SystemExit) as end:
        command_line.main(["realign", str(source), "--out", str(tmp_path / "out"), *options])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("keepstill: ITK is not installed")
    assert "make itk, or" in line and line.endswith("-r envs/itk.txt, both in keepstill's clone")
    assert not list((tmp_path / "out").rglob("*"))


def test_a_reference_without_a_head_is_refused(made):
    _, both = made
    target = both.task.target
    flat = np.full_like(target.reference.volume, 7)
    flat_target = replace(target, reference=replace(target.reference, volume=flat))
    with pytest.raises(InputError, match="shows no head"):
        realign_by_itk(replace(both.task, target=flat_target), [1], Crew())
    assert issubclass(InputError, KeepstillError)
