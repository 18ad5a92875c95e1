"""What the volumes of a run have in common beyond the head: aliasing, shading, activity.

Sampling at voxels folds detail finer than two voxels down among the coarse, with a phase that
turns once while the head moves by one voxel. A fit takes part of it for motion. Seen from the
head, though, it is simple: at a point x of the reference whose source lies at voxel y of a volume,
detail of a frequency near one cycle a voxel along axis k adds

    a_k(x) cos(2 pi y_k) + b_k(x) sin(2 pi y_k)

to what is expected there, with a_k and b_k fixed to the head. So once volumes are registered, seven
numbers for each point (a constant, and two for each axis) are a linear fit to their residuals, and
taking off what they predict leaves the motion that the fold had hidden. Motion and fields
determine each other, and weakly where motion goes as the waves do: fitted in turn they would need
hundreds of rounds.

What stays with the scanner is fitted before, and taken off (see `keepstill.scanner_effects`); what
changes in parts of the head is looked for in what is left then (see `keepstill.activity`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill.activity import Activity, find_activity
from keepstill.estimate import allowed_step
from keepstill.kernels.aliasing import (
    N_FACTORS,
    N_FIELDS,
    Fitted,
    fill_factors,
    fit_fields,
    row_phases,
    take_off_aliasing,
    wave_tables,
)
from keepstill.kernels.small import product, solution
from keepstill.kernels.sums import N_COLUMNS, Points, outside_normal
from keepstill.reference import Reference, block_points, extent_of
from keepstill.scanner_effects import (
    NO_EFFECTS,
    ScannerEffects,
    fit_scanner_effects,
)
from keepstill.team import Team

Matrix = NDArray[np.float64]

# Noise variance over that of a wave, as is expected: waves are stronger.
_RIDGE = 0.5
# Corrections of the steps; rounds that solve for each; and how many earlier rounds each goes by.
_CORRECTIONS, _ROUNDS, _MEMORY = 2, 7, 6
# A round looks at one row of points in eight, but at no fewer rows than this.
_ROWS_APART, _FEWEST_ROWS = 8, 160
# Freedom is looked at in one point of so many.
_POINTS_PER_FREEDOM = 16
# Anderson's weights see motion only: shifts in mm, rotations in mm at this radius.
_RADIUS_MM = 65.0


@dataclass(frozen=True)
class RunModel:
    """What the residuals of a run's volumes have in common.

    Attributes
    ----------
    fields : (7, n) float32 or None
        Constant, and cosine and sine for each axis, at the points of the reference's last level.
    effects : ScannerEffects
    activity : Activity or None
    wave_power : float
        Mean square of cosines and sines at a point, all axes together.
    explained : float
        Part of the noise of a volume that the fields were fitted to which they explain: 7 numbers
        a point over the number of volumes, or less where the volumes' waves are alike.
    learnt_from : frozenset of int
        These volumes.
    """

    fields: NDArray[np.float32] | None
    effects: ScannerEffects = NO_EFFECTS
    activity: Activity | None = None
    wave_power: float = 0.0
    explained: float = 0.0
    learnt_from: frozenset[int] = frozenset()

    def take_off(
        self,
        residuals: NDArray[np.float32],
        reference: Reference,
        spans: NDArray[np.int64],
        to_moving: Matrix,
    ) -> None:
        """Take off one volume's residuals, in place, what the model predicts.

        Parameters
        ----------
        residuals : (n,) float32
            At the points of the reference's last level, 0 outside the spans.
        reference : Reference
        spans : (n_rows, 2) int64
        to_moving : (4, 4) float64
            Voxel of the reference -> voxel of the volume.
        """
        self.effects.take_off(residuals, reference, spans, to_moving)
        if self.fields is not None:
            points = reference.last.points
            take_off_aliasing(residuals, points, spans, to_moving[:3], self.fields)
        if self.activity is not None:
            self.activity.take_off(residuals, reference.last.points, spans)


NO_MODEL = RunModel(None)


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
    tables = wave_tables(np.array(kept), int(rows[:, 3].max()))
    return Fitted(
        residuals, np.array(slots, np.int64), np.array(spans), np.array(kept), phases, tables
    )


def fit_run_model(reference: Reference, fitted: Fitted, team: Team) -> RunModel:
    """Fit what stays with the scanner, aliasing and activity to some volumes of a run.

    Parameters
    ----------
    reference : Reference
    fitted : Fitted
        Residuals at the points of the reference's last level; what stays with the scanner is taken
        off them.
    team : Team
    """
    effects = fit_scanner_effects(reference, fitted, team)
    fields, steps, freedom = _fit_fields(reference, fitted, team)
    rows = reference.last.points.rows
    some = stands_for_all(rows, rows_apart(rows))
    activity = find_activity(reference, fitted, (fields, steps), some, team)
    wave_power = float(np.square(fields[1:], dtype=np.float64).sum(axis=0).mean())
    return RunModel(fields, effects, activity, wave_power, freedom / len(fitted.slots))


def _fit_fields(
    reference: Reference, fitted: Fitted, team: Team
) -> tuple[NDArray[np.float32], Matrix, float]:
    """Fields of aliasing, solved for together with the volumes' steps; and their freedom."""
    work = _FieldsWork(reference, fitted, team)
    steps = np.zeros((len(fitted.slots), N_COLUMNS))
    for _ in range(_CORRECTIONS):
        steps = steps + work.solved(work.change(steps))
    work.change(steps)
    return work.gathered(), steps, work.freedom()


class _FieldsWork:
    """The fields, and what is done to them block by block."""

    def __init__(self, reference: Reference, fitted: Fitted, team: Team) -> None:
        self._basis, self._team, self._fitted = reference.basis, team, fitted
        self._parts = {block: block_points(reference, block) for block in team.blocks}
        last = reference.last
        n_points, self._rows_apart = last.points.values.size, rows_apart(last.points.rows)
        chosen = stands_for_all(last.points.rows, self._rows_apart)
        self._part = last.points.rows[chosen, 3].sum() / n_points
        self._normals = [last.normal - outside_normal(last.points, spans) for spans in fitted.spans]
        self._fields = np.zeros((N_FIELDS, n_points), np.float32)
        self._factors = np.empty((N_FACTORS, n_points), np.float32)
        team.each(self._fill_factors)

    def _fill_factors(self, block: int) -> None:
        points, rows = self._parts[block]
        fill_factors(self._factors, points, self._fitted.of_rows(rows), _RIDGE)

    def change(self, steps: Matrix) -> Matrix:
        """Changes (m, 8) that the volumes ask for after some steps, with the fields fitted then."""

        def right_of(block: int) -> Matrix:
            points, rows = self._parts[block]
            return self._fitted_right(points, self._fitted.of_rows(rows), steps)

        return self._steps_of(sum(self._team.each(right_of), np.zeros(steps.shape)))

    def solved(self, change: Matrix) -> Matrix:
        """Steps (m, 8) after which a change would be answered, fields following them.

        What steps change is linear, needs no residuals, and is much the same for a few rows of
        points as for all: these tell steps to try out by Anderson's method (1965, J. ACM 12:547).
        """
        steps, history = np.zeros(change.shape), list[tuple[Matrix, Matrix]]()
        for _ in range(_ROUNDS):
            answered = self._steps_of(self._answers(steps) / self._part)
            steps = _accelerated(history, steps, change + answered)
        return steps

    def _answers(self, steps: Matrix) -> Matrix:
        m, n = len(self._fitted.slots), self._fields.shape[1]
        nothing, slots = np.zeros((1, n), np.float32), np.zeros(m, np.int64)

        def right_of(block: int) -> Matrix:
            points, rows = self._parts[block]
            chosen = stands_for_all(points.rows, self._rows_apart)
            few = points._replace(rows=np.ascontiguousarray(points.rows[chosen]))
            of_few = self._fitted.of_rows(np.arange(rows.start, rows.stop)[chosen])
            return self._fitted_right(few, of_few._replace(residuals=nothing, slots=slots), steps)

        return sum(self._team.each(right_of), np.zeros(steps.shape))

    def _fitted_right(self, points: Points, fitted: Fitted, steps: Matrix) -> Matrix:
        as_singles = steps.astype(np.float32)
        right: Matrix = fit_fields(self._fields, self._factors, points, fitted, as_singles)
        return right

    def _steps_of(self, right: Matrix) -> Matrix:
        found = zip(self._normals, right, strict=True)
        return np.array([allowed_step(normal, r, self._basis)[0][:, 0] for normal, r in found])

    def freedom(self) -> float:
        """Mean number of degrees of freedom of the fields at a point."""

        def of_block(block: int) -> Matrix:
            extent = extent_of(self._parts[block][0])
            return _freedoms(self._factors[:, extent.start : extent.stop : _POINTS_PER_FREEDOM])

        return float(np.concatenate(self._team.each(of_block)).mean())

    def gathered(self) -> NDArray[np.float32]:
        """The fields, on all ranks."""
        extents = {block: extent_of(points) for block, (points, _) in self._parts.items()}
        mine = [(extent, self._fields[:, extent]) for extent in extents.values()]
        for extent, values in (part for parts in self._team.gather(mine) for part in parts):
            self._fields[:, extent] = values
        return self._fields


def rows_apart(rows: NDArray[np.int64]) -> int:
    """One row in how many stands for all of (n_rows, 5): 1 where there are few."""
    return max(1, min(_ROWS_APART, len(rows) // _FEWEST_ROWS))


def stands_for_all(rows: NDArray[np.int64], apart: int) -> NDArray[np.bool_]:
    """Which rows of (n_rows, 5), one in `apart`, stand for all: a slanted lattice of y and z."""
    chosen: NDArray[np.bool_] = (rows[:, 1] + 3 * rows[:, 0]) % apart == 0
    return chosen


def _freedoms(factors: NDArray[np.float32]) -> Matrix:
    """Degrees of freedom of the fields at some points of a block: 7 less what the ridge holds.

    That is 7 - ridge trace(A^-1) for normal matrices A with factors L, by the rows of L^-1.
    """
    some = factors.astype(np.float64)
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
