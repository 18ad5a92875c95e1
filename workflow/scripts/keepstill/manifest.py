"""Completion: a run is complete when its manifest says what its input, settings and outputs are.

The manifest is a run's last file. It holds nothing that differs between two runs of the same
work: no time, host, number of ranks or absolute path. What belongs to this machine, the stamp
that saves hashing an unchanged input again, stands under ``logs``.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from keepstill import __version__
from keepstill.files import Written, file_sha256, put_text
from keepstill.settings import RealignSettings

PACKAGE = Path(__file__).parent
# What cannot change a run's voxels, motion or tables: where and when things run, what is shown and
# said, what is written beside them. A test holds this against what the work on a run imports.
WITHOUT_EFFECT = (
    *("__init__", "__main__", "config", "config_files", "errors", "files", "job_requests"),
    *("ladder", "lanes", "manifest", "misnamed", "multi_echo", "phantom", "preflight"),
    *("progress", "report", "run_table", "scopes", "selftest", "sidecars", "simulate", "start"),
    *("study", "summary", "truth", "tune", "verify", "warm"),
    *("blobs", "kernels/blobs", "kernels/cache"),  # of the phantom; where kernels are kept
)
# The one arithmetic on all processors: kernels are compiled without licence to fuse, reorder or
# approximate, so a rounding is where the source has it.
ARITHMETIC = "IEEE 754, nothing fused"
LIBRARIES = ("numba", "numpy")
PINNED_ITK = PACKAGE.parents[2] / "envs" / "itk.txt"  # in the clone

MANIFESTS = "manifests"  # folder below the output directory
ECHOES = "echoes"  # below that, of the echoes of multi-echo runs
DAMAGED = "damaged"  # outputs that `keepstill verify` has found to differ from what was written
SHARED = "references"  # and of what the runs of a session or subject share


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
    leader_key : str
        Key of the multi-echo run whose motion an echo was resliced with; empty for a run with a
        motion of its own.
    """

    run: str
    input_sha256: str
    input_bytes: int
    metadata: Mapping[str, Any]
    settings: RealignSettings
    outputs: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    leader_key: str = ""


def manifest_path(output_dir: Path, run: str, *, is_echo: bool = False) -> Path:
    """Where the manifest of a run lies, or of one echo of a multi-echo run."""
    folder = output_dir / MANIFESTS / ECHOES if is_echo else output_dir / MANIFESTS
    return folder / f"{run}.json"


def shared_entry(scope: str) -> str:
    """What stands for a run's name in the manifest of a scope's reference, and in its path."""
    return f"{SHARED}/{scope}"


def write_manifest(output_dir: Path, manifest: Manifest) -> Path:
    """Write a run's manifest under its final name at once, never in part."""
    sidecar_sha256 = _json_sha256(manifest.metadata)
    values = {
        "keepstill_version": __version__,
        "run": manifest.run,
        "key": run_key(
            manifest.input_sha256, manifest.metadata, manifest.settings, manifest.leader_key
        ),
        "engine": engine_sha256(),
        "libraries": library_versions() | _itk_of(manifest.settings),
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
    if manifest.leader_key:
        values["leader_key"] = manifest.leader_key
    return _put_manifest(output_dir, values, is_echo=bool(manifest.leader_key))


def read_manifest(output_dir: Path, run: str, *, is_echo: bool = False) -> dict[str, Any] | None:
    """The manifest of a run as it was written; None if there is none or it is damaged."""
    path = manifest_path(output_dir, run, is_echo=is_echo)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and values.get("run") == run else None


def withdraw_manifest(output_dir: Path, run: str, *, is_echo: bool = False) -> set[Path]:
    """Remove a run's manifest, before any of its outputs is written over; the outputs it named."""
    values = read_manifest(output_dir, run, is_echo=is_echo) or {}
    manifest_path(output_dir, run, is_echo=is_echo).unlink(missing_ok=True)
    outputs = values.get("outputs")
    return {output_dir / path for path in outputs} if isinstance(outputs, dict) else set()


def describe_outputs(output_dir: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """`Manifest.outputs` of files below `output_dir`, which are read again."""
    written = {path: Written(file_sha256(path), path.stat().st_size) for path in paths}
    return outputs_of(output_dir, written)


def outputs_of(output_dir: Path, written: Mapping[Path, Written]) -> dict[str, dict[str, Any]]:
    """`Manifest.outputs` of files below `output_dir`, as they were written."""
    return {path.relative_to(output_dir).as_posix(): asdict(what) for path, what in written.items()}


def is_complete(
    run: str, source: Path, metadata: Mapping[str, Any], settings: RealignSettings, output_dir: Path
) -> bool:
    """Whether a run's files are there and are those of this input, these settings, this engine.

    Outputs are compared by size. The input is hashed only if its stamp has changed since it was
    hashed last; an input that is gone counts as what it was.
    """
    key = known_key(run, source, metadata, settings, output_dir)
    return has_key(run, key, output_dir)


def has_key(run: str, key: str | None, output_dir: Path, *, is_echo: bool = False) -> bool:
    """Whether the files of a run, or of one echo of a multi-echo run, are there and have a key."""
    manifest = whole_manifest(output_dir, run, is_echo=is_echo)
    return manifest is not None and key is not None and bool(manifest.get("key") == key)


def whole_manifest(output_dir: Path, run: str, *, is_echo: bool = False) -> dict[str, Any] | None:
    """A run's manifest, if its outputs have their sizes and none is marked as damaged."""
    manifest = read_manifest(output_dir, run, is_echo=is_echo)
    if manifest is None or manifest.get(DAMAGED):
        return None
    return manifest if has_outputs(output_dir, manifest.get("outputs")) else None


def mark_damaged(
    output_dir: Path, run: str, damaged: Iterable[str], *, is_echo: bool = False
) -> None:
    """Note in a run's manifest which outputs are damaged: until it is done again, or none is."""
    values = read_manifest(output_dir, run, is_echo=is_echo)
    marks = sorted(damaged)
    if values is None or values.get(DAMAGED, []) == marks:
        return
    values.pop(DAMAGED, None)
    _put_manifest(output_dir, values | ({DAMAGED: marks} if marks else {}), is_echo=is_echo)


def known_key(
    run: str, source: Path, metadata: Mapping[str, Any], settings: RealignSettings, output_dir: Path
) -> str | None:
    """A run's key; None if its input cannot be read. It is hashed only if its stamp has changed."""
    input_sha256 = known_sha256(output_dir, run, source)
    return None if input_sha256 is None else run_key(input_sha256, metadata, settings)


def run_key(
    input_sha256: str,
    metadata: Mapping[str, Any],
    settings: RealignSettings,
    leader_key: str = "",
) -> str:
    """Hash of all that a run's files depend on: input, sidecars, settings, engine; ITK if used.

    An echo's file depends on the run that its motion was estimated on as well.
    """
    depends_on = {
        "input": input_sha256,
        "sidecar": _json_sha256(metadata),
        "settings": portable_settings(settings),
        "engine": engine_sha256(),
    }
    depends_on |= _itk_of(settings)
    return _json_sha256(depends_on | ({"leader": leader_key} if leader_key else {}))


def remember_inputs(output_dir: Path, run: str, entry: Mapping[str, Any]) -> None:
    """Note the hashes of a staged run's input, or of each of the echoes that it is the mean of."""
    parts = entry.get("parts", {run: entry})
    for name, part in parts.items():
        remember_input(output_dir, name, Stamp(**part["stamp"]), part["sha256"])


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
    """Settings with the content of the image in the place of its path."""
    values = asdict(settings)
    if settings.image:
        name = "shared_reference" if settings.shared_reference else "reference"
        values[name] = f"sha256:{_hash_once(settings.image, stamp_of(settings.image))}"
    return values


@functools.cache
def engine_sha256() -> str:
    """Hash of all but input and settings that a run's voxels, motion and tables depend on.

    That is the code without the modules that have no effect on them, numpy's and numba's
    versions, and the arithmetic that kernels are compiled for.
    """
    digest = hashlib.sha256(json.dumps([ARITHMETIC, library_versions()]).encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        names = relative.parts[0].removesuffix(".py"), relative.with_suffix("").as_posix()
        if not set(names).intersection(WITHOUT_EFFECT):
            digest.update(relative.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that compute."""
    from importlib.metadata import version

    return {name: version(name) for name in LIBRARIES}


@functools.cache
def itk_version() -> str:
    """ITK's version, without importing it; "unknown" if there is neither ITK nor a clone.

    Where it is not installed, conda brings the rule `realign` the one that the clone pins, and
    what plans and collects, in environments without it, goes by that.
    """
    from importlib.metadata import PackageNotFoundError, version

    with contextlib.suppress(PackageNotFoundError):
        return version("itk")
    with contextlib.suppress(OSError):
        if pinned := re.search(r"^itk==(\S+)", PINNED_ITK.read_text(encoding="utf-8"), re.M):
            return pinned[1]
    return "unknown"


def _itk_of(settings: RealignSettings) -> dict[str, str]:
    """ITK's version where it takes part, for key and manifest; nothing where it does not."""
    return {"itk": itk_version()} if settings.uses_itk else {}


def has_outputs(output_dir: Path, outputs: Any) -> bool:
    """Whether the files that a manifest names are there, with the sizes that it gives."""
    try:
        sizes = {path: entry["bytes"] for path, entry in outputs.items()}
        return bool(sizes) and all(
            (output_dir / path).stat().st_size == size for path, size in sizes.items()
        )
    except (AttributeError, KeyError, OSError, TypeError):
        return False


def has_content(output_dir: Path, run: str, output: PurePosixPath) -> bool:
    """Whether an output is what its manifest says, by content; hashed if its stamp has changed."""
    written = output_sha256(output_dir, run, output)
    entry = f"{run}/{output.name}"
    return written is not None and known_sha256(output_dir, entry, output_dir / output) == written


def output_sha256(output_dir: Path, run: str, output: PurePosixPath) -> str | None:
    """Hash of an output as it was written; None if no manifest says."""
    outputs = (read_manifest(output_dir, run) or {}).get("outputs")
    try:
        return str(outputs[output.as_posix()]["sha256"]) if outputs else None
    except (KeyError, TypeError):
        return None


def known_sha256(output_dir: Path, run: str, source: Path) -> str | None:
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


def _put_manifest(output_dir: Path, values: Mapping[str, Any], *, is_echo: bool) -> Path:
    path = manifest_path(output_dir, values["run"], is_echo=is_echo)
    put_text(path, json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return path


def _identity_path(output_dir: Path, run: str) -> Path:
    return output_dir / "logs" / "identity" / f"{run}.json"


@functools.lru_cache(maxsize=8)
def _hash_once(path: Path, stamp: Stamp) -> str:
    del stamp  # part of the cache's key only
    return file_sha256(path)


def _json_sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
