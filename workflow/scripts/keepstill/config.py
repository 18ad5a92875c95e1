"""A study's configuration: checked against its schema, and turned into settings."""

import contextlib
import difflib
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from keepstill.bids import FILTERS, Filters
from keepstill.errors import SettingsError
from keepstill.run_table import TABLE_ENDING
from keepstill.settings import REFERENCES, SBREF, RealignSettings

Config = Mapping[str, Any]
SCHEMA = Path("config", "config.schema.yaml")  # in the clone
LADDER_PATHS = ("stage_root", "ladder_dir")
PATHS = ("bids_dir", "output_dir", *LADDER_PATHS)


def effective_config(config: Config, given: Iterable[str], clone: Path) -> dict[str, Any]:
    """The configuration as it counts: text typed, checked, complete, its paths absolute.

    Parameters
    ----------
    config : mapping
        As Snakemake or `config_files.load_config` has it.
    given : iterable of str
        Keys that the caller gave, on the command line or in a file of their own.
    clone : Path
        Folder of the Snakefile.

    Raises
    ------
    SettingsError
        If a key is unknown or missing, or a value is of no use.
    """
    effective = with_absolute_paths(_complete(config, clone), given, clone)
    if run_table_of(effective):
        del effective["bids_dir"]  # the table stands in its place
    return effective


def ladder_config(config: Config, given: Collection[str], clone: Path) -> dict[str, Any]:
    """As `effective_config`, of what the ladder reads; whether a study could be read is open.

    Raises
    ------
    SettingsError
        If a key is unknown or missing, or a value is of no use.
    """
    complete = _complete(config, clone)
    paths = {name: _absolute(complete[name], name in given, clone) for name in LADDER_PATHS}
    _refuse_braces(paths)
    return paths | {"ladder": complete["ladder"]}


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
    errors = _validator(schema).iter_errors(config)
    for error in sorted(errors, key=lambda error: (len(error.path), str(error.path))):
        where = "".join(f"{part}: " for part in error.path)
        if error.validator == "additionalProperties":
            known = error.schema["properties"]
            unknown = sorted(map(str, set(error.instance) - set(known)))[0]
            nearest = _nearest(unknown, _names(known))
            raise SettingsError(f"config: {where}{unknown!r} is unknown; {nearest}")
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


def with_defaults(config: Config, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in the schema's order, in which no key is missing that has a default."""
    complete = {}
    for name, described in schema["properties"].items():
        if "properties" in described:
            complete[name] = with_defaults(config.get(name, {}), described)
        elif name in config or "default" in described:
            complete[name] = config.get(name, described.get("default"))
    return complete


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
        if there are two inputs, or if Snakemake could not handle a path.
    """
    given = set(given)
    absolute = dict(config)
    for name in _paths_in(config):
        absolute[name] = _absolute(config[name], name in given, clone)
    _refuse_places(absolute, given)
    return absolute


def settings_of(config: Config) -> RealignSettings:
    """The settings in a checked configuration with absolute paths.

    Raises
    ------
    SettingsError
        If the reference is a file that is not there.
    """
    reference = config["reference"]
    known = (*REFERENCES, SBREF)
    if reference not in known and not Path(reference).is_file():
        raise SettingsError(
            f"config: reference: {reference!r} found; needs {', '.join(known)} or an existing file"
        )
    if config["engine"] == "itk" and config["reference_scope"] != "run":
        raise SettingsError(
            f"config: reference_scope: {config['reference_scope']} found with engine: itk, which "
            "realigns each run to a reference of its own; needs run, or engine: native"
        )
    defaults = RealignSettings()
    names = {setting.name for setting in fields(RealignSettings)} - {"shared_reference"}
    values = {name: config[name] for name in names}
    values["estimate"] = _like(defaults.estimate, config["estimate"])
    return RealignSettings.from_dict(_like(defaults, values))


def run_table_of(config: Config) -> Path | None:
    """The table that lists the runs; None if they are those of a data set."""
    runs = config.get("runs")
    if isinstance(runs, str) and runs.endswith(TABLE_ENDING):
        return Path(runs)
    return None


def filters_of(config: Config) -> Filters:
    """The filters in a checked configuration; a single label stands for a list of one."""
    filters = {}
    for name in FILTERS:
        labels = config.get(name)
        if name == "runs" and run_table_of(config):
            labels = None
        filters[name] = [labels] if isinstance(labels, str | int) else labels
    return filters


def _validator(schema: Mapping[str, Any]) -> Any:
    """A validator to which NaN and infinity are no numbers, since they pass every bound."""
    from jsonschema import Draft202012Validator, validators

    extend: Any = validators.extend  # it has no types

    def is_number(checker: Any, value: Any) -> bool:
        del checker
        is_real = isinstance(value, int | float) and not isinstance(value, bool)
        return is_real and math.isfinite(value)

    checker = Draft202012Validator.TYPE_CHECKER.redefine("number", is_number)
    return extend(Draft202012Validator, type_checker=checker)(schema)


def _complete(config: Config, clone: Path) -> dict[str, Any]:
    """A configuration whose text is typed, checked, and filled up with defaults."""
    schema = read_schema(clone / SCHEMA)
    config = with_types(config, schema)
    check_config(config, schema)
    complete = with_defaults(config, schema)
    _refuse_ladder(complete["ladder"])
    return complete


def _refuse_ladder(ladder: Mapping[str, int]) -> None:
    """Refuse a ladder whose classic rungs would realign volume 0 alone, to itself."""
    n_volumes, every = ladder["volumes"], ladder["every_volume"]
    if every >= n_volumes:
        raise SettingsError(
            f"config: ladder: every_volume: {every} found with volumes: {n_volumes}, which leaves "
            f"one volume to realign; needs a whole number from 1 to {n_volumes - 1}"
        )


def _absolute(path: str, is_given: bool, clone: Path) -> str:
    """An absolute path: the caller's is relative to the working directory, else to the clone."""
    return os.path.abspath((Path.cwd() if is_given else clone) / os.path.expanduser(path))


def _refuse_braces(paths: Mapping[str, str]) -> None:
    """Refuse paths with braces: they are Snakemake's, and cannot be escaped there."""
    for name, path in paths.items():
        if set("{}") & set(path):
            raise SettingsError(f"config: {name}: {path} has braces; choose another")


def _paths_in(config: Config) -> Iterator[str]:
    """Keys whose values are paths."""
    yield from PATHS
    if config["reference"] not in (*REFERENCES, SBREF):
        yield "reference"
    if run_table_of(config):
        yield "runs"


def _refuse_places(config: Config, given: Collection[str]) -> None:
    """Refuse absolute paths that would do harm or that nobody can have meant."""
    _refuse_braces({name: config[name] for name in ("output_dir", *LADDER_PATHS)})
    source = "runs" if run_table_of(config) else "bids_dir"
    if source == "runs" and {"runs", "bids_dir"} <= set(given):
        raise SettingsError(
            f"config: runs is a table, {config['runs']}, and bids_dir is given too; leave one out"
        )
    output_dir, folder = Path(config["output_dir"]).resolve(), Path(config[source]).resolve()
    proposed = (folder.parent if source == "runs" else folder) / "derivatives" / "keepstill"
    if source in given and "output_dir" not in given:
        raise SettingsError(
            f"config: {source} is given and output_dir is not; add it, such as "
            f"output_dir={proposed}"
        )
    if output_dir == folder:
        raise SettingsError(
            f"config: output_dir: {output_dir} is {source} too; choose another, such as {proposed}"
        )
    below = output_dir.relative_to(folder).parts if output_dir.is_relative_to(folder) else ()
    if source == "bids_dir" and below and below[0] != "derivatives":
        raise SettingsError(
            f"config: output_dir: {output_dir} lies among the raw data; choose another, "
            f"such as {proposed}"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise SettingsError(
            f"config: output_dir: {output_dir} is no folder; choose another, such as {proposed}"
        )


def _typed(value: Any, schema: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping) and "properties" in schema:
        return with_types(value, schema)
    if not isinstance(value, str):
        # On the command line the word is taken for a number.
        return str(value) if str(value) in schema.get("enum", ()) else value
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
    """Values with the kind of number that the default is: 1 and 1.0 are one setting, one key."""
    like = {name: getattr(defaults, name, None) for name in values}
    return {
        name: float(value)
        if isinstance(like[name], float)
        else int(value)
        if isinstance(value, float)
        else value
        for name, value in values.items()
    }


def _schema_at(schema: Mapping[str, Any], path: Iterable[str | int]) -> Mapping[str, Any]:
    """Schema of the named value; of a list's item, that of the list."""
    for part in path:
        if isinstance(part, str):
            schema = schema["properties"][part]
    return schema


def _names(properties: Mapping[str, Any]) -> dict[str, str]:
    """Every key, nested ones too -> how an error names it; Snakemake's own is left out."""
    nested = {
        name: f"{name} in {outer}"
        for outer, described in properties.items()
        for name in described.get("properties", ())
    }
    return nested | {name: name for name in properties if name != "pathvars"}


def _nearest(name: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {known[near[0]]}?" if near else f"known: {', '.join(sorted(known))}"
