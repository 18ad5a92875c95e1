"""The configuration: one truth in four places, and errors that say what is needed."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from keepstill import config as engine_config
from keepstill.config_files import parse_entries
from keepstill.errors import SettingsError
from keepstill.settings import RealignSettings

CONFIG = Path(__file__).parents[2] / "config"
SCHEMA = engine_config.read_schema(CONFIG / "config.schema.yaml")
SHIPPED = yaml.safe_load((CONFIG / "config.yaml").read_text(encoding="utf-8"))


def leaves(properties: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key of a schema, nested ones as estimate.degree -> its own schema."""
    found = {}
    for name, value in properties.items():
        if "properties" in value:
            found |= leaves(value["properties"], f"{prefix}{name}.")
        elif name != "pathvars":
            found[prefix + name] = value
    return found


def test_the_shipped_configuration_is_the_schema_s_defaults() -> None:
    engine_config.check_config(SHIPPED, SCHEMA)
    defaults = {name: schema["default"] for name, schema in leaves(SCHEMA["properties"]).items()}
    nested = {
        f"{outer}.{name}": value
        for outer in ("estimate", "ladder")
        for name, value in SHIPPED[outer].items()
    }
    assert {**SHIPPED, **nested} == {
        **defaults,
        "estimate": SHIPPED["estimate"],
        "ladder": SHIPPED["ladder"],
    }


def test_the_shipped_configuration_is_the_engine_s_defaults() -> None:
    assert engine_config.settings_of(SHIPPED) == RealignSettings()
    names = {setting.name for setting in fields(RealignSettings)}
    assert names - {"shared_reference"} <= set(SHIPPED)


@pytest.mark.parametrize(("name", "schema"), leaves(SCHEMA["properties"]).items())
def test_every_key_is_explained(name: str, schema: dict[str, Any]) -> None:
    assert schema["description"] and schema["needs"]
    assert "default" in schema
    assert schema["unit"] == "mm" or not name.endswith("_mm")
    assert schema["unit"] == "voxels" or not name.endswith("_voxels")
    if schema.get("type") in ("number", "integer"):
        assert "maximum" in schema and {"minimum", "exclusiveMinimum"} & schema.keys()
    readme = (CONFIG / "README.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in readme if line.startswith(f"| `{name}` |"))
    _, _, unit, default, explained, _ = (cell.strip() for cell in row.split("|"))
    assert unit == schema["unit"] or schema["unit"] in ("label", "none")
    shown = {None: "null", True: "true", False: "false"}.get(
        schema["default"], str(schema["default"])
    )
    assert default.startswith(f"`{shown}`")
    bounds = (schema.get(bound) for bound in ("minimum", "exclusiveMinimum", "maximum"))
    allowed = [*schema.get("enum", ()), *(bound for bound in bounds if bound is not None)]
    assert all(str(value) in explained for value in allowed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"participant": ["01"]}, "'participant' is unknown; did you mean participants?"),
        ({"zzz": 1}, "'zzz' is unknown; known: affine_source"),
        ({"estimate": {"degre": 3}}, "estimate: 'degre' is unknown; did you mean degree?"),
        ({"degre": 3}, "'degre' is unknown; did you mean degree in estimate?"),
        ({"interpolation_degree": 9}, "interpolation_degree: 9 found; needs a whole number from 1"),
        ({"interpolation_degree": 2.5}, "interpolation_degree: 2.5 found"),
        ({"fd_radius_mm": 0}, "fd_radius_mm: 0 found; needs a number of mm above 0"),
        ({"fd_radius_mm": float("nan")}, "fd_radius_mm: nan found; needs a number of mm"),
        ({"fd_outlier_mm": float("inf")}, "fd_outlier_mm: inf found; needs a number of mm"),
        ({"estimate": {"tolerance_mm": "1 mm"}}, "estimate: tolerance_mm: '1 mm' found; needs"),
        ({"output_dtype": "int8"}, "output_dtype: 'int8' found; needs float32 or int16"),
        ({"output_desc": "a_b"}, "output_desc: 'a_b' found; needs letters and digits only"),
        ({"participants": 1}, "participants: 1 found; needs labels in quotes"),
        ({"participants": [1]}, "participants: 0: 1 found; needs labels in quotes"),
        ({"participants": []}, "participants: [] found; needs labels"),
        ({"pages": "maybe"}, "pages: 'maybe' found; needs true or false"),
        ({"bids_dir": None}, "bids_dir: None found; needs the path of a folder"),
    ],
)
def test_a_misfit_is_one_line(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        engine_config.check_config(SHIPPED | changed, SCHEMA)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_left_out_has_its_default() -> None:
    less = {name: value for name, value in SHIPPED.items() if name not in ("pages", "estimate")}
    assert engine_config.with_defaults(less, SCHEMA) == SHIPPED
    some = engine_config.with_defaults(less | {"estimate": {"degree": 3}}, SCHEMA)
    assert some["estimate"] == SHIPPED["estimate"] | {"degree": 3}


def test_a_missing_key() -> None:
    less = {name: value for name, value in SHIPPED.items() if name != "output_dir"}
    with pytest.raises(SettingsError, match="output_dir is missing"):
        engine_config.check_config(less, SCHEMA)


def test_text_from_the_command_line() -> None:
    given = {
        "pages": "false",
        "participants": "null",
        "tasks": "rest",
        "fd_radius_mm": "40",
        "estimate": {"degree": "3", "tolerance_mm": "1e-3"},
        "reference": "first",
        "unknown": "true",
    }
    assert engine_config.with_types(given, SCHEMA) == {
        "pages": False,
        "participants": None,
        "tasks": "rest",
        "fd_radius_mm": 40,
        "estimate": {"degree": 3, "tolerance_mm": 1e-3},
        "reference": "first",
        "unknown": "true",
    }


@pytest.mark.parametrize("entry", ["outside=nan", "outside=NaN", "outside='nan'"])
def test_nan_is_a_word_where_it_is_a_choice(entry: str) -> None:
    """Snakemake takes it for a number on the command line, and only there."""
    given = parse_entries([entry])
    typed = engine_config.with_types(given, SCHEMA)
    engine_config.check_config(SHIPPED | typed, SCHEMA)
    assert engine_config.settings_of(SHIPPED | typed).outside == "nan"
    with pytest.raises(SettingsError, match="needs a number of mm"):
        number = engine_config.with_types(parse_entries(["fd_radius_mm=nan"]), SCHEMA)
        engine_config.check_config(SHIPPED | number, SCHEMA)


def test_whole_numbers_and_fractions_are_one_setting() -> None:
    whole = engine_config.settings_of(SHIPPED | {"fd_radius_mm": 50})
    assert whole.to_json() == RealignSettings().to_json()


def test_a_single_label_is_a_list_of_one() -> None:
    filters = engine_config.filters_of({"participants": "01", "runs": 2, "tasks": None})
    assert filters == {"participants": ["01"], "sessions": None, "tasks": None, "runs": [2]}


def test_paths_are_relative_to_who_gave_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, here = tmp_path / "clone", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    shipped = engine_config.with_absolute_paths(SHIPPED, (), clone)
    assert shipped["bids_dir"] == str(clone / SHIPPED["bids_dir"])
    given = {"bids_dir": "../study", "output_dir": "out", "reference": "mean.nii"}
    mixed = engine_config.with_absolute_paths(SHIPPED | given, given, clone)
    assert mixed["bids_dir"] == str(tmp_path / "study")
    assert mixed["output_dir"] == str(here / "out")
    assert mixed["reference"] == str(here / "mean.nii")
    assert mixed["stage_root"] == SHIPPED["stage_root"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bids_dir": "/data"}, "output_dir=/data/derivatives/keepstill"),
        ({"bids_dir": "/data", "output_dir": "/data"}, "is bids_dir too"),
        ({"output_dir": "/out/{run}"}, "has braces"),
    ],
)
def test_paths_that_would_do_harm(given: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=words):
        engine_config.with_absolute_paths(SHIPPED | given, given, tmp_path)


def test_a_reference_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match="lowest-motion, sbref or an existing file"):
        engine_config.settings_of(SHIPPED | {"reference": "/nowhere/mean.nii"})


def test_one_space_is_not_for_itk() -> None:
    shared = SHIPPED | {"reference_scope": "session"}
    assert engine_config.settings_of(shared | {"check": "itk"}).check == "itk"
    with pytest.raises(SettingsError, match="needs run, or engine: native"):
        engine_config.settings_of(shared | {"engine": "itk"})


@pytest.mark.parametrize(
    ("output", "words"), [("sub-01", "lies among the raw data"), ("../file", "is no folder")]
)
def test_an_output_directory_that_will_not_do(output: str, words: str, tmp_path: Path) -> None:
    study = tmp_path / "study"
    study.mkdir()
    (tmp_path / "file").touch()
    config = {**SHIPPED, "bids_dir": str(study), "output_dir": str(study / output)}
    with pytest.raises(SettingsError, match=words):
        engine_config.with_absolute_paths(config, ["bids_dir", "output_dir"], CONFIG.parent)
    config["output_dir"] = str(study / "derivatives" / "keepstill")
    engine_config.with_absolute_paths(config, ["bids_dir", "output_dir"], CONFIG.parent)


@pytest.mark.parametrize("every", [4, 9])
def test_a_ladder_of_one_volume_is_refused(every: int) -> None:
    config = {**SHIPPED, "ladder": {"volumes": 4, "every_volume": every}}
    for read in (engine_config.effective_config, engine_config.ladder_config):
        with pytest.raises(SettingsError, match=rf"every_volume: {every} found .* from 1 to 3"):
            read(config, [], CONFIG.parent)
        config_of_two = {**config, "ladder": {"volumes": 4, "every_volume": 3}}
        assert read(config_of_two, [], CONFIG.parent)["ladder"]["repeats"] == 3


def test_the_ladder_asks_for_no_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {**SHIPPED, "bids_dir": "/data", "ladder_dir": "here"}
    found = engine_config.ladder_config(config, ["bids_dir", "ladder_dir"], CONFIG.parent)
    assert found["ladder_dir"] == str(tmp_path / "here") and "bids_dir" not in found
    assert found["stage_root"] == SHIPPED["stage_root"]
    with pytest.raises(SettingsError, match=r"ladder_dir: .* has braces"):
        engine_config.ladder_config(config | {"ladder_dir": "{run}"}, [], CONFIG.parent)
