"""What of a study is to do, what failed, and where it is staged."""

import os
import time
from pathlib import Path

import pytest

from keepstill import stage
from keepstill import study as engine_study
from keepstill.errors import StageError
from keepstill.manifest import (
    Manifest,
    describe_outputs,
    file_sha256,
    manifest_path,
    remember_input,
    stamp_of,
    write_manifest,
)
from keepstill.settings import RealignSettings
from studies import study_of

RUNS = ("sub-01_task-rest", "sub-02_task-rest", "sub-03_task-rest")


@pytest.fixture
def made(tmp_path: Path) -> engine_study.Study:
    """A study of three runs, none complete."""
    bids_dir = tmp_path / "study"
    for run in RUNS:
        path = bids_dir / run[:6] / "func" / f"{run}_bold.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_text(run)
    (bids_dir / "dataset_description.json").write_text("{}")
    return study_of(bids_dir, tmp_path)


def complete(study: engine_study.Study, run: str) -> None:
    source = study.runs[run].source
    output = study.output_dir / f"{run}.txt"
    output.parent.mkdir(exist_ok=True)
    output.write_text(run)
    sha256 = file_sha256(source)
    outputs = describe_outputs(study.output_dir, [output])
    remember_input(study.output_dir, run, stamp_of(source), sha256)
    write_manifest(
        study.output_dir, Manifest(run, sha256, len(run), {}, study.settings, outputs, {})
    )


def make_page(study: engine_study.Study, run: str) -> None:
    for path in (f"figures/{run}.svg", f"pages/{run}.html"):
        (study.output_dir / path).parent.mkdir(exist_ok=True)
        (study.output_dir / path).touch()


def write_log(study: engine_study.Study, rule: str, run: str, text: str) -> None:
    log = study.log_path(rule, run)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(text)


def test_all_is_to_do_at_first(made: engine_study.Study) -> None:
    plan = made.make_plan()
    assert plan == (RUNS, (), True, (), ())
    assert plan.in_words(3) == "3 runs found, 0 complete, 3 to do"


def test_complete_runs_are_left_out(made: engine_study.Study) -> None:
    for run in RUNS[:2]:
        complete(made, run)
    make_page(made, RUNS[0])
    plan = made.make_plan()
    assert plan == (RUNS[2:], (RUNS[1],), True, (), ())
    assert plan.in_words(3) == "3 runs found, 2 complete, 1 to do, 1 page to make"


def test_a_complete_study_has_nothing_to_do(made: engine_study.Study) -> None:
    for run in RUNS:
        complete(made, run)
        make_page(made, run)
    assert made.make_plan() == ((), (), True, (), ())
    index = made.output_dir / "index.html"
    index.touch()
    assert not any(made.make_plan())
    assert made.make_plan().in_words(3) == "3 runs, all complete; nothing to do"
    os.utime(index, ns=(1, 1))  # a study page older than a run does not show it
    assert made.make_plan().study_page


def test_a_sidecar_that_breaks_later_is_for_stage_to_tell(made: engine_study.Study) -> None:
    complete(made, RUNS[0])
    assert made.is_complete(RUNS[0])
    (made.bids_dir / "task-rest_bold.json").write_text("{")
    assert not engine_study.Study(**vars_of(made)).is_complete(RUNS[0])


def vars_of(study: engine_study.Study) -> dict[str, object]:
    return {name: getattr(study, name) for name in study.__dataclass_fields__}


def test_flags_left_by_a_killed_call_go_and_no_others(made: engine_study.Study) -> None:
    complete(made, RUNS[0])
    make_page(made, RUNS[0])
    made.flag_dir.mkdir(parents=True)
    for run in RUNS[:2]:
        made.flag_path(run, "collected").touch()
        made.flag_path(run, "paged").touch()
    made.flag_path("study", "paged").touch()
    engine_study.plan_study(made)
    assert {path.name for path in made.flag_dir.iterdir()} == {
        f"{RUNS[0]}.collected",
        f"{RUNS[0]}.paged",
    }


def test_failures_name_run_and_reason(made: engine_study.Study) -> None:
    plan = made.make_plan()
    since_s = time.time() - 10
    write_log(
        made,
        "stage",
        RUNS[0],
        f"a warning\nkeepstill: {RUNS[0]}: truncated; copy it again\nexit status 2\n",
    )
    write_log(made, "stage", RUNS[1], "")
    write_log(made, "realign", RUNS[1], "Traceback\n  x\nValueError: no\nexit status 1\n")
    first, second, rest = made.failures(plan, since_s)
    assert first == f"{RUNS[0]}: truncated; copy it again"
    assert second.startswith(f"{RUNS[1]}: ValueError: no: exit status 1; see ")
    assert rest == "1 run not finished; the next call goes on with them"


def test_a_log_of_an_earlier_call_is_no_failure_of_this_one(made: engine_study.Study) -> None:
    write_log(made, "stage", RUNS[0], "keepstill: old\nexit status 2\n")
    later_s = time.time() + 10
    assert made.failures(made.make_plan(), later_s) == [
        "3 runs not finished; the next call goes on with them"
    ]


def test_a_page_that_failed_is_named(made: engine_study.Study) -> None:
    plan = made.make_plan()
    for run in RUNS:
        complete(made, run)
    for run in RUNS[:2]:
        make_page(made, run)
    write_log(made, "page_run", RUNS[2], "keepstill: no table\nexit status 2\n")
    assert made.failures(plan, 0) == [f"{RUNS[2]}: no table"]


def test_many_failures_are_cut_short(
    made: engine_study.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_study, "MAX_FAILURES_SHOWN", 2)
    for run in RUNS:
        write_log(made, "stage", run, "keepstill: bad\nexit status 2\n")
    lines = made.failures(made.make_plan(), 0)
    assert lines[2:] == [f"and 1 more; see {made.output_dir / 'logs'}"]


def test_the_stage_of_other_settings_is_another(made: engine_study.Study) -> None:
    other = vars_of(made) | {"settings": RealignSettings(reference="mean")}
    assert engine_study.Study(**other).stage_dir != made.stage_dir
    assert engine_study.Study(**vars_of(made)).stage_dir == made.stage_dir


def test_the_stage_root_is_closed_to_others(tmp_path: Path) -> None:
    root = stage.private_stage_root(tmp_path)
    assert root == tmp_path / f"keepstill-{os.getuid()}"
    root.mkdir(mode=0o755)
    stage.claim_stage_root(root)
    assert root.stat().st_mode & 0o777 == 0o700
    stage.claim_stage_root(root)


def test_a_stage_root_of_somebody_else_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "keepstill-1"
    link.symlink_to(tmp_path)
    with pytest.raises(StageError, match="choose another"):
        stage.claim_stage_root(link)
    (tmp_path / "file").touch()
    with pytest.raises(StageError, match="is no folder"):
        stage.claim_stage_root(tmp_path / "file")


def test_only_what_nobody_holds_is_cleared(made: engine_study.Study) -> None:
    plan = engine_study.Plan(tuple(RUNS[:1]), (), False)
    own, other = engine_study.hold_stage(made), stage.hold_stage_dir(made.stage_root / "other")
    for run in RUNS[:2]:
        (made.stage_dir / run).mkdir()
        (made.stage_dir / run / "bold.nii").touch()
    engine_study.clear_stage(made, plan)
    assert not (made.stage_dir / RUNS[0]).exists()  # this call's
    assert (made.stage_dir / RUNS[1]).exists()  # perhaps another call's, of the same study
    own.close()
    engine_study.clear_stage(made, plan)
    assert not made.stage_dir.exists() and (made.stage_root / "other").exists()
    other.close()
    engine_study.clear_stage(made, plan)
    assert not made.stage_root.exists()


def test_manifest_of_another_run_is_none(made: engine_study.Study) -> None:
    complete(made, RUNS[0])
    manifest_path(made.output_dir, RUNS[0]).rename(manifest_path(made.output_dir, RUNS[1]))
    assert not made.is_complete(RUNS[1])
