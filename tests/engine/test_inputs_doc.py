"""docs/inputs.md says what happens to each kind of input, with the message as it is printed.

`KEEPSTILL_WRITE_DOCS=1 pytest tests/engine/test_inputs_doc.py` writes the page anew.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import inputs
from keepstill.bids import derivative_folder, index_runs
from keepstill.config_files import load_config
from keepstill.errors import KeepstillError
from keepstill.settings import RealignSettings
from keepstill.stage import DEFAULTS, STAGED, stage_run
from keepstill.study import read_study

CLONE = Path(__file__).parents[2]
PAGE = CLONE / "docs" / "inputs.md"
HEAD = """\
# What happens to each kind of input

The rows down to the references were made and staged to write this page, and a test does it again
and compares; the others have tests of their own. A refused run is one line on the terminal and in
its log, exit status 2, nothing under a final name, and no harm to the other runs of the study. A
warning goes to the log, the run's manifest and its page.

| input | what happens | message |
|---|---|---|
"""


ROWS = (
    (
        "4-D NIfTI-1 or -2, .nii or .nii.gz, 8 to 64 bits, any byte order, slope, intercept",
        inputs.good,
    ),
    ("truncated gzip stream", inputs.truncated),
    ("gzip checksum wrong", inputs.bad_crc),
    ("gzip in gzip", inputs.compressed_twice),
    ("text under the name .nii.gz", inputs.text),
    ("text under the name .nii", inputs.plain_text),
    ("empty file", inputs.empty),
    ("file that is not there", inputs.missing),
    ("annexed file that was not fetched", inputs.broken_link),
    ("header that claims terabytes", inputs.terabytes),
    ("more voxels than the header says", inputs.longer_than_its_header),
    ("complex numbers", inputs.complex_numbers),
    ("one 3-D volume", inputs.one_3d_volume),
    ("one slice, without `in_plane`", inputs.one_slice),
    ("all zero", inputs.zeros),
    ("all NaN", inputs.not_numbers),
    ("all volumes identical", inputs.identical),
    ("sform and qform apart, without `affine_source`", inputs.position_apart),
    ("sheared affine", inputs.sheared),
    ("singular affine", inputs.singular),
    ("no unit of length", inputs.no_unit),
    ("lengths in micron", inputs.micron),
    ("1 mm voxels, no units", inputs.lost_geometry),
    ("no sidecar", lambda tmp_path: inputs.repetition_time(tmp_path, 2)),
    (
        "no sidecar, header in ms that says s",
        lambda tmp_path: inputs.repetition_time(tmp_path, 2000),
    ),
    ("no repetition time anywhere", lambda tmp_path: inputs.repetition_time(tmp_path, 0)),
    (
        "sidecar and header disagree",
        lambda tmp_path: inputs.repetition_time(tmp_path, 1.79, {"RepetitionTime": 2.0}),
    ),
    (
        "sidecar with a repetition time that is none",
        lambda tmp_path: inputs.repetition_time(tmp_path, 2, {"RepetitionTime": "2 s"}),
    ),
    ("sidecar that is no JSON", inputs.broken_sidecar),
    ("no SBRef, with `reference: sbref`", inputs.small, RealignSettings(reference="sbref")),
    (
        "other voxels than the reference of its session or subject, without `grid`",
        inputs.small,
        RealignSettings(shared_reference="sub-01_desc-shared_boldref.nii.gz"),
    ),
)
# What shows later than staging, or needs no message; tests in tests/engine/test_borders.py.
ALSO = (
    (
        "NaN or Inf in some voxels",
        "warned",
        "N values, in N voxels, are no numbers; they were filled from their neighbours and are "
        "left out of the figures",
    ),
    (
        "one volume all zero or NaN",
        "that volume is marked `failed` and listed; the run is done",
        "volumes that failed: N",
    ),
    (
        "first volumes brighter than the rest",
        "flagged, and never the reference (`dummy_scans`)",
        "",
    ),
    (
        "a volume that leaves the field of view or moves within itself",
        "marked `failed` and listed",
        "volumes that failed: N",
    ),
    (
        "no volume can be realigned",
        "refused",
        "none of N volumes could be realigned; look at the run, or choose another reference",
    ),
    (
        "stage root full",
        "staged on disk instead, and said",
        "N MB do not fit in DIR (REASON); staged in DIR instead",
    ),
    (
        "output folder not writable, or full",
        "refused before anything starts",
        "cannot write to DIR (REASON); choose another folder",
    ),
    (
        "output folder that fills meanwhile",
        "refused; what was written of the run is removed; the reason is in the log, for whose end "
        "room was kept, or on the terminal",
        "cannot write below DIR (No space left on device); free space there or choose another "
        "output_dir",
    ),
    (
        "output folder that holds the input",
        "refused",
        "FILE in DIR is the input itself and would be written over; choose another output folder",
    ),
    (
        "output folder that is another data set",
        "refused",
        "DIR is a data set that keepstill did not make; choose another folder",
    ),
)
STUDIES_HEAD = """
## Studies, tables of runs, configurations

Found before anything starts: one line on the terminal, exit status 2, and no run is begun.

| what is wrong | message |
|---|---|
"""
BOLD = ("sub-01_task-nback_bold.nii.gz", "sub-02_task-rest_bold.nii.gz")
# What is wrong, the files of the study, the configuration.
STUDIES = (
    ("no BOLD run", ("sub-01_T1w.nii.gz",), {}),
    ("a label that no run has", BOLD, {"tasks": ["nbak"]}),
    ("filters that leave nothing", BOLD, {"participants": ["01"], "tasks": ["rest"]}),
    ("two files for one run", (*BOLD, "sub-02_task-rest_bold.nii"), {}),
    ("phase images alone", ("sub-01_task-rest_part-phase_bold.nii.gz",), {}),
    ("a key that is misspelt", BOLD, {"participant": ["01"]}),
    ("a value out of range", BOLD, {"interpolation_degree": 9}),
    ("a reference that is not there", BOLD, {"reference": "mean.nii"}),
)
# What is wrong, and the table.
TABLES = (
    ("table: unknown column", "path\tsubjects\n"),
    ("table: missing file", "path\tsubject\na.nii.gz\t01\nb.nii.gz\t02\n"),
    ("table: two lines for one name", "path\tsubject\na.nii.gz\t01\na.nii.gz\t01\n"),
    ("table: label that does not fit", "path\tsubject\na.nii.gz\t0_1\n"),
)


NAMES_HEAD = """
## Names that are not quite BIDS

A file that looks like a BOLD run and is not named like one is never passed over in silence: where
subject, session or kind are in doubt it is left out, else it is taken, and its outputs keep the odd
name. `keepstill plan` and every call of `snakemake` say how many there are of each, and what is
wrong with the first three; so does a refusal for want of runs. Rename them, or list the runs in a
table.

| file | what happens | message |
|---|---|---|
"""
NAMES = (
    *("func/sub-01_task-rest_BOLD.nii.gz", "func/sub-01_task-rest_bold.NII.GZ"),
    *("func/sub-01_task-rest_bold.img", "func/sub-01_task-rest_fmri.nii.gz"),
    *("func/sub-01_task-rest_bold (copy).nii.gz", "func/task-rest_bold.nii.gz"),
    *("func/sub-02_task-rest_bold.nii.gz", "ses-1/func/sub-01_task-rest_bold.nii.gz"),
    *("func/sub-01_task-rest_desc-preproc_bold.nii.gz", "anat/sub-01_task-rest_bold.nii.gz"),
    *("func/sub-01_run-1_task-rest_bold.nii.gz", "func/sub-01_bold.nii.gz"),
    *("func/sub-01_task-two-back_bold.nii.gz", "func/sub-01_task-rest_run-a_bold.nii.gz"),
)


def name_row(name, bids_dir):
    """Row of a file whose name does not fit, beside a good one."""
    for path in (bids_dir / "sub-01" / name, bids_dir / "sub-01/func/sub-01_task-good_bold.nii"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (bids_dir / "dataset_description.json").write_text("{}")
    left_out, taken = index_runs(bids_dir).misnamed
    ((_, fault),) = left_out or taken
    return f"| `sub-01/{name}` | {'left out' if left_out else 'taken'} | `{fault}` |\n"


def refused(kind, config, tmp_path):
    """Row of a study that is refused before anything starts."""
    given = config | {"output_dir": str(tmp_path / "derivatives" / "out")}
    shipped, _ = load_config([], [], CLONE)
    with pytest.raises(KeepstillError) as caught:
        read_study(shipped | given, given, CLONE)
    message = str(caught.value).replace(str(tmp_path), "…")
    return f"| {kind} | `{message}` |\n"


def study_row(kind, files, config, tmp_path):
    for name in files:
        path = tmp_path / derivative_folder(name) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "dataset_description.json").write_text("{}")
    config = dict(config)
    if "reference" in config:
        config["reference"] = str(tmp_path / config["reference"])
    return refused(kind, config | {"bids_dir": str(tmp_path)}, tmp_path)


def table_row(kind, text, tmp_path):
    tmp_path.mkdir()
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "runs.tsv").write_text(text)
    return refused(kind, {"runs": str(tmp_path / "runs.tsv")}, tmp_path)


def row(kind, make, tmp_path, settings=DEFAULTS):
    tmp_path.mkdir()
    if settings.shared_reference:
        image = inputs.other_grid(tmp_path, settings.shared_reference)
        settings = replace(settings, shared_reference=str(image))
    try:
        stage_run(make(tmp_path), "sub-01_task-rest", None, tmp_path / "stage", settings)
    except KeepstillError as error:
        happens, said = "refused", [str(error)]
    else:
        said = json.loads((tmp_path / "stage" / STAGED).read_text())["warnings"]
        happens = "warned" if said else "works"
    message = " ".join(said).replace(str(tmp_path), "…").replace("|", "\\|")
    return f"| {kind} | {happens} | {f'`{message}`' if message else ''} |\n"


def test_the_page_says_what_happens(tmp_path):
    rows = [row(kind, make, tmp_path / str(i), *more) for i, (kind, make, *more) in enumerate(ROWS)]
    rows += [f"| {kind} | {happens} | {said and f'`{said}`'} |\n" for kind, happens, said in ALSO]
    rows.append(STUDIES_HEAD)
    for i, (kind, files, config) in enumerate(STUDIES):
        rows.append(study_row(kind, files, config, tmp_path / f"study-{i}"))
    for i, (kind, text) in enumerate(TABLES):
        rows.append(table_row(kind, text, tmp_path / f"table-{i}"))
    rows.append(NAMES_HEAD)
    rows += [name_row(name, tmp_path / f"name-{i}") for i, name in enumerate(NAMES)]
    page = HEAD + "".join(rows)
    if os.environ.get("KEEPSTILL_WRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page
