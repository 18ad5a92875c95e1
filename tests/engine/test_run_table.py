"""Runs that a table lists: their names, and refusals that name the line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstill import run_table
from keepstill.bids import derivative_folder, lone_metadata, run_name
from keepstill.config import check_config, effective_config, filters_of, read_schema, run_table_of
from keepstill.config_files import load_config
from keepstill.errors import InputError, SettingsError
from keepstill.run_table import read_run_table
from keepstill.study import Study, read_study

CLONE = Path(__file__).parents[2]
HEADER = "path\tsubject\tsession\ttask\trun\techo\tjson"


def table_of(folder: Path, *lines: str, header: str = HEADER) -> Path:
    """A table, and empty files a.nii.gz, b.nii and a note.json to name in it."""
    for name in ("a.nii.gz", "deep/b.nii", "note.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"RepetitionTime": 2}')
    table = folder / "runs.tsv"
    table.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return table


def study_of(table: Path, **config: object) -> Study:
    given = {"runs": str(table), "output_dir": str(table.parent / "out"), **config}
    shipped, _ = load_config([], [], CLONE)
    return read_study(shipped | given, given, CLONE)


def refusal(table: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_run_table(table)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(table))
    return message.removeprefix(str(table))


def test_names_are_made_of_the_columns(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        "deep/b.nii\tsub-7\t\trest\trun-02\t1\tnote.json",
        f"{tmp_path}/a.nii.gz\t01\tses-pre\t\t\t\tn/a",
    )
    first, second = read_run_table(table)
    assert first.name == "sub-01_ses-pre_task-unnamed"
    assert (first.subject, first.session) == ("01", "pre")
    assert first.source == tmp_path / "a.nii.gz"
    assert first.sidecar == tmp_path / "a.json"
    assert second.name == "sub-7_task-rest_run-02_echo-1"
    assert second.session is None
    assert second.entities == {"sub": "7", "task": "rest", "run": "02", "echo": "1"}
    assert second.source == tmp_path / "deep" / "b.nii"
    assert second.sidecar == tmp_path / "note.json"
    assert str(derivative_folder(first.name)) == "sub-01/ses-pre/func"


def test_two_columns_are_enough_in_any_order(tmp_path: Path) -> None:
    table = table_of(tmp_path, "01\ta.nii.gz", header="subject\tpath")
    assert [run.name for run in read_run_table(table)] == ["sub-01_task-unnamed"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_tables_of_any_system(tmp_path: Path, encoding: str, ending: str) -> None:
    table = table_of(tmp_path)
    lines = ["path\tsubject", "a.nii.gz\t01", "", "deep/b.nii\t02\t", ""]
    table.write_bytes(ending.join(lines).encode(encoding))
    assert [run.subject for run in read_run_table(table)] == ["01", "02"]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("path\tsubjects", ", line 1: column 'subjects' is unknown; did you mean subject?"),
        ("path\tzzz", ", line 1: column 'zzz' is unknown; known: path, subject, session"),
        ("path\tpath\tsubject", ", line 1: column 'path' stands there twice; remove one"),
        ("path\ttask", ", line 1: column 'subject' is missing; add it"),
        ("path,subject", "; columns are separated by tabs"),
        ("", ", line 1: column '' is unknown"),
    ],
)
def test_a_header_that_does_not_fit(tmp_path: Path, header: str, words: str) -> None:
    assert words in refusal(table_of(tmp_path, "a.nii.gz\t01", header=header))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("c.nii.gz\t01", "/c.nii.gz: no such file; paths are relative to the table's folder"),
        ("a.nii.gz\t01\t\t\t\t\tno.json", "/no.json: no such file"),
        ("deep\t01", "/deep is a folder; needs a file"),
        ("note.json\t01", "/note.json found; needs a .nii or .nii.gz file"),
        ("a.nii.gz", "no subject found; every run needs one"),
        ("n/a\t01", "no path found; every run needs one"),
        ("a.nii.gz\t0_1", "subject '0_1' found; needs letters a to z and digits only"),
        ("a.nii.gz\tsub-", "subject 'sub-' found; needs letters"),
        ("a.nii.gz\t01\tprä", "session 'prä' found; needs letters a to z and digits only"),
        ("a.nii.gz\t01\t../x", "session '../x' found; needs letters"),
        ("a.nii.gz\t01\t\t\tone", "run 'one' found; needs a whole number"),
        ("a.nii.gz\t01\t\t\t\t1\t\tmore", "8 cells found; needs 7, as the header has"),
        ("deep/b.nii\t09", "sub-09_task-unnamed is what line 2 is called too; tell them apart"),
        ("deep/b.nii\tsub-09\t\ttask-unnamed", "sub-09_task-unnamed is what line 2 is called"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path: Path, line: str, words: str) -> None:
    message = refusal(table_of(tmp_path, "a.nii.gz\t09", "", line))
    assert message.startswith(", line 4: ")
    assert words in message


def test_the_first_of_many_bad_lines_is_told(tmp_path: Path) -> None:
    message = refusal(table_of(tmp_path, "a.nii.gz\t1", "x.nii\t2", "y.nii\t3", "a.nii.gz\t1"))
    assert message.startswith(", line 3: ")
    assert message.endswith("(first of 3 lines to mend)")


def test_a_table_without_runs_and_no_table(tmp_path: Path) -> None:
    assert "no run found" in refusal(table_of(tmp_path))
    assert "No such file or directory" in refusal(tmp_path / "other.tsv")
    (tmp_path / "latin.tsv").write_bytes(b"path\tsubject\n\xe4.nii\t01\n")
    assert "it is not UTF-8 text" in refusal(tmp_path / "latin.tsv")


def test_a_link_that_is_yet_to_be_fetched_is_left_to_stage(tmp_path: Path) -> None:
    table = table_of(tmp_path, "annexed.nii.gz\t01")
    (tmp_path / "annexed.nii.gz").symlink_to(".git/annex/objects/x")
    assert len(read_run_table(table)) == 1


@given(st.text(max_size=60))
def test_any_text_is_a_table_or_is_refused(text: str) -> None:
    """Below the border there are no other errors."""
    folder = Path("/nowhere")
    columns = list(run_table.COLUMNS)
    for cells in (text, f"a.nii\t{text}"):
        with pytest.raises(InputError):
            run_table._run(run_table._cells(cells, columns), folder)


def test_metadata_are_those_of_the_json_and_the_task(tmp_path: Path) -> None:
    note = tmp_path / "note.json"
    assert lone_metadata(note, "sub-1_task-rest") == {"TaskName": "rest"}
    note.write_text(json.dumps({"RepetitionTime": 2}))
    assert lone_metadata(note, "sub-1_task-x") == {"RepetitionTime": 2, "TaskName": "x"}
    note.write_text(json.dumps({"TaskName": "At rest"}))
    assert lone_metadata(note, "sub-1_task-rest") == {"TaskName": "At rest"}
    note.unlink()
    note.symlink_to("gone.json")
    with pytest.raises(InputError, match="not there; fetch it"):
        lone_metadata(note, "sub-1_task-rest")


def test_a_study_of_a_table(tmp_path: Path) -> None:
    lines = ("a.nii.gz\t01\t\trest", "deep/b.nii\t02\t\trest\t\t\tnote.json")
    study = study_of(table_of(tmp_path, *lines))
    assert study.bids_dir is None
    assert list(study.runs) == ["sub-01_task-rest", "sub-02_task-rest"]
    assert study.origin(study.runs["sub-02_task-rest"]) == ["--sidecar", f"{tmp_path}/note.json"]
    assert study.metadata("sub-02_task-rest") == {"RepetitionTime": 2, "TaskName": "rest"}
    assert study.metadata("sub-01_task-rest") == {"TaskName": "rest"}
    assert study.make_plan().runs == tuple(study.runs)
    assert run_name(study.runs["sub-01_task-rest"].source) == "a"


def test_filters_hold_for_a_table_too(tmp_path: Path) -> None:
    table = table_of(tmp_path, "a.nii.gz\t01", "deep/b.nii\t02")
    assert list(study_of(table, participants=["02"]).runs) == ["sub-02_task-unnamed"]
    with pytest.raises(InputError, match=r"runs\.tsv: participants: no run has 3; .*01, 02"):
        study_of(table, participants=["3"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"runs": "t.tsv"}, "runs is given and output_dir is not"),
        ({"runs": "t.tsv", "bids_dir": "/d", "output_dir": "/o"}, "bids_dir is given too; leave"),
        ({"runs": "t.csv", "output_dir": "/o"}, "runs: 't.csv' found; needs run numbers, such"),
        ({"runs": ["t.tsv"], "output_dir": "/o"}, "the path of a .tsv table, or null"),
    ],
)
def test_tables_that_nobody_can_have_meant(values: dict[str, object], words: str) -> None:
    shipped, _ = load_config([], [], CLONE)
    with pytest.raises(SettingsError) as caught:
        effective_config(shipped | values, values, CLONE)
    assert words in str(caught.value)


def test_a_table_stands_in_the_place_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, given = load_config([], ["runs=t.tsv", "output_dir=out"], CLONE)
    effective = effective_config(config, given, CLONE)
    assert "bids_dir" not in effective
    assert effective["runs"] == f"{tmp_path}/t.tsv"
    assert run_table_of(effective) == tmp_path / "t.tsv"
    assert filters_of(effective)["runs"] is None
    again = effective_config(load_config([], [], CLONE)[0] | effective, effective, CLONE)
    assert again == effective


@pytest.mark.parametrize("runs", [1, "1", "run-01", [1, "02"], None, "a b/c d.tsv"])
def test_what_runs_may_be(runs: object) -> None:
    shipped, _ = load_config([], [], CLONE)
    schema = read_schema(CLONE / "config" / "config.schema.yaml")
    check_config(shipped | {"runs": runs}, schema)
