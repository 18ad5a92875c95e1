"""Ways to cut a head in parts, whose motion is compared to tell how far all of it may be off.

Errors in which neighbouring points agree do not show in the residuals' variance, but parts of the
head disagree by them. Slabs of y, front to back, show aliasing, ghosts and activation; slabs of z,
slice by slice in time, show motion inside the volume, which is alike in all of a slice.
"""

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.small import product, solution
from keepstill.kernels.sums import Points, cross_sums, sums_of_parts

Matrix = NDArray[np.float64]

# Slabs of z: thick, so that motion of a few slices pulls a slab as a whole.
_N_SLABS = 5
# Fewer parts say too little.
_FEWEST_PARTS = 3


class Strips(NamedTuple):
    """Runs of points that no cut divides: of one y and one slab of z.

    Attributes
    ----------
    ends : (n_strips + 1,) int64
        Points where strips begin, and where the last one ends.
    parts_of_rows : (n_cuts, n_rows) int64
        Part that each row of points belongs to, by each cut.
    parts_of_strips : (n_cuts, n_strips) int64
    """

    ends: NDArray[np.int64]
    parts_of_rows: NDArray[np.int64]
    parts_of_strips: NDArray[np.int64]


class Cut(NamedTuple):
    """The parts of one cut, with what is expected of them.

    Attributes
    ----------
    part_of_row : (n_rows,) int64
    part_of_strip : (n_strips,) int64
    normals : (n_parts, 8, 8) float64
        What each part's points have of the normal matrix.
    spread : (8, 8) float64
        What the parts' sums of residuals scatter by after a fit, for residuals of variance 1 that
        have nothing to do with each other.
    """

    part_of_row: NDArray[np.int64]
    part_of_strip: NDArray[np.int64]
    normals: Matrix
    spread: Matrix

    @property
    def n_parts(self) -> int:
        """How many parts there are."""
        return len(self.normals)


def one_strip(points: Points) -> Strips:
    """All points as one, without a cut."""
    nothing = np.zeros((0, 1), np.int64)
    return Strips(np.array([0, points.values.size], np.int64), nothing, nothing)


def strips_of(rows: NDArray[np.int64], blocks: NDArray[np.int64]) -> Strips:
    """Strips of rows of points, cut into blocks and into slabs of z.

    Parameters
    ----------
    rows : (n_rows, 4) int64
        y, z, first x and number of points of each, by y.
    blocks : (n_blocks + 1,) int64
        Rows where blocks begin, and where the last one ends.
    """
    block = np.searchsorted(blocks, np.arange(len(rows)), side="right") - 1
    cuts = [parts for parts in (block, _slabs(rows)) if parts.max() + 1 >= _FEWEST_PARTS]
    parts = np.array(cuts, np.int64).reshape(len(cuts), len(rows))
    labels = np.vstack([rows[:, 0], parts])
    begins = np.flatnonzero((np.diff(labels, axis=1, prepend=-1) != 0).any(axis=0))
    ends = np.append(0, np.cumsum(rows[:, 3]))[np.append(begins, len(rows))]
    return Strips(ends, parts, np.ascontiguousarray(parts[:, begins]))


def _slabs(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Slab of z that each row lies in: about equal numbers of points in each."""
    by_z = np.bincount(rows[:, 1], weights=rows[:, 3]).astype(np.int64)
    before = np.cumsum(by_z) - by_z
    slab = (_N_SLABS * before // by_z.sum())[rows[:, 1]]
    return np.unique(slab, return_inverse=True)[1].astype(np.int64)


def cuts_of(
    points: Points, strips: Strips, prior: Matrix
) -> tuple[Matrix, Matrix, tuple[Cut, ...]]:
    """Normal matrix test' jacobian + prior, the tests' own test' test, (8, 8) each, and cuts."""
    between = list(itertools.pairwise(int(end) for end in strips.ends))
    test, plain = points.test_jacobian, points.jacobian
    by_strip = np.array([cross_sums(test, plain, a, b) for a, b in between])
    tests_by_strip = np.array([cross_sums(test, test, a, b) for a, b in between])
    normal, of_tests = total_of(by_strip) + prior, total_of(tests_by_strip)
    cuts = []
    for rows, of_strips in zip(strips.parts_of_rows, strips.parts_of_strips, strict=True):
        n = int(of_strips.max()) + 1
        normals, tests = (
            sums_of_parts(sums.reshape(len(sums), -1), of_strips, n).reshape(n, *normal.shape)
            for sums in (by_strip, tests_by_strip)
        )
        cuts.append(Cut(rows, of_strips, normals, _spread((normals, tests), (normal, of_tests))))
    return normal, of_tests, tuple(cuts)


def total_of(parts: Matrix) -> Matrix:
    """Sum of (n, ...) over the first axis, in its order, which no rank or thread changes."""
    out = np.zeros(parts.shape[1:])
    for part in parts:
        out += part
    return out


def _spread(parts: tuple[Matrix, Matrix], whole: tuple[Matrix, Matrix]) -> Matrix:
    """Expected sum of d d' over parts, d = T_g' r - N_g N^-1 T' r, for white r of variance 1."""
    normal, of_tests = whole
    out = np.zeros_like(normal)
    for of_part, tests in zip(*parts, strict=True):
        turned, regular = solution(np.ascontiguousarray(normal.T), np.ascontiguousarray(of_part.T))
        out += tests
        if regular:
            taken = np.ascontiguousarray(turned.T)  # N_g N^-1
            both = product(taken, tests)
            out += product(product(taken, of_tests), turned) - both - both.T
    return out
