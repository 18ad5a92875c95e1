"""Settings as frozen values: what a user may choose, checked once at the border."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from keepstill.errors import SettingsError

OUTSIDE = ("zero", "nan", "nearest")
FD_FILTERS = ("none", "notch", "lowpass")
ENGINES, CHECKS = ("native", "itk"), ("none", "itk")

# A check looks at every so many volumes.
CHECK_EVERY = 20
# What ITK can be given without a first pass of the other engine.
_ITK_REFERENCES = ("first", "middle")

# On what the motion of a multi-echo run is estimated, if not on an echo by its number.
SHORTEST, ALL_MEAN = "shortest", "all-mean"

# References that every run has one of in itself. Anything else but `SBREF` is the path of a file.
REFERENCES = ("first", "middle", "mean", "median", "lowest-motion")
# A reference that is another file for each run; it is resolved to that file's path.
SBREF = "sbref"
# Runs that end in one space, and on which grid.
SCOPES = ("run", "session", "subject")
GRIDS = ("auto", "reference", "own")


@dataclass(frozen=True)
class EstimateSettings:
    """How a volume's motion is found.

    Attributes
    ----------
    degree : int
        Degree of the B-spline that samples the moving volume, 1 to 5.
    lowpass_fwhm_voxels : float
        Full width at half maximum, in voxels per axis, of the Gaussian that low-passes the
        reference's Jacobian. Narrower lets interpolation error in, wider gives sharp edges away;
        flat between 1.6 and 2.
    last_lowpass_fwhm_voxels : float
        The same for the last step, which is taken once aliasing is known: it may be narrower. At
        1.4 voxels errors of blurred images are 3 to 5% larger, those of sharp ones hardly.
    tolerance_mm : float
        The last step is taken once no more than this (rms, mm) is to be expected of it.
    max_iterations : int
        A volume that has not converged by then is marked as failed.
    model_volumes : int
        Aliasing, shading and activity are learnt from at most so many volumes; 0 leaves them.
    min_overlap : float
        Smallest part of the reference's sampling points, 0 to 1, that must lie inside the
        moving volume's field of view.
    """

    degree: int = 5
    lowpass_fwhm_voxels: float = 1.8
    last_lowpass_fwhm_voxels: float = 1.1
    tolerance_mm: float = 0.01
    max_iterations: int = 40
    model_volumes: int = 96
    min_overlap: float = 0.5


@dataclass(frozen=True)
class RealignSettings:
    """Everything that changes a run's outputs; all of it enters the run's key.

    Attributes
    ----------
    reference : str
        ``first``, ``middle``, ``mean``, ``median``, ``lowest-motion``, ``sbref`` or the path of
        a 3-D NIfTI file.
    shared_reference : str
        Path of the image in whose space the run ends together with others; empty if it ends in
        its own. `reference` then says what the run's motion is relative to before that.
    grid : str
        Grid of a run that ends in the space of an image: that of the image (``reference``), the
        run's ``own``, or ``auto``: that of the image, which must not differ if it is shared.
    interpolation_degree : int
        Degree of the B-spline that reslices, 1 to 5.
    outside : str
        What a voxel holds whose source lies outside a volume's field of view: ``zero``, ``nan``
        (float32 only), or ``nearest``, the value at the nearest point of the field.
    common_field : bool
        Voxels that lie outside the field of any volume are ``outside`` in all.
    non_negative : bool
        Negative values, to which a spline swings at sharp edges, become 0.
    reslice : bool
        False writes transforms and tables only.
    output_dtype : str
        ``float32`` or ``int16`` (with a fitted scl_slope and scl_inter).
    output_desc : str
        The ``desc`` entity of the realigned run.
    fd_radius_mm : float
        Radius of the sphere on which rotations count in framewise displacement.
    fd_filter : str
        ``notch`` or ``lowpass`` adds a column of framewise displacement without breathing;
        ``none`` does not.
    fd_notch_low_per_min, fd_notch_high_per_min : float
        Breaths a minute that the notch stops.
    fd_lowpass_per_min : float
        Cycles a minute up to which the low-pass keeps motion.
    fd_outlier_mm, std_dvars_outlier : float
        A volume above either is flagged as an outlier.
    affine_source : str
        ``sform`` or ``qform`` says which affine is true; ``auto`` takes the sform if it has a
        code, and refuses two affines that disagree.
    dummy_scans : str or int
        Number of first volumes before the signal is steady; ``auto`` finds the brighter ones.
    in_plane : bool
        Motion within the slice plane only (two shifts, one rotation): for single slices.
    engine : str
        Who estimates and reslices: ``native``, or ``itk`` (references ``first`` and ``middle``).
    check : str
        ``itk`` has every 20th volume realigned by ITK too, and tells the difference; ``none``
        does not.
    estimate : EstimateSettings
    """

    reference: str = "first"
    shared_reference: str = ""
    grid: str = "auto"
    interpolation_degree: int = 5
    outside: str = "zero"
    common_field: bool = False
    non_negative: bool = False
    reslice: bool = True
    output_dtype: str = "float32"
    output_desc: str = "hmc"
    fd_radius_mm: float = 50.0
    fd_filter: str = "none"
    fd_notch_low_per_min: float = 12.0
    fd_notch_high_per_min: float = 18.0
    fd_lowpass_per_min: float = 6.0
    fd_outlier_mm: float = 0.5
    std_dvars_outlier: float = 1.5
    affine_source: str = "auto"
    dummy_scans: str | int = "auto"
    in_plane: bool = False
    engine: str = "native"
    check: str = "none"
    estimate: EstimateSettings = field(default_factory=EstimateSettings)

    def __post_init__(self) -> None:
        """Refuse what no engine could honour, in words."""
        for name, degree in (
            ("interpolation_degree", self.interpolation_degree),
            ("estimate degree", self.estimate.degree),
        ):
            if degree not in range(1, 6):
                raise SettingsError(f"{name}: {degree} found; needs a whole number from 1 to 5")
        if self.output_dtype not in ("float32", "int16"):
            raise SettingsError(
                f"output_dtype: {self.output_dtype!r} found; needs float32 or int16"
            )
        _check_space(self)
        _check_outside(self)
        _check_fd_filter(self)
        _check_engine(self)
        if self.affine_source not in ("auto", "sform", "qform"):
            raise SettingsError(
                f"affine_source: {self.affine_source!r} found; needs auto, sform or qform"
            )
        if self.dummy_scans != "auto" and not (
            isinstance(self.dummy_scans, int) and self.dummy_scans >= 0
        ):
            raise SettingsError(
                f"dummy_scans: {self.dummy_scans!r} found; needs auto or a number of volumes"
            )

    @property
    def uses_itk(self) -> bool:
        """Whether ITK has to be there."""
        return "itk" in (self.engine, self.check)

    @property
    def reslices_twice(self) -> bool:
        """Whether the reference is made of realigned volumes."""
        return self.reference in ("mean", "median")

    @property
    def image(self) -> Path | None:
        """File in whose space the run ends; None if that is its own."""
        if self.shared_reference:
            return Path(self.shared_reference)
        return None if self.reference in (*REFERENCES, SBREF) else Path(self.reference)

    @property
    def for_sharing(self) -> "RealignSettings":
        """Those that a reference depends on which others share; nothing is resliced."""
        return RealignSettings(
            reference=self.reference,
            interpolation_degree=self.interpolation_degree,
            reslice=False,
            affine_source=self.affine_source,
            dummy_scans=self.dummy_scans,
            in_plane=self.in_plane,
            estimate=self.estimate,
        )

    def to_json(self) -> str:
        """These settings as one line of JSON with sorted keys, equal for equal settings."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "RealignSettings":
        """Settings from `to_json`; missing keys take their default.

        Raises
        ------
        SettingsError
            For a key that no setting has.
        """
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RealignSettings":
        """Settings from a plain dictionary (`from_json` without the JSON)."""
        values = dict(values)
        nested = values.pop("estimate", {})
        _refuse_unknown(cls, values)
        _refuse_unknown(EstimateSettings, nested)
        return cls(estimate=EstimateSettings(**nested), **values)


def _check_space(settings: RealignSettings) -> None:
    """Refuse a grid that is none, and two images at once."""
    if settings.grid not in GRIDS:
        raise SettingsError(f"grid: {settings.grid!r} found; needs {', '.join(GRIDS)}")
    if settings.shared_reference and settings.reference not in (*REFERENCES, SBREF):
        raise SettingsError(
            f"reference: {settings.reference} found beside a shared reference; needs "
            f"{', '.join(REFERENCES)} or {SBREF}, or no shared reference"
        )


def _check_outside(settings: RealignSettings) -> None:
    """Refuse values outside the field that no file or mask could hold."""
    outside = settings.outside
    if outside not in OUTSIDE:
        raise SettingsError(f"outside: {outside!r} found; needs zero, nan or nearest")
    if outside == "nan" and settings.output_dtype != "float32":
        raise SettingsError(
            f"outside: nan found with {settings.output_dtype} voxels, which have no NaN; needs "
            "zero or nearest, or float32"
        )
    if outside == "nearest" and settings.common_field:
        raise SettingsError(
            "outside: nearest found with common_field, which leaves nothing to fill; needs zero "
            "or nan, or common_field: false"
        )


def _check_fd_filter(settings: RealignSettings) -> None:
    """Refuse what is no filter of breathing."""
    if settings.fd_filter not in FD_FILTERS:
        raise SettingsError(
            f"fd_filter: {settings.fd_filter!r} found; needs none, notch or lowpass"
        )
    low, high = settings.fd_notch_low_per_min, settings.fd_notch_high_per_min
    if not 0 < low < high:
        raise SettingsError(
            f"fd_notch_low_per_min: {low:g} found, fd_notch_high_per_min: {high:g}; the first "
            "needs to be above 0 and below the second"
        )
    if not settings.fd_lowpass_per_min > 0:
        raise SettingsError(
            f"fd_lowpass_per_min: {settings.fd_lowpass_per_min:g} found; needs cycles a minute, "
            "above 0"
        )


def _check_engine(settings: RealignSettings) -> None:
    """Refuse what ITK is not made to do here."""
    for name, value, known in (
        ("engine", settings.engine, ENGINES),
        ("check", settings.check, CHECKS),
    ):
        if value not in known:
            raise SettingsError(f"{name}: {value!r} found; needs {' or '.join(known)}")
    if settings.uses_itk and settings.in_plane:
        raise SettingsError("in_plane: true found; engine or check: itk needs motion in space")
    if settings.engine != "itk":
        return
    if settings.check == "itk":
        raise SettingsError("check: itk found with engine: itk, which it would check by itself")
    if settings.reference not in _ITK_REFERENCES:
        raise SettingsError(
            f"reference: {settings.reference} found; engine: itk needs "
            f"{' or '.join(_ITK_REFERENCES)} (check: itk takes any)"
        )
    if settings.shared_reference:
        raise SettingsError("engine: itk found; a shared reference needs native (or check: itk)")
    if settings.outside == "nearest":
        raise SettingsError("outside: nearest found; engine: itk needs zero or nan")


def with_sbref(settings: RealignSettings, sbref: Path | None) -> RealignSettings:
    """Settings that name a run's single-band reference by its path, if they ask for it."""
    if settings.reference != SBREF or sbref is None or settings.shared_reference:
        return settings
    return replace(settings, reference=str(sbref.absolute()))


def _refuse_unknown(kind: type, values: dict[str, Any]) -> None:
    known = {f.name for f in fields(kind)}
    for name in values:
        if name not in known:
            raise SettingsError(f"setting {name!r} is unknown; known: {', '.join(sorted(known))}")
