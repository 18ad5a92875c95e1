"""Who does what: volumes by rank, and the points and slices of the last few volumes by rank."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Shares(NamedTuple):
    """Volumes of one rank (positions in the list of volumes): its own, and those of all ranks."""

    own: range
    joint: range


def shares(n_volumes: int, size: int, rank: int) -> Shares:
    """The volumes that a rank of `size` does alone, and those that all ranks do together.

    Ranks take whole volumes as long as there is one for each. The remainder of the division,
    which the classic script never returns, is done by all ranks together, which share the
    sample points and the slices of each of these volumes.
    """
    whole = n_volumes - n_volumes % size
    return Shares(range(rank, whole, size), range(whole, n_volumes))


class Alone:
    """A team of one."""

    rank, size = 0, 1

    def total(self, part: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum of all members' parts."""
        return part

    def gather(self, value: Any) -> list[Any] | None:
        """All members' values, for the first of them."""
        return [value]

    def wait(self) -> None:
        """Go on when all are here."""


class Ranks:
    """The ranks that the launcher started."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()

    def total(self, part: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum of all members' parts; the same bytes for all, so that all decide alike."""
        total = np.empty_like(part)
        self._comm.Reduce(part, total)
        self._comm.Bcast(total)
        return total

    def gather(self, value: Any) -> list[Any] | None:
        """All members' values, for the first of them."""
        gathered: list[Any] | None = self._comm.gather(value)
        return gathered

    def wait(self) -> None:
        """Go on when all are here."""
        self._comm.Barrier()


Team = Alone | Ranks
