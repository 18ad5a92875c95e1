"""Motion without breathing: against scipy's filters, and on motion that is known."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

import runs
from keepstill import breathing
from keepstill.__main__ import main
from keepstill.errors import InputError, SettingsError
from keepstill.settings import RealignSettings

NOTCH = RealignSettings(fd_filter="notch")
LOWPASS = RealignSettings(fd_filter="lowpass")


def by_scipy(motion, tr_s, chosen):
    """The same by scipy: filters from their frequencies in Hz, constant padding of n - 1."""
    per_s = 1 / tr_s
    if chosen.fd_filter == "lowpass":
        filters = [signal.butter(2, chosen.fd_lowpass_per_min / 60, fs=per_s)]
    else:
        low_hz, high_hz = chosen.fd_notch_low_per_min / 60, chosen.fd_notch_high_per_min / 60
        middle_hz = (low_hz + high_hz) / 2
        filters = [signal.iirnotch(middle_hz, middle_hz / (high_hz - low_hz), fs=per_s)] * 2
    for b, a in filters:
        n = len(motion)
        motion = signal.filtfilt(b, a, motion, axis=0, padtype="constant", padlen=n - 1)
    return motion


@given(
    st.integers(2, 300),
    st.floats(0.3, 1.6),
    st.sampled_from([NOTCH, LOWPASS, replace(NOTCH, fd_notch_low_per_min=3.0)]),
)
@settings(max_examples=60, deadline=None)
def test_filters_are_scipy_s(n, tr_s, chosen):
    motion = np.cumsum(np.random.default_rng(n).normal(size=(n, 6)), axis=0) + 5
    motion.setflags(write=False)
    found = breathing.without_breathing(motion, np.zeros(n, bool), tr_s, chosen)
    np.testing.assert_allclose(found, by_scipy(motion, tr_s, chosen), atol=1e-9)


def amplitude(chosen, per_min, tr_s=0.8):
    """What is left of a swing of 1 mm, in the middle of ten minutes."""
    t_min = np.arange(750) * tr_s / 60
    motion = np.outer(np.sin(2 * np.pi * per_min * t_min), np.ones(6))
    found = breathing.without_breathing(motion, np.zeros(750, bool), tr_s, chosen)
    return np.abs(found[250:500]).max()


@pytest.mark.parametrize(
    ("chosen", "per_min", "low", "high"),
    [
        (NOTCH, 15, 0, 0.001),  # the middle of the band
        (NOTCH, 12, 0.2, 0.3),  # its ends: 3 dB, four times
        (NOTCH, 18, 0.2, 0.3),
        (NOTCH, 2, 0.95, 1.05),  # a head that nods once in half a minute
        (LOWPASS, 6, 0.45, 0.55),  # 3 dB, twice
        (LOWPASS, 15, 0, 0.03),
        (LOWPASS, 1, 0.99, 1.01),
    ],
)
def test_what_is_left_of_a_swing(chosen, per_min, low, high):
    assert low <= amplitude(chosen, per_min) <= high


def test_failed_volumes_do_not_count():
    """Whatever their numbers are."""
    rng = np.random.default_rng(2)
    motion, failed = rng.normal(size=(60, 6)), np.zeros(60, bool)
    failed[[0, 20, 21, 59]] = True
    wild = motion.copy()
    wild[failed] = 1e3
    both = [breathing.without_breathing(m, failed, 0.8, NOTCH) for m in (motion, wild)]
    np.testing.assert_array_equal(*both)
    assert np.abs(both[0]).max() < 10


@pytest.mark.parametrize(
    ("chosen", "tr_s", "words"),
    [
        (NOTCH, 2.0, "notch at 18 breaths/min; a repetition time of 2 s shows less than 15"),
        (NOTCH, 1.7, "shows less than 17.6; choose fd_filter: lowpass or none"),
        (LOWPASS, 6.0, "lowpass at 6 breaths/min; a repetition time of 6 s shows less than 5"),
        (LOWPASS, None, "needs a repetition time, and there is none"),
    ],
)
def test_a_repetition_time_that_cannot_show_the_rates(chosen, tr_s, words):
    with pytest.raises(InputError, match=words):
        breathing.check_filter(tr_s, chosen, "sub-01")
    breathing.check_filter(tr_s, RealignSettings(), "sub-01")
    if tr_s:
        breathing.check_filter(tr_s / 4, chosen, "sub-01")


@pytest.mark.parametrize(
    "values",
    [
        {"fd_filter": "bandpass"},
        {"fd_notch_low_per_min": 20.0},
        {"fd_notch_low_per_min": 0.0},
        {"fd_lowpass_per_min": -1.0},
    ],
)
def test_what_is_no_filter(values):
    with pytest.raises(SettingsError):
        RealignSettings(**values)


def call(*arguments, code=0):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == code


def test_the_column(tmp_path):
    """Worked out again from the other columns of the table."""
    data = runs.ball_run(12)
    data[..., 5] = 0
    source = runs.write_run(tmp_path / "a_bold.nii.gz", data, tr_s=0.8)
    for name, options in (
        ("none", ()),
        ("notch", ("--fd-filter", "notch", "--fd-notch-per-min", "10", "30")),
        ("lowpass", ("--fd-filter", "lowpass")),
    ):
        call("realign", source, "--out", tmp_path / name, "--threads", "1", *options)
    table, name = "a_desc-confounds_timeseries", "framewise_displacement_filtered"
    plain = runs.read_table(tmp_path / "none" / f"{table}.tsv")
    assert name not in plain
    for kind, chosen in (
        ("notch", replace(NOTCH, fd_notch_low_per_min=10.0, fd_notch_high_per_min=30.0)),
        ("lowpass", LOWPASS),
    ):
        columns = runs.read_table(tmp_path / kind / f"{table}.tsv")
        found = runs.numbers(columns.pop(name))
        assert columns == plain
        motion = np.transpose([runs.numbers(plain[column]) for column in list(plain)[:6]])
        good = np.delete(np.arange(12), 5)
        motion[5] = [np.interp(5, good, motion[good, i]) for i in range(6)]
        change = np.abs(np.diff(by_scipy(motion, 0.8, chosen), axis=0))
        expected = change[:, :3].sum(axis=1) + 50 * change[:, 3:].sum(axis=1)
        expected[[4, 5]] = np.nan  # of the dead volume, and of the one after it
        np.testing.assert_allclose(found[1:], expected, atol=1e-7)
        assert np.isnan(found[0]) and np.nanmax(found) < np.nanmax(
            runs.numbers(plain["framewise_displacement"])
        )
        said = json.loads((tmp_path / kind / f"{table}.json").read_text())[name]
        assert said["Units"] == "mm"
        assert {"notch": "10 to 30", "lowpass": "6 cycles/min"}[kind] in said["Description"]
        manifest = json.loads((tmp_path / kind / "manifests" / "a.json").read_text())
        mean_mm = manifest["summary"]["mean_fd_filtered_mm"]
        assert mean_mm == pytest.approx(np.nanmean(found), rel=1e-6)


def test_a_run_that_is_too_slow_is_one_line(tmp_path, capsys):
    source = runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run(4))
    call("realign", source, "--out", tmp_path / "out", "--fd-filter", "notch", code=2)
    error = capsys.readouterr().err
    assert "keepstill: a: fd_filter notch at 18 breaths/min; a repetition time of 2 s" in error
    assert not list((tmp_path / "out").glob("*.tsv"))
