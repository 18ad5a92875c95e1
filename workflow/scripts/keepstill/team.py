"""Who shares work on blocks of points: threads of a rank, and ranks."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
P = TypeVar("P")


def in_threads(n_threads: int, work: Callable[[P], T], parts: Iterable[P]) -> list[T]:
    """Result of some work on every part, in the order of parts, with so many threads at work."""
    if n_threads == 1:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(work, parts))


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
        mine = in_threads(self.n_threads, work, self.blocks)
        return [result for results in self.gather(mine) for result in results]
