"""Small dense algebra in a fixed order of operations.

A BLAS picks its instructions by CPU kind, so the last bit of its results differs between
machines; motion must not.
"""

import numpy as np
from numpy.typing import NDArray

from keepstill.kernels.compiled import kernel, part


@kernel
def product(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matrix product a @ b of (n, m) and (m, p) float64, as (n, p) float64."""
    out = np.zeros((a.shape[0], b.shape[1]))
    for i in range(a.shape[0]):
        for k in range(a.shape[1]):
            for j in range(b.shape[1]):
                out[i, j] += a[i, k] * b[k, j]
    return out


@kernel
def solution(
    matrix: NDArray[np.float64], right: NDArray[np.float64]
) -> tuple[NDArray[np.float64], bool]:
    """X with matrix @ x = right, by Gaussian elimination with row pivots.

    Parameters
    ----------
    matrix : (n, n) float64
        Never modified.
    right : (n, m) float64
        Never modified.

    Returns
    -------
    x : (n, m) float64
    regular : bool
        False, and x meaningless, for a singular matrix.
    """
    a = matrix.copy()
    x = right.copy()
    n = a.shape[0]
    scale = 0.0
    for i in range(n):
        for j in range(n):
            scale = max(scale, abs(a[i, j]))
    for column in range(n):
        _swap_rows(a, x, column)
        if not abs(a[column, column]) > 1e-14 * scale:
            return x, False
        for i in range(column + 1, n):
            factor = a[i, column] / a[column, column]
            for j in range(column, n):
                a[i, j] -= factor * a[column, j]
            for j in range(x.shape[1]):
                x[i, j] -= factor * x[column, j]
    for i in range(n - 1, -1, -1):
        for j in range(x.shape[1]):
            for k in range(i + 1, n):
                x[i, j] -= a[i, k] * x[k, j]
            x[i, j] /= a[i, i]
    return x, True


@part
def _swap_rows(a: NDArray[np.float64], x: NDArray[np.float64], column: int) -> None:
    """Bring the row with the largest entry in a column, from the diagonal on, to the diagonal."""
    pivot = column
    for i in range(column + 1, a.shape[0]):
        if not abs(a[i, column]) <= abs(a[pivot, column]):
            pivot = i
    for j in range(a.shape[1]):
        a[column, j], a[pivot, j] = a[pivot, j], a[column, j]
    for j in range(x.shape[1]):
        x[column, j], x[pivot, j] = x[pivot, j], x[column, j]
