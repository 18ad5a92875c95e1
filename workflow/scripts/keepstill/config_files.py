"""Where a configuration comes from: the shipped file, files of the caller's own, KEY=VALUE.

The rules are those of Snakemake's ``--configfile`` and ``--config``, so that a call of keepstill
without Snakemake sees the configuration that the workflow would see. Values are data: nothing is
evaluated, and a file with Python tags is refused.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from keepstill.config import SCHEMA, Config
from keepstill.errors import SettingsError
from keepstill.manifest import PACKAGE

SHIPPED = Path("config", "config.yaml")
TEMPLATE_KEY = "__use_yte__"  # Snakemake evaluates Python in a file that has it
_KEY = re.compile(r"[a-zA-Z_][\w-]*\w")
_TRUTHS = {"True": True, "False": False}


def find_clone() -> Path:
    """The clone that this package lies in, else the working directory if it is one.

    Raises
    ------
    SettingsError
        If neither holds the shipped configuration.
    """
    for folder in (PACKAGE.parents[2], Path.cwd()):
        if (folder / SHIPPED).is_file() and (folder / SCHEMA).is_file():
            return folder
    raise SettingsError(
        f"config: no {SHIPPED} found; call this in the folder of keepstill's Snakefile"
    )


def load_config(
    files: Iterable[Path], entries: Iterable[str], clone: Path
) -> tuple[dict[str, Any], frozenset[str]]:
    """The configuration as Snakemake would have it, and the keys that the caller gave.

    Parameters
    ----------
    files : iterable of Path
        Each overrides those before it.
    entries : iterable of str
        ``KEY=VALUE``; they override the files.
    clone : Path
        Holds the shipped configuration, which all others override.

    Raises
    ------
    SettingsError
        If a file is not a YAML mapping, or an entry is not ``KEY=VALUE``.
    """
    given: dict[str, Any] = {}
    for file in files:
        given = merged(given, read_config_file(file))
    given = merged(given, parse_entries(entries))
    return merged(read_config_file(clone / SHIPPED), given), frozenset(given)


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or error
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise SettingsError(f"config: {path}: {reason}{line}; needs a YAML file") from error
    if not isinstance(values, dict):
        kind = "nothing" if values is None else type(values).__name__
        raise SettingsError(f"config: {path}: {kind} found; needs lines of KEY: VALUE")
    return values


def refuse_templates(paths: Iterable[Path]) -> None:
    """Refuse files that ask Snakemake to evaluate them as templates: a configuration is data."""
    for path in paths:
        if TEMPLATE_KEY in read_config_file(path):
            raise SettingsError(
                f"config: {path}: templates are not for keepstill; remove "
                f"{TEMPLATE_KEY} and write the values themselves"
            )


def parse_entries(entries: Iterable[str]) -> dict[str, Any]:
    """Values of ``KEY=VALUE``, read as Snakemake's ``--config`` reads them."""
    values: dict[str, Any] = {}
    for entry in entries:
        key, is_pair, text = entry.partition("=")
        if not is_pair or not _KEY.fullmatch(key):
            raise SettingsError(
                f"config: {entry!r} found; needs KEY=VALUE (a file goes behind --config)"
            )
        values = merged(values, {key: _parsed(text.strip("'\""))})
    return values


def merged(values: Mapping[str, Any], overriding: Mapping[str, Any]) -> dict[str, Any]:
    """Values with others in their place; mappings in mappings are merged likewise."""
    result = dict(values)
    for key, value in overriding.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def config_text(config: Config) -> str:
    """A configuration as YAML, from which it can be read again."""
    return str(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100))


def _parsed(text: str) -> Any:
    """A number, a truth, or YAML whose leaves stay text; with_types does the rest."""
    if not text:
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    if text in _TRUTHS:
        return _TRUTHS[text]
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return text
