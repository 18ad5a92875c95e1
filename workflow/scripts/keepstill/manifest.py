"""Completion: a run is complete when its manifest says what its input, settings and outputs are.

The manifest is a run's last file. It holds nothing that differs between two runs of the same
work: no time, host, number of ranks or absolute path. What belongs to this machine, the stamp
that saves hashing an unchanged input again, stands under ``logs``.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keepstill import __version__
from keepstill.files import file_sha256, put_text
from keepstill.settings import SBREF, RealignSettings

PACKAGE = Path(__file__).parent
# What cannot change a run's files: where and when things run, what is shown, what is shared out.
WITHOUT_EFFECT = (
    *("__main__", "config", "config_files", "lanes", "misnamed", "preflight"),
    *("phantom", "progress", "report", "run_table", "selftest", "simulate", "start", "study"),
    *("truth", "warm"),
)

# Anything else is the path of a file.
REFERENCES = ("first", "middle", "mean", "median", "lowest-motion")


@dataclass(frozen=True)
class Stamp:
    """What the file system says of a file; while it stays the same, the content is taken to."""

    bytes: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class Manifest:
    """What a complete run says of itself.

    Attributes
    ----------
    run : str
    input_sha256 : str
        Of the BOLD file as it lies in the data set.
    input_bytes : int
    metadata : dict
        The input's sidecars merged, as `bids.sidecar_metadata` gives them; only their hash is
        written.
    settings : RealignSettings
    outputs : dict
        Path relative to the output directory -> ``{"sha256": ..., "bytes": ...}``.
    summary : dict
        Figures of the run for pages and logs; None for a figure that is not known.
    warnings : tuple of str
    """

    run: str
    input_sha256: str
    input_bytes: int
    metadata: Mapping[str, Any]
    settings: RealignSettings
    outputs: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def manifest_path(output_dir: Path, run: str) -> Path:
    """Where the manifest of a run lies."""
    return output_dir / "manifests" / f"{run}.json"


def write_manifest(output_dir: Path, manifest: Manifest) -> Path:
    """Write a run's manifest under its final name at once, never in part."""
    sidecar_sha256 = _json_sha256(manifest.metadata)
    values = {
        "keepstill_version": __version__,
        "run": manifest.run,
        "key": _key(manifest.input_sha256, sidecar_sha256, manifest.settings),
        "engine": engine_sha256(),
        "settings": portable_settings(manifest.settings),
        "input": {
            "sha256": manifest.input_sha256,
            "bytes": manifest.input_bytes,
            "sidecar_sha256": sidecar_sha256,
        },
        "outputs": manifest.outputs,
        "summary": manifest.summary,
        "warnings": list(manifest.warnings),
    }
    path = manifest_path(output_dir, manifest.run)
    put_text(path, json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return path


def read_manifest(output_dir: Path, run: str) -> dict[str, Any] | None:
    """The manifest of a run as it was written; None if there is none or it is damaged."""
    try:
        values = json.loads(manifest_path(output_dir, run).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and values.get("run") == run else None


def withdraw_manifest(output_dir: Path, run: str) -> set[Path]:
    """Remove a run's manifest, before any of its outputs is written over; the outputs it named."""
    values = read_manifest(output_dir, run) or {}
    manifest_path(output_dir, run).unlink(missing_ok=True)
    outputs = values.get("outputs")
    return {output_dir / path for path in outputs} if isinstance(outputs, dict) else set()


def describe_outputs(output_dir: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """`Manifest.outputs` of files below `output_dir`."""
    return {
        path.relative_to(output_dir).as_posix(): {
            "sha256": file_sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in paths
    }


def is_complete(
    run: str, source: Path, metadata: Mapping[str, Any], settings: RealignSettings, output_dir: Path
) -> bool:
    """Whether a run's files are there and are those of this input, these settings, this engine.

    Outputs are compared by size. The input is hashed only if its stamp has changed since it was
    hashed last; an input that is gone counts as what it was.
    """
    manifest = read_manifest(output_dir, run)
    if manifest is None or not _has_outputs(output_dir, manifest.get("outputs")):
        return False
    input_sha256 = _known_sha256(output_dir, run, source)
    if input_sha256 is None:
        return False
    return bool(manifest.get("key") == run_key(input_sha256, metadata, settings))


def run_key(input_sha256: str, metadata: Mapping[str, Any], settings: RealignSettings) -> str:
    """Hash of all that a run's files depend on: input, sidecars, settings, engine."""
    return _key(input_sha256, _json_sha256(metadata), settings)


def remember_input(output_dir: Path, run: str, stamp: Stamp, sha256: str) -> None:
    """Note an input's hash, so that it is not hashed again while its stamp stays the same.

    `stamp` must be of before the file was read: a file changed meanwhile is then hashed anew.
    """
    path = _identity_path(output_dir, run)
    put_text(path, json.dumps({"sha256": sha256, "stamp": asdict(stamp)}) + "\n")


def stamp_of(path: Path) -> Stamp:
    """The file's stamp now, links followed."""
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


def portable_settings(settings: RealignSettings) -> dict[str, Any]:
    """Settings with the content of a reference file in the place of its path."""
    values = asdict(settings)
    if settings.reference not in (*REFERENCES, SBREF):
        reference = Path(settings.reference)
        values["reference"] = f"sha256:{_hash_once(reference, stamp_of(reference))}"
    return values


@functools.cache
def engine_sha256() -> str:
    """Hash of the engine's code, without the modules that cannot change a run's files."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts[0].removesuffix(".py") not in WITHOUT_EFFECT:
            digest.update(relative.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _key(input_sha256: str, sidecar_sha256: str, settings: RealignSettings) -> str:
    return _json_sha256(
        {
            "input": input_sha256,
            "sidecar": sidecar_sha256,
            "settings": portable_settings(settings),
            "engine": engine_sha256(),
        }
    )


def _has_outputs(output_dir: Path, outputs: Any) -> bool:
    try:
        sizes = {path: entry["bytes"] for path, entry in outputs.items()}
        return bool(sizes) and all(
            (output_dir / path).stat().st_size == size for path, size in sizes.items()
        )
    except (AttributeError, KeyError, OSError, TypeError):
        return False


def _known_sha256(output_dir: Path, run: str, source: Path) -> str | None:
    """Hash of an input, from the notes if its stamp allows; None if it cannot be known."""
    noted_stamp, noted_sha256 = _noted(_identity_path(output_dir, run))
    try:
        stamp = stamp_of(source)
        if stamp == noted_stamp:
            return noted_sha256
        sha256 = file_sha256(source)
    except FileNotFoundError:
        return noted_sha256
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a note that cannot be kept costs time only
        remember_input(output_dir, run, stamp, sha256)
    return sha256


def _noted(path: Path) -> tuple[Stamp | None, str | None]:
    """Stamp and hash that `remember_input` has left."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Stamp(**values["stamp"]), str(values["sha256"])
    except (KeyError, OSError, TypeError, ValueError):
        return None, None


def _identity_path(output_dir: Path, run: str) -> Path:
    return output_dir / "logs" / "identity" / f"{run}.json"


@functools.lru_cache(maxsize=8)
def _hash_once(path: Path, stamp: Stamp) -> str:
    del stamp  # part of the cache's key only
    return file_sha256(path)


def _json_sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
