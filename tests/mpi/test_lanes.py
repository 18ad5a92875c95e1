"""Lanes on this machine: leases that exclude each other, end with their holder and bind ranks.

Every test leases under socket names of its own, so that neither lanes at work on this machine
nor tests beside it can make it wait.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepstill import lanes
from keepstill.errors import LaunchError
from keepstill.lanes import Place, choose_cores, fill_cores, lease_cores, read_places

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="leases are abstract unix sockets, which only Linux has"
)

SCRIPTS = Path(__file__).parents[2] / "workflow" / "scripts"
PATIENCE_S = 120  # a child that is silent for so long hangs; no test depends on anything faster

# argv: socket name, then the mask as JSON, or null for the process's own; `{}` is the body.
CHILD = """
import json, os, runpy, sys
from keepstill import lanes
lanes.SOCKET_NAME = "\\0" + sys.argv[1]
mask = json.loads(sys.argv[2])
if mask is not None:
    os.sched_getaffinity = lambda pid: set(mask)
{}
"""
HOLD = """
tell = lambda text: print(json.dumps(text), flush=True)
lease = lanes.lease_cores(int(sys.argv[3]), on_wait=tell)
print(json.dumps(lease.cores), flush=True)
sys.stdin.read()
"""
LAUNCH = """
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# One line in one write, so that ranks do not mix: rank, pid, affinity, leased cores.
RANK = """
import json, os, sys
rank = int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
seen = [rank, os.getpid(), sorted(os.sched_getaffinity(0)), sys.argv[2]]
os.write(1, (json.dumps(seen) + "\\n").encode())
if sys.argv[1] == "stay":
    sys.stdin.read()
"""


@pytest.fixture
def socket_name(monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"keepstill-test-{uuid.uuid4().hex}-"
    monkeypatch.setattr(lanes, "SOCKET_NAME", f"\0{name}")
    return name


@pytest.fixture
def four_cores(socket_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of four cores, each on its own, whatever this machine has: leases are but names."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(lanes, "CPU_DIR", Path("/nonexistent"))


@pytest.fixture
def start(socket_name: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a child that knows this test's socket name; all children end with the test."""
    started: list[subprocess.Popen[str]] = []
    timers: list[threading.Timer] = []

    def start_child(body: str, *arguments: str, mask: list[int] | None = None):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD.format(body), socket_name, json.dumps(mask), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(),
            start_new_session=True,
        )
        started.append(child)
        timers.append(threading.Timer(PATIENCE_S, kill_session, [child]))
        timers[-1].start()
        return child

    yield start_child
    for child in started:
        end(child)
    for timer in timers:
        timer.cancel()


def end(child: subprocess.Popen[str]) -> None:
    """End the child by the end of its input, and by force if that does not do."""
    try:
        child.communicate(timeout=PATIENCE_S / 10)
    except subprocess.TimeoutExpired:
        kill_session(child)
        child.communicate()


def kill_session(child: subprocess.Popen[str]) -> None:
    """Kill the child and what it started; it is not yet reaped, so its number is still its own."""
    if child.returncode is None:
        os.killpg(child.pid, signal.SIGKILL)


def child_environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(SCRIPTS),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def read_json(child: subprocess.Popen[str]):
    line = child.stdout.readline()
    assert line, f"child ended without an answer: {child.communicate()[1]}"
    return json.loads(line)


def mpirun() -> str:
    """The launcher of this environment, else the one on PATH."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun beside this python or on PATH")
    return found


def mpich_flags(n_ranks: int) -> list[str]:
    """MPICH's mpirun with a place for the cores; its numbers are the kernel's."""
    version = subprocess.run([mpirun(), "--version"], capture_output=True, text=True, check=True)
    if "HYDRA" not in version.stdout:
        pytest.skip("-bind-to user:... is MPICH's, and mpirun here is not MPICH")
    return [mpirun(), "-n", str(n_ranks), "-bind-to", "user:{cores}"]


def launch_arguments(n_ranks: int, command: list[str]) -> list[str]:
    script = str(SCRIPTS / "launch.py")
    return [script, "--run", "sub-01_task-rest", "--ranks", str(n_ranks), "--", *command]


def rank_command(manner: str) -> list[str]:
    return [sys.executable, "-c", RANK, manner, "{cores}"]


# -- leases --------------------------------------------------------------------------------------


def test_names_are_the_same_for_every_lane_of_a_machine():
    assert lanes.SOCKET_NAME == "\0keepstill-core-"


def test_two_lanes_sit_on_different_cores(four_cores, start):
    other = start(HOLD, "1", mask=[0, 1, 2, 3])
    (other_core,) = read_json(other)
    lease = lease_cores(1)
    assert lease.cores != (other_core,)
    lease.release()


def test_killed_holder_frees_its_cores(four_cores, start):
    holder = start(HOLD, "4", mask=[0, 1, 2, 3])
    read_json(holder)
    with pytest.raises(LaunchError, match="fewer than 1 of 4 cores"):
        lease_cores(1, wait_s=0)
    holder.kill()
    holder.wait()
    lease = lease_cores(4, wait_s=0)
    assert lease.cores == (0, 1, 2, 3)
    lease.release()


def test_lane_waits_until_enough_cores_are_free(four_cores, start):
    held = lease_cores(3)
    waiter = start(HOLD, "2", mask=[0, 1, 2, 3])
    assert read_json(waiter) == "waiting for 2 of 4 cores"
    lease_cores(1, wait_s=PATIENCE_S).release()  # who waits holds nothing
    held.release()
    assert len(set(read_json(waiter))) == 2


def test_lane_tells_only_once_that_it_waits(four_cores, monkeypatch):
    held = lease_cores(4)
    told: list[str] = []
    slept_s: list[float] = []

    def sleep(seconds):
        slept_s.append(seconds)
        if len(slept_s) == 3:
            held.release()

    monkeypatch.setattr(lanes.time, "sleep", sleep)
    lease_cores(1, on_wait=told.append).release()
    assert len(slept_s) == 3
    assert told == ["waiting for 1 of 4 cores"]


@pytest.mark.parametrize("mask", [[0, 1], [0, 1, 2]])
def test_lanes_that_cannot_run_at_once_take_turns(socket_name, start, tmp_path, mask):
    body = """
for turn in range(40):
    lease = lanes.lease_cores(2, poll_s=0.001)
    os.close(os.open(sys.argv[3], os.O_CREAT | os.O_EXCL))
    os.unlink(sys.argv[3])
    lease.release()
print(json.dumps("done"), flush=True)
"""
    children = [start(body, str(tmp_path / "held"), mask=mask) for _ in range(2)]
    assert [read_json(child) for child in children] == ["done", "done"]


def test_fewer_cores_than_ranks_are_repeated(four_cores, caplog):
    lease = lease_cores(6)
    assert lease.cores == (0, 1, 2, 3, 0, 1)
    assert len(lease.sockets) == 4
    assert "6 cores asked for, 4 allowed" in caplog.text
    lease.release()


def test_lease_outlives_the_process_that_took_it(four_cores):
    lease = lease_cores(4)
    assert all(held.get_inheritable() for held in lease.sockets)
    with subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, pass_fds=[held.fileno() for held in lease.sockets]
    ) as heir:
        lease.release()
        with pytest.raises(LaunchError):
            lease_cores(1, wait_s=0)
        heir.stdin.close()
    lease_cores(4, wait_s=0).release()


def test_no_core_is_refused(socket_name):
    with pytest.raises(LaunchError, match="0 cores"):
        lease_cores(0)


def test_without_sockets_ranks_run_unbound(four_cores, monkeypatch, caplog):
    def refuse(cpus):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(lanes, "_taken", refuse)
    assert lease_cores(2) == lanes.Lease((), ())
    assert "no cores leased" in caplog.text
    assert len(caplog.records) == 1


# -- choice --------------------------------------------------------------------------------------

# 2 packages of 4 cores with 2 threads; the kernel counts the second threads from 8 on.
TWO_PACKAGES = {cpu: Place((cpu % 8) // 4, (cpu % 8, cpu % 8 + 8)) for cpu in range(16)}


@pytest.mark.parametrize(
    ("taken", "n_cores", "chosen"),
    [
        (set(), 2, (0, 1)),
        (set(), 8, (0, 1, 2, 3, 4, 5, 6, 7)),
        ({0}, 4, (4, 5, 6, 7)),  # one package, not two
        ({8}, 3, (1, 2, 3)),  # core 0 is busy through thread 8
        ({1, 4}, 1, (0,)),  # the shortest stretch that fits
        ({1, 6}, 4, (2, 3, 4, 5)),  # no stretch fits: the longest ones
        ({0, 1, 2, 3, 4, 5, 6, 7}, 2, (8, 9)),  # no whole core left: threads
        (set(range(8)) | {8}, 8, None),
    ],
)
def test_choice_of_cores(taken, n_cores, chosen):
    assert choose_cores(set(range(16)), taken, n_cores, TWO_PACKAGES) == chosen


def test_threads_of_one_core_are_neighbours():
    chosen = choose_cores(set(range(16)), {3}, 8, TWO_PACKAGES)
    assert chosen == (4, 12, 5, 13, 6, 14, 7, 15)


def test_choice_is_always_distinct_free_and_allowed():
    generator = random.Random(7)
    for _ in range(300):
        mask = set(generator.sample(range(16), generator.randint(1, 16)))
        taken = set(generator.sample(range(16), generator.randint(0, 16)))
        n_cores = generator.randint(1, 16)
        chosen = choose_cores(mask, taken, n_cores, TWO_PACKAGES)
        if chosen is None:
            assert len(mask - taken) < n_cores
        else:
            assert len(chosen) == len(set(chosen)) == n_cores
            assert set(chosen) <= mask - taken


@pytest.mark.parametrize(
    ("package", "siblings", "place"),
    [
        ("1", "5,13", Place(1, (5, 13))),
        ("0", "4-5", Place(0, (4, 5))),
        ("0", "5", Place(0, (5,))),
        ("", "", Place(0, (5,))),
        (None, None, Place(0, (5,))),
    ],
)
def test_places_as_the_kernel_writes_them(tmp_path, package, siblings, place):
    if package is not None:
        topology = tmp_path / "cpu5" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "thread_siblings_list").write_text(f"{siblings}\n")
    assert read_places([5], tmp_path) == {5: place}


def test_places_of_this_machine_hold_their_core():
    places = read_places(os.sched_getaffinity(0), lanes.CPU_DIR)
    assert all(cpu in place.siblings for cpu, place in places.items())


# -- arguments -----------------------------------------------------------------------------------


def test_cores_are_filled_in():
    arguments = ["mpirun", "-n", "2", "-bind-to", "user:{cores}", "python"]
    assert fill_cores(arguments, (2, 3)) == ["mpirun", "-n", "2", "-bind-to", "user:2,3", "python"]
    assert fill_cores(["--map-by", "pe-list={cores}:ordered"], (7,)) == [
        "--map-by",
        "pe-list=7:ordered",
    ]


def test_cores_of_ranks_with_threads_are_joined():
    assert fill_cores(["user:{cores}"], (2, 3, 4, 5), threads_per_rank=2) == ["user:2+3,4+5"]
    assert fill_cores(["user:{cores}"], (0, 0), threads_per_rank=2) == ["user:0"]


@pytest.mark.parametrize(
    "flags", [["-bind-to", "user:{cores}"], ["--cpu-set={cores}"], ["--cpu-set", "{cores}"]]
)
def test_without_cores_the_binding_goes_away(flags):
    assert fill_cores(["mpirun", "-n", "2", *flags, "x"], ()) == ["mpirun", "-n", "2", "x"]


# -- launcher ------------------------------------------------------------------------------------


def test_single_rank_stays_on_its_core(socket_name, start):
    child = start(LAUNCH, *launch_arguments(1, rank_command("stay")))
    _, pid, affinity, cores = read_json(child)
    assert [str(core) for core in affinity] == [cores]
    assert pid == child.pid  # the command took the launcher's place: signals reach it
    with pytest.raises(LaunchError):
        lease_cores(len(os.sched_getaffinity(0)), wait_s=0)


def test_threads_of_numerical_libraries_follow_the_rank(socket_name, start, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")  # as Snakemake does for a rule of 8 ranks
    show = "import os; print([os.environ['OMP_NUM_THREADS'], os.environ['OPENBLAS_NUM_THREADS']])"
    child = start(LAUNCH, *launch_arguments(1, [sys.executable, "-c", show]))
    assert child.communicate()[0] == "['1', '1']\n"


def test_exit_status_is_that_of_the_command(socket_name, start):
    child = start(LAUNCH, *launch_arguments(1, [sys.executable, "-c", "raise SystemExit(7)"]))
    assert child.wait() == 7


def test_missing_command_is_one_line_and_exit_2(socket_name, start):
    child = start(LAUNCH, *launch_arguments(1, ["no-such-mpirun"]))
    _, errors = child.communicate()
    assert child.returncode == 2
    assert errors == (
        "keepstill: sub-01_task-rest: no-such-mpirun: no such command; "
        "needs to be installed and on PATH\n"
    )


def test_waiting_lane_names_its_run(socket_name, start):
    lease = lease_cores(len(os.sched_getaffinity(0)))
    child = start(LAUNCH, *launch_arguments(1, rank_command("go")))
    told = child.stderr.readline()
    lease.release()
    assert told.startswith("keepstill: sub-01_task-rest: waiting for 1 of ")
    assert read_json(child)[0] == 0


# -- ranks under a real launcher -----------------------------------------------------------------


def test_each_rank_is_bound_to_its_leased_core(socket_name, start):
    child = start(LAUNCH, *launch_arguments(2, mpich_flags(2) + rank_command("go")))
    ranks = sorted(read_json(child) for _ in range(2))
    assert [rank for rank, *_ in ranks] == [0, 1]
    for rank, _, affinity, cores in ranks:
        assert affinity == [int(cores.split(",")[rank])]


def test_ranks_of_a_launcher_that_does_not_bind_stay_in_their_lane(socket_name, start):
    unbound = [mpirun(), "--bind-to", "none", "-n", "1"]
    child = start(LAUNCH, *launch_arguments(1, unbound + rank_command("go")))
    _, _, affinity, cores = read_json(child)
    assert [str(core) for core in affinity] == [cores]


def test_lanes_side_by_side_have_disjoint_cores(socket_name, start):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two lanes at once need two cores")
    arguments = launch_arguments(1, mpich_flags(1) + rank_command("stay"))
    children = [start(LAUNCH, *arguments) for _ in range(2)]
    (*_, first, _), (*_, second, _) = [read_json(child) for child in children]
    assert len(first) == len(second) == 1
    assert first != second


def test_orphaned_mpirun_keeps_its_cores(socket_name, start):
    """Snakemake and its shell may be killed while mpirun goes on: its cores are not free."""
    launcher = launch_arguments(1, mpich_flags(1) + rank_command("stay"))
    body = """
import subprocess
subprocess.Popen([sys.executable, "-c", *json.loads(sys.argv[3])])
sys.stdin.read()
"""
    parent = start(body, json.dumps([CHILD.format(LAUNCH), socket_name, "null", *launcher]))
    _, rank_pid, _, cores = read_json(parent)
    parent.kill()
    n_cores = len(os.sched_getaffinity(0))
    with pytest.raises(LaunchError):
        lease_cores(n_cores, wait_s=0)
    assert Path(f"/proc/{rank_pid}").exists()
    kill_session(parent)
    lease = lease_cores(n_cores, wait_s=PATIENCE_S)
    assert int(cores) in lease.cores
    lease.release()


@pytest.mark.parametrize(
    ("launcher", "n_ranks", "command"),
    [
        ("mpirun", 1, "python"),
        ("", 1, "python"),
        ("srun --mpi=pmi2", 3, "srun --mpi=pmi2 -n 3 --bind 'a b' python -m mpi4py"),
    ],
)
def test_one_rank_needs_no_launcher(launcher, n_ranks, command):
    assert lanes.launch_command(launcher, "--bind 'a b'", n_ranks) == shlex.split(command)
