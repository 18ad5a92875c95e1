"""The same bytes from another clone, on a processor that knows fewer instructions."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import runs

SCRIPTS = str(Path(__file__).parents[2] / "workflow" / "scripts")
# A processor of 2003: two float64 at a time, and nothing fused.
OLD_NUMBA = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}
OLD_NUMPY = {"NPY_DISABLE_CPU_FEATURES": " ".join(np._core._multiarray_umath.__cpu_dispatch__)}


def realigned(source, out, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "keepstill", "realign", str(source), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": SCRIPTS, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return runs.digests(out)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names an x86 processor")
def test_same_bytes_on_an_old_processor_from_another_clone(tmp_path):
    """Kernels compiled for an old processor, in a cache of their own; numpy's old loops."""
    clone = tmp_path / "another clone" / "scripts"
    shutil.copytree(SCRIPTS, clone, ignore=shutil.ignore_patterns("__pycache__"))
    data = runs.ball_run(15)
    data[:, :, 5:7, 4] //= 4
    source = runs.write_run(tmp_path / "in" / "a_bold.nii.gz", data)
    old = OLD_NUMBA | OLD_NUMPY | {"PYTHONPATH": str(clone)}
    cache = tmp_path / "cache"
    there = realigned(source, tmp_path / "there", **old, NUMBA_CACHE_DIR=str(cache))
    assert there == realigned(source, tmp_path / "here")
    assert list(cache.rglob("*.nbc"))
