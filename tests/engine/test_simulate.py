"""`keepstill simulate`: a valid study, its truth beside it, the same bytes for the same seed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nitransforms.linear import load as load_transform

import runs
from keepstill import phantom
from keepstill import simulate as study_module
from keepstill.__main__ import main
from keepstill.errors import OutputError, SettingsError

# Coarse and few, so that most of the time is spent on the heads.
SMALL = ("--volumes", "5", "--shape", "22", "24", "16", "--voxel-mm", "9.0", "9.0", "8.0")
VALIDATOR = [sys.executable, "-c", "from bids_validator_deno import cli; cli()"]
NAMES = {
    "README.md",
    "dataset_description.json",
    "participants.json",
    "participants.tsv",
    "derivatives/truth/.bidsignore",
    "derivatives/truth/dataset_description.json",
}


def simulate(out, *options):
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(out), *SMALL, *map(str, options)])
    return ended.value.code


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two subjects with a task, slices at their own times, all troubles at once."""
    out = tmp_path_factory.mktemp("simulated") / "study"
    options = ["--subjects", 2, "--seed", 7, "--activation-percent", 4, "--slice-timing"]
    options += ["--shading", 0.35, "--dropped-slices", 3, "--gain-drift", 0.05]
    options += [
        "--first-brighter",
        0.45,
        "--ghost",
        0.04,
        "--motion",
        "spikes",
        "--oblique-deg",
        12,
    ]
    assert simulate(out, *options, "--tr-s", 6, "--threads", 2) == 0
    return out


def files(study):
    return {path.relative_to(study).as_posix() for path in study.rglob("*") if path.is_file()}


def test_files(made):
    wanted = set(NAMES)
    for subject in ("sub-01", "sub-02"):
        run = f"{subject}/func/{subject}_task-blocks_run-1"
        wanted |= {f"{run}_{ending}" for ending in ("bold.nii.gz", "bold.json", "events.tsv")}
        for stem in ("from-orig_to-boldref_mode-image_desc-truth_xfm.txt",
                     "desc-truth_timeseries.tsv", "desc-brain_mask.nii.gz"):  # fmt: skip
            wanted |= {f"derivatives/truth/{run}_{stem}"}
            wanted |= {f"derivatives/truth/{run}_{stem.split('.')[0]}.json"}
    assert files(made) == wanted


@pytest.mark.parametrize("part", [".", "derivatives/truth"])
def test_study_and_truth_are_valid_bids(made, part, tmp_path):
    environment = os.environ | {"DENO_DIR": str(tmp_path), "DENO_NO_UPDATE_CHECK": "1"}
    command = [*VALIDATOR, str(made / part), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    assert done.returncode == 0
    assert sorted(json.loads(done.stdout)["summary"]["subjects"]) == ["01", "02"]


def test_header_and_sidecar(made):
    image = nib.load(made / "sub-01/func/sub-01_task-blocks_run-1_bold.nii.gz")
    sidecar = json.loads((made / "sub-01/func/sub-01_task-blocks_run-1_bold.json").read_text())
    assert image.shape == (22, 24, 16, 5) and image.get_data_dtype() == np.int16
    assert image.header.get_xyzt_units() == ("mm", "sec")
    assert image.header["pixdim"][4] == sidecar["RepetitionTime"] == 6
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)
    np.testing.assert_allclose(
        image.affine, phantom.grid_affine((22, 24, 16), (9, 9, 8), oblique_deg=12)
    )
    assert image.affine[2, 1] == pytest.approx(9 * np.sin(np.deg2rad(12)))
    assert len(sidecar["SliceTiming"]) == 16 and max(sidecar["SliceTiming"]) < 6
    bound = sidecar["CramerRaoBoundMillimetres"]
    assert bound["NoisyReference"] == pytest.approx(2**0.5 * bound["TemplateKnown"])
    assert sidecar["Simulation"]["motion"] == "spikes"
    assert sidecar["Simulation"]["shading"] == 0.35
    volumes = np.asarray(image.dataobj).astype(float)
    inside = volumes[..., 0] > 700
    ratio = np.median(volumes[inside, 0]) / np.median(volumes[inside, -1])
    assert ratio == pytest.approx(1.45 / 1.05, rel=0.1)


def test_transforms_and_table_are_the_same_motion(made):
    """Read by nitransforms, an independent reader of ITK files."""
    stem = made / "derivatives/truth/sub-02/func/sub-02_task-blocks_run-1_"
    read = load_transform(f"{stem}from-orig_to-boldref_mode-image_desc-truth_xfm.txt", fmt="itk")
    lines = Path(f"{stem}desc-truth_timeseries.tsv").read_text().splitlines()
    assert lines[0].split("\t")[:6] == ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"]
    rows = np.array([[float(cell) for cell in line.split("\t")] for line in lines[1:]])
    np.testing.assert_allclose(read.matrix[0], np.eye(4), atol=1e-9)
    poses = [phantom.pose_of(row[:6]) for row in rows]
    np.testing.assert_allclose(read.matrix, poses, atol=1e-6)
    assert np.abs(rows[1:, :6]).max() > 0.1
    assert lines[0].split("\t")[6:] == ["bent", "gain", "dropped_slices"]
    assert rows[:, 6].max() > 0.01  # slices have times of their own
    assert sorted(rows[:, 8]) == [0, 0, 0, 0, 3]
    mask = nib.load(f"{stem}desc-brain_mask.nii.gz")
    litres = np.asarray(mask.dataobj).sum() * 9 * 9 * 8 * 1e-6
    assert 1.0 < litres < 1.7


def test_task_is_told(made):
    events = made / "sub-01/func/sub-01_task-blocks_run-1_events.tsv"
    assert events.read_text() == "onset\tduration\ttrial_type\n20\t10\ttask\n"


def test_same_seed_same_bytes_whatever_the_threads(tmp_path):
    """Every file, for one and two threads; another seed gives another run."""
    for name, threads, seed in (("a", 1, 3), ("b", 2, 3), ("c", 2, 4)):
        options = ("--subjects", 1, "--runs", 2, "--seed", seed, "--threads", threads)
        assert simulate(tmp_path / name, *options) == 0
    names = files(tmp_path / "a")
    assert names == files(tmp_path / "b") == files(tmp_path / "c")
    contents = {k: {n: (tmp_path / k / n).read_bytes() for n in names} for k in "abc"}
    assert contents["a"] == contents["b"]
    runs_of = [name for name in names if name.endswith("_bold.nii.gz")]
    assert len(runs_of) == 2
    assert len({contents[k][name] for k in "ac" for name in runs_of}) == 4


def test_motion_from_a_file(tmp_path):
    """As many volumes as the table has, and its motion as the truth."""
    six = np.array([[0.5, 0, 0, 0, 0, 0.01], [0.5, 1, 0, 0, 0, 0.01], [0, 0, 2, 0.02, 0, 0]])
    np.savetxt(tmp_path / "motion.txt", six)
    out = tmp_path / "study"
    table = str(tmp_path / "motion.txt")
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(out), *SMALL[2:], "--subjects", "1", "--motion", table])
    assert ended.value.code == 0
    (found,) = out.rglob("*_timeseries.tsv")
    rows = np.array([line.split("\t")[:6] for line in found.read_text().splitlines()[1:]], float)
    poses = [phantom.pose_of(row) for row in six]
    expected = [phantom.numbers_of(pose @ np.linalg.inv(poses[0])) for pose in poses]
    np.testing.assert_allclose(rows, expected, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--volumes", 0], "volumes: 0 found; needs 2 to 100000"),
        (["--threads", -3], "--threads: -3 found; needs 1 or more"),
        (["--subjects", 0], "subjects: 0 found; needs 1 to 9999"),
        (["--tsnr", 0], "tsnr: 0 found"),
        (["--shape", 3, 3], "--shape: 2 numbers found; needs one or three"),
        (["--shape", 2], "shape: 2 found; needs 4 to"),
        (["--voxel-mm", 0], "voxel-mm: 0 found"),
        (["--voxel-mm", 0.7], "point spread in mm: 0.56 found; needs 0.6 to 80"),
        (["--shading", 1.5], "shading: 1.5 found"),
        (["--dropped-slices", 17], "dropped-slices: 17 found; needs 0 to 16"),
        (["--motion", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--sessions", 0], "sessions: 0 found; needs 1 to 99"),
        (["--echoes", 0], "--echoes: 0 found; needs 1 or more"),
        (["--echoes", 3, "--echo-times-ms", 10, 20], "--echo-times-ms: 2 numbers found"),
        (["--echo-times-ms", 30, 10], "30, 10 found; needs each longer than the last"),
        (["--echo-times-ms", 0, 10], "echo-times-ms: 0 found; needs 1 to 500"),
        (["--oblique-deg", 91], "oblique-deg: 91 found; needs -90 to 90"),
        (["--point-spread-voxels", 0.1], "point-spread-voxels: 0.1 found"),
    ],
)
def test_what_cannot_be_simulated(options, words, tmp_path, capsys):
    assert simulate(tmp_path / "out", *options) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interrupted_call_ends_in_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(study_module, "simulate_study", interrupted)
    assert simulate(tmp_path / "out") == 130
    assert capsys.readouterr().err == "keepstill: interrupted\n"


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError(28, "no space")])
def test_nothing_is_left_of_a_study_that_is_stopped(is_there, stop, tmp_path, monkeypatch):
    """By Ctrl-C, by a signal, by a full disk; an empty folder that was there stays."""
    out = tmp_path / "out"
    if is_there:
        out.mkdir()

    def write_half(subject, n_threads, on_volume):
        (out / "sub-01").mkdir()
        (out / "sub-01" / "half").touch()
        raise stop

    monkeypatch.setattr(study_module._Subject, "write", write_half)
    with pytest.raises((KeyboardInterrupt, SystemExit, OutputError)):
        study_module.simulate_study(out, study_module.StudyPlan())
    assert list(tmp_path.rglob("*")) == ([out] if is_there else [])


@pytest.fixture(scope="module")
def echoes(tmp_path_factory):
    """Two sessions of one run, two echoes, with SBRefs, with one thread and with two."""
    folder = tmp_path_factory.mktemp("echoes")
    options = ["--subjects", 1, "--sessions", 2, "--echo-times-ms", 15, 45, "--sbref"]
    for threads in (1, 2):
        assert simulate(folder / str(threads), *options, "--threads", threads) == 0
    return folder


def voxels(path):
    return np.asarray(nib.load(path).dataobj).astype(float)


def test_sessions_echoes_and_sbrefs(echoes):
    """Names, bytes whatever the threads, and one truth a run; times, contrast and poses as told."""
    out = echoes / "1"
    names = files(out)
    assert names == files(echoes / "2")
    for name in names:
        assert (out / name).read_bytes() == (echoes / "2" / name).read_bytes(), name
    stem = "sub-01/ses-02/func/sub-01_ses-02_task-rest_run-1"
    images = {name for name in names if name.startswith(stem) and name.endswith(".nii.gz")}
    kinds = [f"{stem}_echo-{echo}_{kind}.nii.gz" for kind in ("bold", "sbref") for echo in (1, 2)]
    assert images == set(kinds)
    truths = [name for name in names if "/ses-02/" in name and name.endswith("_xfm.txt")]
    assert {name.split("_run-1_")[1].split("_")[0] for name in truths} == {
        "from-orig",
        "from-sbref",
    }
    assert len(truths) == 2
    short, long, sbref, _ = (voxels(out / name) for name in kinds)
    sidecar = json.loads((out / f"{stem}_echo-2_bold.json").read_text())
    assert sidecar["EchoTime"] == 0.045
    brain = voxels(out / f"derivatives/truth/{stem}_desc-brain_mask.nii.gz") > 0
    ratio = np.median(long[brain, 0]) / np.median(short[brain, 0])
    assert ratio == pytest.approx(np.exp(-30 / 50), rel=0.15)  # T2* of 50 ms
    assert sbref.shape == short.shape[:3]
    assert np.median(sbref[brain]) > 1.15 * np.median(short[brain, 0])
    poses = [json.loads(path.read_text())["WorldFromHead"]
             for path in sorted(out.rglob("*_from-orig_*_xfm.json"))]  # fmt: skip
    assert np.linalg.norm(np.array(poses[0])[:3, 3] - np.array(poses[1])[:3, 3]) > 1


def test_noise_of_echoes_is_their_own_and_alike(echoes):
    stem = echoes / "1/sub-01/ses-01/func/sub-01_ses-01_task-rest_run-1"
    made = [json.loads(Path(f"{stem}_echo-{echo}_bold.json").read_text())["Simulation"]
            for echo in (1, 2)]  # fmt: skip
    assert made[0]["noise_sd"] == made[1]["noise_sd"] and made[0]["seed"] != made[1]["seed"]


@pytest.mark.parametrize("part", [".", "derivatives/truth"])
def test_sessions_echoes_and_sbrefs_are_valid_bids(echoes, part, tmp_path):
    environment = os.environ | {"DENO_DIR": str(tmp_path), "DENO_NO_UPDATE_CHECK": "1"}
    command = [*VALIDATOR, str(echoes / "1" / part), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["summary"]["sessions"] == ["01", "02"]


def test_short_table_and_full_folder_are_refused(tmp_path, capsys):
    np.savetxt(tmp_path / "motion.txt", np.zeros((2, 6)))
    assert simulate(tmp_path / "out", "--motion", tmp_path / "motion.txt") == 2
    assert "motion of 2 volumes found; needs 5" in capsys.readouterr().err
    np.savetxt(tmp_path / "one.txt", np.zeros((1, 6)))
    with pytest.raises(SettingsError, match=r"one\.txt: motion of 1 volume found; needs 2"):
        study_module.simulate_study(
            tmp_path / "out", study_module.StudyPlan(motion=str(tmp_path / "one.txt"))
        )
    assert simulate(tmp_path) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_start_is_light():
    """The command line does not load the phantom for other commands."""
    program = (
        "import sys; from keepstill.__main__ import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: assert 'keepstill.phantom' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(runs.SCRIPTS)},
    )
    assert done.returncode == 0, done.stderr
