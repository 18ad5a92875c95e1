"""The benchmark measures what it says, and its requirements can be missed."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import accuracy
import engines
import scale
import split
from accuracy import Errors, errors_of, faults, figures_of, joined, read_columns, shared_offset
from cases import CASES, Case, Limits
from cost import Cost
from keepstill import manifest, phantom
from keepstill.settings import RealignSettings
from keepstill.truth import read_truth, truth_path
from made_runs import made_run, plan_of

TINY = {"shape": (22, 24, 16), "voxel_mm": (9.0, 9.0, 8.0), "motion": "spikes"}
GAUGE = phantom.rigid((0.02, -0.01, 0.03), (0.01, 0.02, -0.03))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A coarse run of six volumes, and where it is kept."""
    folder = tmp_path_factory.mktemp("bench") / "cache"
    plan = plan_of(Case("tiny", "", Limits(), TINY), 1.0, 6, 1)
    return made_run(folder, plan), plan, folder


def errors(n=100, **given):
    """Errors of n volumes, all just at the bound and inside their bars, but for what is given."""
    nothing = np.zeros(n, bool)
    whole = dict.fromkeys(("raw_mm", "free_mm", "bent_mm"), np.full(n, 0.005))
    whole |= dict.fromkeys(("raw_bounds", "free_bounds"), np.ones(n))
    bar_mm = np.where(np.arange(n) < 0.68 * n, 0.006, 0.004)
    whole |= {"bar_mm": bar_mm, "is_dropped": nothing, "is_failed": nothing}
    return Errors(**whole | given)


def missed(limits, **given):
    return figures_of(Case("case", "", limits), "mild", errors(**given)).faults


def test_gauge_is_found_though_a_volume_goes_astray():
    exact = phantom.drawn_poses("drift", 20, 3)
    found = exact @ GAUGE
    found[7] = found[7] @ phantom.rigid((5, 0, 0), (0, 3, 0))
    np.testing.assert_allclose(shared_offset(found, exact), GAUGE, atol=1e-9)


def test_errors_against_the_truth(made):
    """None for the truth itself; a gauge is a raw error and no gauge-free one."""
    source, _, folder = made
    exact = read_truth(truth_path(folder / source.parents[2], source)).moving_from_first
    status = {"status": ["reference", *["ok"] * 5]}
    none = errors_of(source, exact, status)
    assert none.raw_mm.shape == (5,) and none.raw_mm.max() < 1e-9 and np.isnan(none.bar_mm).all()
    turned = errors_of(source, exact @ GAUGE, status)
    assert turned.raw_mm.min() > 0.02 and turned.free_mm.max() < 1e-9
    np.testing.assert_allclose(turned.raw_mm, turned.raw_bounds * bound_mm(source))
    other = exact @ np.linalg.inv(exact[2])  # against volume 2
    status = {"status": ["failed", "ok", "reference", *["ok"] * 3], "expected_error": ["0.5"] * 6}
    found = errors_of(source, other, status)
    assert found.raw_mm.max() < 1e-9 and found.is_failed.tolist() == [True, *[False] * 4]
    assert found.bar_mm.tolist() == [0.5] * 5


def bound_mm(source):
    return read_truth(truth_path(source.parents[2], source)).bound_mm


def test_a_run_is_made_once(made):
    source, plan, folder = made
    stamp = source.stat().st_mtime_ns
    assert made_run(folder, plan) == source and source.stat().st_mtime_ns == stamp
    assert len(list(folder.iterdir())) == 1
    assert len(read_columns(next(folder.rglob("*_timeseries.tsv")))["gain"]) == 6


def test_after_an_error_no_seed_is_begun(monkeypatch, tmp_path):
    """What is wrong is told at once, not when all others have been made and realigned."""
    begun = []

    def of_seed(options, spread, seed):
        begun.append(seed)
        if seed == 1:
            raise SystemExit("failed")
        time.sleep(0.1)

    monkeypatch.setattr(accuracy, "errors_of_seed", of_seed)
    monkeypatch.setattr(
        accuracy, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n)
    )
    options = accuracy.Options(("drift",), ("mild",), tuple(range(1, 31)), 5, 1, tmp_path)
    with pytest.raises(SystemExit, match="failed"):
        list(accuracy.measured(options))
    assert begun[0] == 1 and len(begun) < 30


def test_figures_are_percentiles_of_all_seeds():
    ramp = np.arange(101) / 1000
    parts = [errors(50, raw_mm=ramp[:50]), errors(51, raw_mm=ramp[50:])]
    found = figures_of(CASES["drift"], "sharp", joined(parts))
    assert found.raw_mm == pytest.approx((0.05, 0.095, 0.1))
    assert found.n_volumes == 101 and found.needs == "0.8-2x"
    lost = np.arange(100) == 3
    given = {"raw_mm": np.where(lost, 0.5, 0.01), "bar_mm": np.full(100, np.nan)}
    apart = figures_of(CASES["lost-slices"], "mild", errors(**given, is_dropped=lost))
    assert (apart.dropped_mm, apart.raw_mm[2]) == (0.5, 0.01)
    assert apart.faults == ["dropped 0.5000 mm"]


@pytest.mark.parametrize(
    ("limits", "given", "words"),
    [
        (Limits((1.4, 2.0)), {}, []),
        (Limits((1.4, 2.0)), {"raw_bounds": np.full(100, 1.5)}, ["raw 1.50x"]),
        (Limits((1.4, 2.0)), {"free_bounds": np.full(100, 0.7)}, ["gauge-free 0.70x"]),
        (Limits(median_mm=0.004, worst_mm=0.004), {}, ["median 0.0050 mm", "worst 0.0050 mm"]),
        (Limits(bent=1.0), {"bent_mm": np.full(100, 0.004)}, ["error 0.0050 mm"]),
        (Limits(bent=1.0), {}, []),
        (Limits(), {"is_failed": np.arange(100) == 1}, ["1 failed"]),
        (Limits(), {"bar_mm": np.full(100, 0.006)}, ["covers 100%"]),
        (Limits(), {"bar_mm": np.full(100, np.nan)}, []),
    ],
)
def test_what_is_missed_is_told(limits, given, words):
    assert missed(limits, **given) == words


def test_no_figure_is_a_fault():
    """All volumes failed: NaN meets no requirement."""
    found = missed(Limits((1.4, 2.0)), is_failed=np.ones(100, bool))
    assert found == ["100 failed", "raw nanx", "gauge-free nanx"]


def test_sharp_limits_are_for_the_sharp_point_spread():
    figures = figures_of(Case("case", "", Limits()), "sharp", errors(raw_bounds=np.full(100, 1.9)))
    assert list(faults(figures, Limits((1.4, 2.0)))) == []
    mild = dataclasses.replace(figures, point_spread="mild")
    assert list(faults(mild, Limits((1.4, 2.0)))) == ["raw 1.90x"]


def test_a_cost_can_be_too_much_or_too_little():
    assert Cost("", 2.0, "G", 2.2).passes and not Cost("", 2.3, "G", 2.2).passes
    assert Cost("", 160, "M", 150, True).passes and not Cost("", 140, "M", 150, True).passes
    assert Cost("", 1e9, "G").passes


def test_split_of_samples():
    """The innermost call that is named decides; what none names is start-up."""
    samples = [
        "main (a.py:1);collect_run (keepstill/collect.py:55);put_nifti (keepstill/write.py:9) 3",
        "run (b.py:2);_Worker.estimate (keepstill/realign.py:1);estimate_motion (e.py:1) 4",
        "<module> (c.py:1);_find_and_load (<frozen importlib._bootstrap>:1) 2",
    ]
    assert split.split(samples) == {"write": 3, "first estimate": 4, split.REST: 2}


def result_of_engine(shift_mm, factor, status=("reference", "ok", "ok", "failed")):
    """What an engine left that is off by a shift, and by a factor of intensity."""
    matrices = np.array([np.eye(4)] + [phantom.rigid((1.5 + shift_mm, 0, 0), (0, 0, 0))] * 3)
    brain = np.zeros((6, 6, 6), bool)
    brain[1:5, 1:5, 1:5] = True
    voxels = np.full((6, 6, 6, 4), 100.0) * factor
    return engines.Result(matrices, np.array(status), voxels, brain, np.diag([3.0, 3, 3, 1]))


@pytest.mark.parametrize(
    ("shift_mm", "factor", "words"),
    [
        (0.01, 1.001, []),
        (0.03, 1.001, ["median 0.030 mm"]),
        (0.06, 1.001, ["median 0.060 mm", "worst 0.060 mm"]),
        (0.01, 1.01, ["voxels 1.00%"]),
    ],
)
def test_engines_that_are_apart_are_told(tmp_path, shift_mm, factor, words):
    source = tmp_path / "sub-01" / "func" / "sub-01_task-rest_bold.nii.gz"
    apart = engines.compared(source, result_of_engine(0, 1), result_of_engine(shift_mm, factor))
    np.testing.assert_allclose(apart.apart_mm, [shift_mm] * 2)
    assert apart.n_failed == (1, 1) and apart.errors_mm is None
    assert list(engines.faults(apart)) == words
    assert f"| {shift_mm:.4f} | {shift_mm:.4f} |" in engines.line("run", apart)
    assert engines.is_required("sub-01_task-rest", apart)
    moved = dataclasses.replace(apart, motion_mm=np.array([0.0, 2.5]))
    assert not engines.is_required("sub-01_task-rest", moved)  # reported only
    assert engines.is_required("phantom, mild", moved) and list(engines.faults(moved)) == words
    none = engines.compared(source, *[result_of_engine(0, 1, ("failed",) * 4)] * 2)
    assert engines.is_required("sub-01_task-rest", none) and list(engines.faults(none))


def test_a_large_study_and_its_results_are_links(tmp_path):
    """Every run of it is complete, by manifests of their own names."""
    names = scale.names_of(5)
    assert (names[0], names[4]) == ("sub-00000_task-rest_run-1", "sub-00001_task-rest_run-1")
    (tmp_path / "bold").write_bytes(b"voxels")
    scale.make_study(tmp_path / "study", tmp_path / "bold", names)
    source = tmp_path / "study" / "sub-00001" / "func" / f"{names[4]}_bold.nii.gz"
    assert source.is_symlink() and source.read_bytes() == b"voxels"
    out, done = tmp_path / "out", names[0]
    output = out / "sub-00000" / "func" / f"{done}_desc-hmc_bold.nii.gz"
    output.parent.mkdir(parents=True)
    output.write_bytes(b"realigned voxels")
    sha256, settings = manifest.file_sha256(source), RealignSettings()
    outputs = manifest.describe_outputs(out, [output])
    manifest.write_manifest(out, manifest.Manifest(done, sha256, 6, {}, settings, outputs, {}))
    manifest.remember_input(out, done, manifest.stamp_of(source), sha256)
    scale.complete(out, done, names[1:])
    assert all(manifest.is_complete(name, source, {}, settings, out) for name in names)
    (out / "sub-00001" / "func" / f"{names[4]}_desc-hmc_bold.nii.gz").unlink()
    assert not manifest.is_complete(names[4], source, {}, settings, out)
