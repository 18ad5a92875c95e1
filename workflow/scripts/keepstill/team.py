"""Who shares work on blocks of points: threads of a rank, and ranks."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


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
        if self.n_threads == 1:
            mine = [work(block) for block in self.blocks]
        else:
            with ThreadPoolExecutor(self.n_threads) as pool:
                mine = list(pool.map(work, self.blocks))
        return [result for results in self.gather(mine) for result in results]
