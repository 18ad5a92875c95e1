"""Sessions, runs, echoes and SBRefs of a simulated study in one space, through the workflow."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import runs
from keepstill import geometry
from keepstill.transforms.itk import read_itk
from keepstill.truth import SBREF_TRANSFORM, read_truth, truth_path
from studies import call, simulate
from validator import validate

CLONE = Path(__file__).parents[2]
SUBJECTS, SESSIONS, NUMBERS, ECHOES = ("sub-01", "sub-02"), (1, 2), (1, 2), (1, 2, 3)
NAMES = [
    f"{subject}_ses-0{session}_task-rest_run-{number}"
    for subject in SUBJECTS
    for session in SESSIONS
    for number in NUMBERS
]
XFM = "from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects of two sessions of two runs of three echoes, each subject in one space."""
    root = tmp_path_factory.mktemp("space")
    (root / "memory").mkdir()
    size = "--shape 44 46 26 --voxel-mm 4.8 4.8 4.8 --oblique-deg 12 --volumes 3"
    simulate(root / "study", f"{size} --subjects 2 --sessions 2 --runs 2 --echoes 3 --sbref")
    lines = call(root, "reference_scope=subject", "pages=false")
    assert lines[0] == (
        "keepstill: 8 runs found, 0 complete, 8 to do, 24 of their echoes to reslice, 2 references "
        "to make"
    )
    for subject in SUBJECTS:
        made = f"keepstill: {subject}: reference made, volume 0 of {subject}_ses-01_task-rest_run-1"
        begun = [k for k, line in enumerate(lines) if line.startswith(f"keepstill: {subject}_")]
        assert lines.index(made) < min(begun)
    assert lines[-1] == f"keepstill: all complete in {root / 'out'}"
    assert not any((root / "memory").iterdir())
    return root


def folder_of(out: Path, name: str) -> Path:
    return out / name[:6] / name[7:13] / "func"


def errors_mm(place: Path, out: Path, names: Sequence[str], *, to_sbref: bool) -> dict[str, float]:
    """Mean displacement error over the brain in the scope's space, of each run's worst volume."""
    worst, world_from_head, brain_mm = {}, np.eye(4), np.zeros((0, 3))
    for name in names:
        source = folder_of(place / "study", name) / f"{name}_bold.nii.gz"
        path = truth_path(place / "study", source)
        truth = read_truth(path)
        own = np.array(json.loads(path.with_suffix(".json").read_text())["WorldFromHead"])
        if name.endswith("ses-01_task-rest_run-1"):  # in whose space the subject ends
            world_from_head, brain_mm = own, truth.brain_mm
            if to_sbref:
                (sbref_from_first,) = read_itk(path.with_name(f"{name}_{SBREF_TRANSFORM}"))
                world_from_head = sbref_from_first @ own
                brain_mm = geometry.world(sbref_from_first, brain_mm)
        true = truth.moving_from_first @ own @ geometry.inverse(world_from_head)
        found = read_itk(folder_of(out, name) / f"{name}_{XFM}")
        worst[name] = float(geometry.displacement_mm(found, true, brain_mm).max())
    return worst


def test_every_run_is_where_it_should_be(place: Path) -> None:
    """Sessions are 2 to 9 mm apart; the worst, run 2 of sub-01's first session, is 0.08 mm off."""
    found = errors_mm(place, place / "out", NAMES, to_sbref=False)
    assert max(found.values()) < 0.12, found


def test_file_names_and_manifests(place: Path) -> None:
    out = place / "out"
    for subject in SUBJECTS:
        made = {path.name for path in (out / subject / "func").iterdir()}
        stem = f"{subject}_desc-shared_boldref"
        assert made == {f"{stem}.nii.gz", f"{stem}.json"}
        manifest = json.loads((out / "manifests" / "references" / f"{subject}.json").read_text())
        assert set(manifest["outputs"]) == {f"{subject}/func/{name}" for name in made}
    manifests = [
        path.relative_to(out / "manifests") for path in (out / "manifests").rglob("*.json")
    ]
    assert sorted(map(str, manifests)) == sorted(
        [f"references/{subject}.json" for subject in SUBJECTS]
        + [f"{name}.json" for name in NAMES]
        + [f"echoes/{name}_echo-{echo}.json" for name in NAMES for echo in ECHOES]
    )
    for name in NAMES:
        made = {path.name for path in folder_of(out, name).glob(f"{name}_*")}
        bold = {f"{name}_echo-{echo}_desc-hmc_bold.nii.gz" for echo in ECHOES}
        assert {file for file in made if file.endswith("bold.nii.gz")} == bold
        assert {f"{name}_{XFM}", f"{name}_desc-hmc_boldref.nii.gz"} <= made and len(made) == 26


def test_results_are_valid_bids(place: Path) -> None:
    verdict = validate(place / "out")
    assert (verdict.issues("error"), verdict.exit_code) == ([], 0)


@pytest.mark.parametrize(("ranks", "threads"), [(1, 2), (2, 1), (3, 1)])
def test_the_command_line_makes_the_same_bytes(place: Path, ranks: int, threads: int) -> None:
    """Of a run of the other session, taken to the reference that the workflow has made."""
    name, alone = NAMES[3], place / f"alone-{ranks}-{threads}"
    shared = place / "out" / "sub-01" / "func" / "sub-01_desc-shared_boldref.nii.gz"
    sources = sorted(folder_of(place / "study", name).glob(f"{name}_*_bold.nii.gz"))
    launcher = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks)]
    command = [
        *(launcher if ranks > 1 else []),
        *(sys.executable, "-m", "keepstill", "realign", *map(str, sources)),
        *("--out", str(alone), "--shared-reference", str(shared)),
        *("--threads", str(threads), "--stage-root", str(place / "memory")),
    ]
    environment = os.environ | {"PYTHONPATH": str(CLONE / "workflow" / "scripts")}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    made = sorted(alone.glob("sub-*"))
    assert len(made) == 26
    for path in made:
        assert path.read_bytes() == (folder_of(place / "out", name) / path.name).read_bytes(), path


def test_in_the_space_of_the_first_sbref(place: Path) -> None:
    """The worst, run 2 of the first session, is 0.07 mm off; then there is nothing to do."""
    config = ("output_dir=sbref", "reference_scope=subject", "reference=sbref")
    config = (*config, "participants=['01']", "pages=false")
    lines = call(place, *config)
    assert lines[0].endswith("4 runs found, 0 complete, 4 to do, 12 of their echoes to reslice")
    found = errors_mm(place, place / "sbref", NAMES[:4], to_sbref=True)
    assert max(found.values()) < 0.12, found
    for name in NAMES[:4]:
        boldref = folder_of(place / "sbref", name) / f"{name}_desc-hmc_boldref.json"
        reference = json.loads(boldref.read_text())["Reference"]
        assert reference.startswith(f"{NAMES[0]}_echo-1_sbref.nii.gz (sha256:")
    assert call(place, *config) == ["keepstill: 4 runs, all complete; nothing to do"]


def test_a_first_run_that_fails_is_told_for_all_that_follow(place: Path) -> None:
    """Comes last. The other subject stays complete; of this one nothing is begun."""
    config = ("reference_scope=subject", "pages=false")
    assert call(place, *config) == ["keepstill: 8 runs, all complete; nothing to do"]
    first = folder_of(place / "study", NAMES[4]) / f"{NAMES[4]}_echo-1_bold.nii.gz"
    first.write_bytes(gzip.compress(gzip.decompress(first.read_bytes())[:-1000]))
    lines = call(place, *config, status=1)
    assert lines[0] == (
        "keepstill: 8 runs found, 4 complete, 4 to do, 12 of their echoes to reslice, 1 reference "
        "to make"
    )
    assert lines[-1].startswith(
        f"keepstill: sub-02: no reference from {NAMES[4]}, so 4 runs not begun: "
    )
    assert sum("sub-02" in line for line in lines[1:]) == 2  # when it failed, and at the end
    call(place, *config, "participants=['01']")


def test_real_runs_in_one_space(tmp_path: Path) -> None:
    """Three runs in which a head turned, 2 to 5 mm apart: brains lie on each other.

    The means of the volumes correlate by 0.93 to 0.95 in the brain; each in its own space, by 0.81.
    """
    (tmp_path / "memory").mkdir()
    demo = CLONE / "tests" / "data" / "study"
    config = ("reference_scope=subject", "participants=['02']", "pages=false")
    lines = call(tmp_path, f"bids_dir={demo}", *config)
    assert lines[0] == "keepstill: 3 runs found, 0 complete, 3 to do, 1 reference to make"
    means, brains = [], []
    for number in (1, 2, 3):
        stem = tmp_path / "out" / "sub-02" / "func" / f"sub-02_task-headturn_run-{number}"
        status = np.array(runs.read_table(Path(f"{stem}_desc-confounds_timeseries.tsv"))["status"])
        series = np.asarray(nib.load(f"{stem}_desc-hmc_bold.nii.gz").dataobj)
        means.append(series[..., status != "failed"].mean(axis=3))
        brains.append(np.asarray(nib.load(f"{stem}_desc-brain_mask.nii.gz").dataobj) > 0)
    np.testing.assert_array_equal(brains[0], brains[2])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.corrcoef(means[one][brains[0]], means[other][brains[0]])[0, 1] > 0.9
