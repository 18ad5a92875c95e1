"""The demo study is valid BIDS, small, true to its sidecars, and licensed."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from validator import Verdict, validate

DATA = Path(__file__).parents[1] / "data"
STUDY = DATA / "study"
MAX_STUDY_BYTES = 12_000_000  # a clone stays quick; the study is 9.9 MB
N_VOLUMES = {
    "sub-01_task-oneback_run-1": 42,
    "sub-02_task-headturn_run-1": 10,
    "sub-02_task-headturn_run-2": 10,
    "sub-02_task-headturn_run-3": 10,
    "sub-03_task-rest": 6,
}
GZIP_FLAGS_AND_MTIME = slice(3, 8)  # RFC 1952, section 2.3


def run_path(run: str, ending: str) -> Path:
    """Path of one of a run's files in the study."""
    subject, _, _ = run.partition("_")
    return STUDY / subject / "func" / f"{run}{ending}"


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds one object."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def verdict() -> Verdict:
    """What the validator says of the study."""
    return validate(STUDY)


def test_validator_finds_no_error(verdict: Verdict) -> None:
    """Exit 0, and no issue of severity error."""
    assert verdict.issues("error") == []
    assert verdict.exit_code == 0


def test_validator_sees_the_whole_study(verdict: Verdict) -> None:
    """An empty or wrongly ignored folder would be valid as well."""
    summary = verdict.report["summary"]
    assert sorted(summary["subjects"]) == ["01", "02", "03"]
    assert sorted(summary["tasks"]) == ["headturn", "oneback", "rest"]
    assert summary["dataTypes"] == ["func"]


def test_study_is_small() -> None:
    """All files of the study together."""
    assert sum(path.stat().st_size for path in STUDY.rglob("*") if path.is_file()) < MAX_STUDY_BYTES


def test_study_has_these_runs_only() -> None:
    """The table of runs above is complete."""
    found = sorted(path.name for path in STUDY.rglob("*.nii*"))
    assert found == [f"{run}_bold.nii.gz" for run in sorted(N_VOLUMES)]


@pytest.mark.parametrize("run", N_VOLUMES)
def test_header_agrees_with_sidecar(run: str) -> None:
    """Repetition time in seconds, to the last bit of a float32; slices; volumes; raw int16."""
    header = nib.load(run_path(run, "_bold.nii.gz")).header
    sidecar = read_json(run_path(run, "_bold.json"))
    _, _, n_slices, n_volumes = header.get_data_shape()
    assert header["pixdim"][4] == np.float32(sidecar["RepetitionTime"])
    assert header.get_xyzt_units() == ("mm", "sec")
    assert n_volumes == N_VOLUMES[run]
    assert len(sidecar.get("SliceTiming", range(n_slices))) == n_slices
    assert header.get_data_dtype() == np.int16
    assert (header["sform_code"], header["qform_code"]) == (1, 1)


@pytest.mark.parametrize("run", N_VOLUMES)
def test_files_tell_no_clock_time(run: str) -> None:
    """Neither the gzip header (time, file name) nor the NIfTI header (descrip) does."""
    compressed = run_path(run, "_bold.nii.gz").read_bytes()
    assert compressed[GZIP_FLAGS_AND_MTIME] == bytes(5)
    assert b"Time" not in gzip.decompress(compressed)[:352]


def test_every_subject_has_its_licence() -> None:
    """One text a subject, told apart by its name, and the table of participants names it."""
    rows = (STUDY / "participants.tsv").read_text(encoding="utf-8").splitlines()
    columns = rows[0].split("\t")
    participants = [dict(zip(columns, row.split("\t"), strict=True)) for row in rows[1:]]
    subjects = sorted(path.name for path in STUDY.glob("sub-*"))
    assert subjects == [participant["participant_id"] for participant in participants]
    licences = [f"{row['participant_id']}_{row['licence']}.txt" for row in participants]
    assert sorted(path.name for path in (STUDY / "licences").iterdir()) == licences
    assert all((STUDY / "licences" / name).stat().st_size > 0 for name in licences)


def test_maker_refuses_an_empty_source(tmp_path: Path) -> None:
    """One line that says what is missing, exit 2, nothing written over the study."""
    command = [sys.executable, str(DATA / "make_study.py"), str(tmp_path)]
    process = subprocess.run(
        [*command, "--output", str(tmp_path / "study")], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert "no such file" in process.stderr
