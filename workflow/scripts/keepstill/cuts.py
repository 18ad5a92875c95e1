"""Ways to cut a head in parts, whose motion is compared to tell how far all of it may be off.

Errors in which neighbouring points agree do not show in the residuals' variance, but parts of the
head disagree by them. Slabs of y, front to back, show aliasing; front and back as a whole show
ghosts and activation, which are alike in many of those; slabs of z, slice by slice in time, show
motion inside the volume, which is alike in all of a slice.
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
# Fewer slabs or blocks say too little; nor are fewer blocks halved.
_FEWEST_PARTS = 3


class Cells(NamedTuple):
    """Where all cuts meet: parts of parts, of which every cut's parts are made.

    Attributes
    ----------
    strip_ends : (n_strips + 1,) int64
        Points where strips begin, which lie in one cell each, and where the last one ends.
    cell_of_strip : (n_strips,) int64
    cell_of_row : (n_rows,) int64
        For the rows of points.
    parts : (n_cuts, n_cells) int64
        Part that each cell belongs to, by each cut.
    """

    strip_ends: NDArray[np.int64]
    cell_of_strip: NDArray[np.int64]
    cell_of_row: NDArray[np.int64]
    parts: NDArray[np.int64]

    @property
    def n_cells(self) -> int:
        """How many cells there are."""
        return self.parts.shape[1]


class Cut(NamedTuple):
    """The parts of one cut, with what is expected of them.

    Attributes
    ----------
    part_of_cell : (n_cells,) int64
    normals : (n_parts, 8, 8) float64
        What each part's points have of the normal matrix.
    spread : (8, 8) float64
        What the parts' sums of residuals scatter by after a fit, for residuals of variance 1 that
        have nothing to do with each other.
    """

    part_of_cell: NDArray[np.int64]
    normals: Matrix
    spread: Matrix


def one_cell(points: Points) -> Cells:
    """All points as one, without a cut."""
    whole, rows = np.zeros(1, np.int64), np.zeros(len(points.rows), np.int64)
    ends = np.array([0, points.values.size], np.int64)
    return Cells(ends, whole, rows, np.zeros((0, 1), np.int64))


def cells_of(rows: NDArray[np.int64], blocks: NDArray[np.int64]) -> Cells:
    """Cells of rows of points, cut into blocks, into front and back, and into slabs of z.

    Parameters
    ----------
    rows : (n_rows, 4) int64
        y, z, first x and number of points of each, by y.
    blocks : (n_blocks + 1,) int64
        Rows where blocks begin, and where the last one ends.
    """
    block = np.searchsorted(blocks, np.arange(len(rows)), side="right") - 1
    cuts = [parts for parts in (block, _slabs(rows)) if parts.max() + 1 >= _FEWEST_PARTS]
    if len(blocks) > _FEWEST_PARTS:
        cuts.append(2 * block // (len(blocks) - 1))
    by_row = np.array(cuts, np.int64).reshape(len(cuts), len(rows))
    parts, cell = np.unique(by_row, axis=1, return_inverse=True)
    cell = cell.reshape(-1).astype(np.int64)
    begins = np.flatnonzero((np.diff([rows[:, 0], cell], axis=1, prepend=-1) != 0).any(axis=0))
    ends = np.append(0, np.cumsum(rows[:, 3]))[np.append(begins, len(rows))]
    return Cells(ends, np.ascontiguousarray(cell[begins]), cell, parts)


def _slabs(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Slab of z that each row lies in: about equal numbers of points in each."""
    by_z = np.bincount(rows[:, 1], weights=rows[:, 3]).astype(np.int64)
    before = np.cumsum(by_z) - by_z
    slab = (_N_SLABS * before // by_z.sum())[rows[:, 1]]
    return np.unique(slab, return_inverse=True)[1].astype(np.int64)


def cuts_of(points: Points, cells: Cells, prior: Matrix) -> tuple[Matrix, Matrix, tuple[Cut, ...]]:
    """Normal matrix test' jacobian + prior, the tests' own test' test, (8, 8) each, and cuts."""
    between = list(itertools.pairwise(int(end) for end in cells.strip_ends))
    test, plain = points.test_jacobian, points.jacobian
    by_strip = np.array([cross_sums(test, plain, a, b) for a, b in between])
    tests_by_strip = np.array([cross_sums(test, test, a, b) for a, b in between])
    by_cell, tests = (
        gathered(sums, cells.cell_of_strip, cells.n_cells) for sums in (by_strip, tests_by_strip)
    )
    normal, of_tests = total_of(by_cell) + prior, total_of(tests)
    cuts = []
    for parts in cells.parts:
        n = int(parts.max()) + 1
        normals, tests_of_parts = gathered(by_cell, parts, n), gathered(tests, parts, n)
        spread = _spread((normals, tests_of_parts), (normal, of_tests))
        cuts.append(Cut(np.ascontiguousarray(parts), normals, spread))
    return normal, of_tests, tuple(cuts)


def gathered(sums: Matrix, parts: NDArray[np.int64], n_parts: int) -> Matrix:
    """Sums (n_parts, ...) of those of (n, ...) that belong to each part, by (n,) their parts."""
    flat = sums_of_parts(sums.reshape(len(sums), -1), parts, n_parts)
    return np.asarray(flat.reshape(n_parts, *sums.shape[1:]))


def total_of(parts: Matrix) -> Matrix:
    """Sum of (n, ...) over the first axis, in its order, which no rank or thread changes."""
    flat = product(np.ones((1, len(parts))), parts.reshape(len(parts), -1))
    return np.asarray(flat.reshape(parts.shape[1:]))


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
