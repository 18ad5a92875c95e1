"""Signal that changes over a run in parts of the head alone: activation, vessels, eyes.

Where a few percent of the head brighten with a task, a fit takes some of it for motion. One volume
cannot tell: what is left of its residuals is as large as its noise. A run can. The course over
volumes whose map has the most outliers is that of activity, if there is any: even noise, and errors
of the motion, make maps without. What stands out of that map is the activity's pattern; the map is
low-passed for that, since activity is as wide as several voxels and fades at its edges. The motion
that it had passed for is told from the rest of the map, by a regression that leaves the pattern
out. Each volume then has as much of the pattern taken off as it holds, found by a probe that no
motion moves.

Noise that is much louder in a few places than in others makes outliers too, and passes for
activity.

To look for directions in which data are least Gaussian is projection pursuit (Friedman & Tukey
1974, IEEE Trans. Comput. C-23:881; Hyvarinen & Oja 1997, Neural Comput. 9:1483, for the fixed
point); a regression that leaves outliers out is one of Huber's (1981, Robust Statistics).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepstill.estimate import allowed_step
from keepstill.kernels.aliasing import Fitted
from keepstill.kernels.courses import course_of, fill_left, map_of, take_off_pattern
from keepstill.kernels.small import solution
from keepstill.kernels.sums import N_COLUMNS, Points, block_sums, cross_sums
from keepstill.reference import Reference, block_points, voxels_of
from keepstill.smooth import lowpass
from keepstill.team import Team

Matrix = NDArray[np.float64]

# A normal distribution has half its values within so many standard deviations.
_HALF_WITHIN = 0.6745
# The search goes by points this many standard deviations out; a pattern is what lies further out.
_FAR, _OUT = 2.0, 3.0
_SEARCHES, _REGRESSIONS = 15, 3
# How wide activity is at least: noise falls to a tenth.
_PATTERN_FWHM_VOXELS = 3.0
# Part of a map's power that its outliers hold: 0.03 of normal values, up to 0.15 where a search has
# made the most of noise and aliasing, 0.3 to 0.4 with an activation of 4% in a twelfth of the head.
_LEAST_POWER = 0.2
# What is left of a volume whose head moved while it was scanned has its own outliers: volumes with
# this many times the median's power are not asked, and a course is one of this part of the others
# at least (of a task half; of such volumes a tenth).
_ODD_POWER, _LEAST_VOLUMES = 2.0, 0.2
# A pattern of which motion explains more than the rest of this is motion.
_LEAST_OWN = 0.5


@dataclass(frozen=True)
class Activity:
    """Activity at the points of a reference's last level.

    Attributes
    ----------
    pattern : (n,) float32
        In units of intensity that mean nothing by themselves; 0 outside the parts that change.
    probe : (n,) float32
        Tells how much of the pattern there is: its product with residuals does not change with a
        step, of motion, intensity or ghost.
    """

    pattern: NDArray[np.float32]
    probe: NDArray[np.float32]

    def take_off(
        self, residuals: NDArray[np.float32], points: Points, spans: NDArray[np.int64]
    ) -> None:
        """Take off one volume's residuals (n,), in place, what there is of it."""
        take_off_pattern(residuals, points, spans, self.pattern, self.probe)


def find_activity(
    reference: Reference,
    fitted: Fitted,
    found: tuple[NDArray[np.float32], Matrix],
    some: NDArray[np.bool_],
    team: Team,
) -> Activity | None:
    """Activity in what fields and steps leave of the residuals of many volumes, if there is any.

    Parameters
    ----------
    reference : Reference
    fitted : Fitted
        Residuals at the points of the reference's last level.
    found : tuple of (7, n) float32 and (m, 8) float64
        Fields of aliasing, and steps of the volumes.
    some : (n_rows,) bool
        Rows that stand for all: the course is looked for there.
    team : Team
    """
    fields, steps = found[0], found[1].astype(np.float32)

    def left_of(block: int, chosen: NDArray[np.bool_]) -> NDArray[np.float32]:
        points, rows = block_points(reference, block)
        few = points._replace(rows=np.ascontiguousarray(points.rows[chosen[rows]]))
        of_few = fitted.of_rows(np.flatnonzero(chosen[rows]) + rows.start)
        out = np.empty((len(fitted.slots), int(few.rows[:, 3].sum())), np.float32)
        fill_left(out, few, of_few, fields, steps)
        return out

    course = _course(np.concatenate(team.each(lambda block: left_of(block, some)), axis=1))
    if course is None:
        return None
    every = np.ones_like(some)
    parts = team.each(lambda block: map_of(left_of(block, every), course))
    return _activity(reference, np.concatenate(parts))


def _course(left: NDArray[np.float32]) -> Matrix | None:
    """Course (m,) whose map over (m, k) has the most outliers, if many, by many volumes."""
    points, volumes = np.zeros(left.shape[1]), np.zeros(left.shape[0])
    for v, of_volume in enumerate(left):
        squares = of_volume.astype(np.float64) ** 2
        points += squares
        volumes[v] = squares.sum()
    odd = volumes > _ODD_POWER * np.median(volumes)
    course = np.where(odd, 0.0, left[:, int(np.argmax(points))].astype(np.float64))
    for _ in range(_SEARCHES):
        size = float(np.sqrt((course**2).sum()))
        if not size > 0:
            return None
        seen = map_of(left, course / size)
        course = course_of(left, np.where(_is_out(seen, _FAR), seen, 0.0))
        course[odd] = 0.0
    # By a power of two, which rounds nothing: its map is to fit in a float32 at any intensity.
    course = np.ldexp(course, -np.frexp(np.abs(course).max())[1])
    return course if _has_outliers(seen) and _is_of_many(course) else None


def _has_outliers(seen: Matrix) -> bool:
    """Whether outliers hold more of a map's power than noise would give them."""
    outliers = float((seen[_is_out(seen, _OUT)] ** 2).sum())
    return outliers > _LEAST_POWER * float((seen**2).sum())


def _is_of_many(course: Matrix) -> bool:
    """Whether many volumes make a course, by its participation ratio."""
    squares = course**2  # twice, since numpy's fourth power differs between processors
    return bool(squares.sum() ** 2 > _LEAST_VOLUMES * len(course) * (squares**2).sum())


def _is_out(values: Matrix, times: float) -> NDArray[np.bool_]:
    """Which values lie so many standard deviations out, these by the median."""
    size = np.abs(values)
    out: NDArray[np.bool_] = size > times / _HALF_WITHIN * np.median(size)
    return out


def _activity(reference: Reference, seen: Matrix) -> Activity | None:
    """Activity by its map (n,), from which steps have taken what they could."""
    points, normal = reference.last.points, reference.last.normal
    right, passed = _tested(points.test_jacobian, seen), _lowpassed(seen, reference)
    for _ in range(_REGRESSIONS):
        out = np.flatnonzero(_is_out(passed, _OUT))
        test, plain = (c.take(out, axis=1) for c in (points.test_jacobian, points.jacobian))
        inner = normal - cross_sums(test, plain, 0, out.size)
        motion, regular = allowed_step(inner, right - _tested(test, seen[out]), reference.basis)
        if not regular:
            return None
        passed = _lowpassed(seen - map_of(points.jacobian, motion[:, 0].copy()), reference)
    pattern = np.where(_is_out(passed, _OUT), passed, 0.0)
    # What of a pattern lies along the tests, with as much motion in it, is of no use.
    along, regular = solution(
        np.ascontiguousarray(normal.T), _tested(points.jacobian, pattern).reshape(-1, 1)
    )
    probe = pattern - map_of(points.test_jacobian, along[:, 0].copy())
    own = float((probe * pattern).sum())
    if not regular or own < _LEAST_OWN * float((pattern**2).sum()):
        return None
    return Activity(pattern.astype(np.float32), probe.astype(np.float32))


def _lowpassed(seen: Matrix, reference: Reference) -> Matrix:
    """A map (n,), 0 between the points, after a low-pass over the grid."""
    voxels = voxels_of(reference.last.points.rows)
    grid = np.zeros_like(reference.volume)
    grid[voxels] = seen
    return np.asarray(lowpass(grid, _PATTERN_FWHM_VOXELS)[voxels].astype(np.float64))


def _tested(columns: NDArray[np.float32], values: Matrix) -> Matrix:
    """Sums (8,) of columns (8, n), each times values (n,)."""
    ends = np.array([0, values.size], np.int64)
    sums = block_sums(columns, values.astype(np.float32), ends)
    return np.asarray(sums[0, :N_COLUMNS])
