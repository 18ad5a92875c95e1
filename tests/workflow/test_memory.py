"""How much of the stage root a study takes, and what happens where that is too small."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import runs
from keepstill.stage import REALIGNED_VOXELS, STAGED_VOXELS

CLONE = Path(__file__).parents[2]
N_RUNS, N_LANES = 60, 2
WATCH_S = 0.02


def study_of(bids_dir: Path, n_runs: int) -> int:
    """A data set of so many runs, one of them longer; bytes of that, uncompressed."""
    (bids_dir).mkdir()
    (bids_dir / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    for k in range(n_runs):
        path = bids_dir / f"sub-{k:02d}" / "func" / f"sub-{k:02d}_task-rest_bold.nii"
        runs.write_run(path, runs.ball_run(6 if k == n_runs // 2 else 3))
    return max(path.stat().st_size for path in bids_dir.rglob("*_bold.nii"))


def call(root: Path, *options: str) -> list[str]:
    """Snakemake without pages, as many runs at a time as lanes."""
    return [
        *(sys.executable, "-m", "snakemake", "--cores", str(N_LANES)),
        *("--snakefile", str(CLONE / "Snakefile"), *options),
        *("--config", "bids_dir=study", "output_dir=out", "pages=false"),
        f"stage_root={root / 'memory'}",
    ]


def staged_bytes(memory: Path) -> int:
    """Voxels in the stage root, as staged and as realigned."""
    total = 0
    for name in (STAGED_VOXELS, REALIGNED_VOXELS):
        for path in memory.glob(f"*/*/*/{name}"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue  # collected meanwhile
    return total


def test_what_is_staged_is_bounded(tmp_path: Path) -> None:
    """At most lanes x the largest run x 3: as int16, and as float32 beside it."""
    (tmp_path / "memory").mkdir()
    largest = study_of(tmp_path / "study", N_RUNS)
    process = subprocess.Popen(
        call(tmp_path), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_S):
            seen.append(staged_bytes(tmp_path / "memory"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, told = process.communicate()
    over.set()
    watcher.join()
    assert process.returncode == 0, told
    assert len(list((tmp_path / "out" / "manifests").glob("*.json"))) == N_RUNS
    assert largest < max(seen) <= N_LANES * 3 * largest
    assert not list((tmp_path / "memory").iterdir())


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, to mount a tmpfs"
)
def test_too_little_memory_ends_on_disk_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "disk").mkdir()
    study_of(tmp_path / "study", 2)
    mount = 'mount --make-rprivate / && mount -t tmpfs -o size=200k tmpfs memory && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", *call(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(tmp_path / "disk")},
    )
    if "mount" in done.stderr and "permission denied" in done.stderr:
        pytest.skip("no right to mount a tmpfs here")
    assert done.returncode == 0, done.stderr
    assert f"warning: the largest run will not fit into {tmp_path / 'memory'}" in done.stderr
    assert f"it is staged in {tmp_path / 'disk'} instead" in done.stderr
    for log in (tmp_path / "out" / "logs" / "stage").glob("*.log"):
        assert f"staged in {tmp_path / 'disk'}" in log.read_text()
    assert len(list((tmp_path / "out" / "manifests").glob("*.json"))) == 2
    assert not list((tmp_path / "disk").glob("keepstill-*"))
