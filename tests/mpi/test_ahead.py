"""Ranks that work ahead while the first one stages: same bytes, and no error of its is lost."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import runs

MPIRUN = str(Path(sys.executable).with_name("mpirun"))

# keepstill, but that staging waits between two chunks until another rank has begun with a volume.
PATIENT = """
import os, sys, time
from pathlib import Path
from keepstill import stage
from keepstill.__main__ import main
chunks_of = stage.Chunks.__iter__
root = Path(sys.argv[sys.argv.index("--stage-root") + 1])
def number(name):
    return sum(sum(path.read_bytes()[:8]) for path in root.glob("*/run-*/" + name))
def patiently(chunks):
    for chunk in chunks_of(chunks):
        yield chunk
        deadline_s = time.monotonic() + 60
        while number("arrived") and not number("turn"):
            assert time.monotonic() < deadline_s, "nobody works ahead"
            time.sleep(0.01)
stage.Chunks.__iter__ = patiently
main()
"""


def realign(source, out, root, ranks, *options):
    root.mkdir(exist_ok=True)
    program = ["-m", "keepstill"] if ranks == 1 else ["-c", PATIENT]
    launcher = [] if ranks == 1 else [MPIRUN, "-n", str(ranks)]
    where = ["--out", out, "--stage-root", root]
    return subprocess.run(
        [*launcher, sys.executable, *program, "realign", *map(str, [source, *where, *options])],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(runs.SCRIPTS)},
        check=False,
    )


def long_run(kind):
    """3.5 MB: more than the chunk in which the first volumes arrive."""
    data = runs.ball_run(50, (40, 44, 20), dtype=np.float32 if kind == "nan" else np.int16)
    if kind == "nan":
        data[..., 7] = np.nan
        data[3:5, :, 4, 30] = np.nan
    if kind == "dummies":
        data[..., :2] *= 2
    return data


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("plain", ()),
        ("nan", ()),
        ("dummies", ()),  # what was made with the first volume as reference is dropped
        ("plain", ("--dummy-scans", "2", "--reference", "lowest-motion")),
        ("plain", ("--reference", "mean", "--no-reslice")),
    ],
)
def test_same_bytes_whoever_works_ahead(kind, options, tmp_path):
    source = runs.write_run(tmp_path / "in" / "a_bold.nii.gz", long_run(kind))
    found = []
    for ranks, threads in [(1, 1), (2, 2), (4, 1)]:
        out, root = tmp_path / f"out-{ranks}", tmp_path / "memory"
        done = realign(source, out, root, ranks, "--threads", threads, *options)
        assert done.returncode == 0, done.stderr
        assert not list(root.rglob("*"))
        found.append(runs.digests(out))
    assert found[0] == found[1] == found[2]


def test_a_file_that_is_damaged_further_on_is_told_once_and_leaves_nothing(tmp_path):
    source = runs.write_run(tmp_path / "in" / "a_bold.nii.gz", long_run("plain"))
    content = bytearray(source.read_bytes())
    content[-8:-4] = bytes(4)  # the check sum, once all volumes have arrived
    source.write_bytes(content)
    root = tmp_path / "memory"
    done = realign(source, tmp_path / "out", root, 2)
    assert done.returncode == 2
    assert done.stderr.count("the gzip stream is damaged") == 1
    assert "Traceback" not in done.stderr
    assert not list(root.rglob("*")) and not list((tmp_path / "out").rglob("*"))
