"""What whole processes cost: processor time, wall time and memory of their own."""

import contextlib
import os
import re
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.01
_WATCHED_S = 2.0
_ANONYMOUS = re.compile(r"^RssAnon:\s*(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Spent:
    """Seconds of a command: processor time of all its processes, and from beginning to end."""

    cpu_s: float
    wall_s: float


def spent(command: Sequence[str]) -> Spent:
    """What a command costs, from the resource usage of ended children."""
    began_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after, wall_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began_s
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(cpu_s, wall_s)


def least(costs: Sequence[Spent]) -> Spent:
    """Least processor time and least wall time: what others do on the machine only adds."""
    return Spent(min(cost.cpu_s for cost in costs), min(cost.wall_s for cost in costs))


def peak_anonymous_mb(command: Sequence[str]) -> float:
    """Most anonymous memory (MB) of a command's own process, seen every 10 ms.

    Shared memory and mapped files do not count.
    """
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        status, peak_kb = Path(f"/proc/{process.pid}/status"), 0
        while process.poll() is None:
            with contextlib.suppress(OSError):
                found = _ANONYMOUS.search(status.read_text())
                peak_kb = max(peak_kb, int(found[1]) if found else 0)
            time.sleep(_POLL_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return peak_kb / 1e3


def idle_part() -> float:
    """Part of this process's cores that nobody uses, 0 to 1, watched for two seconds."""
    before = _jiffies()
    time.sleep(_WATCHED_S)
    total, idle = (after - then for after, then in zip(_jiffies(), before, strict=True))
    return idle / max(total, 1)


def _jiffies() -> tuple[int, int]:
    """All time and idle time of this process's cores so far."""
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    # user nice system idle iowait irq softirq steal; guests are in user already.
    counts = [[int(n) for n in row[1:9]] for row in rows if row[0] in names]
    return sum(map(sum, counts)), sum(count[3] + count[4] for count in counts)
