"""The workflow as a user calls it: what is done, what is not done again, what is told."""

import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from keepstill.__main__ import main
from keepstill.config_files import load_config
from keepstill.preflight import study_needs
from keepstill.stage import hold_stage_dir
from keepstill.study import read_study, sweep_study
from runs import ball_run, write_run
from studies import TWO_RANKS
from validator import validate

CLONE = Path(__file__).parents[2]
FIRST, SECOND = "sub-01_task-rest", "sub-02_task-headturn"
RUNS = {
    FIRST: "sub-03/func/sub-03_task-rest_bold",
    SECOND: "sub-02/func/sub-02_task-headturn_run-1_bold",
}


class Place:
    """A working directory with a study in it, and Snakemake to call there."""

    def __init__(self, root: Path, runs: Iterable[str] = RUNS) -> None:
        self.root = root
        self.bids_dir = root / "my [old] study.v2"
        self.output_dir = root / "the results"
        self.stage_root = root / "memory"
        self.stage_root.mkdir()
        demo = CLONE / "tests" / "data" / "study"
        self.bids_dir.mkdir()
        description = "dataset_description.json"
        (self.bids_dir / description).write_bytes((demo / description).read_bytes())
        for run in runs:
            for ending in (".nii.gz", ".json"):
                path = self.source(run, ending)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes((demo / (RUNS[run] + ending)).read_bytes())

    def source(self, run: str, ending: str = ".nii.gz") -> Path:
        return self.bids_dir / run[:6] / "func" / f"{run}_bold{ending}"

    def call(
        self,
        *arguments: str,
        config: Iterable[str] = (),
        n_cores: int | None = 2,
        table: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Snakemake in this place, from an environment that is not activated."""
        source = f"runs={table}" if table else f"bids_dir={self.bids_dir.name}"
        command = [
            *(sys.executable, "-m", "snakemake"),
            *([] if n_cores is None else ["--cores", str(n_cores)]),
            *("--snakefile", str(CLONE / "Snakefile")),
            *("--workflow-profile", str(CLONE / "profiles" / "default")),
            *arguments,
            *("--config", source, f"output_dir={self.output_dir.name}"),
            *(f"stage_root={self.stage_root}", *config),
        ]
        environment = os.environ | {"PATH": os.defpath}
        return subprocess.run(
            command, cwd=self.root, capture_output=True, text=True, env=environment, check=False
        )

    def outputs(self) -> dict[str, tuple[int, int]]:
        """Path -> inode and time of change of every file of the results but logs."""
        found = (path for path in self.output_dir.rglob("*") if path.is_file())
        return {
            name: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in found
            if not (name := path.relative_to(self.output_dir).as_posix()).startswith("logs/")
        }


def told(process: subprocess.CompletedProcess[str]) -> list[str]:
    """Our own lines on the terminal, but for those that say that others use the cores."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("keepstill: ")]
    return [line for line in lines if ": waiting for " not in line]


def assert_preflight(lines: list[str], place: Place) -> None:
    """What is told before two runs are started."""
    found, output, memory, time = lines
    assert found == "keepstill: 2 runs found, 0 complete, 2 to do"
    size = r"less than 0\.01 GB"
    assert re.match(rf"keepstill: output: {size}, [\d,.]+ GB free in ", output)
    assert output.endswith(f" in {place.output_dir}")
    assert re.match(rf"keepstill: shared memory: {size} a lane, [\d,.]+ GB free in ", memory)
    assert memory.endswith(f" in {place.stage_root}")
    assert re.fullmatch(r"keepstill: time: about \d\.\d CPU minutes", time)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, list[str]]:
    """A study that was realigned, two ranks a run, and what was told."""
    place = Place(tmp_path_factory.mktemp("done"))
    process = place.call(*TWO_RANKS)
    assert process.returncode == 0, process.stderr
    return place, told(process)


def test_a_study_is_realigned(done: tuple[Place, list[str]]) -> None:
    place, lines = done
    assert_preflight(lines[:4], place)
    assert {line.split(": ")[1] for line in lines[4:6]} == {FIRST, SECOND}
    assert lines[6:] == [f"keepstill: all complete in {place.output_dir}"]
    for run in RUNS:
        folder = place.output_dir / run[:6] / "func"
        assert (folder / f"{run}_desc-hmc_bold.nii.gz").is_file()
        for made in (f"manifests/{run}.json", f"figures/{run}.svg", f"pages/{run}.html"):
            assert (place.output_dir / made).is_file()
        assert (place.output_dir / "figures" / f"{run}_slices.svg").is_file()
    assert (place.output_dir / "index.html").is_file()


def test_the_results_are_valid_bids(done: tuple[Place, list[str]]) -> None:
    """No error; the one hint is that the demo study names no authors."""
    verdict = validate(done[0].output_dir)
    assert verdict.issues("error") == []
    assert verdict.exit_code == 0
    assert set(verdict.codes("warning")) <= {("TOO_FEW_AUTHORS", None)}
    assert sorted(verdict.report["summary"]["tasks"]) == ["headturn", "rest"]


def strings(value: object) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def test_every_bids_uri_leads_to_a_file(done: tuple[Place, list[str]]) -> None:
    output_dir = done[0].output_dir
    description = json.loads((output_dir / "dataset_description.json").read_text())
    links = {"": ".", **description["DatasetLinks"]}
    assert not Path(links["raw"]).is_absolute()
    n_uris = 0
    for path in output_dir.rglob("func/*.json"):
        for text in strings(json.loads(path.read_text())):
            if text.startswith("bids:"):
                _, data_set, name = text.split(":")
                assert (output_dir / unquote(links[data_set]) / unquote(name)).is_file(), text
                n_uris += 1
    assert n_uris >= 2 * 10


def test_only_logs_tell_where_and_when(done: tuple[Place, list[str]]) -> None:
    place, _ = done
    words = (str(place.root), os.uname().nodename, time.strftime("%Y-%m-%d"))
    told = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in words))
    for path in place.output_dir.rglob("*"):
        if not path.is_file() or "logs" in path.relative_to(place.output_dir).parts:
            continue
        content = path.read_bytes()
        if path.suffix == ".gz":
            assert content[3:8] == bytes(5), path  # neither name nor time (RFC 1952)
            content = gzip.decompress(content)[:352]
        assert not told.search(content.decode(errors="replace")), path


def test_the_command_line_makes_the_same_bytes(
    done: tuple[Place, list[str]], tmp_path: Path
) -> None:
    """In one folder, and with the folder's name missing from the manifest's paths."""
    place, _ = done
    command = [sys.executable, "-m", "keepstill", "realign", str(place.source(FIRST))]
    subprocess.run([*command, "--out", str(tmp_path / "out")], check=True, capture_output=True)
    folder = place.output_dir / FIRST[:6] / "func"
    files = sorted(path for path in (tmp_path / "out").iterdir() if path.is_file())
    assert [path.name for path in files] == sorted(path.name for path in folder.iterdir())
    for path in files:
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    manifests = [
        json.loads((root / "manifests" / f"{FIRST}.json").read_text())
        for root in (tmp_path / "out", place.output_dir)
    ]
    for manifest in manifests:
        outputs = manifest["outputs"].items()
        manifest["outputs"] = {path.rpartition("/")[2]: stamp for path, stamp in outputs}
    assert manifests[0] == manifests[1]


def test_the_outputs_fit_into_what_was_foretold(done: tuple[Place, list[str]]) -> None:
    place, _ = done
    entries = [f"bids_dir={place.bids_dir}", f"output_dir={place.output_dir}"]
    study = read_study(*load_config([], entries, CLONE), CLONE)
    foretold = study_needs(study, study.runs).output_bytes
    written = sum((place.output_dir / name).stat().st_size for name in place.outputs())
    assert 0.4 * foretold < written < foretold


def test_nothing_stays_behind(done: tuple[Place, list[str]]) -> None:
    place, _ = done
    assert not list(place.stage_root.iterdir())
    assert not (place.output_dir / "logs" / "done").exists()
    assert not list(place.output_dir.rglob("*.part"))


def test_a_complete_study_is_not_repeated(done: tuple[Place, list[str]]) -> None:
    place, _ = done
    before = place.outputs()
    for path in place.bids_dir.rglob("*.nii.gz"):
        path.touch()
    process = place.call()
    assert process.returncode == 0, process.stderr
    assert told(process) == ["keepstill: 2 runs, all complete; nothing to do"]
    assert place.outputs() == before


def test_a_damaged_run_alone_is_done_again(done: tuple[Place, list[str]]) -> None:
    place, _ = done
    before = place.outputs()
    table = f"sub-01/func/{FIRST}_desc-confounds_timeseries.tsv"
    (place.output_dir / table).write_text("")
    process = place.call()
    assert process.returncode == 0, process.stderr
    assert told(process)[0] == "keepstill: 2 runs found, 1 complete, 1 to do"
    after = place.outputs()
    assert (place.output_dir / table).stat().st_size > 0
    assert {name for name in before if SECOND in name and before[name] != after[name]} == set()


def test_a_missing_page_costs_no_realignment(done: tuple[Place, list[str]]) -> None:
    place, _ = done
    before = place.outputs()
    (place.output_dir / "pages" / f"{SECOND}.html").unlink()
    process = place.call()
    assert process.returncode == 0, process.stderr
    assert told(process)[0] == "keepstill: 2 runs, all complete; 1 page to make"
    after = place.outputs()
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {
        "index.html",
        f"figures/{SECOND}.svg",
        f"figures/{SECOND}_slices.svg",
        f"pages/{SECOND}.html",
    }


def test_what_a_killed_call_left_counts_for_nothing(done: tuple[Place, list[str]]) -> None:
    """A flag without a run, and a staged run that is then swept away, made Snakemake skip jobs."""
    place, _ = done
    entries = [f"bids_dir={place.bids_dir}", f"output_dir={place.output_dir}"]
    entries.append(f"stage_root={place.stage_root}")
    study = read_study(*load_config([], entries, CLONE), CLONE)
    flag = study.flag_path(FIRST, "collected")
    staged = study.stage_dir / FIRST
    for folder in (flag.parent, staged):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    study.stage_root.chmod(0o700)
    for left in (flag, study.stage_dir / "lock", staged / "staged.json", staged / "motion.npz"):
        left.touch()
    (place.output_dir / "manifests" / f"{FIRST}.json").unlink()
    process = place.call()
    assert process.returncode == 0, process.stderr
    assert (place.output_dir / "manifests" / f"{FIRST}.json").is_file()


def test_what_another_call_has_staged_is_left_to_it(done: tuple[Place, list[str]]) -> None:
    """Two calls from two directories shared a run's folder: one wrote zeros under the other's
    hands, which that one then compressed and called complete. So did the ranks that a killed call
    leaves behind.
    """
    place, _ = done
    entries = [f"bids_dir={place.bids_dir}", f"output_dir={place.output_dir}"]
    entries.append(f"stage_root={place.stage_root}")
    study = read_study(*load_config([], entries, CLONE), CLONE)
    study.stage_root.mkdir(mode=0o700)
    with hold_stage_dir(study.stage_dir):
        (study.stage_dir / FIRST).mkdir()
        others = [study.stage_dir / FIRST / name for name in ("staged.json", "bold.nii")]
        for path in others:
            path.write_text("another's")
        manifest = place.output_dir / "manifests" / f"{FIRST}.json"
        before = manifest.read_bytes()
        manifest.unlink()
        process = place.call()
        assert process.returncode == 0, process.stderr
        assert manifest.read_bytes() == before
        assert [path.read_text() for path in others] == ["another's"] * 2
    sweep_study(study)


def test_a_killed_call_is_unlocked_without_cores(done: tuple[Place, list[str]]) -> None:
    place, _ = done
    process = place.call("--unlock", n_cores=None)
    assert process.returncode == 0, process.stderr


def test_a_bad_run_stops_no_other_and_is_named_last(tmp_path: Path) -> None:
    place = Place(tmp_path)
    bad = place.source(SECOND)
    bad.write_bytes(bad.read_bytes()[:200_000])
    process = place.call()
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith(f"keepstill: {SECOND}: ") and "truncated" in last
    assert "Traceback" not in process.stderr
    assert (place.output_dir / "manifests" / f"{FIRST}.json").is_file()
    assert f"pages/{FIRST}.html" in (place.output_dir / "index.html").read_text()
    assert not [name for name in place.outputs() if SECOND in name]
    assert not list(place.stage_root.iterdir())


def test_one_core_needs_no_launcher(tmp_path: Path) -> None:
    place = Place(tmp_path, [FIRST])
    process = place.call("--printshellcmds", config=["pages=false"], n_cores=1)
    assert process.returncode == 0, process.stderr
    assert (place.output_dir / "manifests" / f"{FIRST}.json").is_file()
    assert not (place.output_dir / "index.html").exists()


def test_runs_of_a_table_are_realigned(tmp_path: Path) -> None:
    """Files with any name, some without a JSON, end in the folders and names that BIDS wants."""
    place = Place(tmp_path)
    place.source(FIRST).rename(tmp_path / "first run.nii.gz")
    place.source(SECOND).rename(tmp_path / "two.nii.gz")
    place.source(SECOND, ".json").rename(tmp_path / "note.json")
    (tmp_path / "runs.tsv").write_text(
        "path\tsubject\tsession\ttask\trun\tjson\n"
        "first run.nii.gz\t7\n"
        "two.nii.gz\tA1\tpre\theadturn\t1\tnote.json\n"
    )
    process = place.call(table="runs.tsv")
    assert process.returncode == 0, process.stderr
    names = ["sub-7_task-unnamed", "sub-A1_ses-pre_task-headturn_run-1"]
    assert {line.split(": ")[1] for line in told(process) if "volumes" in line} == set(names)
    first, second = (
        json.loads((place.output_dir / folder / f"{name}_desc-hmc_bold.json").read_text())
        for folder, name in zip(("sub-7/func", "sub-A1/ses-pre/func"), names, strict=True)
    )
    assert (place.output_dir / unquote(first["Sources"][0])).samefile(tmp_path / "first run.nii.gz")
    assert " " not in first["Sources"][0]
    assert (first["TaskName"], second["TaskName"]) == ("unnamed", "headturn")
    described = json.loads((place.output_dir / "dataset_description.json").read_text())
    assert not {"DatasetLinks", "SourceDatasets"} & described.keys()
    for name in place.outputs():
        assert str(tmp_path).encode() not in (place.output_dir / name).read_bytes()
    errors = [entry for entry in bids_issues(place.output_dir) if entry["severity"] == "error"]
    assert errors == []
    again = place.call(table="runs.tsv")
    assert told(again) == ["keepstill: 2 runs, all complete; nothing to do"]
    (tmp_path / "note.json").write_text(json.dumps({"RepetitionTime": 2.5}))
    changed = place.call("--dry-run", table="runs.tsv")
    assert told(changed)[0] == "keepstill: 2 runs found, 1 complete, 1 to do"


def bids_issues(folder: Path) -> list[dict[str, Any]]:
    """What bids-validator-deno finds."""
    validator = [sys.executable, "-c", "from bids_validator_deno import cli; cli()"]
    command = [*validator, str(folder), "--format", "json"]
    cache = {"DENO_DIR": str(folder.parent / "deno"), "DENO_NO_UPDATE_CHECK": "1"}
    process = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | cache, check=False
    )
    return list(json.loads(process.stdout)["issues"]["issues"])


def test_nothing_in_the_configuration_is_evaluated(tmp_path: Path) -> None:
    place = Place(tmp_path, [FIRST])
    place.bids_dir = place.bids_dir.rename(tmp_path / "$(touch trap);touch trap;'`touch trap`")
    place.output_dir = tmp_path / 'a $(touch trap) & touch trap | " __import__("os")'
    process = place.call(config=["pages=false"], n_cores=1)
    assert process.returncode == 0, process.stderr
    assert (place.output_dir / "manifests" / f"{FIRST}.json").is_file()
    assert not [*tmp_path.rglob("trap"), *CLONE.glob("trap")]


def test_a_template_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path, [FIRST])
    (tmp_path / "own.yaml").write_text("__use_yte__: true\ntasks: ?['rest']\n")
    process = place.call("--dry-run", "--configfile", "own.yaml")
    assert process.returncode == 2
    assert told(process) == [
        f"keepstill: config: {tmp_path}/own.yaml: templates are not for keepstill; "
        "remove __use_yte__ and write the values themselves"
    ]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A study that nothing is done to."""
    return Place(tmp_path_factory.mktemp("fresh"))


def command_of_ranks(process: subprocess.CompletedProcess[str]) -> str:
    """What a dry run shows between the launch script and its end."""
    assert process.returncode == 0, process.stderr
    found = re.search(r"launch\.py.*? -- (.*?) \S*realign_run\.py", process.stdout)
    assert found, process.stdout
    return found.group(1)


@pytest.mark.parametrize(
    ("arguments", "n_cores", "command"),
    [
        ((), 2, "python"),
        (TWO_RANKS, 2, "mpirun -n 2 -bind-to 'user:{cores}' python -m mpi4py"),
        (TWO_RANKS, 1, "python"),
        (
            (
                "--set-resources",
                "realign:mpi=srun --mpi=pmi2",
                "realign:mpi_args=--cpu-bind=cores --label",
                "realign:tasks=2",
            ),
            2,
            "srun --mpi=pmi2 -n 2 --cpu-bind=cores --label python -m mpi4py",
        ),
    ],
)
def test_the_launcher_is_the_profile_s(
    fresh: Place, arguments: tuple[str, ...], n_cores: int, command: str
) -> None:
    if n_cores > len(os.sched_getaffinity(0)):
        pytest.skip("two cores are needed for two ranks")
    options = ("--dry-run", "--printshellcmds", "--quiet", "host")
    assert command_of_ranks(fresh.call(*options, *arguments, n_cores=n_cores)) == command


def test_more_ranks_than_cores_in_a_profile_are_told(fresh: Place) -> None:
    """As where `tasks` alone was changed."""
    told_of = []
    for arguments in (TWO_RANKS, TWO_RANKS[TWO_RANKS.index("--set-resources") :]):
        told_of.append([line for line in told(fresh.call("-n", *arguments)) if "warning" in line])
    assert told_of == [
        [],
        [
            "keepstill: warning: 2 ranks a run (set-resources, realign: tasks) on 1 core "
            "(set-threads); set-threads of all steps should be 2"
        ],
    ]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("participant=01", "config: 'participant' is unknown; did you mean participants?"),
        ("interpolation_degree=7", "config: interpolation_degree: 7 found; needs a whole number"),
        ("participants=[09]", "participants: no run has 09"),
        ("reference=nowhere.nii", "lowest-motion, sbref or an existing file"),
    ],
)
def test_a_wrong_configuration_is_one_line(fresh: Place, config: str, words: str) -> None:
    process = fresh.call(config=[config])
    assert process.returncode == 2
    assert words in process.stderr.splitlines()[-1]
    assert process.stderr.count("keepstill: ") == 1
    assert "Traceback" not in process.stderr


def test_a_dry_run_changes_nothing(fresh: Place) -> None:
    process = fresh.call("--dry-run")
    assert process.returncode == 0, process.stderr
    assert_preflight(told(process), fresh)
    assert not fresh.output_dir.exists()
    assert not list(fresh.stage_root.iterdir())


def test_itk_as_the_engine_and_as_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has a key of its own, and is not done again; without ITK nothing is begun."""
    place = Place(tmp_path, ())
    source = place.bids_dir / "sub-01" / "func" / f"{FIRST}_bold.nii.gz"
    write_run(source, ball_run(4))
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text("import sys; sys.modules['itk'] = None")
    with monkeypatch.context() as context:
        context.setenv("PYTHONPATH", str(tmp_path / "without"), prepend=os.pathsep)
        refused = place.call(config=("engine=itk",))
    assert refused.returncode == 2 and not place.output_dir.exists()
    assert told(refused)[-1].startswith("keepstill: ITK is not installed")
    monkeypatch.chdir(CLONE)
    given = [f"{name}={getattr(place, name)}" for name in ("bids_dir", "output_dir", "stage_root")]
    for option in ("engine=itk", "check=itk"):
        assert "1 to do" in plan_in_words([option, *given], capsys)
        process = place.call(config=(option,))
        assert process.returncode == 0, process.stderr
        manifest = place.output_dir / "manifests" / f"{FIRST}.json"
        summary = json.loads(manifest.read_text())["summary"]
        assert summary["engine"].startswith("ITK 5") == (option == "engine=itk")
        assert (summary["check"] is None) == (option == "engine=itk")
        assert "all complete" in plan_in_words([option, *given], capsys)
    page = (place.output_dir / "pages" / f"{FIRST}.html").read_text()
    assert "differs by (median, worst)" in page


def plan_in_words(entries: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """First line of `keepstill plan`."""
    with pytest.raises(SystemExit):
        main(["plan", *entries])
    return "".join(capsys.readouterr()).splitlines()[0]
