"""What stays with the scanner while the head moves through it: the coil's shading, the ghost.

The logarithm of a receive coil's sensitivity is taken to be a quadratic polynomial of the
scanner's position, nine numbers a run. The ghost of echo-planar images is the image once more,
fainter and half a field of view away: where it falls on the head, a turn of the head moves it
differently. Its mean strength is one number; what it has more or less of in one volume is one of
that volume's own parameters (see `keepstill.reference`). All ten are fitted to the residuals of
many volumes, with each volume's own parameters eliminated, by instrumental variables: the
low-passed images of the columns, so that aliasing has no say.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.kernels.aliasing import Fitted, take_off_columns, take_off_parabolas
from keepstill.kernels.small import product, solution
from keepstill.kernels.sums import Points, block_sums, cross_sums
from keepstill.reference import Reference, block_points, extent_of, wide_lowpassed
from keepstill.team import Team

Matrix = NDArray[np.float64]

# Scanner positions are measured in units of this, mm, and the coefficients of the log of the
# sensitivity are expected to be of this size; a ghost, of this part of the image.
_UNIT_MM, _SHADING_SD, _GHOST_SD = 80.0, 0.1, 0.05
# Activity and noise make a shading of about this standard deviation over the head out of nothing;
# one of that size is not believed, one of twice that size almost whole.
_SPURIOUS_SD = 0.035
# A weaker ghost may be none, and moves nothing by a micrometre.
_LEAST_GHOST = 0.004
# Every third volume is enough to begin with, if that makes so many.
_EVERY, _FEWEST = 3, 24
# A fit needs this part of the points to be seen by all volumes.
_LEAST_COMMON = 0.3
# Quadratic monomials of (x, y, z, 1): of the shading, all but the constant.
_PAIRS = [(a, b) for a in range(4) for b in range(a, 4)]
_FREE_PAIRS = _PAIRS[:-1]
# Columns: the image times each monomial, and the ghost's slopes along x, y, z.
_N_FIXED = len(_PAIRS) + 3


@dataclass(frozen=True)
class ScannerEffects:
    """What stays with the scanner.

    Attributes
    ----------
    shading : (4, 4) float64
        The log of the sensitivity at voxel p = (x, y, z, 1) of a volume is p' shading p.
    ghost : float
        Mean strength of the ghost, as a part of the image.
    """

    shading: Matrix
    ghost: float = 0.0

    def take_off(
        self,
        residuals: NDArray[np.float32],
        reference: Reference,
        spans: NDArray[np.int64],
        to_moving: Matrix,
        rows: slice = slice(None),
    ) -> None:
        """Take their change by a volume's motion off its residuals, in place.

        Parameters
        ----------
        residuals : (n,) float32
            At the points of the reference's last level, 0 outside the spans.
        reference : Reference
        spans : (n_rows, 2) int64
            Of the rows in `rows`.
        to_moving : (4, 4) float64
            Voxel of the reference -> voxel of the volume.
        rows : slice
            Rows whose points are looked at.
        """
        points = reference.last.points
        here = points._replace(rows=np.ascontiguousarray(points.rows[rows]))
        if self.shading.any():
            take_off_parabolas(residuals, here, spans, change_of(self.shading, to_moving))
        if self.ghost:
            factors = (self.ghost * _ghost_shift(reference, to_moving)).astype(np.float32)
            take_off_columns(residuals, here, spans, reference.ghost_slopes, factors)


NO_EFFECTS = ScannerEffects(np.zeros((4, 4)))


def fit_scanner_effects(reference: Reference, fitted: Fitted, team: Team) -> ScannerEffects:
    """Fit shading and ghost to some volumes of a run, and take them off their residuals.

    Parameters
    ----------
    reference : Reference
        On the run's own grid: a position of its is one in the scanner.
    fitted : Fitted
        Residuals at the points of the reference's last level; changed in place.
    team : Team
    """
    some = _thinned(fitted)
    common = _common_points(reference.last.points, some.spans)
    if common.mean() < _LEAST_COMMON:
        return NO_EFFECTS
    to_unit = _to_unit(reference)
    cross, right = _sums(reference, some, (common, to_unit), team)
    n_values = max(float(common.sum()) * len(some.slots), 1.0)
    variance = float(right[:, -1].sum()) / n_values
    allowed = _beside_fixed(reference.basis)
    cross = product(product(np.ascontiguousarray(allowed.T), cross), allowed)
    right = product(np.ascontiguousarray(right[:, :-1]), allowed)
    effects = _solved((cross, right), some.maps, reference, (to_unit, variance))
    shading = effects.shading * _credibility(effects.shading, reference.last.points)
    ghost = effects.ghost if abs(effects.ghost) >= _LEAST_GHOST else 0.0
    effects = ScannerEffects(shading, ghost)
    _take_off_residuals(effects, reference, fitted, team)
    return effects


def _thinned(fitted: Fitted) -> Fitted:
    """Every third volume, or all where they are few."""
    step = _EVERY if len(fitted.slots) >= _EVERY * _FEWEST else 1
    return fitted._replace(
        slots=np.ascontiguousarray(fitted.slots[::step]),
        spans=np.ascontiguousarray(fitted.spans[::step]),
        maps=np.ascontiguousarray(fitted.maps[::step]),
        phases=np.ascontiguousarray(fitted.phases[::step]),
    )


def _take_off_residuals(
    effects: ScannerEffects, reference: Reference, fitted: Fitted, team: Team
) -> None:
    """Take effects off the residuals at the points of this rank's blocks, in place."""
    if effects.shading.any() or effects.ghost:
        first, last = team.blocks.start, team.blocks.stop
        rows = slice(int(reference.blocks[first]), int(reference.blocks[last]))
        for v, slot in enumerate(fitted.slots):
            spans = np.ascontiguousarray(fitted.spans[v, rows])
            whole = _whole(fitted.maps[v])
            effects.take_off(fitted.residuals[slot], reference, spans, whole, rows)


def change_of(shading: Matrix, to_moving: Matrix) -> Matrix:
    """The log sensitivity's change from the reference's voxel to its source, as a (4, 4) form."""
    return product(product(np.ascontiguousarray(to_moving.T), shading), to_moving) - shading


def _whole(to_moving: Matrix) -> Matrix:
    """A (3, 4) map as (4, 4)."""
    return np.vstack([to_moving, [0.0, 0.0, 0.0, 1.0]])


def _ghost_shift(reference: Reference, to_moving: Matrix) -> Matrix:
    """Voxels (x, y, z) by which a turn of the head moves its ghost beside the head."""
    half = reference.ghost_half_voxels
    back = geometry.inverse(to_moving)[:3, :3]
    return half - product(np.ascontiguousarray(back), half.reshape(3, 1))[:, 0]


def _sums(
    reference: Reference,
    fitted: Fitted,
    points_and_unit: tuple[NDArray[np.bool_], Matrix],
    team: Team,
) -> tuple[Matrix, Matrix]:
    """Sums over the points that all volumes see: tests by columns, and residuals by tests.

    Tests and columns are the fixed ones, then the eight of a step; behind the sums (m, 21) of
    residuals stands that of their squares.
    """
    common, to_unit = points_and_unit
    wide = wide_lowpassed(reference)

    def sums_of(block: int) -> tuple[Matrix, Matrix]:
        points, _ = block_points(reference, block)
        here = extent_of(points)
        monomials = _monomials(points, to_unit)
        plain = np.concatenate(
            [monomials * points.values[here], reference.ghost_slopes[:, here],
             points.jacobian[:, here]]
        )  # fmt: skip
        tests = np.concatenate(
            [monomials * wide.values[here], wide.ghost_slopes[:, here],
             wide.test_jacobian[:, here]]
        )  # fmt: skip
        tests[:, ~common[here]] = 0
        n = tests.shape[1]
        whole = np.array([0, n], np.int64)
        residuals = [np.ascontiguousarray(fitted.residuals[slot, here]) for slot in fitted.slots]
        right = [block_sums(tests, values, whole)[0] for values in residuals]
        return cross_sums(tests, plain, 0, n), np.array(right)

    found = team.each(sums_of)
    cross = sum((normal for normal, _ in found), np.zeros(()))
    cross[-1, -1] += reference.mean_intensity**2  # of a ghost that no point shows
    return cross, sum((r for _, r in found), np.zeros(()))


def _beside_fixed(basis: Matrix) -> Matrix:
    """The (8, m) basis of steps, with the fixed columns as they are; (21, 13 + m)."""
    out = np.zeros((_N_FIXED + basis.shape[0], _N_FIXED + basis.shape[1]))
    out[:_N_FIXED, :_N_FIXED], out[_N_FIXED:, _N_FIXED:] = np.eye(_N_FIXED), basis
    return out


def _solved(
    sums: tuple[Matrix, Matrix], maps: Matrix, reference: Reference, scale: tuple[Matrix, float]
) -> ScannerEffects:
    """Effects by sums over points, each volume's own step eliminated."""
    (cross, right), (to_unit, variance), n = sums, scale, _N_FIXED
    onto, distinct = solution(
        cross[n:, n:], np.concatenate([cross[n:, :n], right[:, n:].T], axis=1)
    )
    free = cross[:n, :n] - product(np.ascontiguousarray(cross[:n, n:]), onto[:, :n].copy())
    rest = right[:, :n].T - product(np.ascontiguousarray(cross[:n, n:]), onto[:, n:].copy())
    expected = np.array([_SHADING_SD] * len(_FREE_PAIRS) + [_GHOST_SD])
    normal = np.diag(variance / expected**2)
    total = np.zeros((len(expected), 1))
    for v, to_moving in enumerate(maps):
        change = _changes(to_moving, to_unit, reference)
        normal += product(product(change, free), np.ascontiguousarray(change.T))
        total += product(change, np.ascontiguousarray(rest[:, v : v + 1]))
    found, regular = solution(normal, total)
    if not (regular and distinct):
        return NO_EFFECTS
    form = np.zeros((4, 4))
    for x, pair in zip(found[:-1, 0], _FREE_PAIRS, strict=True):
        form += x * _as_form(pair)
    shading = product(product(np.ascontiguousarray(to_unit.T), form), to_unit)
    return ScannerEffects(shading, float(found[-1, 0]))


def _changes(to_moving: Matrix, to_unit: Matrix, reference: Reference) -> Matrix:
    """What each effect adds to a volume's residuals, in fixed columns, (10, 13)."""
    moved = geometry.compose(to_unit, _whole(to_moving), geometry.inverse(to_unit))
    out = np.zeros((len(_FREE_PAIRS) + 1, _N_FIXED))
    for row, pair in enumerate(_FREE_PAIRS):
        out[row, : len(_PAIRS)] = _as_column(change_of(_as_form(pair), moved))
    out[-1, len(_PAIRS) :] = _ghost_shift(reference, _whole(to_moving))
    return out


def _credibility(form: Matrix, points: Points) -> float:
    """0 to 1: how far beyond a spurious one the shading is, over the head (Breiman's garrote)."""
    monomials = _monomials(points, np.eye(4))
    field = sum((c * m for c, m in zip(_as_column(form), monomials, strict=True)), np.zeros(1))
    variance = float(np.var(field))
    return max(0.0, 1.0 - (_SPURIOUS_SD**2 / variance) ** 2) if variance > 0 else 0.0


def _to_unit(reference: Reference) -> Matrix:
    """Scanner position in `_UNIT_MM`, along the voxel axes about the head, from voxel; (4, 4)."""
    sizes = geometry.voxel_sizes_mm(reference.affine) / _UNIT_MM
    inverse = geometry.inverse(reference.affine)
    centre = (
        inverse[:3, 3]
        + product(np.ascontiguousarray(inverse[:3, :3]), reference.centre_mm.reshape(3, 1))[:, 0]
    )
    out = np.diag([*sizes, 1.0])
    out[:3, 3] = -sizes * centre
    return out


def _as_form(pair: tuple[int, int]) -> Matrix:
    """The monomial p_a p_b as a symmetric (4, 4) form."""
    out = np.zeros((4, 4))
    out[pair[0], pair[1]] += 0.5
    out[pair[1], pair[0]] += 0.5
    return out


def _as_column(form: Matrix) -> Matrix:
    """Factors (10,) of the monomials in a form."""
    return np.array([form[a, b] + form[b, a] if a != b else form[a, a] for a, b in _PAIRS])


def _monomials(points: Points, to_unit: Matrix) -> NDArray[np.float32]:
    """The ten monomials of the unit position at the points of rows, (10, n)."""
    rows = points.rows
    row = np.repeat(np.arange(len(rows)), rows[:, 3])
    x = np.arange(row.size) - (rows[row, 4] - rows[0, 4]) + rows[row, 2]
    voxel = (x, rows[row, 0], rows[row, 1])
    unit = [to_unit[a, a] * voxel[a] + to_unit[a, 3] for a in range(3)] + [np.ones(len(x))]
    return np.array([unit[a] * unit[b] for a, b in _PAIRS], np.float32)


def _common_points(points: Points, spans: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Points that all volumes see, (n,)."""
    low, high = spans[:, :, 0].max(axis=0), spans[:, :, 1].min(axis=0)
    rows = points.rows
    row = np.repeat(np.arange(len(rows)), rows[:, 3])
    i = np.arange(row.size) - rows[row, 4]
    return np.asarray((i >= low[row]) & (i < high[row]))
