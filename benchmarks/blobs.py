"""The ladder of ways to sum Gaussian blobs on a grid, from the naive one upwards.

    python benchmarks/blobs.py [--blobs 100] [--size 200] [--threads 2]

Every rung sums value = bright * exp(-distance^2 / spread^2) on a grid of numpy.linspace(-50, 50,
size) a side, spreads of 3 to 12 voxels, into uint16. The slow rungs run on fewer blobs, and their
figures are multiplied up: the table says so. Ratios are of CPU seconds.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from keepstill.blobs import density

EXTENT = (-50.0, 50.0)
SPREADS_VOXELS = (3.0, 12.0)
BRIGHTS = (100.0, 600.0)
REQUIRED_RATIO, REQUIRED_TIMES_FILL = 250, 10
REPEATS = 5


@dataclass(frozen=True)
class Blobs:
    """Centres (n, 3), spreads (n,), brights (n,), on the positions (size,) of each axis."""

    axis: np.ndarray
    centres: np.ndarray
    spreads: np.ndarray
    brights: np.ndarray

    @property
    def step(self) -> float:
        """Distance between grid points."""
        return (EXTENT[1] - EXTENT[0]) / (self.axis.size - 1)

    def head(self, n: int) -> "Blobs":
        """The first n blobs."""
        return Blobs(self.axis, self.centres[:n], self.spreads[:n], self.brights[:n])

    def each(self) -> Any:
        """(centre, spread, bright) of one blob after the other."""
        return zip(self.centres, self.spreads, self.brights, strict=True)

    def centred(self) -> "Blobs":
        """The same blobs, all at the grid's centre."""
        return Blobs(self.axis, np.zeros_like(self.centres), self.spreads, self.brights)


def drawn(n: int, size: int) -> Blobs:
    """Seeded blobs anywhere on the grid."""
    rng = np.random.default_rng(4)
    step = (EXTENT[1] - EXTENT[0]) / (size - 1)
    return Blobs(
        axis=np.linspace(*EXTENT, size),
        centres=rng.uniform(*EXTENT, (n, 3)),
        spreads=rng.uniform(*SPREADS_VOXELS, n) * step,
        brights=rng.uniform(*BRIGHTS, n),
    )


def by_mesh_grid(blobs: Blobs, sparse: bool) -> np.ndarray:
    """A mesh grid a blob, each blob truncated: the naive way, or with axes left open."""
    axis = blobs.axis
    total = np.zeros((axis.size,) * 3, np.uint16)
    for (x0, y0, z0), spread, bright in blobs.each():
        x, y, z = np.meshgrid(axis, axis, axis, indexing="ij", sparse=sparse)
        r2 = (x - x0) ** 2 + (y - y0) ** 2 + (z - z0) ** 2
        total += (bright * np.exp(-r2 / spread**2)).astype(np.uint16)
    return total


def factors(blobs: Blobs) -> list[np.ndarray]:
    """exp(-d^2 / spread^2) along x, y, z, each (n, size)."""
    distance = blobs.axis - blobs.centres[:, :, None]
    return list(np.moveaxis(np.exp(-((distance / blobs.spreads[:, None, None]) ** 2)), 1, 0))


def broadcast(blobs: Blobs) -> np.ndarray:
    """Separable, all blobs at once: temporaries of n whole grids."""
    x, y, z = factors(blobs)
    x = x * blobs.brights[:, None]
    values = x[:, :, None, None] * y[:, None, :, None] * z[:, None, None, :]
    return values.astype(np.uint16).sum(axis=0, dtype=np.uint16)


def in_place(blobs: Blobs) -> np.ndarray:
    """Separable, one blob after the other into a float sum, truncated once."""
    total = np.zeros((blobs.axis.size,) * 3)
    blob = np.empty_like(total)
    for x, y, z, bright in zip(*factors(blobs), blobs.brights, strict=True):
        np.multiply(((bright * x)[:, None] * y)[:, :, None], z, out=blob)
        total += blob
    return total.astype(np.uint16)


def octant(blobs: Blobs) -> np.ndarray:
    """`in_place` on one octant, mirrored to the others: for blobs at the grid's centre only."""
    half = Blobs(blobs.axis[blobs.axis.size // 2 :], blobs.centres, blobs.spreads, blobs.brights)
    total = in_place(half)
    for axis in range(3):
        inner = [slice(None)] * 3
        inner[axis] = slice(blobs.axis.size % 2, None)  # an odd grid's middle plane is not doubled
        total = np.concatenate([np.flip(total[tuple(inner)], axis), total], axis)
    return total


def region_of_interest(blobs: Blobs, **how: Any) -> np.ndarray:
    """`keepstill.blobs.density`: each blob only where it reaches."""
    n = blobs.axis.size
    table = blobs.centres, blobs.spreads, blobs.brights
    return density((n, n, n), *table, spacing=blobs.step, origin=EXTENT[0], **how)


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Least CPU and wall seconds of a few calls."""
    cpu, wall = [], []
    for _ in range(repeats):
        begin = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - begin[0])
        wall.append(time.perf_counter() - begin[1])
    return min(cpu), min(wall)


def ladder(blobs: Blobs, n_threads: int) -> list[tuple[str, int, Callable[[], Any]]]:
    """Rungs as (name, number of blobs it runs on, work), the naive way first."""
    n = len(blobs.centres)
    few = blobs.head(10)
    each: dict[str, Any] = {"dtype": np.uint16, "rounding": "blob"}
    return [
        ("full mesh grid (naive)", 10, lambda: by_mesh_grid(few, sparse=False)),
        ("sparse mesh grid", 10, lambda: by_mesh_grid(few, sparse=True)),
        ("separable, broadcast over all blobs", 10, lambda: broadcast(few)),
        ("separable, summed in place", n, lambda: in_place(blobs)),
        ("one octant mirrored (blobs centred)", n, lambda: octant(blobs.centred())),
        ("region of interest", n, lambda: region_of_interest(blobs, **each)),
        (
            f"region of interest, {n_threads} threads",
            n,
            lambda: region_of_interest(blobs, **each, n_threads=n_threads),
        ),
        ("region of interest, sum truncated once", n, lambda: region_of_interest(
            blobs, dtype=np.uint16)),
        ("region of interest, float32", n, lambda: region_of_interest(blobs)),
    ]  # fmt: skip


def voxels_reached(blobs: Blobs, falls: np.ndarray) -> int:
    """Number of grid points within reach, over all blobs: distance^2 <= spread^2 * falls."""
    x, y, z = np.meshgrid(*[blobs.axis] * 3, indexing="ij", sparse=True)
    total = 0
    for (centre, spread, _), fall in zip(blobs.each(), falls, strict=True):
        r2 = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
        total += int(np.count_nonzero(r2 <= spread**2 * fall))
    return total


def print_bytes(blobs: Blobs) -> None:
    """Seconds a byte against `grid += 1`, which reads and writes each voxel once.

    The density reads and writes its sum at each voxel that a blob reaches, and zeroes the grid.
    Whole numbers are summed in float64 planes, which are zeroed, read and stored once more.
    """
    print("\nbytes touched, against one read and one write of each voxel (grid += 1):")
    floor = np.full(len(blobs.brights), -np.log(np.finfo(np.float32).eps))
    for dtype, rounding, falls, sum_item, grid_items in (
        (np.uint16, "blob", np.log(blobs.brights), 8, 8 + 8 + 2 + 2),
        (np.float32, "sum", floor, 4, 4),
    ):
        grid = np.ones((blobs.axis.size,) * 3, dtype)
        fill_s = timed(lambda grid=grid: np.add(grid, 1, out=grid), 20)[0]
        fill_rate = 2 * grid.nbytes / fill_s
        touched = 2 * sum_item * voxels_reached(blobs, falls) + grid_items * grid.size
        how = {"dtype": dtype, "rounding": rounding}
        rate = touched / timed(lambda how=how: region_of_interest(blobs, **how), REPEATS)[0]
        print(
            f"  {np.dtype(dtype)!s:8} {touched / 1e6:4.0f} MB at {rate / 1e9:5.1f} GB/s, "
            f"fill at {fill_rate / 1e9:5.1f} GB/s: {fill_rate / rate:.1f} times the fill "
            f"(at most {REQUIRED_TIMES_FILL})"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blobs", type=int, default=100)
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    blobs = drawn(args.blobs, args.size)
    region_of_interest(blobs.head(1), dtype=np.uint16)  # kernels compile or load outside the table
    region_of_interest(blobs.head(1))
    same = np.count_nonzero(
        region_of_interest(blobs.head(10), dtype=np.uint16, rounding="blob")
        != by_mesh_grid(blobs.head(10), sparse=False)
    )
    print(f"{args.blobs} blobs on {args.size}^3, spreads 3 to 12 voxels, uint16")
    print(f"voxels that differ from the naive way, 10 blobs: {same}\n")
    print(f"{'way':38} {'run on':>6} {'CPU s':>9} {'wall s':>9} {'ratio':>8}")
    naive_cpu = 0.0
    for name, n, work in ladder(blobs, args.threads):
        cpu, wall = (s * args.blobs / n for s in timed(work, 1 if n < args.blobs else REPEATS))
        naive_cpu = naive_cpu or cpu
        print(f"{name:38} {n:6d} {cpu:9.4f} {wall:9.4f} {naive_cpu / cpu:8.0f}")
    print(f"\nrun on fewer blobs: seconds multiplied up to {args.blobs}; least of {REPEATS} calls")
    print(f"required: region of interest at least {REQUIRED_RATIO} times less CPU than naive")
    print_bytes(blobs)


if __name__ == "__main__":
    main()
