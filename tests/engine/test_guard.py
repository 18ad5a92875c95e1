"""What a job has to say reaches the user, full disk or not."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from keepstill import files, study
from keepstill.errors import OutputError

GUARD = Path(__file__).parents[2] / "workflow" / "scripts" / "guard.sh"


def guarded(log: Path, command: str, stage_dir: str = "") -> subprocess.CompletedProcess[str]:
    heard = ["env", "--default-signal=HUP"]  # the tests may run under nohup
    arguments = [*heard, "bash", str(GUARD), str(log), stage_dir, "bash", "-c", command]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_the_last_word_is_told_and_the_log_has_all(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("of an earlier call")
    process = guarded(log, "echo more; echo keepstill: first; echo keepstill: last >&2; exit 3")
    assert process.returncode == 3
    assert process.stderr == "keepstill: last\n"
    assert log.read_text() == "more\nkeepstill: first\nkeepstill: last\nexit status 3\n"


def test_a_warning_is_no_reason_and_being_told_to_end_no_failure(tmp_path: Path) -> None:
    run = study.Run("a", tmp_path / "a.nii", "01", None, {})
    made = study.Study(None, tmp_path, tmp_path, study.RealignSettings(), {"a": run}, False)
    log = made.log_path("realign", "a")
    log.parent.mkdir(parents=True)
    warn = "echo keepstill: a: warning: ranks share cores; "
    process = guarded(log, warn + "exit 3")
    assert process.stderr == f"keepstill: exit status 3; see {log}\n"
    plan = study.Plan(("a",), (), False)
    (reason,) = made.failures(plan, 0)
    assert reason == f"a: exit status 3; see {log}"
    for ended in ("kill -TERM $$", "exit 15", "exit 143"):  # 15 is what MPICH's mpirun says
        process = guarded(log, warn + ended)
        assert process.returncode in (15, 143) and "keepstill" not in process.stderr
        assert made.failures(plan, 0) == ["1 run not finished; the next call goes on with them"]


def test_a_terminal_that_closes_leaves_nothing_staged(tmp_path: Path) -> None:
    """Bash would end at once, taking the job for done: no status, what is staged stays."""
    log, staged = tmp_path / "run.log", tmp_path / "run"
    staged.mkdir()
    process = guarded(log, "kill -HUP $PPID; sleep 0.2", str(staged))
    assert process.returncode == 129 and not process.stderr
    assert not staged.exists() and not log.read_text()


def test_a_log_on_a_full_disk_is_told_before_the_work(tmp_path: Path) -> None:
    log = tmp_path / "sub-01_task-rest.log"
    log.symlink_to("/dev/full")  # every write to it fails as on a full disk
    process = guarded(log, f"touch {tmp_path / 'done'}")
    assert process.returncode == 2
    assert process.stderr == (
        f"keepstill: sub-01_task-rest: no room for its log, {log}; free space there or choose "
        "another output_dir\n"
    )
    assert not (tmp_path / "done").exists()


def test_room_for_the_log_is_held_during_the_work_and_no_longer(tmp_path: Path) -> None:
    """Should the disk fill meanwhile, the reason can still be written."""
    log, probe = tmp_path / "run.log", tmp_path / "probe"
    try:
        with probe.open("w") as file:
            os.posix_fallocate(file.fileno(), 0, 1)
        subprocess.run(["fallocate", "--keep-size", "--length", "9", probe], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this file system reserves nothing")
    process = guarded(log, f"stat -c %b {log}; echo keepstill: well")
    assert process.stderr == "keepstill: well\n"
    assert int(log.read_text().split()[0]) * 512 >= 1 << 16
    assert log.stat().st_blocks * 512 < 1 << 16


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fail)


def test_a_full_output_directory_is_refused_at_once(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(OutputError, match=r"cannot write to .* \(No space left on device\); ch"):
        files.claim_output_dir(tmp_path / "out", "output_dir")
    assert list((tmp_path / "out").iterdir()) == []


def test_runs_without_a_log_are_explained_by_the_full_disk(tmp_path: Path, full_disk: None) -> None:
    run = study.Run("a", tmp_path / "a.nii", "01", None, {})
    made = study.Study(None, tmp_path, tmp_path, study.RealignSettings(), {"a": run}, False)
    assert made.failures(study.Plan(("a",), (), False), 0) == [
        f"1 run not finished: cannot write to {tmp_path} (No space left on device); free space "
        "there; the next call goes on with them"
    ]
