"""Make the demo study's runs from their public sources.

    python make_study.py SOURCE [--output STUDY]

SOURCE holds the folders ``forrest-oneback``, ``dcmqa-nih-ge`` and ``dcmqa-sag``: NIfTI files and
sidecars that dcm2niix made from the public DICOM files named in ``study/README.md``, and the
licence of each. Their sha256 stand below; a file that differs is refused.

What is done, and nothing else:

- A run keeps its voxels (int16 as stored), scl_slope, scl_inter, qform, sform and both codes.
- sub-01 keeps its first 42 of 156 volumes: three whole stimulus blocks, up to the onset of the
  fourth, in under 10 MB for the study. Its pixdim[4], 1.79 s by dcm2niix's estimate, becomes the
  2.0 s of its sidecar. Its events are those of the 84 s kept, without the ``stim_file`` column,
  since no stimuli are shipped.
- ``descrip`` loses what follows the echo time: the clock time of the acquisition.
- Sidecars keep the fields that BIDS defines for BOLD runs and that the source has, and gain
  TaskName and TaskDescription. CoilString and PulseSequenceName get BIDS's names.
  AcquisitionDuration goes: it is not BIDS's FrameAcquisitionDuration, but the whole series'.
- Licences are copied byte for byte, under the name of the subject they cover.

``README.md``, ``dataset_description.json``, ``participants.*`` and ``.bidsignore`` are written
by hand and left alone. The same zlib gives the same bytes every time: no clock time and no file
name in a gzip header. Only the standard library is needed.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import math
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Sidecar = dict[str, Any]

SOURCE_SHA256 = {
    "forrest-oneback/LICENSE": ("38b79a08150da787781c319264b20fb2149051f1ca7cb6d12c06800e4bef88f1"),
    "forrest-oneback/events.tsv": (
        "dac6c0d7f1b38c4eec2ace8b18ae7e8f08af5674bb062972c36e7fc1fb4fc07c"
    ),
    "forrest-oneback/sub-02_task-oneback_run-1_bold.json": (
        "3e4aac194a33e49c28e3c4aaff836aaf594925e8ae323d61b373138589dfa0f1"
    ),
    "forrest-oneback/sub-02_task-oneback_run-1_bold.nii.gz": (
        "2eb7948ab00c6d8a048584098107a8fb4d4dc70f9e823e5be1e537c33ae7a8bd"
    ),
    "dcmqa-nih-ge/LICENSE": ("0e21426a03fbf9171bcaf248987616cdaae3acf014ff8b196299cdd924336863"),
    "dcmqa-nih-ge/DCM2NIIX_regression_test_4.json": (
        "9e84e894c459de2a378e34349219f85fa5731d0dcec9aa1b03ce8e2dba961afb"
    ),
    "dcmqa-nih-ge/DCM2NIIX_regression_test_4.nii.gz": (
        "8a7097cc754ed6eaa5d3f380b5afdc23bdb803054e1b5df2d164638920206a38"
    ),
    "dcmqa-nih-ge/DCM2NIIX_regression_test_5.json": (
        "f219a1a525a22fdf880ebc6504df5031456b49b0fe751e5ec438a3e2708be512"
    ),
    "dcmqa-nih-ge/DCM2NIIX_regression_test_5.nii.gz": (
        "340c4b0000b09c65d6746395fa3ac3398cb73e6c8fa616ca450d9c6858391868"
    ),
    "dcmqa-nih-ge/DCM2NIIX_regression_test_6.json": (
        "16914f4a984498bafa645f39030a52c109930d684210f261c3052a04334f7932"
    ),
    "dcmqa-nih-ge/DCM2NIIX_regression_test_6.nii.gz": (
        "07005e3de8f70bce236efe6511dede8158abfbf8979c9d5acc5bf42832fb711c"
    ),
    "dcmqa-sag/LICENSE": ("f57a0e2789b3a3561a864cff5747d284128ad6f6fecf9c360f52d01ceffc9e9a"),
    "dcmqa-sag/2_fmri_SagAP.json": (
        "dc56396b9f816ae745ba8265bc7377500ff71268055cdfcc32e0eeeae67a4f22"
    ),
    "dcmqa-sag/2_fmri_SagAP.nii.gz": (
        "df66f434b8e423e852eef5a5354c53b75eecfb83f1bf600b0663f54fe0f5d52e"
    ),
}

# Fields of a source sidecar that BIDS 1.11 knows for a BOLD run, in the order they are written.
KEPT_FIELDS = (
    "RepetitionTime",
    "EchoTime",
    "FlipAngle",
    "SliceTiming",
    "DelayTime",
    "PhaseEncodingDirection",
    "EffectiveEchoSpacing",
    "TotalReadoutTime",
    "DwellTime",
    "SliceThickness",
    "ParallelReductionFactorInPlane",
    "ParallelReductionFactorOutOfPlane",
    "ParallelAcquisitionTechnique",
    "Manufacturer",
    "ManufacturersModelName",
    "SoftwareVersions",
    "MagneticFieldStrength",
    "ReceiveCoilName",
    "ReceiveCoilActiveElements",
    "MatrixCoilMode",
    "CoilCombinationMethod",
    "MRAcquisitionType",
    "ScanningSequence",
    "SequenceVariant",
    "ScanOptions",
    "SequenceName",
    "PulseSequenceType",
    "PulseSequenceDetails",
    "MTState",
    "SpoilingState",
    "NonlinearGradientCorrection",
)

# Fields that dcm2niix fills from a vendor's private tag, and BIDS's name for their content.
RENAMED_FIELDS = {"CoilString": "ReceiveCoilName", "PulseSequenceName": "PulseSequenceDetails"}

ONEBACK = "Blocks of 16 images of one category each; one-back matching."
HEAD_TURN = "No stimuli; the head is turned and lifted on purpose between volumes."
REST = "No stimuli; the head is turned on purpose during volumes (yaw, nose to the left shoulder)."

EVENT_COLUMNS = {
    "onset": {"Description": "Onset of the image, from the start of the run", "Units": "s"},
    "duration": {"Description": "Time for which the image was shown", "Units": "s"},
    "trial_type": {
        "Description": "Category of the image",
        "Levels": {
            "body": "Image of a body",
            "face": "Image of a face",
            "scene": "Image of a scene",
        },
    },
}

# NIfTI-1 header, little-endian: byte offsets, https://nifti.nimh.nih.gov/pub/dist/src/niftilib
HEADER_BYTES = 348
DIM_OFFSET, BITPIX_OFFSET, PIXDIM_OFFSET, VOX_OFFSET_OFFSET, DESCRIP_OFFSET = 40, 72, 76, 108, 148
DESCRIP_BYTES = 80


class SourceError(ValueError):
    """A source file that is missing or is not the one the study was made from."""


@dataclass(frozen=True)
class Run:
    """One run of the study and where it comes from.

    Attributes
    ----------
    source : str
        Path below the source folder, without extension.
    name : str
        BIDS stem without ``_bold``.
    task_description : str
        What the participant did.
    n_volumes : int or None
        Volumes to keep from the start; None keeps all.
    events : str or None
        Events file below the source folder.
    """

    source: str
    name: str
    task_description: str
    n_volumes: int | None = None
    events: str | None = None

    @property
    def subject(self) -> str:
        """Label with its key, as ``sub-01``."""
        return self.name.split("_")[0]

    @property
    def task(self) -> str:
        """Label of the task, without its key."""
        return self.name.split("_task-")[1].split("_")[0]


RUNS = (
    Run(
        "forrest-oneback/sub-02_task-oneback_run-1_bold",
        "sub-01_task-oneback_run-1",
        ONEBACK,
        n_volumes=42,
        events="forrest-oneback/events.tsv",
    ),
    Run("dcmqa-nih-ge/DCM2NIIX_regression_test_4", "sub-02_task-headturn_run-1", HEAD_TURN),
    Run("dcmqa-nih-ge/DCM2NIIX_regression_test_5", "sub-02_task-headturn_run-2", HEAD_TURN),
    Run("dcmqa-nih-ge/DCM2NIIX_regression_test_6", "sub-02_task-headturn_run-3", HEAD_TURN),
    Run("dcmqa-sag/2_fmri_SagAP", "sub-03_task-rest", REST),
)

LICENCES = {
    "sub-01_PDDL-1.0.txt": "forrest-oneback/LICENSE",
    "sub-02_BSD-2-Clause.txt": "dcmqa-nih-ge/LICENSE",
    "sub-03_BSD-2-Clause.txt": "dcmqa-sag/LICENSE",
}


def read_source(folder: Path, name: str) -> bytes:
    """Bytes of a source file, once its sha256 is the one expected.

    Parameters
    ----------
    folder : Path
        The source folder.
    name : str
        Path below it, one of `SOURCE_SHA256`.

    Returns
    -------
    bytes

    Raises
    ------
    SourceError
        If the file is missing or differs.
    """
    path = folder / name
    if not path.is_file():
        raise SourceError(f"{path}: no such file; the source folder must hold {name}")
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != SOURCE_SHA256[name]:
        raise SourceError(f"{path}: sha256 {sha256} found; needs {SOURCE_SHA256[name]}")
    return content


def crop_nifti(nifti: bytes, n_volumes: int | None, tr_s: float) -> bytes:
    """NIfTI-1 file with its first volumes, the repetition time given, and no clock time.

    Parameters
    ----------
    nifti : bytes
        Uncompressed single-file NIfTI-1, little-endian, four axes.
    n_volumes : int or None
        Volumes to keep; None keeps all.
    tr_s : float
        Repetition time for pixdim[4].

    Returns
    -------
    bytes
        The same file but for dim[4], pixdim[4], descrip and the volumes cut off.
    """
    if struct.unpack_from("<i", nifti)[0] != HEADER_BYTES:
        raise SourceError("not a little-endian NIfTI-1 file")
    n_axes, nx, ny, nz, n_found = struct.unpack_from("<5h", nifti, DIM_OFFSET)
    if n_axes != 4:
        raise SourceError(f"{n_axes} axes found; a run needs x, y, z and time")
    n_kept = n_found if n_volumes is None else n_volumes
    volume_bytes = nx * ny * nz * struct.unpack_from("<h", nifti, BITPIX_OFFSET)[0] // 8
    end = int(struct.unpack_from("<f", nifti, VOX_OFFSET_OFFSET)[0]) + n_kept * volume_bytes
    if len(nifti) < end:
        raise SourceError(f"{len(nifti)} bytes found; {n_kept} volumes need {end}")

    cropped = bytearray(nifti[:end])
    struct.pack_into("<h", cropped, DIM_OFFSET + 8, n_kept)
    struct.pack_into("<f", cropped, PIXDIM_OFFSET + 16, tr_s)
    descrip = nifti[DESCRIP_OFFSET : DESCRIP_OFFSET + DESCRIP_BYTES].split(b";")[0]
    struct.pack_into(f"<{DESCRIP_BYTES}s", cropped, DESCRIP_OFFSET, descrip)
    return bytes(cropped)


def compress(content: bytes) -> bytes:
    """Gzip at level 9, without clock time and file name, so that equal input gives equal bytes."""
    stream = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=stream, mtime=0) as file:
        file.write(content)
    return stream.getvalue()


def bids_sidecar(source: Sidecar, run: Run) -> Sidecar:
    """Sidecar of a run: its task, then the fields kept of the source's."""
    task = {"TaskName": run.task, "TaskDescription": run.task_description}
    named = {RENAMED_FIELDS.get(field, field): value for field, value in source.items()}
    return task | {field: named[field] for field in KEPT_FIELDS if field in named}


def crop_events(events: str, end_s: float) -> str:
    """Events that begin before `end_s` (s, from the run's start), as onset, duration and type."""
    rows = csv.DictReader(io.StringIO(events), delimiter="\t")
    kept = [row for row in rows if float(row["onset"]) < end_s]
    columns = list(EVENT_COLUMNS)
    lines = [columns, *([row[column] for column in columns] for row in kept)]
    return "".join("\t".join(line) + "\n" for line in lines)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with the same line ends on every system."""
    path.write_bytes(text.encode("utf-8"))


def write_json(path: Path, content: Sidecar) -> None:
    """Write `content` as indented JSON in its own order."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_run(source: Path, study: Path, run: Run) -> None:
    """Write one run and its sidecar into the study."""
    folder = study / run.subject / "func"
    folder.mkdir(parents=True, exist_ok=True)
    sidecar = bids_sidecar(json.loads(read_source(source, f"{run.source}.json")), run)
    nifti = gzip.decompress(read_source(source, f"{run.source}.nii.gz"))
    cropped = crop_nifti(nifti, run.n_volumes, sidecar["RepetitionTime"])
    (folder / f"{run.name}_bold.nii.gz").write_bytes(compress(cropped))
    write_json(folder / f"{run.name}_bold.json", sidecar)
    if run.events is not None:
        end_s = (run.n_volumes or math.inf) * sidecar["RepetitionTime"]
        events = crop_events(read_source(source, run.events).decode("utf-8"), end_s)
        write_text(folder / f"{run.name}_events.tsv", events)
        write_json(folder / f"{run.name}_events.json", EVENT_COLUMNS)


def write_licences(source: Path, study: Path) -> None:
    """Copy each subject's licence, byte for byte, under the subject's name."""
    folder = study / "licences"
    folder.mkdir(parents=True, exist_ok=True)
    for name, licence in LICENCES.items():
        (folder / name).write_bytes(read_source(source, licence))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 when the runs are written, 2 and one line when the source is not right."""
    parser = argparse.ArgumentParser(description="Make the demo study from its sources.")
    parser.add_argument("source", type=Path, help="folder with the source runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "study")
    parsed = parser.parse_args(arguments)
    try:
        for run in RUNS:
            write_run(parsed.source, parsed.output, run)
        write_licences(parsed.source, parsed.output)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
