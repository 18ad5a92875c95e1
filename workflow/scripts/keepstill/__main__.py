"""The command line: ``keepstill realign``, ``plan``, ``config``, ``warm``."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from keepstill import __version__
from keepstill.errors import KeepstillError
from keepstill.progress import VolumeProgress
from keepstill.settings import RealignSettings

EPILOG = """\
A run is realigned where this command runs: on all cores that the process may use, or on the ranks
that a launcher starts (mpirun -n 8 keepstill realign ...). The outputs have the same bytes.
"""


def main(arguments: list[str] | None = None) -> None:
    """Parse and go; exits with 0, or 2 after one line on what the user can mend."""
    signal.signal(signal.SIGTERM, _end)  # so that what is staged goes
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="keepstill: %(message)s", stream=sys.stderr)
    try:
        status = args.command(args)
        sys.stdout.flush()
    except KeepstillError as error:
        print(f"keepstill: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:  # the reader has seen enough; nothing more can be said
        os._exit(1)
    sys.exit(status)


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keepstill", description="Realign fMRI runs.")
    parser.add_argument("--version", action="version", version=f"keepstill {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    realign = commands.add_parser(
        "realign", help="realign one run", description="Realign one run.", epilog=EPILOG
    )
    _add_realign_arguments(realign)
    realign.set_defaults(command=_realign)
    plan = commands.add_parser(
        "plan",
        help="say what of a study is to do and what it will take",
        description="Say how many runs of a study are found, complete and to do, and what those "
        "to do will take: GB of output, shared memory a lane, CPU minutes. Nothing is started. "
        "The configuration is given as to keepstill config.",
    )
    _add_config_arguments(plan)
    plan.set_defaults(command=_plan)
    config = commands.add_parser(
        "config",
        help="print the configuration that a study would be realigned with",
        description="Check a configuration and print it, complete and with absolute paths, as "
        "YAML. The rules are those of snakemake --configfile FILE --config KEY=VALUE.",
    )
    _add_config_arguments(config)
    config.set_defaults(command=_config)
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
        "--threads", type=_count, metavar="N", help="threads a rank (default: its affinity mask)"
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


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} found; needs 1 or more")
    return int(text)


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        "--configfile",
        dest="given",
        action="append",
        default=[],
        metavar="FILE",
        help="a configuration of your own, YAML; may be repeated, the last one counts most",
    )
    parser.add_argument(
        "entries", nargs="*", metavar="KEY=VALUE", help="a value, such as tasks=rest"
    )


def _realign(args: argparse.Namespace) -> int:
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
    from keepstill.ranks import n_threads_of, on_first, realign_staged, share
    from keepstill.read import open_staged
    from keepstill.realign import Crew

    began_s = time.perf_counter()
    run = run_name(args.bold)
    n_threads = args.threads or n_threads_of(world)
    with contextlib.ExitStack() as stack:
        stage_dir = on_first(world, lambda: _stage(args, run, settings, stack))
        n_mine = len(share(open_staged(stage_dir).n_volumes, world.size, world.rank))
        n_mine *= 2 if settings.reference == "mean" else 1
        label = run if world.size == 1 else f"{run} (one of {world.size} ranks)"
        with VolumeProgress(label, n_mine, is_shown=world.rank == 0) as progress:
            realign_staged(stage_dir, settings, world, Crew(n_threads, progress.count))
        summary = on_first(world, lambda: collect_run(stage_dir, args.out, settings, n_threads))
    if world.rank == 0:
        seconds = time.perf_counter() - began_s
        print(f"{summary_line(run, summary)} ({seconds:.1f} s, in {args.out})")


def _stage(
    args: argparse.Namespace, run: str, settings: RealignSettings, stack: contextlib.ExitStack
) -> Path:
    """Stage the run in a folder that goes with the stack; what can fail early fails first."""
    from keepstill.files import claim_output_dir
    from keepstill.stage import private_stage_root, single_stage_dir, stage_run

    claim_output_dir(args.out, run)
    stage_root = private_stage_root(args.stage_root)
    stage_dir: Path = stack.enter_context(single_stage_dir(stage_root))
    stage_run(args.bold, run, None, stage_dir, settings)
    return stage_dir


def _given_config(args: argparse.Namespace) -> tuple[dict[str, Any], frozenset[str], Path]:
    """The configuration that was asked for, the keys that were given, and the clone."""
    from keepstill.config_files import find_clone, load_config

    # As with Snakemake, --config may stand before KEY=VALUE as well.
    files = [Path(given) for given in args.given if "=" not in given or Path(given).is_file()]
    entries = [given for given in args.given if Path(given) not in files]
    clone = find_clone()
    return *load_config(files, [*entries, *args.entries], clone), clone


def _plan(args: argparse.Namespace) -> int:
    """Print what is to do and what it will take."""
    from keepstill.preflight import preflight
    from keepstill.study import read_study

    study = read_study(*_given_config(args))
    for line in preflight(study, study.make_plan()):
        print(line, flush=True)
    return 0


def _config(args: argparse.Namespace) -> int:
    """Print the effective configuration."""
    from keepstill.config import effective_config, settings_of
    from keepstill.config_files import config_text

    config = effective_config(*_given_config(args))
    settings_of(config)  # refuses a reference that is not there
    print(config_text(config), end="")
    return 0


def _warm(args: argparse.Namespace) -> int:
    """Run every kernel once on a small phantom, so that no rank has to compile."""
    del args
    from keepstill.warm import warm_kernels

    warm_kernels()
    return 0


if __name__ == "__main__":
    main()
