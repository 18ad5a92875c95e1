"""Configurations from files and KEY=VALUE: as Snakemake reads them, and never evaluated."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.cli import parse_config
from snakemake.common.configfile import load_configfile
from snakemake.utils import update_config

from keepstill import config_files
from keepstill.__main__ import main
from keepstill.errors import SettingsError

CLONE = Path(__file__).parents[2]
ENTRIES = (
    "participants=[01,02]",
    "participants=01",
    "participants='01'",
    "sessions=",
    "tasks=rest",
    "tasks=[rest, 'two words']",
    "runs=2",
    "pages=False",
    "pages=false",
    "reslice=null",
    "fd_radius_mm=4e1",
    "fd_radius_mm=nan",
    "output_dir=/a=b/c",
    "output_dir=$(touch gotcha)",
    "output_dir=__import__('os').getcwd()",
    "output_dir={run}",
    "output_dir=[",
    "estimate={degree: 3}",
    "estimate={degree: {a: 1}}",
)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text("tasks: [rest]\nestimate: {degree: 3, min_overlap: 0.4}\n")
    return path


def effective(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What ``keepstill config`` prints."""
    with pytest.raises(SystemExit) as ended:
        main(["config", *arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    return dict(yaml.safe_load(out))


@pytest.mark.parametrize("entry", ENTRIES)
def test_values_are_read_as_snakemake_reads_them(entry: str) -> None:
    assert repr(config_files.parse_entries([entry])) == repr(parse_config([entry]))


def test_files_and_values_override_as_with_snakemake(own: Path) -> None:
    entries = ["estimate={degree: 4}", "estimate={max_iterations: 9}", "pages=false"]
    expected = load_configfile(str(CLONE / "config" / "config.yaml"))
    for values in (load_configfile(str(own)), parse_config(entries)):
        update_config(expected, values)
    config, given = config_files.load_config([own], entries, CLONE)
    assert config == expected
    assert given == {"tasks", "estimate", "pages"}
    assert config["estimate"]["min_overlap"] == 0.4


def test_the_effective_configuration_is_printed(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent)
    shipped = yaml.safe_load((CLONE / "config" / "config.yaml").read_text(encoding="utf-8"))
    found = effective(capsys, "--config", str(own), "output_dir=out", "participants=[01]")
    assert found == shipped | {
        "bids_dir": str(CLONE / shipped["bids_dir"]),
        "output_dir": str(own.parent / "out"),
        "ladder_dir": str(CLONE / shipped["ladder_dir"]),
        "participants": ["01"],
        "tasks": ["rest"],
        "estimate": shipped["estimate"] | {"degree": 3, "min_overlap": 0.4},
    }


def test_what_is_printed_can_be_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = effective(capsys, f"output_dir={tmp_path}/ö ü", "participants=[007,1e3,null]")
    again = tmp_path / "again.yaml"
    again.write_text(config_files.config_text(once), encoding="utf-8")
    assert once["participants"] == ["007", "1e3", "null"]
    assert effective(capsys, "--configfile", str(again)) == once


def test_values_may_stand_behind_config_as_with_snakemake(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert effective(capsys, "--config", "pages=false", "tasks=rest")["pages"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task=rest"], "config: 'task' is unknown; did you mean tasks?"),
        (["rest"], "config: 'rest' found; needs KEY=VALUE (a file goes behind --config)"),
        (["a b=1"], "config: 'a b=1' found; needs KEY=VALUE"),
        (["--config", "missing.yaml"], "config: missing.yaml: No such file or directory"),
        (
            ["reference=missing.nii"],
            "mean, median, lowest-motion, sbref or an existing file",
        ),
        (["bids_dir=/data"], "bids_dir is given and output_dir is not"),
    ],
)
def test_a_misfit_is_one_line_and_exit_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["config", *arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("keepstill: ") and words in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing found; needs lines of KEY: VALUE"),
        ("[1]", "list found; needs lines of KEY: VALUE"),
        ("a: [", "line 1"),
        ("a: \xff", "needs a YAML file"),
        ("a: !!python/object/apply:os.system [exit 1]", "python/object/apply:os.system"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError) as caught:
        config_files.read_config_file(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_templates_are_refused(own: Path) -> None:
    config_files.refuse_templates([own])
    own.write_text("__use_yte__: true\ntasks: ?['rest']\n")
    with pytest.raises(SettingsError, match="remove __use_yte__"):
        config_files.refuse_templates([own])


def test_the_clone_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_files.find_clone() == CLONE
    monkeypatch.setattr(config_files, "PACKAGE", tmp_path / "a" / "b" / "c")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="call this in the folder of keepstill's Snakefile"):
        config_files.find_clone()
    monkeypatch.chdir(CLONE)
    assert config_files.find_clone() == CLONE
