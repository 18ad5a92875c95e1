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

What stays with the scanner is fitted before, and taken off (see `keepstill.scanner_effects`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill.estimate import allowed_step
from keepstill.kernels.aliasing import (
    N_FACTORS,
    N_FIELDS,
    Fitted,
    fill_factors,
    fit_fields,
    row_phases,
    take_off_aliasing,
)
from keepstill.kernels.small import product, solution
from keepstill.kernels.sums import N_COLUMNS, outside_normal
from keepstill.reference import Reference, block_points, extent_of
from keepstill.scanner_effects import (
    NO_EFFECTS,
    ScannerEffects,
    every,
    fit_scanner_effects,
    thinning,
)
from keepstill.team import Team

Matrix = NDArray[np.float64]

# Noise variance over that of a wave, as is expected: waves are stronger.
_RIDGE = 0.5
# Rounds of fields and steps of the early volumes, and how many earlier rounds each goes by.
_ROUNDS, _MEMORY = 3, 3
_NO_FACTORS = np.zeros((N_FACTORS, 0), np.float32)
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
    explained : float
        Part of the noise of a volume that the fields were fitted to which they explain: 7 numbers
        a point over the number of volumes, or less where the volumes' waves are alike.
    learnt_from : frozenset of int
        These volumes.
    """

    fields: NDArray[np.float32] | None
    effects: ScannerEffects = NO_EFFECTS
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
    return Fitted(residuals, np.array(slots, np.int64), np.array(spans), np.array(kept), phases)


def fit_run_model(reference: Reference, fitted: Fitted, team: Team) -> RunModel:
    """Fit what stays with the scanner, and aliasing, to some volumes of a run.

    Parameters
    ----------
    reference : Reference
    fitted : Fitted
        Residuals at the points of the reference's last level; what stays with the scanner is taken
        off them.
    team : Team
    """
    effects = fit_scanner_effects(reference, fitted, team)
    fields, freedom = _fit_fields(reference, fitted, team)
    return RunModel(fields, effects, freedom / len(fitted.slots))


def _of_block(fitted: Fitted, rows: slice) -> Fitted:
    spans, phases = fitted.spans[:, rows], fitted.phases[:, rows]
    return fitted._replace(spans=np.ascontiguousarray(spans), phases=np.ascontiguousarray(phases))


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
    step = thinning(m)
    first = _Chosen.of(reference, fitted, step)
    own = np.zeros((len(first.normals), N_COLUMNS))
    for _ in range(_ROUNDS):
        own = _accelerated(history, own, work.change(first, own, refit=True))
    if step == 1:
        work.change(first, own, refit=True)
        return work.gathered(), work.freedom(first)
    all_of_them = _Chosen.of(reference, fitted, 1)
    work.change(first, own, refit=True)
    first.factors.clear()  # as large as those of all volumes, and no longer needed
    steps += work.change(all_of_them, steps, refit=False)
    steps[::step] = own
    steps += work.change(all_of_them, steps, refit=True)
    work.change(all_of_them, steps, refit=True)
    return work.gathered(), work.freedom(all_of_them)


@dataclass
class _Chosen:
    """Some of the fitted volumes, their normal matrices, and their factors by block."""

    fitted: Fitted
    normals: list[Matrix]
    factors: dict[int, NDArray[np.float32]]

    @classmethod
    def of(cls, reference: Reference, fitted: Fitted, step: int) -> "_Chosen":
        last, chosen = reference.last, every(fitted, step)
        normals = [last.normal - outside_normal(last.points, spans) for spans in chosen.spans]
        return cls(chosen, normals, {})


class _FieldsWork:
    """The fields, and what is done to them block by block."""

    def __init__(self, reference: Reference, team: Team) -> None:
        self._basis, self._team = reference.basis, team
        self._parts = {block: block_points(reference, block) for block in team.blocks}
        n_points = reference.last.points.values.size
        self._fields = np.zeros((N_FIELDS, n_points), np.float32)

    def change(self, chosen: _Chosen, steps: Matrix, refit: bool) -> Matrix:
        """Changes (m, 8) of the steps by the fields, which are fitted to the volumes before."""

        def right_of(block: int) -> Matrix:
            points, rows = self._parts[block]
            of_block = _of_block(chosen.fitted, rows)
            factors = chosen.factors.get(block, _NO_FACTORS)
            if refit and block not in chosen.factors:
                extent = extent_of(points)
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
        extents = {block: extent_of(points) for block, (points, _) in self._parts.items()}
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
