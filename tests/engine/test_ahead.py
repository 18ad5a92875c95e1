"""Working ahead, by hand: what is whole is estimated, each volume once, as it would be later."""

import json
import os
import weakref

import numpy as np
import pytest

import runs
from keepstill import ranks
from keepstill.ahead import Ahead
from keepstill.arrivals import Arrivals, Turns, ask_for_arrivals, telling
from keepstill.errors import InputError, StageError
from keepstill.read import open_staged
from keepstill.realign import Crew, Task, choose_target, estimate_volumes, merged
from keepstill.settings import RealignSettings
from keepstill.stage import STAGED, stage_run

SHAPE, N_VOLUMES = (32, 36, 16), 40  # more than one chunk
PLAIN = RealignSettings()


def staged(tmp_path, data=None, settings=PLAIN):
    """Stage directory of a run whose arrivals were asked for."""
    data = runs.ball_run(N_VOLUMES, SHAPE) if data is None else data
    source = runs.write_run(tmp_path / "a_bold.nii.gz", data)
    (tmp_path / "stage").mkdir()
    ask_for_arrivals(tmp_path / "stage")
    stage_run(source, "a", None, tmp_path / "stage", settings)
    return tmp_path / "stage"


def let_arrive(stage_dir, n_volumes):
    """As if so many volumes had arrived."""
    known = json.loads((stage_dir / STAGED).read_text())
    run = open_staged(stage_dir)
    with telling(stage_dir, known) as tell:
        tell(run.layout.offset + n_volumes * run.voxels[0].nbytes)


def work_ahead(stage_dir, settings=PLAIN, n_threads=1):
    ahead = Ahead(stage_dir, settings, n_threads)
    while ahead.step():
        pass
    return ahead


def test_staging_tells_what_has_arrived(tmp_path):
    stage_dir = staged(tmp_path)
    arrivals, run = Arrivals(stage_dir), open_staged(stage_dir)
    assert 0 < arrivals.n_bytes() <= run.layout.n_bytes
    assert arrivals.known()["metadata"] == run.found["metadata"]
    assert all((stage_dir / name).stat().st_mode & 0o077 == 0 for name in ("arrived", "turn"))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_volumes_ahead_are_as_they_would_be_later(n_threads, tmp_path):
    stage_dir = staged(tmp_path)
    let_arrive(stage_dir, 5)
    first = work_ahead(stage_dir, n_threads=n_threads)
    let_arrive(stage_dir, 7)
    second = work_ahead(stage_dir)
    assert Turns(stage_dir).take(8) == 7  # nobody's, so it is missing below
    run = open_staged(stage_dir)
    assert first.is_right(run) and second.is_right(run)
    task = Task(run, choose_target(run, PLAIN), PLAIN)
    parts = [ahead.finish(task, Crew()) for ahead in (second, first)]
    assert [t for t in parts[0].estimates if t < 7] == [5, 6]
    found = merged(parts).estimates
    wanted = estimate_volumes(task, (t for t in range(N_VOLUMES) if t != 7), Crew()).estimates
    assert list(found) == list(wanted)
    for t, estimate in found.items():
        np.testing.assert_array_equal(
            estimate.moving_from_reference, wanted[t].moving_from_reference
        )
        assert estimate.cost == wanted[t].cost


def test_a_reference_that_is_not_there_yet_is_waited_for(tmp_path):
    settings = RealignSettings(reference="middle")
    stage_dir = staged(tmp_path, settings=settings)
    let_arrive(stage_dir, N_VOLUMES // 2)
    assert work_ahead(stage_dir, settings).target is None
    let_arrive(stage_dir, N_VOLUMES // 2 + 1)
    ahead = work_ahead(stage_dir, settings)
    assert ahead.target.volume == choose_target(open_staged(stage_dir), settings).volume


def test_dummies_that_were_not_expected_make_it_wrong(tmp_path):
    data = runs.ball_run(N_VOLUMES, SHAPE)
    data[..., :2] *= 2
    stage_dir = staged(tmp_path, data)
    ahead = work_ahead(stage_dir)
    assert ahead.target.volume == 0 and not ahead.is_right(open_staged(stage_dir))


def test_what_is_wrong_is_left(tmp_path):
    """The reference that nobody needs is not held beside the right one."""
    data = runs.ball_run(N_VOLUMES, SHAPE)
    data[..., :2] *= 2
    stage_dir = staged(tmp_path, data)
    ahead = work_ahead(stage_dir)
    wrong = weakref.ref(ahead.target.reference)
    target, rest = ranks._first_target(open_staged(stage_dir), PLAIN, ranks.Alone(), ahead)
    assert target.volume == 2 and rest is None
    assert wrong() is None and not ahead.step()


def test_what_goes_wrong_with_a_volume_is_not_taken_for_a_run_that_is_gone(tmp_path, monkeypatch):
    def fail(worker, t):
        raise OSError(5, "Input/output error")

    stage_dir = staged(tmp_path)
    monkeypatch.setattr("keepstill.realign.Worker.estimate", fail)
    with pytest.raises(OSError, match="Input/output"):
        work_ahead(stage_dir)


def test_threads_start_for_volumes_alone(tmp_path, monkeypatch):
    asked = []
    each = Crew.each

    def counted(crew, work, volumes):
        asked.append(list(volumes))
        return each(crew, work, asked[-1])

    monkeypatch.setattr(Crew, "each", counted)
    stage_dir = staged(tmp_path)
    let_arrive(stage_dir, 5)
    ahead = work_ahead(stage_dir, n_threads=2)
    assert not ahead.step() and not ahead.step()
    assert asked == [[0, 1], [2, 3], [4]]


def test_an_empty_first_volume_is_left_to_whoever_sees_the_others(tmp_path):
    data = runs.ball_run(N_VOLUMES, SHAPE)
    data[..., 0] = 0
    ahead = work_ahead(staged(tmp_path, data))
    assert ahead.target is None


def test_a_reference_without_a_head_is_no_reference(tmp_path):
    data = runs.ball_run(N_VOLUMES, SHAPE)
    data[..., 0] = -3
    data[0, 0, 0, 0] = -4
    stage_dir = staged(tmp_path, data)
    ahead = work_ahead(stage_dir)
    assert ahead.target is None
    with pytest.raises(InputError, match="shows no head"):
        choose_target(open_staged(stage_dir), PLAIN)


def test_a_run_that_is_gone_ends_the_work(tmp_path):
    stage_dir = staged(tmp_path)
    ahead = Ahead(stage_dir, PLAIN, 1)
    (stage_dir / "bold.nii").unlink()
    while ahead.step():
        pass
    assert ahead.target is None


def test_without_room_to_tell_a_run_is_staged_all_the_same(tmp_path, monkeypatch):
    def full(*written):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("keepstill.arrivals.os.pwrite", full)
    stage_dir = staged(tmp_path)
    assert Arrivals(stage_dir).n_bytes() == 0
    assert work_ahead(stage_dir).target is None
    assert open_staged(stage_dir).n_volumes == N_VOLUMES


def test_a_stage_directory_that_takes_no_file_is_told(tmp_path):
    with pytest.raises(StageError, match="gone: No such file or directory; choose"):
        ask_for_arrivals(tmp_path / "gone")


def test_room_for_half_of_what_is_known_is_no_room(tmp_path, monkeypatch):
    """A full disk takes the beginning of what is written, and tells by its number of bytes."""
    put, take = os.pwrite, os.posix_fallocate

    def almost_full(handle, offset, n_bytes):
        if n_bytes > 100:
            raise OSError(28, "No space left on device")
        take(handle, offset, n_bytes)

    with monkeypatch.context() as patch:
        patch.setattr("keepstill.arrivals.os.posix_fallocate", almost_full)
        patch.setattr("keepstill.arrivals.os.pwrite", lambda h, b, at: put(h, b[:100], at))
        ask_for_arrivals(tmp_path)
        with telling(tmp_path, {"metadata": "x" * 200}) as tell:
            tell(5)
    assert Arrivals(tmp_path).n_bytes() == 0


def test_nobody_is_told_where_nobody_asked(tmp_path):
    with telling(tmp_path, {}) as tell:
        tell(5)
    assert not list(tmp_path.iterdir())
