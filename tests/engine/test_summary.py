"""The table of all complete runs, worked out again from their tables of confounds."""

import json

import numpy as np
import pytest

import runs
from keepstill.__main__ import main
from keepstill.settings import RealignSettings
from keepstill.summary import DESCRIPTIONS

NAMES = ("sub-01_ses-a_task-rest_run-2", "sub-02_task-rest_echo-1", "sub-10_task-nback")


def call(*arguments, code=0):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == code


@pytest.fixture(scope="module")
def derivatives(tmp_path_factory):
    """Three runs: one like any other, one without reslicing, one with dead volumes."""
    raw = tmp_path_factory.mktemp("raw")
    (raw / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.11.0"}')
    out = raw / "derivatives" / "keepstill"
    choices = (
        RealignSettings(fd_filter="lowpass"),
        RealignSettings(reslice=False),
        RealignSettings(),
    )
    for seed, (name, settings) in enumerate(zip(NAMES, choices, strict=True)):
        data = runs.ball_run(8, seed=seed)
        if settings == RealignSettings():
            data[..., [3, 6]] = 0
        folder = raw / name.split("_")[0] / "func"
        source = runs.write_run(folder / f"{name}_bold.nii.gz", data)
        runs.collected(source, out, settings, bids_dir=raw)
    return out


@pytest.fixture(scope="module")
def table(derivatives):
    call("summary", derivatives)
    return runs.read_table(derivatives / "summary.tsv")


def confounds(derivatives, name):
    (path,) = derivatives.rglob(f"{name.removesuffix('_echo-1')}*_desc-confounds_timeseries.tsv")
    return runs.read_table(path)


def test_a_row_a_run_with_its_labels(table):
    assert table["name"] == list(NAMES)
    assert table["subject"] == ["01", "02", "10"]
    assert table["session"] == ["a", "n/a", "n/a"]
    assert table["task"] == ["rest", "rest", "nback"]
    assert table["run"] == ["2", "n/a", "n/a"]
    assert table["echo"] == ["n/a", "1", "n/a"]


def test_figures_are_those_of_the_tables_of_confounds(derivatives, table):
    for row, name in enumerate(NAMES):
        columns = confounds(derivatives, name)
        status = np.array(columns["status"])
        fd_mm = runs.numbers(columns["framewise_displacement"])
        spikes = [cells for column, cells in columns.items() if column.startswith("motion_outlier")]
        flagged = {cells.index("1") for cells in spikes} - set(np.flatnonzero(status == "failed"))
        error_mm = np.median(runs.numbers(columns["expected_error"])[status == "ok"])
        expected = {
            "n_volumes": 8,
            "tr_s": 2,
            "mean_fd_mm": np.nanmean(fd_mm),
            "max_fd_mm": np.nanmax(fd_mm),
            "n_outliers": len(flagged),
            "n_failed": (status == "failed").sum(),
            "n_non_steady": 0,
            "median_expected_error_mm": error_mm,
        }
        for figure, value in expected.items():
            assert float(table[figure][row]) == pytest.approx(value, rel=1e-7), (name, figure)
        assert 0 < error_mm < 1
    assert table["failed_volumes"] == ["n/a", "n/a", "3,6"]
    known = [cell != "n/a" for cell in table["mean_fd_filtered_mm"]]
    assert known == [True, False, False]
    for figure in ("tsnr_before", "tsnr_after", "mean_std_dvars"):
        assert [cell != "n/a" for cell in table[figure]] == [True, False, True], figure


def test_the_json_says_what_each_column_is(derivatives, table):
    said = json.loads((derivatives / "summary.json").read_text())
    assert list(table) == list(DESCRIPTIONS)
    assert said.keys() == table.keys()
    for name, column in said.items():
        assert column["Description"]
        assert ("Units" in column) == (name in list(table)[6:-1]), name


def test_the_validator_is_told_to_look_away(derivatives, table):
    assert "summary.*" in (derivatives / ".bidsignore").read_text().splitlines()


def test_the_same_bytes_anywhere(derivatives, table, tmp_path, capsys):
    call("summary", derivatives, "--out", tmp_path / "x" / "y.tsv")
    assert capsys.readouterr().out == f"3 runs in {tmp_path / 'x' / 'y.tsv'}\n"
    for ending in (".tsv", ".json"):
        made, again = derivatives / f"summary{ending}", tmp_path / "x" / f"y{ending}"
        assert made.read_bytes() == again.read_bytes()


def test_a_run_that_lacks_a_file_is_left_out_and_told(derivatives, table, tmp_path, caplog):
    (path,) = derivatives.rglob("sub-10*_xfm.json")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    (derivatives / "manifests" / "damaged.json").write_text("{")
    try:
        call("summary", derivatives, "--out", tmp_path / "y.tsv")
    finally:
        path.write_bytes(content)
        (derivatives / "manifests" / "damaged.json").unlink()
    assert runs.read_table(tmp_path / "y.tsv")["name"] == list(NAMES[:2])
    assert "2 runs left out, whose files are not all there" in caplog.text


def test_figures_of_another_version_are_missing(derivatives, tmp_path):
    path = derivatives / "manifests" / f"{NAMES[0]}.json"
    content = path.read_text()
    manifest = json.loads(content)
    del manifest["summary"]["median_expected_error_mm"]
    path.write_text(json.dumps(manifest))
    try:
        call("summary", derivatives, "--out", tmp_path / "y.tsv")
    finally:
        path.write_text(content)
    assert runs.read_table(tmp_path / "y.tsv")["median_expected_error_mm"][0] == "n/a"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("empty",), "0 manifests found, none of a complete run; needs an output_dir of keepstill"),
        (("empty", "--out", "x.csv"), "--out: x.csv found; needs the name of a .tsv file"),
    ],
)
def test_a_refusal_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call("summary", *arguments, code=2)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("keepstill: ")


def test_a_place_that_cannot_be_written(derivatives, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    call("summary", derivatives, "--out", tmp_path / "file" / "x.tsv", code=2)
    assert "choose another --out" in capsys.readouterr().err
