"""A Slurm of one node on this machine, for tests: started, used and ended by them.

Slurm finds its configuration at /etc/slurm/slurm.conf only: the executor plugin takes SLURM_CONF
out of the environment. So a machine that has one, and thus belongs to a cluster, is left alone.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CONF = Path("/etc/slurm/slurm.conf")
MUNGE_SOCKET = Path("/run/munge/munge.socket.2")
NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "squeue", "unshare")
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where daemons are
MARK = "# keepstill: a Slurm for tests, which ends with them"
PATIENCE_S = 60
SHM_BYTES = 1 << 30  # of the node's own /dev/shm

# On two CPUs, so that two jobs of one rank, or one of two, fill the node.
TEMPLATE = """{mark}
ClusterName=keepstill-test
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/jobs.log
ReturnToService=2
InactiveLimit=0
KillWait=5
MinJobAge=300
Waittime=0
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} \
ThreadsPerCore=1 RealMemory={memory_mb} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Node:
    """A running Slurm.

    Attributes
    ----------
    root : Path
        Logs and state.
    shm : Path
        The node's /dev/shm, which is not that of the processes that submit.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        daemon = int((root / "slurmd.pid").read_text())
        self.shm = Path("/proc", str(daemon), "root", "dev", "shm")

    def jobs(self) -> list[str]:
        """Numbers of the jobs that are not over."""
        return run("squeue", "--noheader", "--format=%A").split()

    def completed(self) -> list[dict[str, str]]:
        """What Slurm notes of each job that is over: JobId, JobState, StartTime, ..."""
        log = self.root / "jobs.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [dict(word.partition("=")[::2] for word in line.split()) for line in lines]

    def cpus(self) -> dict[str, set[int]]:
        """CPUs of each job that is running."""
        lines = run("scontrol", "--details", "--oneliner", "show", "jobs").splitlines()
        found = [
            re.search(r"^JobId=(\d+) .* JobState=RUNNING .* CPU_IDs=(\S+)", line) for line in lines
        ]
        return {match[1]: set(_numbers(match[2])) for match in found if match}

    def cancel(self, *jobs: str) -> None:
        """End jobs as a user would."""
        if jobs:
            run("scancel", *jobs)

    def wait_until_idle(self) -> None:
        """Wait for all jobs to be over, and for what they started to be gone."""
        wait(lambda: not self.jobs(), "jobs to end")


def why_not() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    if os.geteuid() != 0:
        return "needs root, to start Slurm's daemons"
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: slurm-wlm, munge)"
    if os.path.lexists(CONF) and not _is_left_over():
        return f"{CONF} is there: this machine belongs to a cluster"
    if len(os.sched_getaffinity(0)) < 2:
        return "needs two cores"
    return None


@contextlib.contextmanager
def slurm_node(root: Path) -> Iterator[Node]:
    """Slurm, started and, in the end, stopped with all its jobs."""
    for name in ("state", "spool"):
        (root / name).mkdir()
    conf = root / "slurm.conf"
    conf.write_text(_configuration(root))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_munge())
        CONF.unlink(missing_ok=True)
        CONF.parent.mkdir(exist_ok=True)
        CONF.symlink_to(conf)
        stack.callback(CONF.unlink)
        stack.callback(_end_daemon, root / "slurmctld.pid")
        run("slurmctld", "-f", str(CONF))
        stack.callback(_end_daemon, root / "slurmd.pid")
        own_shm = f"mount --make-rprivate / && mount -t tmpfs -o size={SHM_BYTES} tmpfs /dev/shm"
        run("unshare", "-m", "sh", "-c", f"{own_shm} && exec slurmd -f {CONF} -N localhost")
        wait(lambda: "idle" in run("sinfo", "--noheader", "--format=%T"), "the node to be idle")
        node = Node(root)
        stack.callback(node.wait_until_idle)
        stack.callback(lambda: node.cancel(*node.jobs()))
        yield node


def wait(is_so: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until something is so; an AssertionError says what was waited for in vain."""
    deadline_s = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"waited {patience_s:g} s for {what}"
        time.sleep(0.2)


def run(*command: str) -> str:
    """What a command prints; an AssertionError has its complaint if it fails."""
    environment = os.environ | {"PATH": PATH}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _configuration(root: Path) -> str:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("", 0))
        second.bind(("", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    memory_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 * 3 // 4
    return TEMPLATE.format(
        mark=MARK,
        root=root,
        controller_port=ports[0],
        node_port=ports[1],
        cpus=2,
        memory_mb=memory_mb,
    )


def _is_left_over() -> bool:
    """Whether the configuration is that of tests that were killed."""
    if not CONF.is_symlink():
        return False
    try:
        if not CONF.read_text().startswith(MARK):
            return False
        return not _is_alive(CONF.resolve().with_name("slurmctld.pid"))
    except OSError:
        return CONF.readlink().parent.name.startswith("slurm")  # whose folder is gone


@contextlib.contextmanager
def _munge() -> Iterator[None]:
    """The daemon that says who somebody is, unless it runs already."""
    if (
        MUNGE_SOCKET.exists()
        and subprocess.run(["munge", "-n"], check=False, capture_output=True).returncode == 0
    ):
        yield
        return
    MUNGE_SOCKET.parent.mkdir(exist_ok=True)
    shutil.chown(MUNGE_SOCKET.parent, "munge", "munge")
    run("su", "-s", "/bin/sh", "munge", "-c", shutil.which("munged", path=PATH))
    try:
        yield
    finally:
        _end_daemon(MUNGE_SOCKET.with_name("munged.pid"))


def _numbers(spans: str) -> Iterator[int]:
    """Numbers of spans such as 0-2,5."""
    for span in spans.split(","):
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _pid(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _is_alive(pid_file: Path) -> bool:
    pid = _pid(pid_file)
    return pid is not None and Path(f"/proc/{pid}").exists()


def _end_daemon(pid_file: Path) -> None:
    """End a daemon by the number that it wrote, if it came so far."""
    pid = _pid(pid_file)
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(AssertionError):
        wait(lambda: not Path(f"/proc/{pid}").exists(), "a daemon to end", 10)
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
