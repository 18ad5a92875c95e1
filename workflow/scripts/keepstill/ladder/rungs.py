"""The rungs, and the terms that all of them keep."""

from dataclasses import dataclass

# What the classic rungs smooth by before they estimate. With points 4 voxels apart it has to be
# wide: of two simulated heads, median errors were 0.028 and 0.023 mm at 7 mm, 0.017 and 0.021 at
# 9, 0.017 and 0.024 at 10, 0.020 and 0.034 at 12.
FWHM_MM = 9.0
SAMPLING_STEP_VOXELS = 4
SPLINE_DEGREE = 3
TOLERANCE_MM = 0.01
WITH_FILES = "keepstill-files"


@dataclass(frozen=True)
class Rung:
    """One way to realign a run.

    Attributes
    ----------
    name : str
        As the table has it.
    loop : str
        How volumes are resliced: ``inverting``, ``hoisted`` or ``compiled``. keepstill has none of
        these: ``keepstill`` goes from memory to memory, ``keepstill-files`` from file to files.
    has_ranks : bool
        Whether it runs on MPI ranks; else in one process.
    is_bound : bool
        Whether the launcher gets the flags that bind ranks to cores.
    every_slice : int
        Only every so manieth slice is resliced, and the loop's seconds are multiplied up.
    """

    name: str
    loop: str
    has_ranks: bool = True
    is_bound: bool = False
    every_slice: int = 1

    @property
    def is_classic(self) -> bool:
        """Whether it is one of the five."""
        return not self.loop.startswith("keepstill")


RUNGS = (
    Rung("ITK point by point, one process", "inverting", has_ranks=False, every_slice=18),
    Rung("MPI over volumes and sample points", "inverting", every_slice=18),
    Rung("inverse hoisted out of the loop", "hoisted", every_slice=6),
    Rung("numba prange in the reslice loop", "compiled"),
    Rung("MPI core binding", "compiled", is_bound=True),
    Rung("keepstill", "keepstill", is_bound=True),
    Rung("keepstill, files to files", WITH_FILES, is_bound=True),
)


def numbered(line: int) -> str:
    """Number of the rung in a line, from 1; the seventh line is the sixth rung, files included."""
    return str(line) if line <= 6 else ""


def slices_run(n_slices: int, every: int) -> range:
    """Slices that are resliced, spread evenly over a volume of so many; at least one."""
    return range(min(every // 2, n_slices - 1), n_slices, every)
