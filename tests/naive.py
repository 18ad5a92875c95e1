"""Slow twins of the kernels: the same result, written for the eye."""

import itertools

import numpy as np


def mirror(index, size):
    """Index of an endless signal mirrored about its first and last sample."""
    while index < 0 or index >= size:
        index = -index if index < 0 else 2 * (size - 1) - index
    return index


def bspline(degree, x):
    """Centred B-spline of `degree` at x, by the Cox-de Boor recursion on half-integer knots."""
    if degree == 0:
        return 1.0 if -0.5 <= x < 0.5 else 0.0
    half = (degree + 1) / 2
    left = (half + x) * bspline(degree - 1, x + 0.5)
    right = (half - x) * bspline(degree - 1, x - 0.5)
    return (left + right) / degree


def coefficients(signal, degree):
    """B-spline coefficients of a mirrored 1-D signal: solve that the spline meets the samples."""
    n = len(signal)
    matrix = np.zeros((n, n))
    for i in range(n):
        for k in range(-3, 4):
            matrix[i, mirror(i + k, n)] += bspline(degree, float(k))
    return np.linalg.solve(matrix, signal)


def fill_coefficients(volume, degree):
    """Coefficients of a (nz, ny, nx) volume, unpadded."""
    out = volume.astype(float)
    for axis in range(3):
        if out.shape[axis] > 1:
            out = np.apply_along_axis(coefficients, axis, out, degree)
    return out


def fill_weights(degree, t):
    """(6, n) weights of the taps at offsets -2 ... 3."""
    return np.array([[bspline(degree, offset - ti) for ti in t] for offset in range(-2, 4)])


def sample(coefficients_, degree, position):
    """B-spline value at a (x, y, z) position; coefficients (nz, ny, nx), mirrored."""
    taps = []
    for p, n in zip(position, coefficients_.shape[::-1], strict=True):
        indices = range(int(np.floor(p)) - 3, int(np.floor(p)) + 5)
        taps.append([(mirror(i, n), bspline(degree, p - i)) for i in indices if abs(p - i) < 3])
    return sum(
        wx * wy * wz * coefficients_[z, y, x]
        for (x, wx), (y, wy), (z, wz) in itertools.product(*taps)
    )


def is_inside(position, shape, tolerance=1e-6):
    """Whether a (x, y, z) position lies in the field of view of a (nx, ny, nz) grid."""
    return all(-tolerance <= p <= n - 1 + tolerance for p, n in zip(position, shape, strict=True))


def fill_resliced(coefficients_, degree, matrix, shape, outside):
    """Volume (nz, ny, nx) of `shape`, sampled at matrix @ (x, y, z, 1)."""
    nz, ny, nx = shape
    out = np.full(shape, outside, dtype=float)
    for z, y, x in itertools.product(range(nz), range(ny), range(nx)):
        position = (matrix @ (x, y, z, 1.0))[:3]
        if is_inside(position, coefficients_.shape[::-1]):
            out[z, y, x] = sample(coefficients_, degree, position)
    return out


def clear_outside(shape, matrix, moving_shape):
    """Mask (nz, ny, nx) of the voxels whose source lies inside the moving field of view."""
    nz, ny, nx = shape
    out = np.zeros(shape, bool)
    for z, y, x in itertools.product(range(nz), range(ny), range(nx)):
        out[z, y, x] = is_inside((matrix @ (x, y, z, 1.0))[:3], moving_shape)
    return out


def step_sums(points, coefficients_, degree, matrix, scale):
    """Sums of a Gauss-Newton step over sampling points, as `kernels.sums.step_sums`."""
    right, outside = np.zeros(7), np.zeros((7, 7))
    squares, n_inside = 0.0, 0
    for y, z, x, n, first in points.rows:
        for i in range(n):
            position = (matrix @ (x + i, y, z, 1.0))[:3]
            test = points.test_jacobian[:, first + i].astype(float)
            plain = points.jacobian[:, first + i].astype(float)
            if not is_inside(position, coefficients_.shape[::-1]):
                outside += np.outer(test, plain)
                continue
            value = sample(coefficients_, degree, position)
            residual = scale * value - float(points.values[first + i])
            right += test * residual
            squares += residual**2
            n_inside += 1
    return right, outside, squares, n_inside


def normal_matrix(points):
    """test_jacobian' jacobian over all points."""
    return points.test_jacobian.astype(float) @ points.jacobian.astype(float).T


def largest_component(mask):
    """Largest face-connected part of a mask."""
    from scipy import ndimage

    labels, n = ndimage.label(mask)
    if n == 0:
        return np.zeros_like(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def dilated(mask, reach):
    """Mask grown by a cube of side 2 reach + 1."""
    from scipy import ndimage

    return ndimage.maximum_filter(mask.astype(np.uint8), 2 * reach + 1, mode="constant") > 0


def solution(matrix, right):
    """x with matrix @ x = right."""
    return np.linalg.solve(matrix, right)


def product(a, b):
    """a @ b."""
    return a @ b


def density(shape, centres, spreads, brights, spacing=1.0, origin=0.0, dtype=float, each=False):
    """Sum of blobs on full mesh grids, (nx, ny, nz); `each` truncates each blob to `dtype`."""
    spacing, origin = np.broadcast_to(spacing, 3), np.broadcast_to(origin, 3)
    axes = [np.arange(n) * h + o for n, h, o in zip(shape, spacing, origin, strict=True)]
    total = np.zeros(shape, dtype if each else float)
    for (x0, y0, z0), spread, bright in zip(centres, spreads, brights, strict=True):
        x, y, z = np.meshgrid(*axes, indexing="ij")
        r2 = (x - x0) ** 2 + (y - y0) ** 2 + (z - z0) ** 2
        blob = bright * np.exp(-r2 / spread**2)
        total += blob.astype(dtype) if each else blob
    return total


def fill_spans(centres, reaches, shape, spacing, origin):
    """First index within reach of each blob along each axis, and the number of indices."""
    first, count = np.zeros((2, len(centres), 3), int)
    for b, a in itertools.product(range(len(centres)), range(3)):
        at = np.arange(shape[a]) * spacing[a] + origin[a]
        inside = np.flatnonzero(np.abs(at - centres[b, a]) <= reaches[b])
        if inside.size:
            first[b, a], count[b, a] = inside[0], inside.size
    return first, count
