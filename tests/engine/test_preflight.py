"""What a study will take, told from headers alone, whatever the files are like."""

import dataclasses
import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import runs
from keepstill import preflight as engine_preflight
from keepstill.__main__ import main
from keepstill.errors import InputError
from keepstill.misnamed import Misnamed
from keepstill.preflight import Needs, preflight, read_layout, run_needs, study_needs
from keepstill.settings import RealignSettings
from keepstill.stage import REALIGNED_VOXELS, STAGED_VOXELS, stage_run
from keepstill.study import Study
from studies import study_of

RUNS = ("sub-01_task-rest", "sub-02_task-rest", "sub-03_task-rest")
SHAPE = (20, 22, 14, 5)


@pytest.fixture
def made(tmp_path: Path) -> Study:
    """A study of three small runs, none complete."""
    bids_dir = tmp_path / "study"
    for run in RUNS:
        runs.write_run(bids_dir / run[:6] / "func" / f"{run}_bold.nii.gz", runs.ball_run())
    (bids_dir / "dataset_description.json").write_text("{}")
    return study_of(bids_dir, tmp_path)


def told(study: Study) -> list[str]:
    return list(preflight(study, study.make_plan()))


def test_needs_are_those_of_the_sbref_s_grid(made: Study) -> None:
    """Its finer voxels are written and held; with `grid: own` they are not."""
    plain = study_needs(made, RUNS[:1])
    source = made.runs[RUNS[0]].source
    sbref = source.with_name(f"{RUNS[0]}_sbref.nii.gz")
    nx, ny, nz, _ = SHAPE
    fine = np.ones((2 * nx, 2 * ny, nz), np.int16)
    nib.save(nib.Nifti1Image(fine, np.diag([1.5, 1.5, 4.0, 1.0])), sbref)
    on_sbref = dataclasses.replace(made, settings=RealignSettings(reference="sbref"))
    needs = study_needs(on_sbref, RUNS[:1])
    assert not needs.refused
    assert 2 < needs.output_bytes / plain.output_bytes < 4 and needs.lane_bytes > plain.lane_bytes
    own = dataclasses.replace(made, settings=RealignSettings(reference="sbref", grid="own"))
    assert study_needs(own, RUNS[:1]) == plain


def huge(path: Path) -> None:
    """A header of 352 bytes that claims terabytes."""
    header = nib.Nifti1Header()
    header.set_data_dtype("float64")
    header.set_data_shape((32767, 32767, 32767, 100))
    header.set_sform(np.eye(4), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path.write_bytes(header.binaryblock + bytes(4))


def mistyped(path: Path, code: int) -> Path:
    """A good file with another data type code (nifti1.h)."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[70:72] = code.to_bytes(2, "little")
    path.write_bytes(content)
    return path


def stretched(path: Path) -> None:
    """A NIfTI-2 file whose axes are 1e200 mm long."""
    image = nib.Nifti2Image(np.zeros((4, 4, 4, 2), np.int16), None)
    image.header["sform_code"], image.header["srow_x"], image.header["vox_offset"] = 1, 1e200, 544
    path.write_bytes(image.header.binaryblock + bytes(1000))


BROKEN: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is no image"),
    "noise": lambda path: path.write_bytes(np.random.default_rng(1).bytes(5000)),
    "truncated in the header": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "damaged stream": lambda path: path.write_bytes(path.read_bytes()[:12] + b"\xff" * 400),
    "gzip of nothing": lambda path: path.write_bytes(gzip.compress(b"")),
    "gzip of text": lambda path: path.write_bytes(gzip.compress(b"x" * 10_000)),
    "a data type without a name": lambda path: pack(mistyped(path, code=5)),
    "a position that overflows": stretched,
    "a data type that is no number": lambda path: pack(mistyped(path, code=128)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "missing": lambda path: path.unlink(),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("annex/x")),
    "terabytes": huge,
    "terabytes, compressed": lambda path: (huge(path), pack(path)),
}


def pack(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize("dtype", [np.int16, np.float64, np.dtype(">f4")])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_layout_is_read_from_the_first_bytes(
    tmp_path: Path, ending: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = runs.write_run(tmp_path / f"a{ending}", runs.ball_run(dtype=dtype))
    content = source.read_bytes()
    monkeypatch.setattr(engine_preflight, "PEEK_BYTES", 1000)
    source.write_bytes(content[:1000] + bytes(len(content) - 1000))  # only these are looked at
    layout = read_layout(source, "a")
    assert layout.shape == SHAPE
    assert layout.dtype.itemsize == np.dtype(dtype).itemsize


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_and_stops_nothing(made: Study, kind: str) -> None:
    source = made.runs[RUNS[1]].source
    BROKEN[kind](source)
    with pytest.raises(InputError) as caught:
        read_layout(source, RUNS[1])
    assert "\n" not in str(caught.value)
    needs = study_needs(made, RUNS)
    assert [name for name, _ in needs.refused] == [RUNS[1]]
    assert needs.output_bytes == pytest.approx(study_needs(made, RUNS[::2]).output_bytes)
    (line,) = (line for line in told(made) if line.startswith("to be refused"))
    assert line.startswith(
        f"to be refused, and not in these figures: 1 run, {RUNS[1]}; the first: "
    )


def test_what_stage_will_refuse_for_its_header_is_told(made: Study) -> None:
    runs.write_run(made.runs[RUNS[0]].source, runs.ball_run(3)[:, :, :1])
    runs.write_run(made.runs[RUNS[1]].source, runs.ball_run(3)[..., 0])
    needs = study_needs(made, RUNS)
    assert [name for name, _ in needs.refused] == [RUNS[0], RUNS[1]]
    assert "set in_plane: true" in needs.refused[0][1]
    settings = dataclasses.replace(made.settings, in_plane=True)
    needs = study_needs(dataclasses.replace(made, settings=settings), RUNS)
    assert [name for name, _ in needs.refused] == [RUNS[1]]


def test_what_is_told(made: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_preflight, "free_bytes", lambda folder: 30e9)
    monkeypatch.setattr(
        engine_preflight, "study_needs", lambda study, names: Needs(2.34e9, 0.2e9, 1200.0)
    )
    assert told(made) == [
        "3 runs found, 0 complete, 3 to do",
        f"output: 2.3 GB, 30 GB free in {made.output_dir}",
        f"shared memory: 0.2 GB a lane, 30 GB free in {made.stage_root.parent}",
        "time: about 20 CPU minutes",
    ]


def test_files_with_odd_names_are_told(made: Study) -> None:
    odd = Misnamed((("a", "why a"), ("b", "why b")), (("c", "why c"),))
    lines = told(dataclasses.replace(made, misnamed=odd))
    assert lines[1:3] == [
        "left out for their names: 2, a (why a), b (why b)",
        "taken, though their names are not BIDS: 1, c (why c)",
    ]


def test_a_warning_when_it_will_not_fit(made: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_preflight, "free_bytes", lambda folder: 1e9)
    monkeypatch.setattr(engine_preflight, "study_needs", lambda study, names: Needs(12e9, 2e9, 90))
    *_, output, memory = told(made)
    assert output.startswith(
        f"warning: the outputs will not fit into {made.output_dir}; free 11 GB"
    )
    assert memory.startswith(f"warning: the largest run will not fit into {made.stage_root.parent}")


@pytest.mark.parametrize(
    ("n_lanes", "free_gb", "warns"), [(2, 5, False), (3, 5, True), (9, 7, False)]
)
def test_a_warning_of_more_lanes_than_memory(
    made: Study, monkeypatch: pytest.MonkeyPatch, n_lanes: int, free_gb: float, warns: bool
) -> None:
    """Of lanes that there are runs for, here three."""
    monkeypatch.setattr(engine_preflight, "free_bytes", lambda folder: free_gb * 1e9)
    monkeypatch.setattr(engine_preflight, "study_needs", lambda study, names: Needs(1e9, 2e9, 90))
    last = list(engine_preflight.preflight(made, made.make_plan(), n_lanes))[-1]
    assert last.startswith("warning: 3 runs at a time may take 6 GB in ") is warns


def test_many_refused_runs_are_cut_short(made: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_preflight, "MAX_NAMED", 2)
    for run in made.runs.values():
        run.source.write_bytes(b"")
    assert f"3 runs, {RUNS[0]}, {RUNS[1]} and 1 more; the first: no NIfTI" in told(made)[-1]


@pytest.mark.parametrize("reslice", [True, False])
@pytest.mark.parametrize("reference", ["first", "mean"])
def test_a_lane_takes_what_stage_takes(
    made: Study, tmp_path: Path, reference: str, reslice: bool
) -> None:
    settings = RealignSettings(reference=reference, reslice=reslice)
    needs = study_needs(dataclasses.replace(made, settings=settings), RUNS)
    stage_dir = tmp_path / "staged"
    stage_run(made.runs[RUNS[0]].source, RUNS[0], None, stage_dir, settings)
    taken = sum((stage_dir / name).stat().st_size for name in (STAGED_VOXELS, REALIGNED_VOXELS))
    assert needs.lane_bytes == taken


def test_the_position_that_counts_is_the_user_s_choice(made: Study) -> None:
    source = made.runs[RUNS[0]].source
    image = nib.load(source)
    apart = image.affine + np.array([[0, 0, 0, 9.0]] + 3 * [[0] * 4])
    image.set_qform(apart, 1)
    source.write_bytes(gzip.compress(image.to_bytes()))
    with pytest.raises(InputError, match="affine_source"):
        read_layout(source, RUNS[0])
    chosen = dataclasses.replace(made, settings=RealignSettings(affine_source="qform"))
    assert study_needs(made, RUNS).refused and not study_needs(chosen, RUNS).refused


def test_the_settings_count(made: Study, tmp_path: Path) -> None:
    layout = read_layout(made.runs[RUNS[0]].source, RUNS[0])
    voxels = int(np.prod(SHAPE))

    def written(**settings: object) -> float:
        return run_needs(layout, RealignSettings(**settings)).output_bytes

    assert written() - written(output_dtype="int16") == pytest.approx(2 * voxels * 0.9)
    assert written() - written(reslice=False) == pytest.approx(4 * voxels * 0.9)
    fine = tmp_path / "fine.nii"
    nib.save(nib.Nifti1Image(np.ones((40, 44, 28), np.uint8), np.eye(4)), fine)
    other = dataclasses.replace(made, settings=RealignSettings(reference=str(fine)))
    own, finer = study_needs(made, RUNS), study_needs(other, RUNS)
    assert 7 < (finer.output_bytes - 3 * 2e5) / (own.output_bytes - 3 * 2e5) < 8.1
    assert finer.lane_bytes > own.lane_bytes and finer.cpu_s > own.cpu_s


def test_a_standard_run_takes_what_was_measured() -> None:
    """64 x 64 x 36 x 200: 103 MB written, 8 CPU s with all steps, 177 MB in memory."""
    header = nib.Nifti1Header()
    header.set_data_dtype("int16")
    header.set_data_shape((64, 64, 36, 200))
    header.set_sform(np.diag([3, 3, 4, 1]), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    layout = engine_preflight.parse_layout(header.binaryblock, "x")
    needs = run_needs(layout, RealignSettings())
    assert 103e6 < needs.output_bytes < 115e6
    assert needs.cpu_s == pytest.approx(8.0, abs=0.1)
    assert needs.lane_bytes == pytest.approx(177e6, rel=0.01)


def test_free_room_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert engine_preflight.free_bytes(tmp_path / "a" / "b") > 0
    assert engine_preflight.free_bytes(Path("/")) > 0


def test_complete_runs_are_not_opened(made: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def spy(source: Path, run: str, affine_source: str) -> object:
        opened.append(run)
        raise InputError(f"{run}: not now")

    monkeypatch.setattr(engine_preflight, "read_layout", spy)
    plan = made.make_plan()
    list(preflight(made, plan._replace(runs=RUNS[1:2])))
    assert opened == [RUNS[1]]
    assert list(preflight(made, plan._replace(runs=(), study_page=False))) == [
        "3 runs, all complete; nothing to do"
    ]


def test_keepstill_plan_tells_it_and_changes_nothing(
    made: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage_root = tmp_path / "memory"
    stage_root.mkdir()
    places = (f"bids_dir={made.bids_dir}", f"output_dir={made.output_dir}")
    with pytest.raises(SystemExit) as ended:
        main(["plan", *places, f"stage_root={stage_root}", "participants=[01,03]"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    first, output, memory, time = out.splitlines()
    assert first == "2 runs found, 0 complete, 2 to do"
    assert output.startswith("output: less than 0.01 GB, ") and f"in {made.output_dir}" in output
    assert memory.startswith("shared memory: less than 0.01 GB a lane, ")
    assert time.startswith("time: about 0.") and time.endswith(" CPU minutes")
    assert not made.output_dir.exists() and not list(stage_root.iterdir())


def test_keepstill_plan_refuses_in_one_line(
    made: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", f"bids_dir={made.bids_dir}", "output_dir=/o", "tasks=[nback]"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert "tasks: no run has nback; choose from those found (found: rest)" in err
