"""The command line: realign, apply, plan, config, summary, verify, simulate, selftest, warm."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from keepstill import __version__
from keepstill.errors import KeepstillError, LaunchError, OutputError, SettingsError, counted
from keepstill.progress import VolumeProgress
from keepstill.settings import (
    ALL_MEAN,
    CHECKS,
    ENGINES,
    FD_FILTERS,
    GRIDS,
    OUTSIDE,
    SHORTEST,
    EstimateSettings,
    RealignSettings,
    with_sbref,
)
from keepstill.start import start_quickly

if TYPE_CHECKING:
    from keepstill.bids import Run

TRIPLES = ("voxel_mm", "shape", "point_spread_voxels")
EPILOG = """\
A run is realigned where this command runs: on all cores that the process may use, or on the ranks
that a launcher starts (mpirun -n 8 keepstill realign ...). The outputs have the same bytes.
"""


class Command(NamedTuple):
    """A command: its name, what it runs, what fills its parser, and what --help says of it."""

    name: str
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    about: str
    description: str
    options: Mapping[str, Any] = MappingProxyType({})


class Parser(argparse.ArgumentParser):
    """A parser that says on one line what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        """Say it, and exit with 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


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
    except KeyboardInterrupt:
        print("keepstill: interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    sys.exit(status)


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="keepstill", description="Realign fMRI runs.")
    parser.add_argument("--version", action="version", version=f"keepstill {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        added = commands.add_parser(
            command.name, help=command.about, description=command.description, **command.options
        )
        command.add_arguments(added)
        added.set_defaults(command=command.run)
    return parser


def _add_realign_arguments(parser: argparse.ArgumentParser) -> None:
    default = RealignSettings()
    parser.add_argument(
        "bold",
        type=Path,
        nargs="+",
        metavar="BOLD",
        help="4-D .nii or .nii.gz file; or one for each echo of a run, named echo-1 and so on",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for all outputs")
    parser.add_argument(
        "--estimate-echo",
        type=_estimate_echo,
        default=SHORTEST,
        metavar="shortest|N|all-mean",
        help="echo that shows the motion of all, or their mean (default: %(default)s)",
    )
    parser.add_argument(
        "--reference",
        default=default.reference,
        metavar="first|middle|mean|median|lowest-motion|sbref|FILE",
        help="what volumes are realigned to; pose and grid are those of the first volume for "
        "'mean' and 'median'; 'lowest-motion' is the volume that all others are nearest to, "
        "'sbref' the single-band reference beside the run "
        "(default: %(default)s)",
    )
    _add_space_arguments(parser)
    _add_reslice_arguments(parser)
    parser.add_argument(
        "--no-reslice", action="store_true", help="write transforms and tables only"
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
        "--engine",
        choices=ENGINES,
        default=default.engine,
        help="who estimates and reslices (default: %(default)s); itk is slower, and independent",
    )
    parser.add_argument(
        "--check",
        choices=CHECKS,
        default=default.check,
        help="have every 20th volume realigned by ITK too, and tell the difference "
        "(default: %(default)s)",
    )
    _add_fd_filter_arguments(parser)
    _add_run_arguments(parser)


def _add_space_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a run ends that does not end in its own space."""
    parser.add_argument(
        "--shared-reference",
        type=Path,
        metavar="FILE",
        help="image in whose space the run ends with others, as the workflow makes it of the first "
        "run of a session or subject; --reference then says what motion is relative to",
    )
    parser.add_argument(
        "--grid",
        choices=GRIDS,
        default=RealignSettings().grid,
        help="grid of a run that ends in the space of an image: that of the image or the run's own "
        "(default: %(default)s, that of the image, which must be alike if it is shared)",
    )


def _add_fd_filter_arguments(parser: argparse.ArgumentParser) -> None:
    default = RealignSettings()
    parser.add_argument(
        "--fd-filter",
        choices=FD_FILTERS,
        default=default.fd_filter,
        help="add framewise displacement of motion without breathing (default: %(default)s)",
    )
    parser.add_argument(
        "--fd-notch-per-min",
        type=float,
        nargs=2,
        default=(default.fd_notch_low_per_min, default.fd_notch_high_per_min),
        metavar=("LOW", "HIGH"),
        help="breaths a minute that the notch stops (default: 12 18, for adults)",
    )
    parser.add_argument(
        "--fd-lowpass-per-min",
        type=float,
        default=default.fd_lowpass_per_min,
        metavar="F",
        help="cycles a minute up to which the low-pass keeps motion (default: %(default)s)",
    )


def _add_apply_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bold", type=Path, metavar="BOLD", help="4-D .nii or .nii.gz file")
    parser.add_argument(
        "--xfm",
        type=Path,
        required=True,
        metavar="XFM",
        help="one transform a volume: ITK text, as keepstill writes it; an mcflirt .mat folder or "
        ".par file; AFNI's .aff12.1D; SPM's rp_*.txt",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE|DIR", help=".nii.gz, .nii, or a folder"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="3-D image whose grid the volumes are put on (default: the run's own grid)",
    )
    parser.add_argument(
        "--voxel-mm",
        type=float,
        nargs="+",
        metavar="X",
        help="edges of the voxels, one or three, about the centre of that grid",
    )
    _add_reslice_arguments(parser)
    _add_run_arguments(parser)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How a run is read, and where it is worked on."""
    parser.add_argument(
        "--affine-source",
        choices=("auto", "sform", "qform"),
        default=RealignSettings().affine_source,
        help="which of the header's affines is true (default: %(default)s: the sform if it has a "
        "code; two that disagree are refused)",
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


def _add_reslice_arguments(parser: argparse.ArgumentParser) -> None:
    default = RealignSettings()
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
        "--outside",
        choices=OUTSIDE,
        default=default.outside,
        help="what a voxel holds whose source lies outside a volume's field of view; nan wants "
        "float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--common-field",
        action="store_true",
        help="in all volumes, leave only voxels that lie in the field of every volume",
    )
    parser.add_argument(
        "--non-negative",
        action="store_true",
        help="make negative values 0, to which a spline swings at sharp edges",
    )


def _add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    part = "PART"
    for name, kind, default, metavar, about in (
        ("--subjects", int, 4, "N", "number of subjects"),
        ("--sessions", int, None, "N", "of each subject; None: no such level"),
        ("--runs", int, 1, "N", "number of runs of each session"),
        ("--echoes", int, None, "N", "of each run, with motion in common; None: one, at 30 ms"),
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
        ("--threads", _count, None, "N", "None: as many as its affinity mask"),
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
    parser.add_argument(
        "--echo-times-ms",
        type=float,
        nargs="+",
        metavar="MS",
        help="of each echo, the shortest first; None: 14, 32, 50 and so on",
    )
    parser.add_argument("--sbref", action="store_true", help="a single-band reference of each run")
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
        "--volumes",
        type=_count,
        metavar="N",
        help="of each run (default: 30, for which the limits are; with few the error is larger, "
        "and may fail; with --tune 120)",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="try all ways to share out this machine and print the fastest as a profile",
    )
    parser.add_argument(
        "--stage-root",
        type=Path,
        default=Path("/dev/shm"),
        metavar="DIR",
        help="where all of it lies meanwhile (default: %(default)s)",
    )


def _add_summary_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "derivatives", type=Path, metavar="DERIVATIVES", help="an output_dir of keepstill"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the table, .tsv; a JSON beside it says what its columns are "
        "(default: summary.tsv in DERIVATIVES)",
    )


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "derivatives", type=Path, metavar="DERIVATIVES", help="an output_dir of keepstill"
    )
    parser.add_argument("--deep", action="store_true", help="compare contents, too (sha256)")
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="files at a time (default: its affinity mask)"
    )


def _estimate_echo(text: str) -> str | int:
    return text if text in (SHORTEST, ALL_MEAN) else int(text)


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
        shared_reference=str(args.shared_reference.absolute()) if args.shared_reference else "",
        grid=args.grid,
        **_reslice_values(args),
        reslice=not args.no_reslice,
        affine_source=args.affine_source,
        dummy_scans=args.dummy_scans,
        in_plane=args.in_plane,
        engine=args.engine,
        check=args.check,
        fd_filter=args.fd_filter,
        fd_notch_low_per_min=args.fd_notch_per_min[0],
        fd_notch_high_per_min=args.fd_notch_per_min[1],
        fd_lowpass_per_min=args.fd_lowpass_per_min,
    )
    return run_in_world(None, lambda world: _realign_in_world(args, settings, world))


def _reslice_values(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that `_add_reslice_arguments` asks for."""
    return {
        "interpolation_degree": args.interpolation_degree,
        "output_dtype": args.dtype,
        "outside": args.outside,
        "common_field": args.common_field,
        "non_negative": args.non_negative,
    }


def _realign_in_world(args: argparse.Namespace, settings: RealignSettings, world: Any) -> None:
    """Stage on rank 0, realign on all, collect on rank 0; the stage directory goes in any case."""
    from keepstill.ahead import Ahead
    from keepstill.bids import find_sbref
    from keepstill.collect import collect_run, summary_line
    from keepstill.itk_bridge import require_itk
    from keepstill.multi_echo import runs_of_files
    from keepstill.ranks import (
        cores_of_all,
        n_threads_of,
        on_first,
        realign_staged,
        share,
        together,
        together_all,
    )
    from keepstill.read import open_staged
    from keepstill.realign import Crew
    from keepstill.warm import ensure_warm

    began_s = time.perf_counter()
    if settings.uses_itk:
        together(world, require_itk)
    first, *echoes = on_first(world, lambda: runs_of_files(args.bold, args.estimate_echo))
    settings = on_first(world, lambda: with_sbref(settings, find_sbref(first.source)))
    on_first(world, ensure_warm)
    run, n_threads = first.name, args.threads or n_threads_of(world)
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        # A mean of echoes is made once all of them are staged, one after the other.
        works_ahead = world.size > 1 and settings.engine == "native" and not first.mean_of
        stage_dir = on_first(world, lambda: _stage_dir(args, first, works_ahead, stack))
        ahead = Ahead(stage_dir, settings, n_threads) if works_ahead else None
        meanwhile = ahead.step if ahead and world.rank else None
        on_first(world, lambda: _stage(stage_dir, first, settings), meanwhile)
        n_mine = len(share(open_staged(stage_dir).n_volumes, world.size, world.rank))
        n_mine *= 2 if settings.reslices_twice else 1
        label = run if world.size == 1 else f"{run} (one of {world.size} ranks)"
        with VolumeProgress(label, n_mine, is_shown=world.rank == 0) as progress:
            realign_staged(stage_dir, settings, world, Crew(n_threads, progress.count), ahead)
        with cores_of_all(world, n_threads) as n_all:
            summary = on_first(world, lambda: collect_run(stage_dir, args.out, settings, n_all))
        if settings.reslice:
            work = _echo_work(args, stage_dir, settings, n_threads)
            mine = echoes[world.rank :: world.size]
            shares = together_all(world, lambda: [(echo.name, work(echo)) for echo in mine])
            lines = [line for _, line in sorted(pair for share_ in shares for pair in share_)]
    if world.rank == 0:
        seconds = time.perf_counter() - began_s
        print(f"{summary_line(run, summary)} ({seconds:.1f} s, in {args.out})")
        print("".join(f"{line}\n" for line in lines), end="")


def _echo_work(
    args: argparse.Namespace, stage_dir: Path, settings: RealignSettings, n_threads: int
) -> Callable[["Run"], str]:
    """What is done with each echo once the run's motion is known; a line about it comes out."""
    from keepstill.echoes import Echo, realign_echo

    def work(run: "Run") -> str:
        echo = Echo(run.source, run.name, run.leader or "")
        return realign_echo(echo, stage_dir / run.name, args.out, settings, n_threads)

    return work


def _stage_dir(
    args: argparse.Namespace, run: "Run", is_watched: bool, stack: contextlib.ExitStack
) -> Path:
    """Folder to stage the run in, which goes with the stack; what can fail early fails first."""
    from keepstill.arrivals import ask_for_arrivals
    from keepstill.files import claim_output_dir
    from keepstill.stage import private_stage_root, single_stage_dir

    claim_output_dir(args.out, run.name)
    stage_dir: Path = stack.enter_context(single_stage_dir(private_stage_root(args.stage_root)))
    if is_watched:
        ask_for_arrivals(stage_dir)
    return stage_dir


def _stage(stage_dir: Path, run: "Run", settings: RealignSettings) -> None:
    """Stage a run, or the mean of its echoes, in a folder."""
    from keepstill.bids import Origin
    from keepstill.mean_echo import stage_mean
    from keepstill.stage import stage_run

    origin = Origin(is_multi_echo=bool(run.echoes))
    if run.mean_of:
        stage_mean(dict(run.mean_of), run.name, origin, stage_dir, settings)
    else:
        stage_run(run.source, run.name, origin, stage_dir, settings)


def _apply(args: argparse.Namespace) -> int:
    """Stage a run, put it on the grid that is wanted, and say where it is."""
    start_quickly()
    from keepstill.apply import Wanted, output_path, prepare_work, write_resliced
    from keepstill.bids import run_name
    from keepstill.files import claim_output_dir
    from keepstill.ranks import launched_size
    from keepstill.read import open_staged
    from keepstill.stage import private_stage_root, single_stage_dir, stage_run

    if (launched_size() or 1) > 1:
        raise LaunchError("keepstill apply works with threads, not with ranks; call it alone")
    began_s = time.perf_counter()
    # One slice will do, and there is nothing to estimate, so nothing to keep room for.
    settings = RealignSettings(
        **_reslice_values(args),
        affine_source=args.affine_source,
        reslice=False,
        in_plane=True,
        estimate=EstimateSettings(model_volumes=0),
    )
    voxel_mm = None if args.voxel_mm is None else _three("voxel_mm", args.voxel_mm)
    wanted = Wanted(args.xfm, args.reference, voxel_mm, settings)
    run, n_threads = run_name(args.bold), args.threads or len(os.sched_getaffinity(0))
    path = output_path(args.out, run)
    claim_output_dir(path.parent, run)
    with single_stage_dir(private_stage_root(args.stage_root)) as stage_dir:
        stage_run(args.bold, run, None, stage_dir, settings)
        work = prepare_work(open_staged(stage_dir), wanted)
        write_resliced(work, wanted, path, n_threads)
    seconds = time.perf_counter() - began_s
    shape = " x ".join(map(str, work.grid.shape))
    print(f"{run}: {work.run.n_volumes} volumes of {shape} voxels in {path} ({seconds:.1f} s)")
    return 0


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


def _summary(args: argparse.Namespace) -> int:
    """Write the table of a study's runs and say where it is."""
    from keepstill.summary import TABLE, summarise, write_summary

    path = args.out or args.derivatives / TABLE
    if path.suffix != ".tsv":
        raise SettingsError(f"--out: {path} found; needs the name of a .tsv file")
    table = summarise(args.derivatives)
    write_summary(table, path)
    print(f"{counted(len(table['name']), 'run')} in {path}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    """Print what is not as it was written; 1 if anything is not."""
    from keepstill.verify import in_words, verify

    n_threads = args.threads or len(os.sched_getaffinity(0))
    checked = verify(args.derivatives, is_deep=args.deep, n_threads=n_threads)
    print("\n".join(in_words(checked, is_deep=args.deep)))
    return int(any(one.damaged for one in checked))


def _three(name: str, given: Sequence[float]) -> tuple[float, ...]:
    """Three numbers from three, or from one for all axes."""
    if len(given) not in (1, 3):
        option = name.replace("_", "-")
        raise SettingsError(f"--{option}: {len(given)} numbers found; needs one or three")
    return tuple(given) * (3 // len(given))


def _echo_times_ms(n: int | None, given: Sequence[float] | None) -> tuple[float, ...]:
    """Times of a run's echoes from their number, their times, or both."""
    from keepstill.phantom import default_echo_times_ms

    if n is not None and n < 1:
        raise SettingsError(f"--echoes: {n} found; needs 1 or more")
    if n is not None and given and len(given) != n:
        raise SettingsError(
            f"--echo-times-ms: {len(given)} numbers found; needs one for each echo ({n})"
        )
    return tuple(given) if given else default_echo_times_ms(n or 0)


def _simulate(args: argparse.Namespace) -> int:
    from keepstill.phantom import Effects
    from keepstill.simulate import StudyPlan, simulate_study

    values = vars(args) | {name: _three(name, getattr(args, name)) for name in TRIPLES}
    values["echo_times_ms"] = _echo_times_ms(args.echoes, args.echo_times_ms)
    effects = Effects(**{f.name: values[f.name] for f in fields(Effects)})
    of_plan = {f.name: values[f.name] for f in fields(StudyPlan) if f.name in values}
    plan = StudyPlan(**of_plan, effects=effects)
    n_threads = args.threads or len(os.sched_getaffinity(0))
    n = plan.n_written
    with VolumeProgress(f"{args.out}", n, is_shown=True) as progress:
        simulate_study(args.out, plan, n_threads, progress.count)
    print(f"{n} volumes of {counted(plan.subjects, 'subject')} in {args.out}")
    return 0


def _selftest(args: argparse.Namespace) -> int:
    """Print how a small simulated study went; 1 if not well."""
    from keepstill.selftest import VOLUMES, Trial, selftest

    trial = Trial(args.workflow_profile, args.cores, args.volumes or VOLUMES, args.stage_root)
    if args.tune:
        from keepstill.tune import TUNE_VOLUMES, tune

        for text in tune(replace(trial, n_volumes=args.volumes or TUNE_VOLUMES)):
            print(text, flush=True)
        return 0
    lines, is_well = selftest(trial)
    print("\n".join(lines))
    return 0 if is_well else 1


def _warm(args: argparse.Namespace) -> int:
    """Run every kernel once on a small phantom, so that no rank has to compile."""
    del args
    from keepstill.kernels.cache import cache_dir
    from keepstill.warm import ensure_warm

    if (folder := cache_dir()) is None:
        raise OutputError("no folder for kernels can be written to; set NUMBA_CACHE_DIR to one")
    done = "compiled" if ensure_warm() else "were there"
    print(f"kernels for this kind of processor {done}, in {folder}")
    return 0


# In the order in which --help lists them.
COMMANDS = (
    Command(
        *("realign", _realign, _add_realign_arguments, "realign one run"),
        description="Realign one run.",
        options={"epilog": EPILOG},
    ),
    Command(
        *("apply", _apply, _add_apply_arguments, "apply given transforms to one run"),
        "Apply given transforms, one a volume, to one run in one interpolation: those of "
        "another echo, of keepstill or of another tool, on the run's own grid, that of "
        "another image, or one of other voxels.",
    ),
    Command(
        *("plan", _plan, _add_config_arguments),
        "say what of a study is to do and what it will take",
        "Say how many runs of a study are found, complete and to do, and what those to do "
        "will take: GB of output, shared memory a lane, CPU minutes. Nothing is started. The "
        "configuration is given as to keepstill config.",
    ),
    Command(
        *("config", _config, _add_config_arguments),
        "print the configuration that a study would be realigned with",
        "Check a configuration and print it, complete and with absolute paths, as YAML. The "
        "rules are those of snakemake --configfile FILE --config KEY=VALUE.",
    ),
    Command(
        *("summary", _summary, _add_summary_arguments),
        "make one table of all complete runs",
        "Make a table of all complete runs of a derivative data set, a row a run: motion, "
        "outliers, failed volumes, temporal signal-to-noise ratio before and after, error bar.",
    ),
    Command(
        *("verify", _verify, _add_verify_arguments),
        "compare a study's files with what was written",
        "Compare every output of a derivative data set with its manifest, by size, or by content "
        "(--deep). Names those that are missing, truncated or changed, and exits with 1 if any "
        "is; the next call of the workflow does their runs again.",
    ),
    Command(
        *("simulate", _simulate, _add_simulate_arguments, "make a study of known motion"),
        "Make a BIDS study of made-up heads, with the truth of their motion beside it.",
        {"formatter_class": argparse.ArgumentDefaultsHelpFormatter},
    ),
    Command(
        *("selftest", _selftest, _add_selftest_arguments),
        "realign a small simulated study and compare it with the truth",
        "Simulate a small study in the stage root, realign it through the workflow as "
        "snakemake would, and say how far it is from the truth, how long it took, and where "
        "the ranks ran. Exits with 1 if that is too far. Leaves nothing behind.",
    ),
    Command(
        *("warm", _warm, lambda parser: None, "compile the kernels, once a kind of processor"),
        "Compile the kernels for the processor that this runs on, unless they were before, and say "
        "where they are kept.",
    ),
)

if __name__ == "__main__":
    main()

    try:
        main()
    except BrokenPipeError:
        os._exit(1)
