"""The index of a data set, the inheritance of sidecars, and the names of outputs."""

import json
from pathlib import Path
from urllib.parse import unquote

import bids2table
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keepstill import bids
from keepstill.errors import InputError

BOLD = "_bold.nii.gz"


def make(root: Path, *names: str) -> Path:
    """A data set of empty files; `sub-01_ses-a_task-x` goes to sub-01/ses-a/func."""
    root.mkdir(parents=True, exist_ok=True)
    (root / bids.DESCRIPTION).write_text('{"Name": "made", "BIDSVersion": "1.11.0"}')
    for name in names:
        path = root / bids.derivative_folder(name) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make(
        tmp_path / "study",
        "sub-02_task-rest" + BOLD,
        "sub-01_ses-b_task-nback_run-02" + BOLD,
        "sub-01_ses-a_task-nback_run-01_bold.nii",
        "sub-01_ses-a_task-nback_run-01_sbref.nii.gz",
        "sub-01_ses-a_task-nback_run-01_bold.json",
        "sub-01_ses-a_task-nback_run-01_events.tsv",
        "sub-01_ses-a_task-mag_part-mag" + BOLD,
        "sub-01_ses-a_task-mag_part-phase" + BOLD,
    )


def names(runs: list[bids.Run]) -> list[str]:
    return [run.name for run in runs]


def test_runs_are_sorted_and_phase_is_left_out(made: Path) -> None:
    runs = bids.index_runs(made).runs
    assert names(runs) == [
        "sub-01_ses-a_task-mag_part-mag",
        "sub-01_ses-a_task-nback_run-01",
        "sub-01_ses-b_task-nback_run-02",
        "sub-02_task-rest",
    ]
    nback = runs[1]
    assert nback.source == made / "sub-01/ses-a/func/sub-01_ses-a_task-nback_run-01_bold.nii"
    assert (nback.subject, nback.session) == ("01", "a")
    assert nback.entities["run"] == "01"
    assert runs[3].session is None


@pytest.mark.parametrize("name", ["ds000114.v2", ".hidden", "old [1]", "a {b} 'c'"])
def test_any_folder_name_will_do(tmp_path: Path, name: str) -> None:
    """bids2table finds nothing below a folder with a dot or with brackets in its name."""
    study = make(tmp_path / name, "sub-01_task-rest" + BOLD)
    assert names(bids.index_runs(study).runs) == ["sub-01_task-rest"]


def test_derivatives_are_not_entered(made: Path) -> None:
    make(made / "derivatives" / "other", "sub-09_task-rest" + BOLD)
    make(made / "sourcedata", "sub-08_task-rest" + BOLD)
    assert {run.subject for run in bids.index_runs(made).runs} == {"01", "02"}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"participants": ["02"]}, ["sub-02_task-rest"]),
        ({"participants": ["sub-02"]}, ["sub-02_task-rest"]),
        ({"sessions": ["ses-b"]}, ["sub-01_ses-b_task-nback_run-02"]),
        ({"runs": [2]}, ["sub-01_ses-b_task-nback_run-02"]),
        ({"runs": ["run-1"]}, ["sub-01_ses-a_task-nback_run-01"]),
        ({"tasks": ["mag", "rest"]}, ["sub-01_ses-a_task-mag_part-mag", "sub-02_task-rest"]),
        ({"tasks": ["nback"], "sessions": ["a"]}, ["sub-01_ses-a_task-nback_run-01"]),
    ],
)
def test_filters(made: Path, filters: bids.Filters, expected: list[str]) -> None:
    assert names(bids.index_runs(made, filters).runs) == expected


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"participants": ["x"]}, "participants: no run has x; choose from those found"),
        ({"tasks": ["nbak"]}, "did you mean nback? (found: mag, nback, rest)"),
        ({"participants": ["2"]}, "did you mean 02?"),
        (
            {"participants": ["01"], "tasks": ["rest"]},
            "4 runs found, 3 left before tasks rest, none after; widen that filter (left were: "
            "sub-01_ses-a_task-mag_part-mag, sub-01_ses-a_task-nback_run-01, ",
        ),
    ],
)
def test_filters_that_leave_nothing_say_which(
    made: Path, filters: bids.Filters, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        bids.index_runs(made, filters)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        bids.index_runs(tmp_path / "missing")


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no sub-\* folder"):
        bids.index_runs(tmp_path)


def test_a_study_without_bold(tmp_path: Path) -> None:
    study = make(tmp_path / "study", "sub-01_T1w.nii.gz", "sub-02_T1w.nii.gz", "sub-02_T2w.nii")
    words = r"no run found \(images found: 2 T1w, 1 T2w\); needs files \S+\Z"
    with pytest.raises(InputError, match=words):
        bids.index_runs(study)


def test_a_study_of_phase_alone(tmp_path: Path) -> None:
    study = make(tmp_path / "study", "sub-01_task-rest_part-phase" + BOLD)
    with pytest.raises(InputError, match=r"only phase images found \(1, part-phase\)"):
        bids.index_runs(study)


def test_one_name_for_two_files(made: Path) -> None:
    make(made, "sub-02_task-rest_bold.nii")
    both = r"sub-02_task-rest: two files found, \S+_bold\.nii\S* and \S+_bold\.nii\S*; remove one"
    with pytest.raises(InputError, match=both):
        bids.index_runs(made)
    make(made, "sub-01_ses-b_task-nback_run-02_bold.nii")
    with pytest.raises(InputError, match=r"run-02: two files found, .* \(first of 2 such runs\)"):
        bids.index_runs(made)


def test_two_files_of_a_run_that_is_not_wanted_do_no_harm(made: Path) -> None:
    make(made, "sub-02_task-rest_bold.nii")
    assert len(bids.index_runs(made, {"participants": ["01"]}).runs) == 3


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("sub-03/func/sub-03_task-rest_BOLD.nii.gz", "suffix 'BOLD'; needs _bold"),
        ("sub-03/func/sub-03_task-rest_bold.NII.GZ", "ends in .NII.GZ; needs .nii or .nii.gz"),
        ("sub-03/func/sub-03_task-rest_bold.img", "ends in .img; needs .nii or .nii.gz"),
        ("sub-03/func/sub-03_task-rest bold.nii.gz", "suffix 'task-rest bold'; needs _bold"),
        ("sub-03/func/sub-03_task-rest_bold (copy).nii.gz", "suffix 'bold (copy)'; needs _bold"),
        ("sub-03/func/sub-03_task-rest_fmri.nii.gz", "suffix 'fmri'; needs _bold"),
        ("sub-03/func/sub-03_task-r\u00e9st_bold.nii", "needs letters, digits, + and - only"),
        ("sub-03/func/sub-03_acq-1.5mm_bold.nii", "'.' in its name; needs letters"),
        ("sub-03/func/task-rest_bold.nii.gz", "begins with task-rest, its folder is sub-03"),
        ("sub-03/func/sub-02_task-x_bold.nii.gz", "begins with sub-02, its folder is sub-03"),
        ("sub-03/ses-1/func/sub-03_task-x_bold.nii", "folder is ses-1, its name has no session"),
        ("sub-03/ses-1/func/sub-03_ses-2_task-x_bold.nii", "is ses-1, its name has ses-2"),
        ("sub-03/func/sub-03_task-x_desc-preproc_bold.nii", "desc-preproc is the name of a deriv"),
        ("sub-foo-1/func/sub-foo-1_task-rest_bold.nii.gz", "folder 'sub-foo-1'; needs sub- and"),
        ("sub_03/func/sub_03_task-rest_bold.nii.gz", "folder 'sub_03'; needs sub- and"),
        ("sub-03_task-rest_bold.nii.gz", "lies in no subject's folder; needs sub-*/[ses-*/]func"),
    ],
)
def test_a_run_that_is_left_out_for_its_name_is_told(made: Path, path: str, fault: str) -> None:
    (made / path).parent.mkdir(parents=True, exist_ok=True)
    (made / path).touch()
    runs, misnamed = bids.index_runs(made)
    assert len(runs) == 4
    assert [(file, fault in words) for file, words in misnamed.left_out] == [(path, True)]
    assert misnamed.taken == ()


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("anat/sub-02_task-x_bold.nii", "lies in sub-02/anat; needs a folder func"),
        ("func/sub-02_run-1_task-x_bold.nii", "sub, run, task; needs sub, task, run"),
        ("func/sub-02_bold.nii", "has no task"),
        ("func/sub-02_task-my_task_bold.nii", "label '' of task; needs letters, digits and +"),
        ("func/sub-02_task-two-back_bold.nii", "label 'two-back' of task; needs letters"),
        ("func/sub-02_task-x_run-a_bold.nii", "run-a; needs a number"),
        ("func/sub-02_task-x_foo-1_bold.nii", "foo-1 is no entity of a BOLD file"),
    ],
)
def test_an_odd_name_is_taken_and_told(made: Path, path: str, fault: str) -> None:
    (made / "sub-02" / path).parent.mkdir(parents=True, exist_ok=True)
    (made / "sub-02" / path).touch()
    runs, misnamed = bids.index_runs(made)
    assert made / "sub-02" / path in [run.source for run in runs]
    assert [(file, fault in words) for file, words in misnamed.taken] == [(f"sub-02/{path}", True)]
    assert misnamed.left_out == ()


def test_what_is_no_run_is_not_told(made: Path) -> None:
    make(made, "sub-02_T1w.nii.gz", "sub-02_task-x_sbref.nii", "._sub-02_task-rest_bold.nii.gz")
    make(
        made,
        "sub-02_task-rest_bold.txt",
        "sub-02_task-rest_boldref.nii.gz",
        "sub-02_stat-tsnr_boldmap.nii.gz",
    )
    assert not any(bids.index_runs(made).misnamed)


def test_a_refusal_names_what_was_left_out(tmp_path: Path) -> None:
    files = [f"sub-{number}_task-rest_BOLD.nii.gz" for number in range(1, 6)]
    study = make(tmp_path / "study", *files)
    words = (
        r"no run found \(images found: none\); needs files .*; left out for their names: 5, "
        r"sub-1/func/sub-1_task-rest_BOLD.nii.gz \(suffix 'BOLD'; needs _bold\), .* and 2 more\Z"
    )
    with pytest.raises(InputError, match=words):
        bids.index_runs(study)
    make(study, "sub-1_task-nback" + BOLD)
    with pytest.raises(InputError, match=r"no run has rest; .*; left out for their names: 5, "):
        bids.index_runs(study, {"tasks": ["rest"]})


def test_sidecars_are_inherited_the_nearer_the_stronger(made: Path) -> None:
    run = bids.index_runs(made).runs[1].source
    for path, values in {
        made / "bold.json": {"far": 0, "a": 0},
        made / "task-nback_bold.json": {"a": 1, "b": 1},
        made / "task-rest_bold.json": {"a": 9},
        made / "sub-01" / "sub-01_bold.json": {"b": 2, "c": 2},
        made / "sub-01/ses-a/func/sub-01_ses-a_task-nback_run-01_bold.json": {"c": 3},
        made / "sub-01/ses-a/func/sub-01_ses-a_task-nback_run-01_sbref.json": {"c": 9},
    }.items():
        path.write_text(json.dumps(values))
    assert bids.sidecar_metadata(run, made) == {"far": 0, "a": 1, "b": 2, "c": 3}
    assert bids.sidecar_metadata(run) == {"far": 0, "a": 1, "b": 2, "c": 3}


def test_outside_a_study_the_json_beside_counts_alone(tmp_path: Path) -> None:
    run = tmp_path / "in" / "functional.nii.gz"
    run.parent.mkdir()
    (tmp_path / "functional.json").write_text('{"far": 1}')
    assert bids.sidecar_metadata(run) == {}
    (run.parent / "functional.json").write_text('{"RepetitionTime": 2}')
    assert bids.sidecar_metadata(run) == {"RepetitionTime": 2}


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_broken_sidecar_is_named(made: Path, text: str) -> None:
    (made / "bold.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"bold\.json"):
        bids.sidecar_metadata(bids.index_runs(made).runs[0].source, made)


def test_uri(made: Path) -> None:
    source = bids.index_runs(made).runs[3].source
    assert bids.bids_uri(source, made) == "bids:raw:sub-02/func/sub-02_task-rest_bold.nii.gz"
    reference = made / "derivatives" / "mean + 50% [\u00e9]#1.nii"
    uri = "bids:raw:derivatives/mean%20+%2050%25%20%5B%C3%A9%5D%231.nii"
    assert bids.bids_uri(reference, made) == uri


def test_a_relative_reference_leads_there(tmp_path: Path) -> None:
    """From where the folder really is, whatever links lead to it."""
    for folder in ("raw data", "disk/out"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "raw data" / "a?.nii").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    reference = bids.relative_reference(tmp_path / "raw data" / "a?.nii", tmp_path / "link")
    assert reference == "../../raw%20data/a%3F.nii"
    assert (tmp_path / "link" / unquote(reference)).is_file()


@pytest.mark.parametrize(
    ("run", "folder"),
    [
        ("sub-01_ses-a_task-x", "sub-01/ses-a/func"),
        ("sub-01_task-ses", "sub-01/func"),
        ("functional", "func"),
    ],
)
def test_folder_of_outputs(run: str, folder: str) -> None:
    assert str(bids.derivative_folder(run)) == folder


@pytest.mark.parametrize(
    ("run", "ending", "entities", "without", "name"),
    [
        ("sub-01_task-x", "bold.nii.gz", {"desc": "hmc"}, (), "sub-01_task-x_desc-hmc_bold.nii.gz"),
        (
            "sub-01_task-x_echo-2",
            "xfm.txt",
            {"from": "orig", "to": "boldref", "mode": "image", "desc": "hmc"},
            ["echo"],
            "sub-01_task-x_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt",
        ),
        ("sub-01_desc-old", "bold.json", {"desc": "hmc"}, (), "sub-01_desc-hmc_bold.json"),
        ("functional", "mask.nii.gz", {"desc": "brain"}, (), "functional_desc-brain_mask.nii.gz"),
    ],
)
def test_names_of_outputs(
    run: str, ending: str, entities: dict[str, str], without: list[str], name: str
) -> None:
    assert bids.derivative_name(run, ending, entities, without=without) == name


def test_name_of_a_run() -> None:
    assert bids.run_name(Path("in/sub-01_task-x_bold.nii.gz")) == "sub-01_task-x"
    assert bids.run_name(Path("functional.nii")) == "functional"
    assert bids.run_name(Path("v1.2_bold.nii.gz")) == "v1.2"


@given(
    st.lists(st.from_regex(r"[a-z]{1,6}(-[a-zA-Z0-9]{0,4}(-[a-z])?)?", fullmatch=True), min_size=1)
)
@example(["sub-01", "task-rest", "bold"])
@example(["sub-01", "sub-02", "bold"])
@example(["run200", "task-a", "echo-1"])
def test_entities_are_those_of_bids2table(parts: list[str]) -> None:
    name = "_".join(parts) + ".nii.gz"
    expected = bids2table.parse_bids_entities(name)
    expected = {key: label for key, label in expected.items() if key not in ("ext", "datatype")}
    assert bids._entities(name) == expected
