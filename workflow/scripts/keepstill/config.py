"""A study's configuration: checked against its schema, and turned into settings."""

import contextlib
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from keepstill.bids import FILTERS, Filters
from keepstill.errors import SettingsError
from keepstill.manifest import REFERENCES
from keepstill.settings import RealignSettings

Config = Mapping[str, Any]
PATHS = ("bids_dir", "output_dir", "stage_root")


def read_schema(path: Path) -> dict[str, Any]:
    """The JSON schema in a YAML file."""
    import yaml

    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def check_config(config: Config, schema: Mapping[str, Any]) -> None:
    """Refuse a configuration that does not fit its schema.

    Raises
    ------
    SettingsError
        One line on the first value that does not fit: which, what was found, what is needed.
    """
    from jsonschema import Draft202012Validator

    errors = Draft202012Validator(schema).iter_errors(config)
    for error in sorted(errors, key=lambda error: (len(error.path), str(error.path))):
        where = "".join(f"{part}: " for part in error.path)
        if error.validator == "additionalProperties":
            known = error.schema["properties"]
            unknown = sorted(set(error.instance) - set(known))[0]
            raise SettingsError(
                f"config: {where}{unknown!r} is unknown; {_nearest(unknown, known)}"
            )
        if error.validator == "required":
            missing = sorted(set(error.validator_value) - set(error.instance))[0]
            raise SettingsError(f"config: {where}{missing} is missing; give it a value")
        needs = _schema_at(schema, error.path).get("needs", error.message)
        raise SettingsError(f"config: {where}{error.instance!r} found; needs {needs}")


def with_types(config: Config, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose text is read as what the schema wants where it wants no text.

    Snakemake hands ``--config pages=false estimate={degree: 3}`` on as text.
    """
    properties = schema["properties"]
    return {name: _typed(value, properties.get(name, {})) for name, value in config.items()}


def with_absolute_paths(config: Config, given: Iterable[str], clone: Path) -> dict[str, Any]:
    """A checked configuration whose paths are absolute.

    Parameters
    ----------
    config : mapping
    given : iterable of str
        Keys that the caller gave: their paths are relative to the working directory, those of
        the shipped configuration to the clone.
    clone : Path

    Raises
    ------
    SettingsError
        If the input is the caller's and the output directory that of the demo, if both are one,
        or if Snakemake could not handle a path.
    """
    given = set(given)
    paths = [*PATHS]
    if config["reference"] not in REFERENCES:
        paths.append("reference")
    absolute = dict(config)
    for name in paths:
        base = Path.cwd() if name in given else clone
        absolute[name] = os.path.abspath(base / Path(config[name]).expanduser())
    for name in ("output_dir", "stage_root"):
        if set("{}") & set(absolute[name]):  # they are Snakemake's, and cannot be escaped there
            raise SettingsError(f"config: {name}: {absolute[name]} has braces; choose another")
    bids_dir, output_dir = Path(absolute["bids_dir"]), Path(absolute["output_dir"])
    proposed = bids_dir / "derivatives" / "keepstill"
    if "bids_dir" in given and "output_dir" not in given:
        raise SettingsError(
            f"config: bids_dir is given and output_dir is not; add it, such as "
            f"output_dir={proposed}"
        )
    if bids_dir == output_dir:
        raise SettingsError(
            f"config: output_dir: {output_dir} is bids_dir too; choose another, such as {proposed}"
        )
    return absolute


def settings_of(config: Config) -> RealignSettings:
    """The settings in a checked configuration with absolute paths.

    Raises
    ------
    SettingsError
        If the reference is a file that is not there.
    """
    reference = config["reference"]
    if reference not in REFERENCES and not Path(reference).is_file():
        raise SettingsError(
            f"config: reference: {reference!r} found; needs {', '.join(REFERENCES)} "
            "or an existing file"
        )
    defaults = RealignSettings()
    values = {setting.name: config[setting.name] for setting in fields(RealignSettings)}
    values["estimate"] = _like(defaults.estimate, config["estimate"])
    return RealignSettings.from_dict(_like(defaults, values))


def filters_of(config: Config) -> Filters:
    """The filters in a checked configuration; a single label stands for a list of one."""
    filters = {}
    for name in FILTERS:
        labels = config.get(name)
        filters[name] = [labels] if isinstance(labels, str | int) else labels
    return filters


def _typed(value: Any, schema: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping) and "properties" in schema:
        return with_types(value, schema)
    if not isinstance(value, str):
        return value
    types = schema.get("type", "string")
    types = [types] if isinstance(types, str) else types
    if value in ("null", "None") and "null" in types:
        return None
    if "boolean" in types:
        return {"true": True, "false": False}.get(value.lower(), value)
    if "string" not in types:
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


def _like(defaults: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with a float wherever the default is one: 1 and 1.0 are one setting, one key."""
    return {
        name: float(value) if isinstance(getattr(defaults, name, None), float) else value
        for name, value in values.items()
    }


def _schema_at(schema: Mapping[str, Any], path: Iterable[str | int]) -> Mapping[str, Any]:
    """Schema of the named value; of a list's item, that of the list."""
    for part in path:
        if isinstance(part, str):
            schema = schema["properties"][part]
    return schema


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
