"""Damaged headers, gzip streams and sidecars end in a clear error or a good read."""

import gzip
import tempfile
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runs
from keepstill.errors import KeepstillError
from keepstill.nifti import made_header
from keepstill.read import open_staged
from keepstill.stage import stage_run

N_EXAMPLES = 700  # of each of three kinds: 2,100 in all
MOST_BYTES = 500_000_000
fuzzed = settings(
    max_examples=N_EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


MEMORY = Path("/proc/self")  # Linux
STARTED_AT = []


def peak_bytes():
    """Most memory that this process held at a time, since `forget_peak`."""
    (line,) = (x for x in (MEMORY / "status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak():
    """What other tests took before must not hide what these take."""
    (MEMORY / "clear_refs").write_text("5")


@pytest.fixture(scope="module")
def good():
    """Bytes of a small uncompressed run, with and without NIfTI-2."""
    forget_peak()
    STARTED_AT.append(peak_bytes())
    with tempfile.TemporaryDirectory() as folder:
        first = runs.write_run(Path(folder) / "a.nii", runs.ball_run(3, shape=(6, 7, 5)))
        second = Path(folder) / "b.nii"
        nib.save(nib.Nifti2Image(runs.ball_run(3, shape=(6, 7, 5)), np.diag([3, 3, 4, 1])), second)
        return first.read_bytes(), second.read_bytes()


def check_read_or_refused(name, content, sidecar):
    """Stage and open; anything but a good read or a KeepstillError fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / name
        source.write_bytes(content)
        source.with_name("a_bold.json").write_bytes(sidecar)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                stage_run(source, "sub-01", None, Path(folder) / "stage")
        except KeepstillError as error:
            assert str(error) and "\n" not in str(error)
            left = [p.name for p in (Path(folder) / "stage").rglob("*")]
            assert left == [], left
            return
        run = open_staged(Path(folder) / "stage")
        assert run.voxels.ndim == 4 and run.n_volumes >= 2
        assert run.volume(run.n_volumes - 1).dtype == np.float32
        assert np.isfinite(run.layout.affine).all()
        shape = tuple(int(size) for size in run.layout.shape)
        header = made_header(run.layout.header, run.layout.affine, shape, "float32")
        np.testing.assert_allclose(header.get_best_affine(), run.layout.affine, atol=1e-2)


flips = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=12)


def flipped(content, changes, within):
    out = bytearray(content)
    for place, bits in changes:
        out[place % min(within, len(out))] ^= bits
    return bytes(out)


@given(flips, st.booleans(), st.one_of(st.none(), st.integers(0, 2000)))
@fuzzed
def test_damaged_headers(good, changes, second, cut):
    content = flipped(good[second], changes, within=544 if second else 352)
    check_read_or_refused("a_bold.nii", content[:cut], b'{"RepetitionTime": 2}')


@given(flips, st.one_of(st.none(), st.integers(0, 1500)), st.binary(max_size=40))
@fuzzed
def test_damaged_gzip_streams(good, changes, cut, tail):
    packed = gzip.compress(good[0], mtime=0)
    content = flipped(packed, changes, within=len(packed))[:cut] + tail
    check_read_or_refused("a_bold.nii.gz", content, b"{}")


json_like = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(
    st.one_of(
        st.binary(max_size=60),
        st.builds(lambda v: repr(v).encode(), json_like),
        st.builds(lambda v: __import__("json").dumps({"RepetitionTime": v}).encode(), json_like),
    )
)
@fuzzed
def test_damaged_sidecars(good, sidecar):
    check_read_or_refused("a_bold.nii", good[0], sidecar)


def test_memory_stays_small(good):
    """Runs last in this file: the high-water mark rose by less than the limit meanwhile."""
    assert peak_bytes() - STARTED_AT[0] < MOST_BYTES
