"""What is done again, and what is not: by content alone, counted in files that were rewritten."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import runs
from studies import TWO_RANKS

CLONE = Path(__file__).parents[2]
NAMES = ("sub-01_task-rest", "sub-02_task-rest")
NOTHING = "keepstill: 2 runs, all complete; nothing to do"
# Of a run: table, transforms, reference, two masks, two maps and the run itself, each with a
# JSON beside it, and the manifest.
N_FILES = 8 * 2 + 1

Seen = dict[str, tuple[int, int]]


class Place:
    """A study of two small runs, its results, and Snakemake to call beside them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memory = root / "memory"
        self.memory.mkdir(parents=True)
        for number, name in enumerate(NAMES):
            runs.write_run(self.source(name), runs.ball_run(4, seed=number))
        described = {"Name": "two balls", "BIDSVersion": "1.10.0"}
        (root / "study" / "dataset_description.json").write_text(json.dumps(described))

    @property
    def out(self) -> Path:
        return self.root / "out"

    def source(self, name: str, ending: str = ".nii.gz") -> Path:
        return self.root / "study" / name[:6] / "func" / f"{name}_bold{ending}"

    def output(self, name: str, ending: str = "_desc-hmc_bold.nii.gz") -> Path:
        return self.out / name[:6] / "func" / f"{name}{ending}"

    def call(self, *arguments: str, config: tuple[str, ...] = (), clone: Path = CLONE) -> list[str]:
        """Our own lines of Snakemake's call."""
        given = "" if "--workflow-profile" in arguments else clone / "profiles" / "default"
        command = [
            *(sys.executable, "-m", "snakemake", "--cores", "2"),
            *("--snakefile", str(clone / "Snakefile")),
            *(("--workflow-profile", str(given)) if given else ()),
            *arguments,
            *("--config", "bids_dir=study", "output_dir=out", f"stage_root={self.memory}"),
            *("pages=false", *config),
        ]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stderr.splitlines() if line.startswith("keepstill: ")]

    def files(self) -> Seen:
        """Inode and time of change of every file of the results but logs."""
        return {
            path.relative_to(self.out).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in self.out.rglob("*")
            if path.is_file() and "logs" not in path.relative_to(self.out).parts
        }

    def verify(self, *arguments: str) -> tuple[list[str], int]:
        """What `keepstill verify` says, and its exit status."""
        command = [sys.executable, "-m", "keepstill", "verify", str(self.out), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.stderr
        return done.stdout.splitlines(), done.returncode


def rewritten(before: Seen, after: Seen) -> dict[str, int]:
    """Number of files that another call has written, by run; those of the study are left out."""
    changed = [path for path in after if after[path] != before.get(path)]
    counts = {name: sum(name in path for path in changed) for name in NAMES}
    return {name: count for name, count in counts.items() if count}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A study that was realigned by one rank a run."""
    place = Place(tmp_path_factory.mktemp("reruns"))
    place.call()
    assert rewritten({}, place.files()) == dict.fromkeys(NAMES, N_FILES)
    return place


@pytest.mark.parametrize(
    "arguments",
    [
        TWO_RANKS,
        ("--set-threads", "realign=2"),
        ("--set-resources", "realign:mpi=srun --mpi=pmi2"),
        ("--workflow-profile", str(CLONE / "profiles" / "workstation")),
        ("--workflow-profile", str(CLONE / "profiles" / "slurm"), "--dry-run"),
    ],
    ids=["ranks", "threads", "launcher", "profile", "executor"],
)
def test_how_a_run_is_worked_on_does_not_count(place: Place, arguments: tuple[str, ...]) -> None:
    before = place.files()
    assert place.call(*arguments) == [NOTHING]
    assert rewritten(before, place.files()) == {}


def test_touched_inputs_do_not_count(place: Place) -> None:
    before = place.files()
    for path in (place.root / "study").rglob("*"):
        os.utime(path)
    assert place.call() == [NOTHING]
    assert rewritten(before, place.files()) == {}


def test_a_copied_and_moved_study_stays_complete(place: Place, tmp_path: Path) -> None:
    """Other paths, other inodes, other times."""
    for folder in ("study", "out"):
        shutil.copytree(place.root / folder, tmp_path / "elsewhere" / folder, copy_function=_copy)
    moved = object.__new__(Place)
    moved.root, moved.memory = tmp_path / "elsewhere", place.memory
    before = moved.files()
    assert moved.call() == [NOTHING]
    assert rewritten(before, moved.files()) == {}


def _copy(source: str, target: str) -> None:
    shutil.copyfile(source, target)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another clone, to be edited."""
    root = tmp_path_factory.mktemp("clone")
    shutil.copy(CLONE / "Snakefile", root)
    for folder in ("workflow", "config", "profiles"):
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(CLONE / folder, root / folder, ignore=left_out)
    return root


@pytest.mark.parametrize(
    ("module", "first_line"),
    [
        ("__main__.py", NOTHING),
        ("report/run_page.py", NOTHING),
        ("kernels/sums.py", "keepstill: 2 runs found, 0 complete, 2 to do"),
    ],
)
def test_only_code_that_computes_counts(
    place: Place, clone: Path, module: str, first_line: str
) -> None:
    before = place.files()
    path = clone / "workflow" / "scripts" / "keepstill" / module
    code = path.read_text()
    path.write_text(code + "# a typo\n")
    assert place.call("--dry-run", clone=clone)[0] == first_line
    path.write_text(code)
    assert rewritten(before, place.files()) == {}


def test_a_changed_input_counts_for_its_run_alone(place: Place) -> None:
    """Of the same size and time: what tells is another inode, then the content."""
    first, _ = NAMES
    source, before = place.source(first), place.files()
    status = source.stat()
    runs.write_run(source.with_name("other.nii.gz"), runs.ball_run(4, seed=7), sidecar=False)
    source.with_name("other.nii.gz").replace(source)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert place.call()[0] == "keepstill: 2 runs found, 1 complete, 1 to do"
    assert rewritten(before, place.files()) == {first: N_FILES}


def test_a_changed_setting_counts_for_all(place: Place) -> None:
    before = place.files()
    config = ("interpolation_degree=3",)
    assert place.call(config=config)[0] == "keepstill: 2 runs found, 0 complete, 2 to do"
    after = place.files()
    assert rewritten(before, after) == dict.fromkeys(NAMES, N_FILES)
    assert place.call(config=config) == [NOTHING]
    place.call()
    assert rewritten(after, place.files()) == dict.fromkeys(NAMES, N_FILES)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """Change one byte in place, and not the time of change."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "words", "is_deep"),
    [
        (Path.unlink, "missing", False),
        (truncate, r" of {} bytes", False),
        (flip, "another content (sha256)", True),
    ],
    ids=["missing", "truncated", "flipped"],
)
def test_a_damaged_output_is_named_and_its_run_done_again(
    place: Place, damage: Callable[[Path], None], words: str, is_deep: bool
) -> None:
    assert place.verify("--deep") == (
        ["32 outputs of 2 runs compared by size and sha256: all as they were written"], 0
    )  # fmt: skip
    _, second = NAMES
    path, before, was = place.output(second), place.files(), place.output(second).read_bytes()
    damage(path)
    shallow, status = place.verify()
    assert (len(shallow), status) == ((1, 0) if is_deep else (2, 1))
    lines, status = place.verify("--deep") if is_deep else (shallow, status)
    assert status == 1
    named = f"{second}: {path.relative_to(place.out).as_posix()}: "
    assert lines[0].startswith(named) and lines[0].endswith(words.format(len(was)))
    assert lines[1].endswith(": 1 damaged; the next call of the workflow does 1 run again")
    assert place.call()[0] == "keepstill: 2 runs found, 1 complete, 1 to do"
    after = place.files()
    assert rewritten(before, after) == {second: N_FILES}
    assert path.read_bytes() == was
    assert place.verify()[1] == 0
