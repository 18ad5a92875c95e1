"""The command line: ``keepstill realign``, ``keepstill warm``."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keepstill import __version__
from keepstill.errors import KeepstillError
from keepstill.settings import RealignSettings
from keepstill.start import start_quickly

EPILOG = """\
A run is realigned where this command runs: on all cores that the process may use, or on the ranks
that a launcher starts (mpirun -n 8 keepstill realign ...). The outputs have the same bytes.
"""


def main(arguments: list[str] | None = None) -> None:
    """Parse and go; exits with 0, or 2 after one line on what the user can mend."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="keepstill: %(message)s", stream=sys.stderr)
    sys.exit(args.command(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keepstill", description="Realign fMRI runs.")
    parser.add_argument("--version", action="version", version=f"keepstill {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    realign = commands.add_parser(
        "realign", help="realign one run", description="Realign one run.", epilog=EPILOG
    )
    _add_realign_arguments(realign)
    realign.set_defaults(command=_realign)
    warm = commands.add_parser(
        "warm", help="compile the kernels, once", description="Compile the kernels, once."
    )
    warm.set_defaults(command=_warm)
    return parser


def _add_realign_arguments(parser: argparse.ArgumentParser) -> None:
    default = RealignSettings()
    parser.add_argument("bold", type=Path, metavar="BOLD", help="4-D .nii or .nii.gz file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for all outputs")
    parser.add_argument(
        "--reference",
        default=default.reference,
        metavar="first|middle|mean|FILE",
        help="what volumes are realigned to; pose and grid are those of the first volume for "
        "'mean' (default: %(default)s)",
    )
    parser.add_argument(
        "--interpolation-degree",
        type=int,
        choices=range(1, 6),
        default=default.interpolation_degree,
        help="of the B-spline that reslices (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "int16"),
        default=default.output_dtype,
        help="of the realigned run; int16 gets a fitted slope (default: %(default)s)",
    )
    parser.add_argument(
        "--no-reslice", action="store_true", help="write transforms and tables only"
    )
    parser.add_argument(
        "--affine-source",
        choices=("auto", "sform", "qform"),
        default=default.affine_source,
        help="which of the header's affines is true (default: %(default)s: the sform if it has a "
        "code; two that disagree are refused)",
    )
    parser.add_argument(
        "--dummy-scans",
        type=_dummy_scans,
        default=default.dummy_scans,
        metavar="auto|N",
        help="first volumes before the signal is steady: flagged, never the reference "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--in-plane",
        action="store_true",
        help="motion within the slice plane only; one slice will do",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads a rank (default: its affinity mask)"
    )
    parser.add_argument(
        "--stage-root",
        type=Path,
        default=Path("/dev/shm"),
        metavar="DIR",
        help="where the run is decompressed meanwhile (default: %(default)s)",
    )


def _dummy_scans(text: str) -> str | int:
    return text if text == "auto" else int(text)


def _realign(args: argparse.Namespace) -> int:
    start_quickly()
    from keepstill.ranks import run_in_world

    settings = RealignSettings(
        reference=args.reference,
        interpolation_degree=args.interpolation_degree,
        reslice=not args.no_reslice,
        output_dtype=args.dtype,
        affine_source=args.affine_source,
        dummy_scans=args.dummy_scans,
        in_plane=args.in_plane,
    )
    return run_in_world(None, lambda world: _realign_in_world(args, settings, world))


def _realign_in_world(args: argparse.Namespace, settings: RealignSettings, world: Any) -> None:
    """Stage on rank 0, realign on all, collect on rank 0; the stage directory goes in any case."""
    from keepstill.bids import run_name
    from keepstill.collect import collect_run, summary_line
    from keepstill.ranks import n_threads_of, realign_staged
    from keepstill.realign import Crew
    from keepstill.stage import open_private_dir, remove_stage, stage_run

    began_s = time.perf_counter()
    run = run_name(args.bold)
    n_threads = args.threads or n_threads_of(world)
    stage_dir: Path | None = None
    try:
        if world.rank == 0:
            stage_dir = open_private_dir(args.stage_root)
            stage_run(args.bold, run, None, stage_dir, settings)
        here: Path = world.bcast(stage_dir)
        with _progress(run, world, n_threads) as on_volume:
            realign_staged(here, settings, world, Crew(n_threads, on_volume))
        if world.rank == 0:
            summary = collect_run(here, args.out, settings, n_threads)
            seconds = time.perf_counter() - began_s
            print(f"{summary_line(run, summary)} ({seconds:.1f} s, in {args.out})")
    finally:
        if stage_dir is not None:
            remove_stage(stage_dir)


class _progress:
    """A bar of volumes on a terminal, on rank 0; silent elsewhere."""

    def __init__(self, run: str, world: Any, n_threads: int) -> None:
        self._run, self._factor = run, world.size
        self._bar: Any = None
        self._shown = world.rank == 0 and sys.stderr.isatty()
        del n_threads

    def __enter__(self) -> Callable[[int], None]:
        if not self._shown:
            return lambda t: None
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn(self._run), MofNCompleteColumn(), TextColumn("volumes"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._bar.start()
        task = self._bar.add_task(self._run, total=None)
        return lambda t: self._bar.advance(task, self._factor)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _warm(args: argparse.Namespace) -> int:
    """Run every kernel once on a small phantom, so that no rank has to compile."""
    del args
    from keepstill.warm import warm_kernels

    warm_kernels()
    return 0


if __name__ == "__main__":
    try:
        main()
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os._exit(1)
