"""A run is complete by content: of input, sidecars, settings, engine and outputs."""

import ast
import importlib.metadata
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from keepstill import manifest
from keepstill.settings import EstimateSettings, RealignSettings

RUN = "sub-01_task-rest"
METADATA = {"RepetitionTime": 2.0}
SETTINGS = RealignSettings()


class Done:
    """A complete run and what it came from."""

    def __init__(self, root: Path) -> None:
        self.source = root / "in" / f"{RUN}_bold.nii.gz"
        self.output_dir = root / "out"
        self.bold = self.output_dir / "sub-01" / "func" / f"{RUN}_desc-hmc_bold.nii.gz"
        self.metadata = METADATA
        self.settings = SETTINGS
        self.source.parent.mkdir(parents=True)
        self.source.write_bytes(b"voxels")
        self.bold.parent.mkdir(parents=True)
        self.bold.write_bytes(b"realigned voxels")
        self.write()
        self.remember()

    def write(self) -> Path:
        outputs = manifest.describe_outputs(self.output_dir, [self.bold])
        sha256 = manifest.file_sha256(self.source)
        return manifest.write_manifest(
            self.output_dir,
            manifest.Manifest(
                RUN, sha256, 6, self.metadata, self.settings, outputs, {"n_volumes": 5}
            ),
        )

    def remember(self) -> None:
        stamp = manifest.stamp_of(self.source)
        sha256 = manifest.file_sha256(self.source)
        manifest.remember_input(self.output_dir, RUN, stamp, sha256)

    @property
    def is_complete(self) -> bool:
        return manifest.is_complete(RUN, self.source, self.metadata, self.settings, self.output_dir)


@pytest.fixture
def done(tmp_path: Path) -> Done:
    return Done(tmp_path)


def forbid_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} hashed")

    monkeypatch.setattr(manifest, "file_sha256", refuse)


def test_a_complete_run_is_not_hashed_again(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_hashing(monkeypatch)
    assert done.is_complete


def test_without_a_note_the_input_is_hashed_once(
    done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    (done.output_dir / "logs" / "identity" / f"{RUN}.json").unlink()
    assert done.is_complete
    forbid_hashing(monkeypatch)
    assert done.is_complete


def test_a_touched_input_is_hashed_once(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(done.source, ns=(1, 1))
    assert done.is_complete
    forbid_hashing(monkeypatch)
    assert done.is_complete


def test_a_changed_input_of_the_same_size(done: Done) -> None:
    done.source.write_bytes(b"VOXELS")
    os.utime(done.source, ns=(1, 1))
    assert not done.is_complete


def test_an_input_that_is_gone_counts_as_what_it_was(done: Done) -> None:
    done.source.unlink()
    assert done.is_complete
    (done.output_dir / "logs" / "identity" / f"{RUN}.json").unlink()
    assert not done.is_complete


def test_a_missing_output(done: Done) -> None:
    done.bold.unlink()
    assert not done.is_complete


def test_a_truncated_output(done: Done) -> None:
    done.bold.write_bytes(b"realigned")
    assert not done.is_complete


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"run": "sub-01_task-rest"}'])
def test_a_damaged_manifest(done: Done, text: str) -> None:
    manifest.manifest_path(done.output_dir, RUN).write_text(text)
    assert not done.is_complete


@pytest.mark.parametrize("text", ["", "[]", '{"sha256": "0", "stamp": {"bytes": 1}}'])
def test_a_damaged_note_only_costs_time(done: Done, text: str) -> None:
    (done.output_dir / "logs" / "identity" / f"{RUN}.json").write_text(text)
    assert done.is_complete


def test_changed_sidecars(done: Done) -> None:
    done.metadata = {"RepetitionTime": 2.5}
    assert not done.is_complete


@pytest.mark.parametrize(
    "changed",
    [
        replace(SETTINGS, reference="mean"),
        replace(SETTINGS, fd_outlier_mm=0.4),
        replace(SETTINGS, estimate=EstimateSettings(degree=3)),
    ],
)
def test_changed_settings(done: Done, changed: RealignSettings) -> None:
    done.settings = changed
    assert not done.is_complete


def test_changed_engine(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "engine_sha256", lambda: "0" * 64)
    assert not done.is_complete


def test_changed_libraries_and_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another numpy or numba may round otherwise, and so may kernels compiled otherwise."""
    engine_sha256 = manifest.engine_sha256.__wrapped__
    found = {engine_sha256()}
    versions = manifest.library_versions()
    assert set(versions) == {"numpy", "numba"}
    for name in versions:
        other = versions | {name: "0.0"}
        monkeypatch.setattr(manifest, "library_versions", lambda other=other: other)
        found.add(engine_sha256())
    monkeypatch.setattr(manifest, "library_versions", lambda: versions)
    monkeypatch.setattr(manifest, "ARITHMETIC", "fused")
    found.add(engine_sha256())
    assert len(found) == 4


def key_of(settings: RealignSettings) -> str:
    return manifest.run_key("0" * 64, METADATA, settings)


@pytest.mark.parametrize("asked", [{"engine": "itk"}, {"check": "itk"}])
def test_another_itk(done: Done, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str]) -> None:
    """A run that ITK took part in is to be done again with another; others know nothing of it."""
    native = key_of(SETTINGS)
    done.settings = replace(SETTINGS, **asked)
    monkeypatch.setattr(manifest, "itk_version", lambda: "5.4.7")
    values = json.loads(done.write().read_text())
    assert values["libraries"] == manifest.library_versions() | {"itk": "5.4.7"}
    assert done.is_complete
    monkeypatch.setattr(manifest, "itk_version", lambda: "5.4.8")
    assert not done.is_complete
    done.settings = SETTINGS
    assert "itk" not in json.loads(done.write().read_text())["libraries"]
    assert key_of(SETTINGS) == native


def test_the_version_of_an_itk_that_conda_will_bring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without import, and where it is not installed, of what the clone pins."""
    monkeypatch.setitem(sys.modules, "itk", None)  # an import would fail
    (tmp_path / "itk.txt").write_text("itk-core==1.0 \\\nitk==5.4.99 \\\n    --hash=sha256:0\n")
    found = manifest.itk_version.__wrapped__
    assert found() == importlib.metadata.version("itk")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert f"itk=={found()} \\" in manifest.PINNED_ITK.read_text().splitlines()
    monkeypatch.setattr(manifest, "PINNED_ITK", tmp_path / "itk.txt")
    assert found() == "5.4.99"
    monkeypatch.setattr(manifest, "PINNED_ITK", tmp_path / "none.txt")
    assert found() == "unknown"


def imported_by(*roots: str) -> set[str]:
    """The engine's modules that some of them import, anywhere in their code; ``a/b`` for a.b."""
    found: set[str] = set()
    wanted = list(roots)
    while wanted:
        name = wanted.pop()
        path = manifest.PACKAGE / name
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.is_file() or name in found:
            continue
        found |= {name, name.split("/")[0]}  # a package comes with what is in it
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keepstill"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                wanted += ["/".join(name.split(".")[1:]) for name in names if "." in name]
    return found


def test_what_is_left_out_of_the_key_has_no_part_in_the_work() -> None:
    """And what is in it has a part: no change of other code does a study again.

    Left out though the work imports them: what says, writes and names things.
    """
    work = ("stage", "mean_echo", "shared_reference", "ranks", "collect", "echoes", "warm")
    by_work = imported_by(*work)
    left_out = set(manifest.WITHOUT_EFFECT)
    unhashed = {"errors", "files", "kernels/cache", "manifest", "misnamed", "sidecars", "start"}
    unhashed |= {"warm", "phantom", "blobs", "kernels/blobs"}  # kernels are warmed with a ball
    assert by_work & left_out == unhashed
    all_modules = {
        path.relative_to(manifest.PACKAGE).with_suffix("").as_posix()
        for path in manifest.PACKAGE.rglob("*.py")
    }
    hashed = {
        name.removesuffix("/__init__")
        for name in all_modules
        if not {name, name.split("/")[0]} & left_out
    }
    assert hashed <= by_work
    assert all((manifest.PACKAGE / f"{name}.py").is_file() or (manifest.PACKAGE / name).is_dir()
               for name in left_out)  # fmt: skip


def test_the_engine_is_its_code_without_pages_and_lanes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("estimate.py", "kernels/sums.py", "lanes.py", "report/page.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("1")
    monkeypatch.setattr(manifest, "PACKAGE", tmp_path)
    engine_sha256 = manifest.engine_sha256.__wrapped__
    before = engine_sha256()
    for name in ("lanes.py", "report/page.py"):
        (tmp_path / name).write_text("2")
    assert engine_sha256() == before
    (tmp_path / "kernels" / "sums.py").write_text("2")
    assert engine_sha256() != before


def test_a_reference_file_counts_by_content(done: Done, tmp_path: Path) -> None:
    here, there = tmp_path / "here.nii", tmp_path / "there.nii"
    here.write_bytes(b"reference")
    there.write_bytes(b"reference")
    done.settings = replace(SETTINGS, reference=str(here))
    done.write()
    done.settings = replace(SETTINGS, reference=str(there))
    assert done.is_complete
    there.write_bytes(b"another reference")
    assert not done.is_complete


def test_the_manifest_is_the_same_every_time_and_names_no_place(done: Done, tmp_path: Path) -> None:
    first = done.write().read_bytes()
    assert done.write().read_bytes() == first
    assert str(tmp_path) not in first.decode()
    assert not list(done.output_dir.rglob("*.part"))
    values = json.loads(first)
    assert list(values["outputs"]) == [f"sub-01/func/{RUN}_desc-hmc_bold.nii.gz"]
    assert values["input"]["sha256"] == manifest.file_sha256(done.source)
    assert values["key"] == manifest.run_key(values["input"]["sha256"], METADATA, SETTINGS)


def test_a_manifest_holds_no_nan(done: Done) -> None:
    nan = manifest.Manifest(RUN, "0", 6, METADATA, SETTINGS, {}, {"mean_fd_mm": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        manifest.write_manifest(done.output_dir, nan)
    assert done.is_complete
