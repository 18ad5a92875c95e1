"""The fast density against the naive formula: full mesh grids, one blob after the other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from keepstill.blobs import density
from keepstill.errors import SettingsError
from keepstill.kernels import blobs as kernels

FLOAT32_EPS = float(np.finfo(np.float32).eps)


def some_blobs(n, seed=0, size=50.0, spreads=(3.0, 12.0)):
    rng = np.random.default_rng(seed)
    made = rng.uniform(-size, size, (n, 3)), rng.uniform(*spreads, n), rng.uniform(50, 900, n)
    for array in made:
        array.setflags(write=False)
    return made


def test_recipe_of_the_naive_way():
    """linspace(-50, 50, 200) a side, each blob truncated to uint16: equal but for ties."""
    n, step = 200, 100 / 199
    centres, spreads, brights = some_blobs(8)
    spreads = spreads * step
    axis = np.linspace(-50, 50, n)
    expected = np.zeros((n, n, n), np.uint16)
    for (x0, y0, z0), spread, bright in zip(centres, spreads, brights, strict=True):
        x, y, z = np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)
        r2 = (x - x0) ** 2 + (y - y0) ** 2 + (z - z0) ** 2
        expected += (bright * np.exp(-r2 / spread**2)).astype(np.uint16)
    found = density(
        (n, n, n), centres, spreads, brights, spacing=step, origin=-50, dtype=np.uint16,
        rounding="blob",
    )  # fmt: skip
    difference = found.astype(int) - expected
    assert np.abs(difference).max() <= 1
    assert (difference != 0).sum() <= 5  # ties at the last bit of a float64; 0 seen


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint64])
@pytest.mark.parametrize("rounding", ["blob", "sum"])
def test_whole_numbers(dtype, rounding):
    grid = {"spacing": (2.0, 1.5, 3.0), "origin": (-30.0, -20.0, -45.0)}
    blobs = some_blobs(6, 1, 30.0)
    blobs = blobs[0], blobs[1], np.minimum(blobs[2], 40)  # no sum beyond uint8
    shape = (31, 28, 33)
    expected = naive.density(shape, *blobs, **grid, dtype=dtype, each=rounding == "blob")
    found = density(shape, *blobs, **grid, dtype=dtype, rounding=rounding)
    assert found.dtype == dtype and found.shape == shape
    # ties: the sum's tail is cut below 6 * 40 * eps, so one voxel in 10^5 may round down
    assert (found != np.trunc(expected)).sum() <= 1


def test_sum_keeps_what_single_blobs_would_lose():
    """A hundred blobs of 0.9 are 90 in the sum, and nothing one by one."""
    blobs = np.zeros((100, 3)), np.full(100, 4.0), np.full(100, 0.9)
    assert density((1, 1, 1), *blobs, dtype=np.int16, rounding="sum")[0, 0, 0] == 90
    assert density((1, 1, 1), *blobs, dtype=np.int16, rounding="blob")[0, 0, 0] == 0


def test_value_at_the_cut_off_is_kept():
    """A value of exactly 1 is not below 1."""
    found = density((3, 1, 1), [[0, 0, 0]], 1.0, np.e, dtype=np.uint8, rounding="blob")
    assert found[:, 0, 0].tolist() == [2, int(np.e * np.exp(-1.0)), 0]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_float_tail_is_bounded(seed):
    """No blob loses more than float32's eps of its brightness, wherever it stands."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 6))
    centres, spreads = rng.uniform(-25, 25, (n, 3)), rng.uniform(0.3, 9, n)
    brights = rng.uniform(-500, 500, n)
    shape, spacing = (17, 14, 19), rng.uniform(0.5, 3, 3)
    grid = {"spacing": spacing, "origin": rng.uniform(-25, 0, 3)}
    expected = naive.density(shape, centres, spreads, brights, **grid)
    bound = FLOAT32_EPS * np.abs(brights).sum()
    exact = density(shape, centres, spreads, brights, **grid, dtype=np.float64)
    assert np.abs(exact - expected).max() <= bound * (1 + 1e-6)
    rounded = density(shape, centres, spreads, brights, **grid)
    assert rounded.dtype == np.float32
    assert np.abs(rounded - expected).max() <= 5 * bound  # three float32 factors and their sum


def test_spans():
    centres, reaches = some_blobs(40, 3, 30.0, (0.5, 20.0))[:2]
    shape, spacing, origin = (9, 12, 30), np.array([3.0, 2.0, 1.5]), np.array([-14.0, 2.0, -22.0])
    first, count = np.zeros((2, 40, 3), np.int64)
    kernels.fill_spans(
        centres, reaches, np.array(shape), kernels.Grid(spacing, origin), first, count
    )
    expected = naive.fill_spans(centres, reaches, shape, spacing, origin)
    np.testing.assert_array_equal(count, expected[1])
    np.testing.assert_array_equal(first, expected[0])


def test_beyond_the_range_is_the_limit():
    one = [[0.0, 0.0, 0.0]]
    found = density((2, 1, 1), one * 3, 1.0, 30000.0, dtype=np.uint16, rounding="blob")
    assert found[:, 0, 0].tolist() == [65535, 3 * int(30000 * np.exp(-1))]
    assert density((1, 1, 1), one, 1.0, -7.9, dtype=np.uint8)[0, 0, 0] == 0
    assert density((1, 1, 1), one, 1.0, -7.9, dtype=np.int8)[0, 0, 0] == -7
    for dtype in (np.int32, np.uint32, np.int64, np.uint64):
        found = density((1, 1, 1), one, 1.0, 1e30, dtype=dtype)[0, 0, 0]
        assert np.iinfo(dtype).max - 1023 <= found <= np.iinfo(dtype).max


@pytest.mark.parametrize("size", [1e12, 1e19, 1e60, 1e100])
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_huge_blob_is_the_same_everywhere(size, dtype):
    """One far wider than the grid, alone and as far away; and a grid that is all one point."""
    at = [[0.0, 0.0, 0.0], [0.0, -size, 0.0]]
    expected = 90 + 100 * np.exp(-1)
    found = density((2, 3, 4), at, size, [90.0, 100.0], dtype=dtype)
    np.testing.assert_allclose(found, dtype(expected), rtol=1e-6)
    found = density((2, 3, 4), at[:1], 1.0, 90.0, spacing=1 / size, dtype=dtype)
    np.testing.assert_allclose(found, 90, rtol=1e-6)


@pytest.mark.parametrize("n_threads", [2, 3, 50])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_threads_do_not_matter(n_threads, dtype):
    blobs = some_blobs(20, 4, 20.0)
    alone = density((23, 20, 21), *blobs, dtype=dtype)
    np.testing.assert_array_equal(
        alone, density((23, 20, 21), *blobs, dtype=dtype, n_threads=n_threads)
    )


def test_no_blobs_and_blobs_outside():
    assert not density((2, 3, 4), np.zeros((0, 3)), [], []).any()
    assert not density((2, 3, 4), [], [], []).any()
    assert not density((2, 3, 4), [[500, 0, 0]], 3.0, 9.0).any()
    assert not density((2, 3, 4), [[0, 0, 0]], 3.0, 0.0, dtype=np.int16, rounding="blob").any()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"spreads": [1.0, 0.0]}, r"spreads: 0 found for blob 1; needs more than 0"),
        ({"spreads": [-2.0, 1.0]}, r"spreads: -2 found for blob 0"),
        ({"spreads": [1.0, np.nan]}, r"spreads: NaN"),
        ({"spreads": [1.0]}, r"spreads: an array of shape \(1,\) found; needs \(2,\)"),
        ({"centres": [[0, 0, np.inf], [0, 0, 0]]}, r"centres: NaN or infinity"),
        ({"centres": [0, 0, 0]}, r"centres: an array of shape \(3,\) found; needs \(n, 3\)"),
        ({"centres": np.zeros((2, 2))}, r"needs \(n, 3\)"),
        ({"brights": [1, 2, 3]}, r"brights"),
        ({"spacing": [1, 1]}, r"spacing: an array of shape \(2,\)"),
        ({"spacing": (1, 0, 1)}, r"spacing: .* needs more than 0"),
        ({"origin": np.nan}, r"origin: NaN"),
        ({"shape": (3, 3)}, r"shape: \(3, 3\) found"),
        ({"shape": (3, 3, 0)}, r"shape"),
        ({"shape": (3, 3, 2.5)}, r"shape"),
        ({"shape": 3}, r"shape: 3 found"),
        ({"shape": (3, 3, np.nan)}, r"shape"),
        ({"centres": [[0, 0, 0], [0, 0]]}, r"centres: not an array of numbers"),
        ({"spreads": [1.0, 1e-200]}, r"spreads: 1e-200 found for blob 1"),
        ({"spreads": [1.0, 1e200]}, r"spreads: 1e\+200 found; needs numbers of at most 1e\+100"),
        ({"spacing": 1e-300}, r"spacing: 1e-300 found"),
        ({"dtype": ">i2"}, r"dtype: >i2 found; .* native byte order"),
        ({"dtype": "number"}, r"dtype: 'number' found"),
        ({"dtype": np.float16}, r"dtype: float16 found"),
        ({"dtype": np.complex64}, r"dtype: complex64 found"),
        ({"rounding": "up"}, r"rounding: 'up' found"),
        ({"rounding": "blob"}, r"'blob' found with float32"),
    ],
)
def test_what_no_density_can_have(changed, words):
    values = {"shape": (3, 3, 3), "centres": np.zeros((2, 3)), "spreads": 1.0, "brights": 1.0}
    values |= changed
    arguments = [values.pop(name) for name in ("shape", "centres", "spreads", "brights")]
    with pytest.raises(SettingsError, match=words):
        density(*arguments, **values)
