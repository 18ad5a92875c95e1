"""A BIDS study of made-up heads, with the truth of their motion beside it."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from keepstill import __version__, geometry, phantom, write
from keepstill.errors import OutputError, SettingsError, counted
from keepstill.files import put_text
from keepstill.phantom.motion import COLUMNS, KINDS
from keepstill.phantom.run import DROPPED_SIGNAL, Run, task_blocks_s
from keepstill.sidecars import CODE_URL
from keepstill.truth import BOUND, BRAIN, SBREF_TRANSFORM, TRANSFORMS, TRUTH

BIDS_VERSION = "1.11.0"
_DEFAULT_VOLUMES = 200
_INT16_LIMIT = 32767
# A head is put down elsewhere in each session, by up to this: mm, and degrees.
_SESSION_SHIFT_MM, _SESSION_TURN_DEG = 4.0, 3.0
# Standard deviation of what a head moves by between its SBRef and volume 0, mm and degrees.
_SBREF_JITTER = 0.3
_MOST_ECHOES = 20
# The head is drawn on a grid as fine as its blur: here in 20 GB of memory, by the cube of 1 / this.
_SHARPEST_MM = 0.6

README = """\
# A simulated study

Made by `keepstill simulate`; nobody was scanned. Each subject is a head of blobs and shells, moved
by a known motion, blurred by the scanner's point spread, sampled and given Rician noise.

The truth is in `derivatives/truth`: a rigid transform a volume as ITK text, the same as six numbers
in a table, and the brain in volume 0. The sidecar of each run holds its settings and the
Cramér-Rao bound: the mean displacement error over the brain that no unbiased estimate can beat.
The echoes of a run have one motion and one truth. `WorldFromHead`, beside the transforms, is where
the head is in volume 0: what runs and sessions of a subject are apart.
"""
IGNORED_TRUTH = ("*_xfm.*", "*_timeseries.*")


@dataclass(frozen=True)
class StudyPlan:
    """What is simulated.

    Attributes
    ----------
    subjects, runs : int
        Number of subjects, and of runs of each in each session.
    sessions : int or None
        Number of sessions, for each of which the head is put down anew; None makes no such level.
    echo_times_ms : tuple of float
        Of each run's echoes, the shortest first; () makes runs of one echo, at 30 ms.
    sbref : bool
        Whether each run comes with a single-band reference on its grid, taken just before.
    volumes : int or None
        Of each run; None takes 200, or as many as a file of motion has.
    seed : int
    shape : (nx, ny, nz)
    voxel_mm : (x, y, z)
    oblique_deg : float
        Turn of the grid about the world's x axis.
    tr_s : float
    point_spread_voxels : (x, y, z)
        Full width at half maximum of the Gaussian. What it lets through at the grid's Nyquist
        frequency folds back as aliasing: 41% at 1.0, one voxel wide; 57% at 0.8, which is sharp.
    motion : str
        ``drift``, ``spikes``, ``steps``, ``still`` or the path of a table.
    slice_timing : bool
        Slices are taken one after the other, the even ones first, while the head moves.
    effects : phantom.Effects
    """

    subjects: int = 4
    runs: int = 1
    sessions: int | None = None
    echo_times_ms: tuple[float, ...] = ()
    sbref: bool = False
    volumes: int | None = None
    seed: int = 1
    shape: tuple[int, int, int] = (64, 64, 36)
    voxel_mm: tuple[float, float, float] = (3.4, 3.4, 3.5)
    oblique_deg: float = 0.0
    tr_s: float = 2.0
    point_spread_voxels: tuple[float, float, float] = (0.8, 0.8, 0.8)
    motion: str = "drift"
    slice_timing: bool = False
    effects: phantom.Effects = field(default_factory=phantom.Effects)

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated, in words."""
        effects = self.effects
        for name, value, low, high in (
            ("subjects", self.subjects, 1, 9999),
            ("runs", self.runs, 1, 99),
            ("sessions", 1 if self.sessions is None else self.sessions, 1, 99),
            ("echoes", len(self.echo_times_ms), 0, _MOST_ECHOES),
            ("echo-times-ms", min(self.echo_times_ms, default=1), 1, 500),
            ("echo-times-ms", max(self.echo_times_ms, default=1), 1, 500),
            ("volumes", 2 if self.volumes is None else self.volumes, 2, 100_000),
            ("seed", self.seed, 0, 2**63 - 1),
            ("shape", min(self.shape), 4, 32767),
            ("voxel-mm", min(self.voxel_mm), 0.5, 20),
            ("voxel-mm", max(self.voxel_mm), 0.5, 20),
            ("oblique-deg", self.oblique_deg, -90, 90),
            ("tr-s", self.tr_s, 0.05, 60),
            ("point-spread-voxels", min(self.point_spread_voxels), 0.4, 4),
            ("point-spread-voxels", max(self.point_spread_voxels), 0.4, 4),
            ("point spread in mm", min(self._point_spread_mm()), _SHARPEST_MM, 80),
            ("tsnr", effects.tsnr, 1, 1e6),
            ("activation-percent", effects.activation_percent, 0, 50),
            ("shading", effects.shading, 0, 1),
            ("gain-drift", effects.gain_drift, -0.9, 2),
            ("dropped-slices", effects.dropped_slices, 0, self.shape[2]),
            ("first-brighter", effects.first_brighter, 0, 10),
            ("ghost", effects.ghost, 0, 1),
        ):
            if not low <= value <= high:
                raise SettingsError(f"{name}: {value:g} found; needs {low:g} to {high:g}")
        if list(self.echo_times_ms) != sorted(set(self.echo_times_ms)):
            shown = ", ".join(f"{echo_ms:g}" for echo_ms in self.echo_times_ms)
            raise SettingsError(f"echo-times-ms: {shown} found; needs each longer than the last")

    def _point_spread_mm(self) -> list[float]:
        sizes = zip(self.point_spread_voxels, self.voxel_mm, strict=True)
        return [round(spread * voxel, 9) for spread, voxel in sizes]

    @property
    def n_volumes(self) -> int:
        """Number of volumes of a run."""
        if self.volumes is not None:
            return self.volumes
        return _DEFAULT_VOLUMES if self.motion in KINDS else len(self._poses())

    @property
    def task(self) -> str:
        """Label of the task: a block design if cortex is to be active, else rest."""
        return "blocks" if self.effects.activation_percent else "rest"

    @property
    def series(self) -> list[tuple[int | None, int]]:
        """Session (None without that level) and number of each run of a subject."""
        sessions = range(1, self.sessions + 1) if self.sessions else (None,)
        return [(s, number) for s in sessions for number in range(1, self.runs + 1)]

    @property
    def n_written(self) -> int:
        """Number of volumes of the whole study, SBRefs included."""
        of_run = (self.n_volumes + self.sbref) * max(len(self.echo_times_ms), 1)
        return of_run * len(self.series) * self.subjects

    def scanner(self) -> phantom.Scanner:
        """The scanner, its grid stored LAS about the head."""
        nz = self.shape[2]
        order = np.argsort([*range(0, nz, 2), *range(1, nz, 2)])
        times = tuple(float(t) for t in order * self.tr_s / nz) if self.slice_timing else ()
        affine = phantom.grid_affine(self.shape, self.voxel_mm, oblique_deg=self.oblique_deg)
        return phantom.Scanner(self.shape, affine, self.point_spread_voxels, self.tr_s, times)

    def poses(self, seed: int) -> NDArray[np.float64]:
        """Poses of a run's volumes, (n, 4, 4)."""
        if self.motion in KINDS:
            return phantom.drawn_poses(self.motion, self.n_volumes, seed)
        read = self._poses()
        needed = max(self.n_volumes, 2)
        if len(read) < needed:
            found = counted(len(read), "volume")
            raise SettingsError(f"{self.motion}: motion of {found} found; needs {needed}")
        return read[:needed]

    def _poses(self) -> NDArray[np.float64]:
        return phantom.read_poses(Path(self.motion))


def simulate_study(
    out: Path, plan: StudyPlan, n_threads: int = 1, on_volume: Callable[[], object] = lambda: None
) -> None:
    """Write a study and its truth.

    Parameters
    ----------
    out : Path
        A folder that is not there yet, or empty.
    plan : StudyPlan
    n_threads : int
        The bytes do not depend on it.
    on_volume : callable
        Called after each volume.

    Raises
    ------
    OutputError, SettingsError, InputError
        Nothing is left of a study that is not whole, after an interruption neither.
    """
    plan.poses(0)  # a table of motion that is not one shall stop before anything is written
    with _as_output_error(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out}: not an empty folder; choose another one")
        with _all_or_nothing(out):
            _describe(out, plan)
            for subject in range(1, plan.subjects + 1):
                _Subject(out, plan, subject).write(n_threads, on_volume)


@contextlib.contextmanager
def _all_or_nothing(out: Path) -> Iterator[None]:
    """What is made in a folder, empty or new, goes again if it does not come to its end."""
    was_there = out.exists()
    try:
        yield
    except BaseException:
        for made in out.iterdir() if was_there else (out,):
            if made.is_dir():
                shutil.rmtree(made, ignore_errors=True)
            else:
                made.unlink(missing_ok=True)
        raise


def _seed(*path: int) -> int:
    """Seed of a subject or a run, apart from all others."""
    return int(np.random.SeedSequence(path[0], spawn_key=path[1:]).generate_state(1, np.uint64)[0])


class _View(NamedTuple):
    """One of the images that are taken of each run: an echo, with or without multiband."""

    echo: int | None
    echo_ms: float | None
    is_sbref: bool

    @property
    def suffix(self) -> str:
        return "sbref" if self.is_sbref else "bold"

    @property
    def contrast(self) -> phantom.Contrast:
        plain = phantom.PLAIN
        at_echo = plain.at_echo(self.echo_ms) if self.echo_ms else plain
        return at_echo.single_band() if self.is_sbref else at_echo


def _views(plan: StudyPlan) -> list[_View]:
    """What is taken of each run; the first one says what the noise is."""
    echoes = [_View(echo, echo_ms, False) for echo, echo_ms in enumerate(plan.echo_times_ms, 1)]
    bold = echoes or [_View(None, None, False)]
    return bold + [view._replace(is_sbref=True) for view in bold if plan.sbref]


@dataclass(frozen=True)
class _Place:
    """Where a run's files go; `series` is all of its name that its echoes share."""

    out: Path
    subject: str
    session: str | None
    series: str

    def raw(self, view: _View, extension: str) -> Path:
        echo = "" if view.echo is None else f"_echo-{view.echo}"
        return self.out / self._file(f"{echo}_{view.suffix}{extension}")

    def events(self) -> Path:
        return self.out / self._file("_events.tsv")

    def truth(self, ending: str) -> Path:
        return self.out / TRUTH / self._file(f"_{ending}")

    def uri(self, view: _View) -> str:
        return f"bids:raw:{self.raw(view, '.nii.gz').relative_to(self.out).as_posix()}"

    def _file(self, ending: str) -> Path:
        levels = [self.subject] + ([self.session] if self.session else [])
        return Path(*levels, "func", "_".join([*levels, self.series]) + ending)


_Images = tuple[Run, Iterable[NDArray[np.int16]]]


class _Subject:
    """A subject: one head in the contrasts of all views, and the runs that show it."""

    def __init__(self, out: Path, plan: StudyPlan, subject: int) -> None:
        self._out, self._plan, self._subject = out, plan, subject
        # Noise and pose of volume 0 of each run, found with its first view.
        self._first: dict[tuple[int | None, int], tuple[float, NDArray[np.float64]]] = {}

    def write(self, n_threads: int, on_volume: Callable[[], object]) -> None:
        """Write all files of the subject."""
        blur_mm = float(self._plan.scanner().point_spread_mm.min())
        views = _views(self._plan)
        contrasts = tuple(view.contrast for view in views)
        heads = phantom.fine_heads(_seed(self._plan.seed, self._subject), blur_mm, contrasts)
        for view, head in zip(views, heads, strict=True):
            for series in self._plan.series:
                run = self._run(head, view, series)
                volumes = _volumes(run, n_threads, on_volume)
                self._write_run(view, series, (run, volumes))

    def _write_run(self, view: _View, series: tuple[int | None, int], images: _Images) -> None:
        """Write one view of a run, and what is known of it."""
        place, run = self._place(series), images[0]
        if view.is_sbref:
            _write_sbref(place, self._plan, view, images)
            if view.echo in (None, 1):
                sbref_from_first = run.poses[0] @ geometry.inverse(self._first[series][1])
                _write_sbref_truth(place, view, sbref_from_first)
            return
        bound = phantom.cramer_rao(run)
        bound_mm = {"TemplateKnown": bound.template_known_mm}
        bound_mm["NoisyReference"] = bound.noisy_reference_mm
        _write_bold(place, view, images, _bold_json(self._plan, run, view, bound_mm))
        if view.echo in (None, 1):
            _write_events(place, self._plan, run)
            _write_truth(place, self._plan, run, bound_mm)

    def _place(self, series: tuple[int | None, int]) -> _Place:
        session = None if series[0] is None else f"ses-{series[0]:02d}"
        name = f"task-{self._plan.task}_run-{series[1]}"
        return _Place(self._out, f"sub-{self._subject:02d}", session, name)

    def _run(self, head: phantom.FineHead, view: _View, series: tuple[int | None, int]) -> Run:
        """A run as one of its views shows it; all views have one motion and one noise."""
        plan, (session, number) = self._plan, series
        path = [number] if session is None else [number, session]
        seed = _seed(plan.seed, self._subject, *path)
        poses, effects = plan.poses(seed), plan.effects
        if session is not None:
            poses = poses @ _session_pose(_seed(plan.seed, self._subject, 0, session))
        if view.is_sbref:
            poses = _sbref_pose(plan, seed) @ poses[:1]
            effects = replace(effects, dropped_slices=0, first_brighter=0, activation_percent=0)
        run = phantom.make_run(head, plan.scanner(), poses, effects, seed)
        if series not in self._first:
            self._first[series] = run.noise_sd, run.poses[0]
            return run
        own_noise = _seed(seed, view.echo or 0, int(view.is_sbref))
        return replace(run, noise_sd=self._first[series][0], seed=own_noise)


def _session_pose(seed: int) -> NDArray[np.float64]:
    """Where a head is put down for a session, world from head."""
    shift_mm, turn_deg = np.random.default_rng(seed).uniform(-1, 1, (2, 3))
    return phantom.rigid(_SESSION_SHIFT_MM * shift_mm, _SESSION_TURN_DEG * turn_deg)


def _sbref_pose(plan: StudyPlan, seed: int) -> NDArray[np.float64]:
    """Where a head is in its SBRef, from where it is in volume 0."""
    if plan.motion == "still":
        return np.eye(4)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(5,)))
    shift_mm, turn_deg = rng.normal(size=(2, 3)) * _SBREF_JITTER
    return phantom.rigid(shift_mm, turn_deg)


def _write_bold(place: _Place, view: _View, images: _Images, sidecar: Mapping[str, Any]) -> None:
    run, volumes = images
    header = _header(run, (*run.scanner.shape, len(run)), "int16")
    parts = (volume.tobytes() for volume in volumes)
    write.put_nifti(place.raw(view, ".nii.gz"), header, parts)
    write.put_json(place.raw(view, ".json"), sidecar)


def _write_events(place: _Place, plan: StudyPlan, run: Run) -> None:
    if plan.effects.activation_percent:
        blocks = task_blocks_s(run.scanner, len(run))
        events: dict[str, list[Any]] = {"onset": [onset for onset, _ in blocks]}
        events["duration"] = [duration for _, duration in blocks]
        events["trial_type"] = ["task"] * len(blocks)
        write.put_table(place.events(), events)


def _write_sbref(place: _Place, plan: StudyPlan, view: _View, images: _Images) -> None:
    run, (volume,) = images
    write.put_volume(place.raw(view, ".nii.gz"), _header(run, run.scanner.shape, "int16"), volume)
    values = _common_json(plan, view) | {"Simulation": {"seed": run.seed, "noise_sd": run.noise_sd}}
    write.put_json(place.raw(view, ".json"), values)


def _write_truth(place: _Place, plan: StudyPlan, run: Run, bound_mm: Mapping[str, float]) -> None:
    sources = [place.uri(view) for view in _views(plan) if not view.is_sbref]
    common = {"Sources": sources, BOUND: bound_mm}
    transforms = place.truth(TRANSFORMS)
    put_text(transforms, write.itk_transforms(run.truth))
    where = {"WorldFromHead": run.poses[0].tolist()}
    write.put_json(transforms.with_suffix(".json"), common | TRANSFORMS_JSON | where)
    table = place.truth("desc-truth_timeseries.tsv")
    numbers = np.array([phantom.numbers_of(matrix) for matrix in run.truth])
    columns: dict[str, Any] = {name: numbers[:, i].tolist() for i, name in enumerate(COLUMNS)}
    columns["bent"] = run.bent_mm.tolist()
    columns["gain"] = run.gains.tolist()
    columns["dropped_slices"] = (run.lost < 1).sum(axis=1).tolist()
    write.put_table(table, columns)
    write.put_json(table.with_suffix(".json"), common | TABLE_JSON)
    mask = place.truth(BRAIN)
    write.put_volume(mask, _header(run, run.scanner.shape, "uint8"), _brain(run))
    write.put_json(place.truth("desc-brain_mask.json"), {"Sources": sources, "Type": "Brain"})


def _write_sbref_truth(place: _Place, view: _View, sbref_from_first: NDArray[np.float64]) -> None:
    transforms = place.truth(SBREF_TRANSFORM)
    put_text(transforms, write.itk_transforms(sbref_from_first[None]))
    values = TRANSFORMS_JSON | {
        "Format": "ITK text, one affine transform",
        "Direction": "a point of volume 0 -> the point of the SBRef (pull)",
        "Sources": [place.uri(view)],
    }
    write.put_json(transforms.with_suffix(".json"), values)


def _brain(run: Run) -> NDArray[np.uint8]:
    """Mask of the brain in volume 0, (nz, ny, nx)."""
    mask = np.zeros(run.scanner.shape[::-1], np.uint8)
    voxel = np.linalg.inv(run.affine)[:3] @ np.c_[run.brain_mm, np.ones(len(run.brain_mm))].T
    x, y, z = np.rint(voxel).astype(int)
    mask[z, y, x] = 1
    return mask


TRANSFORMS_JSON = {
    "Format": "ITK text, one affine transform a volume, in the order of the volumes",
    "Direction": "a point of volume 0 -> the point of the volume (pull)",
    "CoordinateSystem": "LPS+ (ITK)",
    "TranslationUnits": "mm",
    "RotationCentre": "world origin",
    "CoordinatesOfWorldFromHead": "RAS+ mm; a point of the head -> where it is in volume 0",
}
_TURN = "volume 0 -> volume, RAS+, about the world origin; first x, then y, then z, then the shift"
TABLE_JSON: dict[str, Any] = {
    **{f"trans_{axis}": {"Description": f"Shift along {axis}: {_TURN}", "Units": "mm"}
       for axis in "xyz"},
    **{f"rot_{axis}": {"Description": f"Turn about {axis}: {_TURN}", "Units": "rad"}
       for axis in "xyz"},
    "bent": {
        "Description": "Mean distance over the brain between where a head that moves from slice to "
        "slice is and where the volume's rigid transform, the closest to it, puts it",
        "Units": "mm",
    },
    "gain": {"Description": "Factor on the signal"},
    "dropped_slices": {
        "Description": f"Number of slices that keep {DROPPED_SIGNAL:g} of their signal"
    },
}  # fmt: skip


def _common_json(plan: StudyPlan, view: _View) -> dict[str, Any]:
    """What the sidecars of bold and sbref files say alike."""
    values: dict[str, Any] = {
        "TaskName": plan.task,
        "TaskDescription": "20 s of rest and 20 s of task in turn"
        if plan.effects.activation_percent
        else "No task",
        "PhaseEncodingDirection": "j",
        "MagneticFieldStrength": 3,
        "Manufacturer": "keepstill",
    }
    if view.echo_ms:
        values["EchoTime"] = round(view.echo_ms / 1000, 9)
    return values


def _bold_json(
    plan: StudyPlan, run: Run, view: _View, bound_mm: Mapping[str, float]
) -> dict[str, Any]:
    simulation = asdict(plan.effects) | {
        "seed": run.seed,
        "motion": plan.motion if plan.motion in KINDS else Path(plan.motion).name,
        "point_spread_voxels": list(plan.point_spread_voxels),
        "noise_sd": run.noise_sd,
    }
    values = _common_json(plan, view) | {
        "RepetitionTime": plan.tr_s,
        "Simulation": simulation,
        BOUND: bound_mm,
    }
    if run.scanner.slice_times_s:
        values["SliceTiming"] = list(run.scanner.slice_times_s)
    return values


def _header(run: Run, shape: tuple[int, ...], dtype: str) -> Any:
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_qform(run.affine, 1)
    header.set_sform(run.affine, 1)
    header.set_xyzt_units("mm", "sec")
    header["pixdim"][4] = run.scanner.tr_s if len(shape) == 4 else 0
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header


def _volumes(
    run: Run, n_threads: int, on_volume: Callable[[], object]
) -> Iterator[NDArray[np.int16]]:
    """Volumes in order, as many under way as there are threads."""
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: list[Any] = []
        for t in range(len(run) + n_threads):
            if t < len(run):
                waiting.append(pool.submit(_whole_numbers, run, t))
            if t >= n_threads:
                yield waiting.pop(0).result()
                on_volume()


def _whole_numbers(run: Run, t: int) -> NDArray[np.int16]:
    return np.rint(phantom.volume_of(run, t)).clip(0, _INT16_LIMIT).astype(np.int16)


def _describe(out: Path, plan: StudyPlan) -> None:
    """What every data set has: its description, a README, its participants."""
    made_by = [{"Name": "keepstill simulate", "Version": __version__, "CodeURL": CODE_URL}]
    common = {"BIDSVersion": BIDS_VERSION, "GeneratedBy": made_by, "License": "CC0"}
    raw = {"Name": "Simulated study", "DatasetType": "raw", "Authors": ["keepstill simulate"]}
    write.put_json(out / "dataset_description.json", common | raw)
    truth = {"Name": "Truth of a simulated study", "DatasetType": "derivative"}
    links = {"DatasetLinks": {"raw": "../.."}, "SourceDatasets": [{"URL": "../.."}]}
    write.put_json(out / TRUTH / "dataset_description.json", common | truth | links)
    put_text(out / TRUTH / ".bidsignore", "\n".join(IGNORED_TRUTH) + "\n")
    put_text(out / "README.md", README)
    names = [f"sub-{subject:02d}" for subject in range(1, plan.subjects + 1)]
    seeds = [str(_seed(plan.seed, subject)) for subject in range(1, plan.subjects + 1)]
    write.put_table(out / "participants.tsv", {"participant_id": names, "head_seed": seeds})
    write.put_json(
        out / "participants.json",
        {"head_seed": {"Description": "Seed that the participant's head was drawn from"}},
    )


@contextlib.contextmanager
def _as_output_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error})") from error
