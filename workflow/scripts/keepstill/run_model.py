"""What the volumes of a run have in common beyond the head: aliasing, and the coil's shading.

Sampling at voxels folds detail finer than two voxels down among the coarse, with a phase that
turns once while the head moves by one voxel. A fit takes part of it for motion. Seen from the
head, though, it is simple: at a point x of the reference whose source lies at voxel y of a volume,
detail of a frequency near one cycle a voxel along axis k adds

    a_k(x) cos(2 pi y_k) + b_k(x) sin(2 pi y_k)

to what is expected there, with a_k and b_k fixed to the head. So once volumes are registered, seven
numbers for each point (a constant, and two for each axis) are a linear fit to their residuals, and
taking off what they predict leaves the motion that the fold had hidden. Motion and fields
determine each other and are solved for in turn, sped up by Anderson's method (1965, J. ACM 12:547).

A receive coil's sensitivity stays with the scanner while the head moves through it. Its logarithm
is taken to be a quadratic polynomial of the scanner's position, nine numbers a run, fitted to low
frequencies with each volume's own parameters eliminated.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from keepstill import geometry
from keepstill.estimate import allowed_step
from keepstill.kernels.aliasing import (
    N_FACTORS,
    N_FIELDS,
    Fitted,
    fill_factors,
    fit_fields,
    row_phases,
    take_off_aliasing,
    take_off_parabolas,
)
from keepstill.kernels.small import product, solution
from keepstill.kernels.sums import N_COLUMNS, Points, block_sums, cross_sums, outside_normal
from keepstill.reference import Reference, wide_lowpassed

Matrix = NDArray[np.float64]
T = TypeVar("T")

# Noise variance over that of a wave, as is expected: waves are stronger.
_RIDGE = 0.5
# Rounds of fields and steps of the early volumes; with three earlier rounds to go by, more change
# little. Every third volume is early, if that makes enough of them.
_ROUNDS, _MEMORY = 4, 3
_EARLY_EVERY, _FEWEST_EARLY = 3, 24
_NO_FACTORS = np.zeros((N_FACTORS, 0), np.float32)
# Freedom is looked at in one point of so many.
_POINTS_PER_FREEDOM = 16
# Anderson's weights see motion only: shifts in mm, rotations in mm at this radius.
_RADIUS_MM = 65.0
# Scanner positions are measured in units of this, mm, and the coefficients of the log of the
# sensitivity are expected to be of this size.
_UNIT_MM, _SHADING_SD = 80.0, 0.1
# Activity and noise make a shading of about this standard deviation over the head out of nothing;
# one of that size is not believed, one of twice that size almost whole.
_SPURIOUS_SD = 0.035
# Shading needs this part of the points to be seen by all volumes.
_LEAST_COMMON = 0.3
# Quadratic monomials of (x, y, z, 1): of the shading, all but the constant.
_PAIRS = [(a, b) for a in range(4) for b in range(a, 4)]
_FREE_PAIRS = _PAIRS[:-1]


@dataclass(frozen=True)
class Team:
    """Who fits a model, and which blocks of points are this rank's.

    Attributes
    ----------
    blocks : range
    n_threads : int
    gather : callable
        Lists, on all ranks, what each rank gives, in the order of ranks.
    """

    blocks: range
    n_threads: int
    gather: Callable[[Any], list[Any]]

    def each(self, work: Callable[[int], T]) -> list[T]:
        """Result of some work on every block, in the order of blocks, on all ranks."""
        with ThreadPoolExecutor(self.n_threads) as pool:
            mine = list(pool.map(work, self.blocks))
        return [result for results in self.gather(mine) for result in results]


@dataclass(frozen=True)
class RunModel:
    """What the residuals of a run's volumes have in common.

    Attributes
    ----------
    fields : (7, n) float32 or None
        Constant, and cosine and sine for each axis, at the points of the reference's last level.
    shading : (4, 4) float64
        The log of the sensitivity at voxel p = (x, y, z, 1) of a volume is p' shading p.
    explained : float
        Part of the noise of a volume that the fields were fitted to which they explain: 7 numbers
        a point over the number of volumes, or less where the volumes' waves are alike.
    learnt_from : frozenset of int
        These volumes.
    """

    fields: NDArray[np.float32] | None
    shading: Matrix
    explained: float = 0.0
    learnt_from: frozenset[int] = frozenset()

    def take_off(
        self,
        residuals: NDArray[np.float32],
        points: Points,
        spans: NDArray[np.int64],
        to_moving: Matrix,
    ) -> None:
        """Take off one volume's residuals, in place, what the model predicts.

        Parameters
        ----------
        residuals : (n,) float32
            0 outside the spans.
        points : Points
        spans : (n_rows, 2) int64
        to_moving : (4, 4) float64
            Voxel of the reference -> voxel of the volume.
        """
        if self.shading.any():
            take_off_parabolas(residuals, points, spans, change_of(self.shading, to_moving))
        if self.fields is not None:
            take_off_aliasing(residuals, points, spans, to_moving[:3], self.fields)


NO_MODEL = RunModel(None, np.zeros((4, 4)))


def fitted_to(
    reference: Reference,
    residuals: NDArray[np.float32],
    slots: Sequence[int],
    spans: Sequence[NDArray[np.int64]],
    maps: Sequence[Matrix],
) -> Fitted:
    """What a model is to be fitted to: residuals at the points of the reference's last level.

    Parameters
    ----------
    reference : Reference
    residuals : (n_slots, n) float32
    slots : (m,) int
        Slot of each volume.
    spans : (m, n_rows, 2) int64
    maps : (m, 4, 4) float64
        Voxel of the reference -> voxel of each volume.
    """
    rows = reference.last.points.rows
    kept = [np.ascontiguousarray(to_moving[:3]) for to_moving in maps]
    phases = np.array([row_phases(to_moving, rows) for to_moving in kept])
    return Fitted(residuals, np.array(slots, np.int64), np.array(spans), np.array(kept), phases)


def fit_run_model(reference: Reference, fitted: Fitted, own_grid: bool, team: Team) -> RunModel:
    """Fit shading and aliasing to some volumes of a run.

    Parameters
    ----------
    reference : Reference
    fitted : Fitted
        Residuals at the points of the reference's last level; the shading is taken off them.
    own_grid : bool
        Whether the reference has the run's grid: a position in the scanner, too.
    team : Team
    """
    shading = _fit_shading(reference, fitted, team) if own_grid else np.zeros((4, 4))
    fields, freedom = _fit_fields(reference, fitted, team)
    return RunModel(fields, shading, freedom / len(fitted.slots))


def change_of(shading: Matrix, to_moving: Matrix) -> Matrix:
    """The log sensitivity's change from the reference's voxel to its source, as a (4, 4) form."""
    return product(product(np.ascontiguousarray(to_moving.T), shading), to_moving) - shading


def _block_points(reference: Reference, block: int) -> tuple[Points, slice]:
    """Points with the rows of one block, and which rows these are."""
    rows = slice(int(reference.blocks[block]), int(reference.blocks[block + 1]))
    points = reference.last.points
    return points._replace(rows=np.ascontiguousarray(points.rows[rows])), rows


def _of_block(fitted: Fitted, rows: slice) -> Fitted:
    spans, phases = fitted.spans[:, rows], fitted.phases[:, rows]
    return fitted._replace(spans=np.ascontiguousarray(spans), phases=np.ascontiguousarray(phases))


def _extent(points: Points) -> slice:
    """Places of a block's points."""
    return slice(int(points.rows[0, 4]), int(points.rows[-1, 4] + points.rows[-1, 3]))


def _fit_fields(
    reference: Reference, fitted: Fitted, team: Team
) -> tuple[NDArray[np.float32], float]:
    """Fields of aliasing, solved for in turn with the volumes' steps; and their freedom.

    Every third volume goes first, until their steps settle; all others take theirs from the
    fields that these have found, and then all have their say.
    """
    work = _FieldsWork(reference, team)
    m = len(fitted.slots)
    steps, history = np.zeros((m, N_COLUMNS)), list[tuple[Matrix, Matrix]]()
    early = slice(None, None, _EARLY_EVERY if m >= _EARLY_EVERY * _FEWEST_EARLY else 1)
    first = _Chosen.of(reference, fitted, early)
    own = np.zeros((len(first.normals), N_COLUMNS))
    for _ in range(_ROUNDS):
        own = _accelerated(history, own, work.change(first, own, refit=True))
    if early.step == 1:
        work.change(first, own, refit=True)
        return work.gathered(), work.freedom(first)
    every = _Chosen.of(reference, fitted, slice(None))
    work.change(first, own, refit=True)
    steps += work.change(every, steps, refit=False)
    steps[early] = own
    steps += work.change(every, steps, refit=True)
    work.change(every, steps, refit=True)
    return work.gathered(), work.freedom(every)


@dataclass
class _Chosen:
    """Some of the fitted volumes, their normal matrices, and their factors by block."""

    fitted: Fitted
    normals: list[Matrix]
    factors: dict[int, NDArray[np.float32]]

    @classmethod
    def of(cls, reference: Reference, fitted: Fitted, which: slice) -> "_Chosen":
        last = reference.last
        chosen = fitted._replace(
            slots=np.ascontiguousarray(fitted.slots[which]),
            spans=np.ascontiguousarray(fitted.spans[which]),
            maps=np.ascontiguousarray(fitted.maps[which]),
            phases=np.ascontiguousarray(fitted.phases[which]),
        )
        normals = [last.normal - outside_normal(last.points, spans) for spans in chosen.spans]
        return cls(chosen, normals, {})


class _FieldsWork:
    """The fields, and what is done to them block by block."""

    def __init__(self, reference: Reference, team: Team) -> None:
        self._basis, self._team = reference.basis, team
        self._parts = {block: _block_points(reference, block) for block in team.blocks}
        n_points = reference.last.points.values.size
        self._fields = np.zeros((N_FIELDS, n_points), np.float32)

    def change(self, chosen: _Chosen, steps: Matrix, refit: bool) -> Matrix:
        """Changes (m, 8) of the steps by the fields, which are fitted to the volumes before."""

        def right_of(block: int) -> Matrix:
            points, rows = self._parts[block]
            of_block = _of_block(chosen.fitted, rows)
            factors = chosen.factors.get(block, _NO_FACTORS)
            if refit and block not in chosen.factors:
                extent = _extent(points)
                factors = np.empty((N_FACTORS, extent.stop - extent.start), np.float32)
                fill_factors(factors, points, of_block, _RIDGE)
                chosen.factors[block] = factors
            as_singles = steps.astype(np.float32)
            right: Matrix = fit_fields(self._fields, factors, points, of_block, as_singles, refit)
            return right

        right = sum(self._team.each(right_of), np.zeros(steps.shape))
        found = zip(chosen.normals, right, strict=True)
        return np.array([allowed_step(normal, r, self._basis)[0][:, 0] for normal, r in found])

    def freedom(self, chosen: _Chosen) -> float:
        """Mean number of degrees of freedom of the fields at a point."""
        freedoms = self._team.each(lambda block: _freedoms(chosen.factors[block]))
        return float(np.concatenate(freedoms).mean())

    def gathered(self) -> NDArray[np.float32]:
        """The fields, on all ranks."""
        extents = {block: _extent(points) for block, (points, _) in self._parts.items()}
        mine = [(extent, self._fields[:, extent]) for extent in extents.values()]
        for extent, values in (part for parts in self._team.gather(mine) for part in parts):
            self._fields[:, extent] = values
        return self._fields


def _freedoms(factors: NDArray[np.float32]) -> Matrix:
    """Degrees of freedom of the fields at some points of a block: 7 less what the ridge holds.

    That is 7 - ridge trace(A^-1) for normal matrices A with factors L, by the rows of L^-1.
    """
    some = factors[:, ::_POINTS_PER_FREEDOM].astype(np.float64)
    held = np.zeros(some.shape[1])
    rows: list[list[Matrix]] = []
    for a in range(N_FIELDS):
        pivot, row = some[a * (a + 3) // 2], []
        for b in range(a):
            known = (some[a * (a + 1) // 2 + k] * rows[k][b] for k in range(b, a))
            row.append(-pivot * sum(known, np.zeros(1)))
            held += _RIDGE * row[b] ** 2 if b else 0.0
        row.append(pivot)
        held += _RIDGE * pivot**2 if a else 0.0
        rows.append(row)
    return np.asarray(N_FIELDS - held)


def _accelerated(history: list[tuple[Matrix, Matrix]], steps: Matrix, change: Matrix) -> Matrix:
    """Steps (m, 8) of the next round: the combination of rounds that would leave least change."""
    history.append((steps, change))
    del history[: -_MEMORY - 1]
    if len(history) == 1:
        return steps + change
    pairs = list(itertools.pairwise(history))
    weight = np.array([1.0] * 3 + [_RADIUS_MM] * 3)
    differences = np.array([((b[1] - a[1])[:, :6] * weight).ravel() for a, b in pairs])
    now = (change[:, :6] * weight).reshape(-1, 1)
    normal = product(differences, np.ascontiguousarray(differences.T))
    normal += np.eye(len(pairs)) * 1e-9 * np.trace(normal)
    parts, regular = solution(normal, product(differences, now))
    out = steps + change
    if regular:
        for part, (a, b) in zip(parts[:, 0], pairs, strict=True):
            out = out - part * ((b[0] - a[0]) + (b[1] - a[1]))
    return out


def _fit_shading(reference: Reference, fitted: Fitted, team: Team) -> Matrix:
    """Log of the sensitivity, as a (4, 4) form, by instrumental variables.

    Instruments are the low-passed images of the columns, so that aliasing has no say.
    """
    to_unit = _to_unit(reference)
    wide = wide_lowpassed(reference)
    common = _common_points(reference.last.points, fitted.spans)
    if common.mean() < _LEAST_COMMON:
        return np.zeros((4, 4))

    def sums_of(block: int) -> tuple[Matrix, Matrix]:
        points, _ = _block_points(reference, block)
        here = _extent(points)
        columns = _monomials(points, to_unit) * common[here]
        plain = np.concatenate([columns * points.values[here], points.jacobian[:, here]])
        tests = np.concatenate([columns * wide.values[here], wide.test_jacobian[:, here]])
        tests[:, ~common[here]] = 0
        n = tests.shape[1]
        whole = np.array([0, n], np.int64)
        residuals = [np.ascontiguousarray(fitted.residuals[slot, here]) for slot in fitted.slots]
        right = [block_sums(tests, values, whole)[0] for values in residuals]
        return cross_sums(tests, plain, 0, n), np.array(right)

    found = team.each(sums_of)
    cross = sum((normal for normal, _ in found), np.zeros(()))
    cross[-1, -1] += reference.mean_intensity**2  # of a ghost that no point shows
    right = sum((r for _, r in found), np.zeros(()))
    n_values = max(float(common.sum()) * len(fitted.slots), 1.0)
    variance = float(right[:, -1].sum()) / n_values
    allowed = _beside_monomials(reference.basis)
    cross = product(product(np.ascontiguousarray(allowed.T), cross), allowed)
    right = product(np.ascontiguousarray(right[:, :-1]), allowed)
    form = _solved_shading(cross, right, fitted.maps, (to_unit, variance))
    form *= _credibility(form, reference.last.points)
    _take_off_shading(form, reference, fitted, team)
    return form


def _take_off_shading(form: Matrix, reference: Reference, fitted: Fitted, team: Team) -> None:
    """Take the shading off the residuals, in place, each rank off its own blocks."""

    def take_off(block: int) -> None:
        points, rows = _block_points(reference, block)
        for v, slot in enumerate(fitted.slots):
            to_moving = np.vstack([fitted.maps[v], [0.0, 0.0, 0.0, 1.0]])
            spans = np.ascontiguousarray(fitted.spans[v, rows])
            take_off_parabolas(fitted.residuals[slot], points, spans, change_of(form, to_moving))

    team.each(take_off)


def _beside_monomials(basis: Matrix) -> Matrix:
    """The (8, m) basis of steps, with the ten monomials as they are; (18, 10 + m)."""
    n = len(_PAIRS)
    out = np.zeros((n + basis.shape[0], n + basis.shape[1]))
    out[:n, :n], out[n:, n:] = np.eye(n), basis
    return out


def _solved_shading(
    cross: Matrix, right: Matrix, maps: Matrix, scale: tuple[Matrix, float]
) -> Matrix:
    """Shading's form from sums over points: of tests with columns, and with (m) residuals.

    Tests and columns are the ten monomials, then the steps that are allowed.
    """
    to_unit, variance = scale
    n = len(_PAIRS)
    onto, distinct = solution(
        cross[n:, n:], np.concatenate([cross[n:, :n], right[:, n:].T], axis=1)
    )
    free = cross[:n, :n] - product(np.ascontiguousarray(cross[:n, n:]), onto[:, :n].copy())
    rest = right[:, :n].T - product(np.ascontiguousarray(cross[:n, n:]), onto[:, n:].copy())
    from_unit = geometry.inverse(to_unit)
    normal = np.eye(len(_FREE_PAIRS)) * variance / _SHADING_SD**2
    total = np.zeros((len(_FREE_PAIRS), 1))
    for v, to_moving in enumerate(maps):
        moved = geometry.compose(to_unit, np.vstack([to_moving, [0, 0, 0, 1.0]]), from_unit)
        changes = [_as_column(change_of(_as_form(pair), moved)) for pair in _FREE_PAIRS]
        change = np.array(changes)
        normal += product(product(change, free), np.ascontiguousarray(change.T))
        total += product(change, np.ascontiguousarray(rest[:, v : v + 1]))
    found, regular = solution(normal, total)
    if not (regular and distinct):
        return np.zeros((4, 4))
    form = sum((x * _as_form(pair) for x, pair in zip(found[:, 0], _FREE_PAIRS, strict=True)),
               np.zeros((4, 4)))  # fmt: skip
    return product(product(np.ascontiguousarray(to_unit.T), form), to_unit)


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
