"""Kernels kept apart by kind of processor, and the same bytes from all of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import runs
from keepstill.kernels import cache

SCRIPTS = str(Path(__file__).parents[2] / "workflow" / "scripts")
# A processor of 2003: two float64 at a time, and nothing fused.
OLD_NUMBA = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}
OLD_NUMPY = {"NPY_DISABLE_CPU_FEATURES": " ".join(np._core._multiarray_umath.__cpu_dispatch__)}
KEEPSTILL = (sys.executable, "-m", "keepstill")
# To root no folder is read-only, unless it gives that up.
GIVEN_UP = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
AS_OTHERS = GIVEN_UP if os.geteuid() == 0 and shutil.which("setpriv") else ()


def started(*command, **environment):
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SCRIPTS, **environment},
    )


def said(process):
    told, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return told


def realigned(source, out, *prefix, **environment):
    said(started(*prefix, *KEEPSTILL, "realign", str(source), "--out", str(out), **environment))
    return runs.digests(out)


def kernels_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb[ci]")}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names an x86 processor")
def test_same_bytes_on_an_old_processor_from_another_clone(tmp_path):
    """Kernels compiled for an old processor, in a cache of their own; numpy's old loops.

    Two processes that warm the cache at once: one compiles, the other waits, none is torn. The run
    then compiles nothing, and needs no right to write where the kernels are.
    """
    clone = tmp_path / "another clone" / "scripts"
    shutil.copytree(SCRIPTS, clone, ignore=shutil.ignore_patterns("__pycache__"))
    data = runs.ball_run(15)
    data[:, :, 5:7, 4] //= 4
    source = runs.write_run(tmp_path / "in" / "a_bold.nii.gz", data)
    kernels = tmp_path / "cache"
    old = OLD_NUMBA | OLD_NUMPY | {"PYTHONPATH": str(clone), "NUMBA_CACHE_DIR": str(kernels)}
    words = [said(warming) for warming in [started(*KEEPSTILL, "warm", **old) for _ in range(2)]]
    assert sorted(line.split()[6] for line in words) == ["compiled,", "were"]
    (folder,) = (kernels / "keepstill").iterdir()
    assert folder.name.startswith("x86-64-") and words[0].endswith(f"in {folder}\n")
    kept = kernels_in(folder)
    assert len(kept) > 50 and not list(folder.glob("*.tmp.*"))
    folder.chmod(0o555)
    there = realigned(source, tmp_path / "there", *AS_OTHERS, **old)
    assert there == realigned(source, tmp_path / "here")
    assert kernels_in(folder) == kept


def test_a_warm_cache_that_is_only_read_serves(tmp_path):
    """As another user would find it; and one that is neither warm nor writable is passed over."""
    command = (
        sys.executable,
        "-c",
        "from keepstill.kernels.cache import cache_dir as c; print(c())",
    )
    given, empty = tmp_path / "given", tmp_path / "empty"
    warm = Path(said(started(*command, NUMBA_CACHE_DIR=str(given))).strip())
    assert warm == given / "keepstill" / cache.cpu_kind()
    (warm / cache.WARM).touch()
    empty.mkdir()
    for folder in (warm, empty):
        folder.chmod(0o555)
    touch = [*AS_OTHERS, "touch", str(empty / "x")]
    if subprocess.run(touch, capture_output=True, check=False).returncode == 0:
        pytest.skip("this user may write everywhere, and cannot give that up")
    assert Path(said(started(*AS_OTHERS, *command, NUMBA_CACHE_DIR=str(given))).strip()) == warm
    other = Path(said(started(*AS_OTHERS, *command, NUMBA_CACHE_DIR=str(empty))).strip())
    assert other.name == warm.name and not other.is_relative_to(tmp_path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    cache.cache_dir.cache_clear()
    yield cache.cache_dir()
    cache.cache_dir.cache_clear()


def double(x):
    return x + x


def of_another_process(monkeypatch, token):
    """The function as another process would have it."""
    monkeypatch.setattr(cache, "_PROCESS", token)
    return cache.kept(numba.njit(double), double)


def test_two_processes_that_add_variants_at_once(folder, monkeypatch):
    """Each reads the index before the other writes it; in numba's own cache, the code of the one
    that is slower to write would be found under the other's name.
    """
    first, second = (of_another_process(monkeypatch, token) for token in "ab")
    cache_file, late = first._cache._cache_file, []
    save_data = cache_file._save_data
    monkeypatch.setattr(cache_file, "_save_data", lambda *named: late.append(named))
    monkeypatch.setattr(second._cache._cache_file, "_load_index", dict)
    assert (first(1), second(1.5)) == (2, 3.0)
    save_data(*late[0])
    third = of_another_process(monkeypatch, "c")
    assert (third(1.5), third(1)) == (3.0, 2)
    assert sum(third.stats.cache_hits.values()) == 1  # what the last index names


def test_a_cache_that_cannot_be_written_to_costs_time_only(folder, monkeypatch):
    def refuse(self, key, data):
        raise OSError(28, "No space left on device")

    one = of_another_process(monkeypatch, "a")
    monkeypatch.setattr(type(one._cache._cache_file), "save", refuse)
    assert one(2) == 4
    assert not list(folder.glob("*.nb?"))


def test_without_any_folder_kernels_are_compiled_each_time(monkeypatch):
    monkeypatch.setattr(cache, "_bases", lambda: iter([Path("/proc/nowhere")]))
    cache.cache_dir.cache_clear()
    assert cache.cache_dir() is None
    assert of_another_process(monkeypatch, "a")(2) == 4
    cache.cache_dir.cache_clear()


@pytest.mark.parametrize(
    "changed",
    [{"CPU_NAME": "x86-64"}, {"CPU_FEATURES": "+sse2"}],
    ids=["processor", "instructions"],
)
def test_each_kind_of_processor_has_its_own_folder(changed, monkeypatch):
    kind = cache.cpu_kind.__wrapped__
    here = kind()
    for name, value in changed.items():
        monkeypatch.setattr(numba.config, name, value)
    assert kind() != here


def test_each_version_has_its_own_folder(tmp_path, monkeypatch):
    """Numba's, and the kernels', wherever in them the change is."""
    kind = cache.cpu_kind.__wrapped__
    found = [kind()]
    shutil.copytree(cache.SOURCES, tmp_path / "kernels")
    monkeypatch.setattr(cache, "SOURCES", tmp_path / "kernels")
    found.append(kind())
    with (tmp_path / "kernels" / "small.py").open("a") as file:
        file.write("\n# another version\n")
    found.append(kind())
    monkeypatch.setattr(numba, "__version__", "0.0")
    found.append(kind())
    assert found[0] == found[1] and len(set(found)) == 3
