"""The same bytes for any number of ranks and threads; failing ranks end all ranks."""

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import runs
from keepstill import phantom, segments
from keepstill.ranks import share

MPIRUN = str(Path(sys.executable).with_name("mpirun"))
SCRIPTS = str(Path(__file__).parents[2] / "workflow" / "scripts")


def call(arguments, ranks=1, **options):
    launcher = [] if ranks == 1 else [MPIRUN, "-n", str(ranks)]
    environment = os.environ | {"PYTHONPATH": SCRIPTS}
    return subprocess.run(
        [*launcher, sys.executable, "-m", "keepstill", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
        **options,
    )


@given(st.integers(0, 500), st.integers(1, 40))
def test_every_volume_has_one_rank(n, size):
    shares = [share(n, size, rank) for rank in range(size)]
    assert [t for part in shares for t in part] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


BOUND_APART = """
import os
from keepstill import ranks
world = ranks.World()
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[world.rank]})
own = os.sched_getaffinity(0)
with ranks.cores_of_all(world, 1) as n_threads:
    seen = len(own), n_threads, len(os.sched_getaffinity(0))
told = world.gather((*seen, os.sched_getaffinity(0) == own))
if world.rank == 0:
    print(told)
"""


def test_rank_0_has_all_cores_while_the_others_rest():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two cores are needed for two bound ranks")
    done = subprocess.run(
        [MPIRUN, "-n", "2", sys.executable, "-c", BOUND_APART],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": SCRIPTS},
        check=True,
    )
    assert done.stdout.strip() == "[(1, 2, 2, True), (1, 2, 1, True)]"


@pytest.mark.parametrize("reference", ["first", "mean", "median", "lowest-motion"])
def test_same_bytes_for_any_ranks_and_threads(reference, tmp_path):
    """Of a run that is long enough for a model, with a volume of which slices were lost."""
    data = runs.ball_run(15)
    data[:, :, 5:7, 4] //= 4
    source = runs.write_run(tmp_path / "in" / "a_bold.nii.gz", data)
    found = []
    for ranks, threads in [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1)]:
        out = tmp_path / f"out-{ranks}-{threads}"
        done = call(
            ["realign", source, "--out", out, "--threads", threads, "--reference", reference], ranks
        )
        assert done.returncode == 0, done.stderr
        found.append(runs.digests(out))
    assert len(found[0]) == 17  # eight outputs, their sidecars, the manifest
    assert all(other == found[0] for other in found)
    columns = runs.read_table(out / "a_desc-confounds_timeseries.tsv")
    assert columns["n_lost_slices"][4] == "2" and "n/a" not in columns["expected_error"]


@pytest.mark.parametrize(
    "options",
    [
        ("--outside", "nearest", "--non-negative", "--dtype", "int16"),
        ("--outside", "nan", "--common-field", "--interpolation-degree", "2"),
    ],
)
def test_reslicing_options_have_same_bytes_for_any_ranks_and_threads(options, tmp_path):
    source = runs.write_run(tmp_path / "in" / "a_bold.nii.gz", runs.ball_run(7))
    found = []
    for ranks, threads in [(1, 2), (2, 1)]:
        out = tmp_path / f"out-{ranks}"
        done = call(["realign", source, "--out", out, "--threads", threads, *options], ranks)
        assert done.returncode == 0, done.stderr
        found.append(runs.digests(out))
    assert found[0] == found[1]


@pytest.mark.parametrize("estimate_echo", ["shortest", "all-mean"])
def test_echoes_have_same_bytes_for_any_ranks_and_threads(estimate_echo, tmp_path):
    """Three echoes on two ranks, so that one has two of them."""
    paths = [tmp_path / "in" / f"sub-1_task-x_echo-{echo}_bold.nii.gz" for echo in (1, 2, 3)]
    for seed, path in enumerate(paths):
        runs.write_run(path, runs.ball_run(13, seed=seed) // (seed + 1))
    found = []
    for ranks, threads in [(1, 2), (2, 1)]:
        out = tmp_path / f"out-{ranks}"
        options = ("--out", out, "--threads", threads, "--estimate-echo", estimate_echo)
        done = call(["realign", *paths, *options], ranks)
        assert done.returncode == 0, done.stderr
        told = [line.split(":")[0] for line in done.stdout.splitlines()]
        assert told == ["sub-1_task-x", *(f"sub-1_task-x_echo-{echo}" for echo in (1, 2, 3))]
        found.append(runs.digests(out))
    assert found[0] == found[1] and len(found[0]) == 2 * 13 + 4


def test_real_run_has_same_bytes_on_two_ranks(study, tmp_path):
    source = study / "sub-03" / "func" / "sub-03_task-rest_bold.nii.gz"
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        done = call(["realign", source, "--out", out, "--dtype", "int16"], ranks)
        assert done.returncode == 0, done.stderr
    assert runs.digests(tmp_path / "1") == runs.digests(tmp_path / "2")


def test_a_single_band_reference_has_same_bytes_on_ranks_and_threads(study, tmp_path):
    """Found by its name; another pose, grid and contrast. Without it, one line says so."""
    folder = tmp_path / "sub-03"
    folder.mkdir()
    for ending in ("nii.gz", "json"):
        name = f"sub-03_task-rest_bold.{ending}"
        (folder / name).write_bytes((study / "sub-03" / "func" / name).read_bytes())
    source = folder / "sub-03_task-rest_bold.nii.gz"
    arguments = ["realign", source, "--reference", "sbref", "--out"]
    done = call([*arguments, tmp_path / "none"], ranks=2)
    assert done.returncode == 2
    assert done.stderr.count("no sub-03_task-rest_sbref.nii[.gz] beside") == 1
    image = nib.load(source)
    first = image.get_fdata(dtype=np.float32)[4:60, ::1, :, 0]
    affine = phantom.rigid((6, -9, 4), (5, 0, -8)) @ image.affine
    affine[:3, 3] += affine[:3, 0] * 4
    sbref = nib.Nifti1Image(np.sqrt(np.clip(first, 0, None)), affine)
    nib.save(sbref, folder / "sub-03_task-rest_sbref.nii.gz")
    found = []
    for ranks, threads in [(1, 1), (1, 2), (2, 1), (3, 1)]:
        out = tmp_path / f"{ranks}-{threads}"
        done = call([*arguments, out, "--threads", threads], ranks)
        assert done.returncode == 0, done.stderr
        found.append(runs.digests(out))
    assert all(other == found[0] for other in found)
    boldref = nib.load(out / "sub-03_task-rest_desc-hmc_boldref.nii.gz")
    np.testing.assert_allclose(boldref.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(boldref.get_fdata(), np.asarray(sbref.dataobj))
    bold = nib.load(out / "sub-03_task-rest_desc-hmc_bold.nii.gz")
    assert bold.shape == (*boldref.shape, 6)
    sidecar = json.loads((out / "sub-03_task-rest_desc-hmc_boldref.json").read_text())
    assert sidecar["Reference"].startswith("sub-03_task-rest_sbref.nii.gz (sha256:")
    assert "sbref" in sidecar["Sources"][0]


def test_head_turns_have_same_bytes_on_ranks_and_threads(study, tmp_path):
    """Volumes that start far away, on whichever rank and thread they are."""
    source = study / "sub-02" / "func" / "sub-02_task-headturn_run-1_bold.nii.gz"
    found = []
    for ranks, threads in [(1, 1), (1, 2), (2, 1), (3, 1)]:
        out = tmp_path / f"{ranks}-{threads}"
        done = call(["realign", source, "--out", out, "--threads", threads], ranks)
        assert done.returncode == 0, done.stderr
        found.append(runs.digests(out))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("options", [("--engine", "itk"), ("--check", "itk")])
def test_itk_has_same_bytes_on_ranks_and_threads(options, tmp_path):
    """Of 23 volumes two are checked."""
    data = runs.ball_run(3 if "--engine" in options else 23)
    source = runs.write_run(tmp_path / "in" / "a_bold.nii.gz", data)
    found = []
    for ranks, threads in [(1, 2), (3, 1)] if "--engine" in options else [(1, 1), (2, 1)]:
        out = tmp_path / f"{ranks}-{threads}"
        done = call(["realign", source, "--out", out, "--threads", threads, *options], ranks)
        assert done.returncode == 0, done.stderr
        assert ("ITK 5" in done.stdout) == ("--check" in options)
        found.append(runs.digests(out))
    assert all(other == found[0] for other in found) and len(found[0]) == 17


def test_failing_rank_ends_all_with_its_own_message(tmp_path):
    source = runs.write_run(tmp_path / "a_bold.nii.gz", 0 * runs.ball_run())
    done = call(["realign", source, "--out", tmp_path / "out"], ranks=2)
    assert done.returncode != 0
    assert "a: every voxel has one and the same value" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*"))
    assert done.stderr.count("one and the same value") == 1


def test_crashing_rank_ends_all_with_its_traceback(tmp_path):
    """A defect on one rank alone, while the others wait in a collective call."""
    program = (
        "from keepstill.ranks import run_in_world\n"
        "def work(world):\n"
        "    if world.rank == 1: raise RuntimeError('rank one is broken')\n"
        "    world.bcast(None); world.gather(1); world.bcast(2)\n"
        "raise SystemExit(run_in_world(2, work))\n"
    )
    done = subprocess.run(
        [MPIRUN, "-n", "2", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": SCRIPTS},
    )
    assert done.returncode != 0
    assert "rank one is broken" in done.stderr


def test_wrong_number_of_ranks_is_refused():
    program = "from keepstill.ranks import run_in_world\nraise SystemExit(run_in_world(3, print))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": SCRIPTS},
    )
    assert done.returncode == 2
    assert "3 ranks asked for, 1 found" in done.stderr


def test_alone_never_imports_mpi():
    program = (
        "import sys; from keepstill.ranks import run_in_world; run_in_world(1, lambda w: None)\n"
        "assert 'mpi4py' not in sys.modules and 'itk' not in sys.modules"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONPATH": SCRIPTS},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_wrong_reference_is_told_once_and_leaves_nothing_staged(ranks, tmp_path):
    """All ranks meet this error at once; it is told by one, and all end alike."""
    source = runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run(4))
    root = tmp_path / "memory"
    root.mkdir()
    arguments = ["realign", source, "--out", tmp_path / "out", "--stage-root", root]
    for _ in range(3):
        done = call([*arguments, "--reference", tmp_path / "no.nii"], ranks)
        assert done.returncode == 2
        assert done.stderr.count("not readable (") == 1
        assert "Traceback" not in done.stderr
        assert not list(root.rglob("*"))


def at_work(tmp_path, root):
    """A call on one process that has staged its run and is realigning it."""
    source = runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run(40, (64, 64, 30)))
    root.mkdir()
    command = [sys.executable, "-m", "keepstill", "realign", str(source)]
    command += ["--out", str(tmp_path / "out"), "--stage-root", str(root), "--threads", "1"]
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": SCRIPTS})
    while not list(root.glob("*/run-*/staged.json")):
        assert child.poll() is None
    return child


def test_what_a_killed_call_left_goes_with_the_next(tmp_path):
    """SIGKILL leaves the staged run; its lock is free, so the next call removes it."""
    root = tmp_path / "memory"
    child = at_work(tmp_path, root)
    child.kill()
    child.wait()
    left = list(root.glob("*/run-*"))
    assert len(left) == 1
    small = runs.write_run(tmp_path / "b_bold.nii.gz", runs.ball_run(3))
    done = call(["realign", small, "--out", tmp_path / "out", "--stage-root", root])
    assert done.returncode == 0, done.stderr
    assert not list(root.rglob("*"))


def test_termination_clears_the_stage(tmp_path):
    root = tmp_path / "memory"
    child = at_work(tmp_path, root)
    child.terminate()
    assert child.wait(timeout=60) == 143
    assert not list(root.rglob("*"))


def test_mean_reference_without_reslicing(tmp_path):
    """The first pass has to reslice, or there is nothing to take the mean of."""
    source = runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run(5))
    done = call(["realign", source, "--out", tmp_path, "--reference", "mean", "--no-reslice"])
    assert done.returncode == 0, done.stderr


def test_tasks_of_srun_without_pmi_are_refused(tmp_path):
    environment = os.environ | {"PYTHONPATH": SCRIPTS, "SLURM_STEP_NUM_TASKS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "keepstill", "realign", "x.nii", "--out", str(tmp_path / "o")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 2
    assert "srun --mpi=pmi2" in done.stderr


def test_killed_ranks_leave_no_segment(tmp_path):
    """MPICH would leave it in /dev/shm, 2 MB a run, until the machine is started anew."""
    program = (
        "import os, pathlib\n"
        "from keepstill.ranks import World\n"
        "world = World()\n"
        "lines = pathlib.Path('/proc/self/maps').read_text().splitlines()\n"
        "names = {line.split(maxsplit=5)[-1] for line in lines if '/dev/shm/mpich' in line}\n"
        "print(world.bcast(world.gather(sorted(names)))[0][0], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [MPIRUN, "-n", "2", sys.executable, "-m", "mpi4py", "-c", program]
    environment = os.environ | {"PYTHONPATH": SCRIPTS}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    name = done.stdout.splitlines()[0]
    assert name.endswith(" (deleted)"), done
    assert not Path(name.removesuffix(" (deleted)")).exists()


TOLD_EARLY = """
import os, pathlib, signal
from keepstill import ranks, segments
def late(maps):
    print("mapped", *segments._mapped(maps), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    segments.unlink_segments(maps)
ranks.unlink_segments = late
ranks.World()
print("not ended", flush=True)
"""


def test_ranks_told_to_end_at_their_start_leave_no_segment():
    """Signals wait until the names are gone."""
    done = subprocess.run(
        [MPIRUN, "-n", "2", sys.executable, "-c", TOLD_EARLY],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": SCRIPTS},
        check=False,
    )
    assert done.returncode == signal.SIGTERM
    names = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("mapped")]
    assert len(set(names)) == 1 and "not ended" not in done.stdout
    assert not Path("/dev/shm", names[0]).exists()


WAITS = """
import os, signal, threading
from keepstill.segments import signals_wait
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
def elsewhere():
    with signals_wait():
        print("another thread", flush=True)
thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
with signals_wait():
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    print("waited", flush=True)
print("not ended", flush=True)
"""


def test_of_signals_that_waited_none_is_lost():
    """The first may be one that is ignored; threads other than the main one cannot wait."""
    environment = os.environ | {"PYTHONPATH": SCRIPTS}
    done = subprocess.run(
        [sys.executable, "-c", WAITS], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.splitlines() == ["another thread", "waited"]
    assert done.returncode == -signal.SIGTERM and not done.stderr


def test_a_segment_whose_name_stays_ends_no_run(tmp_path, monkeypatch):
    maps, no_folder = tmp_path / "maps", tmp_path / "file"
    maps.write_text("7f00-7f01 rw-s 00000000 00:01 5   /dev/shm/mpich_shm_stays_0\n")
    no_folder.touch()
    monkeypatch.setattr(segments, "_FOLDER", no_folder)
    with pytest.raises(NotADirectoryError):
        (no_folder / "mpich_shm_stays_0").unlink()
    assert segments._mapped(maps) == {"mpich_shm_stays_0"}
    assert segments.unlink_segments(maps) is None


def test_segments_of_killed_ranks_go_with_the_next_call(tmp_path):
    """Old ones that nobody maps; young ones, of ranks that may be starting, after a while only."""
    for name in ("mpich_shm_left_0", "mpich_shm_young_0", "mpich_shm_used_0", "other"):
        (tmp_path / name).write_bytes(b"x" * 4096)
        os.utime(tmp_path / name, (time.time() - 100 * ("young" not in name),) * 2)
    with (tmp_path / "mpich_shm_used_0").open("rb") as used:
        kept = mmap.mmap(used.fileno(), 0, prot=mmap.PROT_READ)
    segments.sweep_segments(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("mpich_shm_used_0", "mpich_shm_young_0", "other")
    ]
    segments.sweep_segments(tmp_path, patience_s=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mpich_shm_used_0", "other"]
    kept.close()
    segments.sweep_segments(tmp_path)
    assert not (tmp_path / "mpich_shm_used_0").exists()


ENDS = """
import os, signal, sys, time
from keepstill import __main__, ranks
signal.signal(signal.SIGTERM, __main__._end)
told = {{"SIGTERM": (1,), "SIGINT": (0, 1)}}[{name!r}]
def work(world):
    try:
        if world.rank in told:
            os.kill(os.getpid(), signal.{name})
        world.gather(None)
    finally:
        if world.rank in told:
            time.sleep(0.2 if world.rank == 0 else 0)
            print("tidied by", world.rank, flush=True)
sys.exit(ranks.run_in_world(2, work))
"""


@pytest.mark.parametrize(("name", "code", "tidied"), [("SIGTERM", 143, "1"), ("SIGINT", 130, "01")])
def test_a_rank_that_is_told_to_end_ends_all(name, code, tidied):
    """The others do not wait for one that was told alone; where all were, rank 0 clears up."""
    done = subprocess.run(
        [MPIRUN, "-n", "2", sys.executable, "-c", ENDS.format(name=name)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": SCRIPTS},
        check=False,
    )
    assert done.returncode == code
    said = sorted(line.split()[-1] for line in done.stdout.splitlines())
    assert said == list(tidied) and "Traceback" not in done.stderr
