"""Multi-echo runs: which echo shows the motion, what each echo gets, what is done again."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import runs
from keepstill import multi_echo
from keepstill.__main__ import main
from keepstill.bids import file_run
from keepstill.echoes import Echo, realign_echo
from keepstill.errors import InputError
from keepstill.mean_echo import stage_mean
from keepstill.preflight import COMPRESSED, study_needs
from keepstill.read import open_staged
from keepstill.settings import RealignSettings
from keepstill.stage import Origin
from keepstill.study import Study

SHARED = Path(os.environ.get("KEEPSTILL_SHARED", Path(__file__).parents[3] / "shared")) / "data"
LEADER = "sub-01_task-rest"
SETTINGS = RealignSettings()
# By the T2* of grey matter, 48 ms, about 1, 0.7 and 0.5; not in the order of the numbers.
TIMES_S = {1: 0.030, 2: 0.012, 3: 0.048}
# An xfm, a table, masks and maps: all but the realigned run.
ENDINGS = {
    *(f"desc-{name}.nii.gz" for name in ("hmc_boldref", "brain_mask", "coverage_mask")),
    *(f"stat-tsnr_desc-{name}_boldmap.nii.gz" for name in ("raw", "hmc")),
    *("desc-confounds_timeseries.tsv", "from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"),
}


def write_echoes(folder: Path, times_s=TIMES_S, n=5) -> list[Path]:
    """Three echoes of a moving ball, each with noise of its own."""
    (folder / "sub-01" / "func").mkdir(parents=True)
    described = {"Name": "Echoes", "BIDSVersion": "1.11.0"}
    (folder / "dataset_description.json").write_text(json.dumps(described))
    paths = []
    for number in (1, 2, 3):
        left = np.exp((0.012 - TIMES_S[number]) / 0.048)
        data = np.rint(runs.ball_run(n, seed=number) * left).astype(np.int16)
        path = folder / "sub-01" / "func" / f"{LEADER}_echo-{number}_bold.nii.gz"
        paths.append(runs.write_run(path, data))
        sidecar = {"RepetitionTime": 2.0, "TaskName": "rest"}
        sidecar |= {"EchoTime": times_s[number]} if number in times_s else {}
        path.with_name(f"{LEADER}_echo-{number}_bold.json").write_text(json.dumps(sidecar))
    return paths


@pytest.fixture
def echoes(tmp_path):
    return write_echoes(tmp_path / "raw")


def realign(out, *arguments, stage_root=None):
    stage_root = stage_root or out.parent / "memory"
    stage_root.mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as ended:
        main(["realign", "--out", str(out), "--stage-root", str(stage_root),
              *map(str, arguments)])  # fmt: skip
    assert not any(stage_root.iterdir())
    return ended.value.code


@pytest.mark.parametrize(("estimate_echo", "number"), [("shortest", 2), (3, 3), ("all-mean", 2)])
def test_which_echo_shows_the_motion(echoes, estimate_echo, number):
    leader, *others = multi_echo.runs_of_files(echoes[::-1], estimate_echo)
    assert (leader.name, leader.source) == (LEADER, echoes[number - 1])
    assert leader.entities.get("echo") is None and leader.leader is None
    assert {run.source for run in others} == set(echoes)
    assert {run.leader for run in others} == {LEADER}
    averaged = [path for _, path in leader.mean_of]
    assert averaged == ([echoes[1], echoes[0], echoes[2]] if estimate_echo == "all-mean" else [])


def test_without_times_the_first_number_is_the_shortest(tmp_path):
    paths = write_echoes(tmp_path / "raw", {2: 0.012, 3: 0.048})
    assert multi_echo.runs_of_files(paths, "shortest")[0].source == paths[0]


def test_one_echo_is_a_run_like_any_other(echoes):
    (run,) = multi_echo.runs_of_files(echoes[:1], "shortest")
    assert (run.name, run.echoes, run.leader) == (f"{LEADER}_echo-1", (), None)


def test_what_are_no_echoes_of_one_run(echoes, tmp_path):
    other = tmp_path / "sub-01_task-other_echo-2_bold.nii.gz"
    with pytest.raises(InputError, match="no echoes of one run; needs names that differ in echo-1"):
        multi_echo.runs_of_files([echoes[0], other], "shortest")
    with pytest.raises(InputError, match="no echoes of one run"):
        multi_echo.runs_of_files([echoes[0], echoes[0]], "shortest")
    with pytest.raises(InputError, match=f"{LEADER}: estimate_echo: 4 found; it has echoes 1, 2"):
        multi_echo.runs_of_files(echoes, 4)
    plain = [file_run(path) for path in (echoes[0], tmp_path / f"{LEADER}_bold.nii.gz")]
    with pytest.raises(InputError, match="found beside files of its echoes; name every echo"):
        multi_echo.with_leaders(plain, "shortest", lambda run: {})


@pytest.mark.parametrize(("number", "kind"), [(2, "echo-2_sbref"), (3, "sbref")])
def test_echoes_have_the_single_band_reference_of_their_run(echoes, tmp_path, number, kind):
    """That of the echo that shows the motion, else the one of all; never one of their own."""
    for name in ("echo-1_sbref", "echo-2_sbref", "sbref"):
        echoes[0].with_name(f"{LEADER}_{name}.nii.gz").write_bytes(b"x")
    found = {run.name: run for run in multi_echo.runs_of_files(echoes, number)}
    places = (tmp_path / name for name in ("raw", "out", "memory"))
    study = Study(*places, RealignSettings(reference="sbref"), found, False)
    references = {study.settings_of(name).reference for name in found}
    assert references == {str(echoes[0].with_name(f"{LEADER}_{kind}.nii.gz"))}


def test_names_of_outputs(echoes, tmp_path):
    """Only the realigned runs, their tSNR and their manifests have `echo`."""
    out = tmp_path / "out"
    assert realign(out, *echoes) == 0
    made = {path.name for path in out.glob("sub*") if path.suffix != ".json"}
    each = ("desc-hmc_bold.nii.gz", "stat-tsnr_desc-hmc_boldmap.nii.gz")
    echoed = {f"{LEADER}_echo-{number}_{ending}" for number in (1, 2, 3) for ending in each}
    assert made == {f"{LEADER}_{ending}" for ending in ENDINGS} | echoed
    assert [path.name for path in out.glob("manifests/*.json")] == [f"{LEADER}.json"]
    manifests = {path.name for path in out.glob("manifests/echoes/*.json")}
    assert manifests == {f"{LEADER}_echo-{number}.json" for number in (1, 2, 3)}


def test_the_estimated_echo_gets_what_it_gets_alone(echoes, tmp_path):
    """Transforms, voxels and tSNR to the byte; the others share the transforms."""
    assert realign(tmp_path / "alone", echoes[1]) == 0
    assert realign(tmp_path / "all", *echoes) == 0
    xfm = "from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"
    bold = f"{LEADER}_echo-2_desc-hmc_bold.nii.gz"
    tsnr = f"{LEADER}_echo-2_stat-tsnr_desc-hmc_boldmap.nii.gz"
    alone = [tmp_path / "alone" / name for name in (f"{LEADER}_echo-2_{xfm}", bold, tsnr)]
    shared = [tmp_path / "all" / name for name in (f"{LEADER}_{xfm}", bold, tsnr)]
    assert [path.read_bytes() for path in alone] == [path.read_bytes() for path in shared]
    sidecar = json.loads((tmp_path / "all" / bold.replace(".nii.gz", ".json")).read_text())
    assert sidecar["EchoTime"] == TIMES_S[2] and sidecar["Reference"] == "volume 0"
    assert sidecar["SpatialReference"].endswith(f"{LEADER}_desc-hmc_boldref.nii.gz")
    manifests = tmp_path / "all" / "manifests"
    found = [
        json.loads((manifests / name).read_text())["summary"]["tsnr_after"]
        for name in (f"{LEADER}.json", *(f"echoes/{LEADER}_echo-{n}.json" for n in (2, 1, 3)))
    ]
    assert found[0] == found[1] and len(set(found)) == 3


@pytest.mark.parametrize("estimate_echo", ["shortest", "1", "all-mean"])
def test_same_bytes_in_any_order_and_with_any_threads(echoes, tmp_path, estimate_echo):
    options = ("--estimate-echo", estimate_echo)
    assert realign(tmp_path / "a", *echoes, *options, "--threads", 1) == 0
    assert realign(tmp_path / "b", *echoes[::-1], *options, "--threads", 2) == 0
    names = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert len(names) == 2 * 13 + 4
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_apply_makes_the_same_voxels(echoes, tmp_path):
    out, name = tmp_path / "out", f"{LEADER}_echo-3_desc-hmc_bold.nii.gz"
    assert realign(out, *echoes, "--dtype", "int16", "--outside", "nearest") == 0
    xfm = out / f"{LEADER}_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"
    with pytest.raises(SystemExit) as ended:
        main(["apply", str(echoes[2]), "--xfm", str(xfm), "--out", str(tmp_path / name),
              "--dtype", "int16", "--outside", "nearest"])  # fmt: skip
    assert ended.value.code == 0
    assert (out / name).read_bytes() == (tmp_path / name).read_bytes()


def test_without_reslicing_there_are_no_echoes(echoes, tmp_path):
    assert realign(tmp_path / "out", *echoes, "--no-reslice") == 0
    assert not list((tmp_path / "out").rglob("*echo*"))


def test_mean_of_echoes(echoes, tmp_path):
    named = {path.name.removesuffix("_bold.nii.gz"): path for path in echoes}
    stage_mean(named, LEADER, Origin(is_multi_echo=True), tmp_path / "stage", SETTINGS)
    staged = open_staged(tmp_path / "stage")
    data = [np.asarray(nib.load(path).dataobj, np.float64) for path in echoes]
    expected = np.mean(data, axis=0).T
    for t in range(5):
        np.testing.assert_allclose(staged.volume(t), expected[t], rtol=1e-6)
    assert staged.layout.dtype == np.float32
    np.testing.assert_array_equal(staged.layout.affine, nib.load(echoes[0]).affine)


def test_a_mean_needs_one_grid(tmp_path, capsys):
    paths = write_echoes(tmp_path / "raw")
    runs.write_run(paths[2], runs.ball_run(5, shape=(20, 22, 15)), sidecar=False)
    assert realign(tmp_path / "out", *paths, "--estimate-echo", "all-mean") == 2
    assert "a mean of echoes needs one grid" in capsys.readouterr().err


def test_an_echo_of_another_length_is_refused(tmp_path, capsys):
    """The others are there, and that echo is not."""
    paths = write_echoes(tmp_path / "raw")
    runs.write_run(paths[2], runs.ball_run(4), sidecar=False)
    assert realign(tmp_path / "out", *paths) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "echo-3: " in text]
    assert "5 transforms" in line and "4 volumes" in line
    made = {path.name[len(LEADER) :] for path in (tmp_path / "out").glob("*_bold.nii.gz")}
    assert made == {"_echo-1_desc-hmc_bold.nii.gz", "_echo-2_desc-hmc_bold.nii.gz"}


def test_an_echo_needs_its_leader(echoes, tmp_path):
    echo = Echo(echoes[0], f"{LEADER}_echo-1", LEADER)
    with pytest.raises(InputError, match=f"the motion of {LEADER} is not in"):
        realign_echo(echo, tmp_path / "stage", tmp_path / "out", SETTINGS)


@pytest.fixture(params=["shortest", "all-mean"])
def done(request, tmp_path):
    """A study of one multi-echo run, realigned as the workflow does it; what makes its plan."""
    bids_dir, output_dir = tmp_path / "raw", tmp_path / "out"
    paths = write_echoes(bids_dir)
    found = [file_run(path) for path in paths]

    def study():
        sidecars = {path: json.loads(path.with_name(path.name[:-7] + ".json").read_text())
                    for path in paths}  # fmt: skip
        led = multi_echo.with_leaders(found, request.param, lambda run: sidecars[run.source])
        runs_ = {run.name: run for run in led}
        return Study(bids_dir, output_dir, tmp_path / "memory", SETTINGS, runs_, False)

    leader = study().runs[LEADER]
    origin = Origin(bids_dir, None, True)
    runs.collected_leader(leader, origin, tmp_path / "stage", output_dir, SETTINGS)
    for path in paths:
        name = path.name.removesuffix("_bold.nii.gz")
        echo = Echo(path, name, LEADER, Origin(bids_dir))
        realign_echo(echo, tmp_path / "stage", output_dir, SETTINGS)
    return study, paths, request.param


def test_a_complete_study_has_nothing_to_do(done):
    study, _, _ = done
    assert study().make_plan() == ((), (), False, (), ())
    assert study().make_plan().in_words(study().n_runs) == "1 run, all complete; nothing to do"


def test_a_change_in_one_echo_redoes_it_alone_unless_it_shows_the_motion(done):
    study, paths, estimate_echo = done
    sidecar = paths[2].with_name(f"{LEADER}_echo-3_bold.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"FlipAngle": 60}))
    plan = study().make_plan()
    assert plan == ((), (), False, (f"{LEADER}_echo-3",), ())
    assert plan.in_words(1) == "1 run, all realigned; 1 of their echoes to reslice"
    runs.write_run(paths[0], runs.ball_run(5, seed=9), sidecar=False)
    plan, every = study().make_plan(), tuple(f"{LEADER}_echo-{k}" for k in (1, 2, 3))
    if estimate_echo == "shortest":  # echo 2 is, and is as it was
        assert plan == ((), (), False, every[::2], ())
        runs.write_run(paths[1], runs.ball_run(5, seed=8), sidecar=False)
        plan = study().make_plan()
    assert plan == ((LEADER,), (), False, every, ())


def test_a_lost_file_redoes_what_made_it(done):
    study, _, _ = done
    folder = study().output_dir / "sub-01" / "func"
    (folder / f"{LEADER}_desc-hmc_boldref.nii.gz").unlink()
    assert study().make_plan() == ((LEADER,), (), False, (), ())
    (folder / f"{LEADER}_echo-1_desc-hmc_bold.nii.gz").unlink()
    assert study().make_plan() == ((LEADER,), (), False, (f"{LEADER}_echo-1",), ())


def test_a_run_that_was_not_finished_is_one_whatever_its_echoes(done):
    study, paths, _ = done
    for path in paths:
        runs.write_run(path, runs.ball_run(4), sidecar=False)
    plan = study().make_plan()
    assert (len(plan.runs), len(plan.echoes)) == (1, 3)
    (line,) = study().failures(plan, 1e12)
    assert line == "1 run not finished; the next call goes on with them"


def test_what_a_run_and_its_echoes_will_take(done):
    """The series are the echoes' to write; a mean needs room for one of them, and for itself."""
    study, _, estimate_echo = done
    names = [f"{LEADER}_echo-{number}" for number in (1, 2, 3)]
    shared = study_needs(study(), [LEADER])
    each = study_needs(study(), names[:1])
    whole = study_needs(study(), [LEADER, *names])
    n_voxels = 20 * 22 * 14 * 5
    assert each.output_bytes == pytest.approx(COMPRESSED * 4 * n_voxels * 6 / 5)  # and a map
    assert whole.output_bytes == pytest.approx(shared.output_bytes + 3 * each.output_bytes)
    assert whole.cpu_s == pytest.approx(shared.cpu_s + 3 * each.cpu_s)
    staged = (2 + 4) * n_voxels + 352
    extra = staged if estimate_echo == "all-mean" else 0
    assert whole.lane_bytes == pytest.approx(staged + extra, rel=1e-3)


def test_three_real_echoes(tmp_path):
    """The first volume is not steady, so the second is the reference; echoes lie on one grid."""
    sources = [SHARED / "tedana-3echo" / f"echo{number}.nii.gz" for number in (1, 2, 3)]
    if not sources[0].exists():
        pytest.skip(f"{sources[0]} is not here; it does not come with the project")
    paths = [tmp_path / f"sub-01_task-x_echo-{number}_bold.nii.gz" for number in (1, 2, 3)]
    for path, source in zip(paths, sources, strict=True):
        path.symlink_to(source)
    out = tmp_path / "out"
    assert realign(out, *paths) == 0
    table = runs.read_table(out / "sub-01_task-x_desc-confounds_timeseries.tsv")
    assert "failed" not in table["status"] and "reference" in table["status"]
    assert np.nanmax(runs.numbers(table["framewise_displacement"])) < 1.0
    fine = [nib.load(out / f"sub-01_task-x_echo-{n}_desc-hmc_bold.nii.gz") for n in (1, 2, 3)]
    assert {image.shape for image in fine} == {(39, 50, 33, 5)}
    brain = np.asarray(nib.load(out / "sub-01_task-x_desc-brain_mask.nii.gz").dataobj) > 0
    levels = [float(np.median(np.asarray(image.dataobj)[brain])) for image in fine]
    assert levels[0] > levels[1] > levels[2]  # T2* decay: no echo is another
