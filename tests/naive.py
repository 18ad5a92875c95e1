"""Slow twins of the kernels: the same result, written for the eye."""

import itertools

import numpy as np


def mirror(index, size):
    """Index of an endless signal mirrored about its first and last sample."""
    if size == 1:
        return 0
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
    if n == 1:
        return signal
    matrix = np.zeros((n, n))
    for i in range(n):
        for k in range(-3, 4):
            matrix[i, mirror(i + k, n)] += bspline(degree, float(k))
    return np.linalg.solve(matrix, signal)


def filter_lines(lines, degree):
    """Coefficients along the first of two axes, without the gain of the prefilter."""
    poles = np.roots([bspline(degree, float(k)) for k in range(-(degree // 2), degree // 2 + 1)])
    poles = poles[np.abs(poles) < 1]
    gain = np.prod((1 - poles) * (1 - 1 / poles))
    return np.apply_along_axis(coefficients, 0, lines.astype(float), degree) / gain


def filter_rows(rows, degree, pad):
    """The same along the second axis, mirrored for `pad` more at both ends."""
    inner = filter_lines(rows.T, degree).T
    n = rows.shape[1]
    return inner[:, [mirror(i, n) for i in range(-pad, n + pad)]]


def fill_coefficients(volume, degree):
    """Coefficients of a (nz, ny, nx) volume, unpadded."""
    out = volume.astype(float)
    for axis in range(3):
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


def narrow_spans(rows, spans, matrix, shape, inset=(0, 0, 0)):
    """Spans of the points of rows that are asked for and lie `inset` deep in a grid's field."""
    out = []
    smaller = np.subtract(shape, np.multiply(2, inset))
    for (y, z, x, n, _at), (first, last) in zip(rows, spans, strict=True):
        positions = [(matrix @ (x + i, y, z, 1.0))[:3] - inset for i in range(n)]
        inside = [i for i in range(first, last) if is_inside(positions[i], smaller)]
        out.append((inside[0], inside[-1] + 1) if inside else (0, 0))
    return np.array(out)


def leave_out_slices(rows, spans, matrix, slices):
    """Longest piece, the first of equals, of each span further than a slice from any of some."""
    out = []
    for (y, z, x, _n, _at), (first, last) in zip(rows, spans, strict=True):
        depth = [(matrix @ (x + i, y, z, 1.0))[2] for i in range(first, last)]
        whole = [all(abs(d - lost) >= 1 for lost in slices) for d in depth]
        pieces = [(i, j) for i in range(len(whole)) for j in range(i + 1, len(whole) + 1)
                  if all(whole[i:j])]  # fmt: skip
        best = max(pieces, key=lambda piece: piece[1] - piece[0], default=None)
        out.append((0, 0) if best is None else (first + best[0], first + best[1]))
    return np.array(out)


def fill_directly(rows, spans, coefficients_, degree, matrix):
    """Values at the points of rows; 0 outside a row's span."""
    out = np.zeros((rows[:, 3] + rows[:, 4]).max())
    for (y, z, x, _n, at), (first, last) in zip(rows, spans, strict=True):
        for i in range(first, last):
            out[at + i] = sample(coefficients_, degree, (matrix @ (x + i, y, z, 1.0))[:3])
    return out


def fill_nearest(rows, spans, coefficients_, degree, matrix, shape):
    """Values at the nearest points of the field of a (nx, ny, nz) grid, outside rows' spans."""
    out = np.zeros((rows[:, 3] + rows[:, 4]).max())
    for (y, z, x, n, at), (first, last) in zip(rows, spans, strict=True):
        for i in (i for i in range(n) if not first <= i < last):
            position = (matrix @ (x + i, y, z, 1.0))[:3]
            out[at + i] = sample(coefficients_, degree, np.clip(position, 0, np.array(shape) - 1))
    return out


def fill_unmoved(rows, spans, volume):
    """Voxels at the points of rows; 0 outside a row's span."""
    out = np.zeros((rows[:, 3] + rows[:, 4]).max())
    for (y, z, x, _n, at), (first, last) in zip(rows, spans, strict=True):
        for i in range(first, last):
            out[at + i] = volume[z, y, x + i]
    return out


def passes_of(matrix):
    """X of (i, Y, Z, 1), Y of (i, j, Z, 1) and Z of (i, j, k, 1), solved from random voxels."""
    voxel = np.random.default_rng(0).normal(size=(20, 4)) * 10
    voxel[:, 3] = 1
    source = voxel @ matrix.T
    i, j, k = voxel[:, 0], voxel[:, 1], voxel[:, 2]
    x, y, z, one = source.T
    found = [
        np.linalg.lstsq(np.stack(known, axis=1), unknown, rcond=None)[0]
        for known, unknown in (((i, y, z, one), x), ((i, j, z, one), y), ((i, j, k, one), z))
    ]
    return np.array(found)


def spline_value(coefficients_, degree, position):
    """B-spline value at a position on a mirrored line."""
    indices = range(int(np.floor(position)) - 3, int(np.floor(position)) + 5)
    n = len(coefficients_)
    return sum(bspline(degree, position - i) * coefficients_[mirror(i, n)] for i in indices)


def resampled(volume, axis, degree, positions):
    """A volume resampled along one axis: value at positions[index] of the line through index."""
    lines = np.apply_along_axis(coefficients, axis, volume, degree)
    out = np.empty(positions.shape)
    for index in np.ndindex(positions.shape):
        line = list(index)
        line[axis] = slice(None)
        out[index] = spline_value(lines[tuple(line)], degree, positions[index])
    return out


def fill_by_passes(shape, volume, degree, matrix):
    """Volume (nz, ny, nx) of `shape`, sampled at matrix @ (x, y, z, 1) by three passes."""
    passes = passes_of(matrix)
    out = volume.astype(float)
    for axis in (0, 1, 2):
        here = list(out.shape)
        here[2 - axis] = shape[2 - axis]
        z, y, x = np.indices(here)
        position = np.tensordot(passes[axis], np.stack([x, y, z, np.ones_like(x)]), 1)
        out = resampled(out, 2 - axis, degree, position)
    return out


def is_in_span(points, spans):
    """Whether each point lies in its row's span, by its place."""
    out = np.zeros(points.values.size, bool)
    for (_y, _z, _x, _n, at), (first, last) in zip(points.rows, spans, strict=True):
        out[at + first : at + last] = True
    return out


def to_residuals(values, points, spans, scale):
    """scale * moving - reference, 0 outside the spans."""
    residuals = scale * values.astype(float) - points.values.astype(float)
    return np.where(is_in_span(points, spans), residuals, 0.0)


def outside_normal(points, spans):
    """test_jacobian' jacobian over the points outside the spans."""
    outside = ~is_in_span(points, spans)
    return cross_sums(points.test_jacobian[:, outside], points.jacobian[:, outside])


def outside_normals(points, spans, parts, n_parts):
    """The same for the rows of each part."""
    out, outside = np.zeros((n_parts, 8, 8)), ~is_in_span(points, spans)
    of_point = np.repeat(parts, points.rows[:, 3])
    for part in range(n_parts):
        chosen = outside & (of_point == part)
        out[part] = cross_sums(points.test_jacobian[:, chosen], points.jacobian[:, chosen])
    return out


def sums_of_parts(sums, parts, n_parts):
    """Sums of those rows that belong to each part."""
    return np.array([sums[parts == part].sum(axis=0) for part in range(n_parts)])


def cross_sums(left, right):
    """left right' over all points."""
    return left.astype(float) @ right.astype(float).T


def block_sums(columns, residuals, blocks):
    """Sums of residuals times columns and times themselves, a row a block."""
    factors = np.vstack([columns, residuals]).astype(float)
    products = factors * residuals.astype(float)
    return np.array([products[:, a:b].sum(axis=1) for a, b in itertools.pairwise(blocks)])


def voxels_of(rows):
    """Voxel (x, y, z, 1) and place of each point of rows."""
    return [((x + i, y, z, 1.0), at + i) for y, z, x, n, at in rows for i in range(n)]


def waves(voxel, to_moving):
    """1, then cosine and sine of where a voxel's source lies between voxels, for each axis."""
    turned = [2 * np.pi * position for position in to_moving @ voxel]
    return np.array([1.0, *(f(angle) for angle in turned for f in (np.cos, np.sin))])


def waves_of_volumes(points, fitted, voxel, place):
    """Waves (m, 7) of all volumes at a point, 0 where it lies outside a volume's span."""
    seen = [is_in_span(points, spans)[place] for spans in fitted.spans]
    return np.array([waves(voxel, to_moving) * inside
                     for to_moving, inside in zip(fitted.maps, seen, strict=True)])  # fmt: skip


def normals_of_fields(points, fitted, ridge):
    """Normal matrix (7, 7) of the fields at each point of rows, ridge and all."""
    found = [waves_of_volumes(points, fitted, *point) for point in voxels_of(points.rows)]
    return np.array([w.T @ w + np.diag([1e-3, *[ridge] * 6]) for w in found])


def fill_factors(points, fitted, ridge):
    """Cholesky factors (28, k), row after row, with inverted diagonals."""
    out = []
    for normal in normals_of_fields(points, fitted, ridge):
        factor = np.linalg.cholesky(normal)
        np.fill_diagonal(factor, 1 / np.diag(factor))
        out.append(factor[np.tril_indices(7)])
    return np.array(out).T


def fit_fields(points, fitted, ridge, steps):
    """Fields (7, k) at the points of rows, and test_jacobian' of what they leave, (m, 8)."""
    fields, right = [], 0.0
    normals = normals_of_fields(points, fitted, ridge)
    for (voxel, place), normal in zip(voxels_of(points.rows), normals, strict=True):
        w = waves_of_volumes(points, fitted, voxel, place)
        inside = w[:, 0]
        residuals = fitted.residuals[fitted.slots, place] - steps @ points.jacobian[:, place]
        fields.append(np.linalg.solve(normal, w.T @ residuals))
        left = inside * residuals - w @ fields[-1]
        right = right + np.outer(left, points.test_jacobian[:, place])
    return np.array(fields).T, right


def take_off_aliasing(residuals, points, spans, to_moving, fields):
    """Residuals without the fields' waves, inside the spans."""
    out, inside = residuals.astype(float), is_in_span(points, spans)
    for voxel, place in voxels_of(points.rows):
        out[place] -= inside[place] * waves(voxel, to_moving) @ fields[:, place]
    return out


def fill_left(points, fitted, fields, steps):
    """What fields and steps leave of residuals at the points of rows, (m, k)."""
    out = []
    for voxel, place in voxels_of(points.rows):
        w = waves_of_volumes(points, fitted, voxel, place)
        residuals = fitted.residuals[fitted.slots, place] - steps @ points.jacobian[:, place]
        out.append(w[:, 0] * residuals - w @ fields[:, place])
    return np.array(out).T


def map_of(left, course):
    """Sum over volumes of (m, k), each times its value of a course."""
    return course @ left.astype(float)


def course_of(left, weights):
    """Sum over points of (m, k), each times its weight."""
    return left.astype(float) @ weights


def take_off_pattern(residuals, points, spans, pattern, probe):
    """Residuals without the part of a pattern that a probe finds, inside the spans; that part."""
    inside = is_in_span(points, spans)
    amount = (probe[inside] @ residuals[inside]) / (probe[inside] @ pattern[inside])
    return residuals - np.where(inside, amount * pattern, 0), amount


def take_off_columns(residuals, points, spans, columns, factors):
    """Residuals without a sum of columns, inside the spans."""
    inside = is_in_span(points, spans)
    return residuals - np.where(inside, np.asarray(factors) @ columns, 0)


def take_off_parabolas(residuals, points, spans, parabola):
    """Residuals without the reference times p' parabola p, inside the spans."""
    out, inside = residuals.astype(float), is_in_span(points, spans)
    for voxel, place in voxels_of(points.rows):
        out[place] -= inside[place] * points.values[place] * (voxel @ parabola @ np.array(voxel))
    return out


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


def fill_int16(voxels, slope, inter):
    """Stored values: scaled, rounded to nearest, half to even, cut off at +-32767."""
    return np.clip(np.rint((voxels - inter) / slope), -32767, 32767).astype(np.int16)


def add_volumes(sums, volumes, origin, times):
    """Sums of x, time x and x^2, with more volumes."""
    x, time = volumes.astype(float) - origin.astype(float), times[:, None]
    return sums + np.stack([x.sum(axis=0), (time * x).sum(axis=0), (x * x).sum(axis=0)])


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


def fill_moments(block):
    """Mean, variance about the own line, lag-1 autocorrelation of each column of (n, m)."""
    out = np.empty((3, block.shape[1]))
    for i, line in enumerate(block.astype(float).T):
        t = np.arange(len(line))
        rest = line - np.polyval(np.polyfit(t, line, 1), t) if len(line) > 1 else line * 0
        centred = line - line.mean()
        power = (centred**2).sum()
        lag1 = (centred[1:] * centred[:-1]).sum() / power if power > 0 else 0.0
        out[:, i] = line.mean(), (rest**2).sum() / max(len(line) - 2, 1), lag1
    return out


def fill_chosen(series, volumes, voxels):
    """Some voxels of some volumes."""
    return series[np.ix_(volumes, voxels)]


def fill_ranked(block, rank):
    """Value of a rank in each column."""
    return np.sort(block, axis=0)[rank]


def add_squared_steps(block, weights):
    """Weighted sum over columns of squared steps between rows."""
    return (np.diff(block.astype(float), axis=0) ** 2 * weights).sum(axis=1)


def clear_outside(shape, matrix, moving_shape):
    """Mask (nz, ny, nx) of the voxels whose source lies inside the moving field of view."""
    nz, ny, nx = shape
    out = np.zeros(shape, bool)
    for z, y, x in itertools.product(range(nz), range(ny), range(nx)):
        out[z, y, x] = is_inside((matrix @ (x, y, z, 1.0))[:3], moving_shape)
    return out
