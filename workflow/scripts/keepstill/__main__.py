"""The command line: ``realign``, ``plan``, ``config``, ``simulate``, ``selftest``, ``warm``."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from keepstill import __version__
from keepstill.errors import KeepstillError, SettingsError
from keepstill.progress import VolumeProgress
from keepstill.settings import RealignSettings, with_sbref
from keepstill.start import start_quickly

TRIPLES = ("voxel_mm", "shape", "point_spread_voxels")
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
    simulate = commands.add_parser(
        "simulate",
        help="make a study of known motion",
        description="Make a BIDS study of made-up heads, with the truth of their motion beside it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_simulate_arguments(simulate)
    simulate.set_defaults(command=_simulate)
    selftest = commands.add_parser(
        "selftest",
        help="realign a small simulated study and compare it with the truth",
        description="Simulate a small study in the stage root, realign it through the workflow as "
        "snakemake would, and say how far it is from the truth, how long it took, and where the "
        "ranks ran. Exits with 1 if that is too far. Leaves nothing behind.",
    )
    _add_selftest_arguments(selftest)
    selftest.set_defaults(command=_selftest)
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
        metavar="first|middle|mean|median|lowest-motion|sbref|FILE",
        help="what volumes are realigned to; pose and grid are those of the first volume for "
        "'mean' and 'median'; 'lowest-motion' is the volume that all others are nearest to, "
        "'sbref' the single-band reference beside the run "
        "(default: %(default)s)",
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


def _add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    part = "PART"
    for name, kind, default, metavar, about in (
        ("--subjects", int, 4, "N", "number of subjects"),
        ("--runs", int, 1, "N", "number of runs of each"),
        ("--volumes", int, None, "N", "of each run; None: 200, or as many as FILE has"),
        ("--seed", int, 1, "N", "the same seed gives the same bytes"),
        ("--tr-s", float, 2.0, "S", "seconds from volume to volume"),
        ("--oblique-deg", float, 0.0, "D", "turn of the slices about the axis from left to right"),
        ("--motion", str, "drift", "drift|spikes|steps|still|FILE",
         "FILE has columns trans_x ... rot_z, mm and rad"),
        ("--tsnr", float, 60.0, "N", "mean of the brain over the noise"),
        ("--activation-percent", float, 0.0, "P", "of some cortex, in blocks of 20 s"),
        ("--shading", float, 0.0, part, "range of the coil's sensitivity, 0.35 for 35%%"),
        ("--gain-drift", float, 0.0, part, "rise of the gain over the run"),
        ("--dropped-slices", int, 0, "N", "slices that lose signal in one volume of twenty"),
        ("--first-brighter", float, 0.0, part, "excess of the first volume"),
        ("--ghost", float, 0.0, part, "part of the image seen again half a field away"),
        ("--threads", int, None, "N", "None: as many as its affinity mask"),
    ):  # fmt: skip
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=about)
    for name, kind, three, about in (
        ("--voxel-mm", float, (3.4, 3.4, 3.5), "edges of a voxel"),
        ("--shape", int, (64, 64, 36), "number of voxels"),
        (
            "--point-spread-voxels",
            float,
            (0.8,) * 3,
            "full width at half maximum: 0.8 is sharp and aliases, 1.0 less; or one for all",
        ),
    ):
        parser.add_argument(name, type=kind, nargs="+", default=three, metavar="X", help=about)
    parser.add_argument("--slice-timing", action="store_true", help="slices one after the other")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make, or an empty one")


def _add_selftest_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workflow-profile",
        type=Path,
        metavar="DIR",
        help="how jobs and ranks are started (default: profiles/default)",
    )
    parser.add_argument("--cores", type=_count, metavar="N", help="default: the profile's, or all")
    parser.add_argument(
        "--volumes", type=_count, default=30, metavar="N", help="of each run (default: %(default)s)"
    )
    parser.add_argument(
        "--stage-root",
        type=Path,
        default=Path("/dev/shm"),
        metavar="DIR",
        help="where all of it lies meanwhile (default: %(default)s)",
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
    from keepstill.bids import find_sbref, run_name
    from keepstill.collect import collect_run, summary_line
    from keepstill.ranks import n_threads_of, on_first, realign_staged, share
    from keepstill.read import open_staged
    from keepstill.realign import Crew

    began_s = time.perf_counter()
    run = run_name(args.bold)
    settings = with_sbref(settings, find_sbref(args.bold))
    n_threads = args.threads or n_threads_of(world)
    with contextlib.ExitStack() as stack:
        stage_dir = on_first(world, lambda: _stage(args, run, settings, stack))
        n_mine = len(share(open_staged(stage_dir).n_volumes, world.size, world.rank))
        n_mine *= 2 if settings.reslices_twice else 1
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


def _three(name: str, given: Sequence[float]) -> tuple[float, ...]:
    """Three numbers from three, or from one for all axes."""
    if len(given) not in (1, 3):
        option = name.replace("_", "-")
        raise SettingsError(f"--{option}: {len(given)} numbers found; needs one or three")
    return tuple(given) * (3 // len(given))


def _simulate(args: argparse.Namespace) -> int:
    from keepstill.phantom import Effects
    from keepstill.simulate import StudyPlan, simulate_study

    values = vars(args) | {name: _three(name, getattr(args, name)) for name in TRIPLES}
    effects = Effects(**{f.name: values[f.name] for f in fields(Effects)})
    of_plan = {f.name: values[f.name] for f in fields(StudyPlan) if f.name in values}
    plan = StudyPlan(**of_plan, effects=effects)
    n_threads = args.threads or len(os.sched_getaffinity(0))
    n = plan.n_volumes * plan.runs * plan.subjects
    with VolumeProgress(f"{args.out}", n, is_shown=True) as progress:
        simulate_study(args.out, plan, n_threads, progress.count)
    print(f"{n} volumes of {plan.subjects} subjects in {args.out}")
    return 0


def _selftest(args: argparse.Namespace) -> int:
    """Print how a small simulated study went; 1 if not well."""
    from keepstill.selftest import Trial, selftest

    trial = Trial(args.workflow_profile, args.cores, args.volumes, args.stage_root)
    lines, is_well = selftest(trial)
    print("\n".join(lines))
    return 0 if is_well else 1


def _warm(args: argparse.Namespace) -> int:
    """Run every kernel once on a small phantom, so that no rank has to compile."""
    del args
    from keepstill.warm import warm_kernels

    warm_kernels()
    return 0


if __name__ == "__main__":
    main()

    try:
        main()
    except BrokenPipeError:
        os._exit(1)
