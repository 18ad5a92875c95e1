"""Pages from synthetic manifests and tables: complete, valid, escaped, equal bytes."""

import json
import os
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nibabel as nib
import numpy as np
import pytest

import keepstill
from keepstill import phantom
from keepstill.errors import InputError
from keepstill.report import write_run_page, write_study_page
from keepstill.report.render import number, size
from keepstill.report.run_page import name_volumes
from keepstill.report.run_record import consecutive, flatten, read_confounds, read_run
from keepstill.report.study_page import SPARK_HEIGHT, SPARK_POINTS, SPARK_WIDTH, sparkline
from keepstill.settings import RealignSettings
from keepstill.truth import BOUND, BRAIN, TRANSFORMS
from keepstill.write import itk_transforms

SVG = "{http://www.w3.org/2000/svg}"
ENGINE_ROOT = str(Path(keepstill.__file__).parents[1])
PAGE_OF_A_RUN = ("pages/sub-01_task-rest.html", "figures/sub-01_task-rest.svg")
ODD_NAME = "sub-01_task-a<b&c$d$_run-1"


def make_columns(n_volumes, step_mm, seed=0):
    """Motion that drifts, jumps, and starts at the reference; rotations in rad."""
    rng = np.random.default_rng(seed)
    motion = np.cumsum(rng.normal(0, step_mm, (n_volumes, 6)), axis=0)
    for jump in rng.integers(0, n_volumes, n_volumes // 80):
        motion[jump:] += rng.normal(0, 12 * step_mm, 6)
    motion[:, 3:] /= 57
    difference = np.abs(np.diff(motion, axis=0, prepend=motion[:1]))
    displacement = difference[:, :3].sum(1) + 50 * difference[:, 3:].sum(1)
    names = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
    columns = {name: motion[:, i] for i, name in enumerate(names)}
    columns["framewise_displacement"] = displacement
    columns["rmsd"] = 0.6 * displacement
    columns["dvars"] = 20 + 10 * displacement
    columns["std_dvars"] = 1 + 0.06 * rng.normal(size=n_volumes) + 0.7 * displacement
    for name in ("framewise_displacement", "rmsd", "dvars", "std_dvars"):
        columns[name][0] = np.nan
    columns["iterations"] = np.full(n_volumes, 4.0)
    columns["cost"] = np.full(n_volumes, 0.0123)
    columns["overlap"] = np.full(n_volumes, 0.97)
    columns["expected_error"] = np.full(n_volumes, 0.008)
    return columns


def write_table(path, columns, status, spikes=()):
    """`spikes`: pairs of a column's name and the volume that it stands for."""
    rows = ["\t".join([*columns, "status", *(name for name, _ in spikes)])]
    for volume, state in enumerate(status):
        cells = [float(columns[name][volume]) for name in columns]
        flags = ["1" if volume == flagged else "0" for _, flagged in spikes]
        rows.append("\t".join([*("n/a" if np.isnan(x) else repr(x) for x in cells), state, *flags]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def make_run(output_dir, run="sub-01_task-rest", n_volumes=40, step_mm=0.02, **choices):
    """Write a manifest and a table; return the manifest's path.

    `choices`: failed, outliers, non_steady (volumes), tr_s, seed, columns (replacing some),
    summary and settings (overriding some), warnings.
    """
    columns = make_columns(n_volumes, step_mm, choices.get("seed", 0))
    columns |= choices.get("columns", {})
    failed = choices.get("failed", [])
    status = ["reference"] + ["ok"] * (n_volumes - 1)
    for volume in failed:
        status[volume] = "failed"
        for name in ("framewise_displacement", "rmsd", "dvars", "std_dvars", "expected_error"):
            if name in columns:
                columns[name][volume] = np.nan
    table = f"{run.split('_')[0]}/func/{run}_desc-confounds_timeseries.tsv"
    flagged = sorted({*failed, *choices.get("outliers", [])})
    spikes = [
        *(
            (f"non_steady_state_outlier{k:02d}", t)
            for k, t in enumerate(choices.get("non_steady", []))
        ),
        *((f"motion_outlier{k:02d}", t) for k, t in enumerate(flagged)),
    ]
    write_table(output_dir / table, columns, status, spikes)
    settings = json.loads(RealignSettings().to_json()) | choices.get("settings", {})
    displacement = columns["framewise_displacement"]
    manifest = {
        "keepstill_version": "0.1.0",
        "run": run,
        "key": "a" * 64,
        "engine": "b" * 64,
        "settings": settings,
        "input": {"sha256": "c" * 64, "bytes": 59_000_000},
        "outputs": {
            path: {"sha256": "d" * 64, "bytes": 61_234_567}
            for path in (table, table.replace("confounds_timeseries.tsv", "hmc_bold.nii.gz"))
        },
        "summary": make_summary(displacement, settings["fd_outlier_mm"], failed)
        | {"tr_s": choices.get("tr_s", 2.0)}
        | choices.get("summary", {}),
        "warnings": choices.get("warnings", []),
    }
    path = output_dir / "manifests" / f"{run}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return path


def make_summary(displacement, threshold, failed):
    finite = displacement[np.isfinite(displacement)]
    return {
        "n_volumes": len(displacement),
        "mean_fd_mm": float(finite.mean()) if finite.size else None,
        "max_fd_mm": float(finite.max()) if finite.size else None,
        "n_outliers": int((finite > threshold).sum()),
        "n_failed": len(failed),
        "failed_volumes": failed,
        "mean_dvars": 22.5,
        "tsnr_before": 48.2,
        "tsnr_after": 55.1,
    }


def page_of(output_dir, run):
    return (output_dir / "pages" / f"{run}.html").read_text(encoding="utf-8")


def figure_of(output_dir, run):
    return ET.parse(output_dir / "figures" / f"{run}.svg").getroot()


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def parse_page(html):
    """The page's element tree, once the HTML and the XML parser of the library took it."""
    HTMLParser().feed(html)
    return ET.fromstring(html)


def links_of(tree):
    return [*(a.get("href") for a in tree.iter("a")), *(i.get("src") for i in tree.iter("img"))]


def test_run_page_and_figure_exist_and_parse(tmp_path):
    write_run_page(make_run(tmp_path), tmp_path)
    tree = parse_page(page_of(tmp_path, "sub-01_task-rest"))
    text = text_of(tree)
    assert "Mean framewise displacement" in text
    for name in flatten(asdict(RealignSettings())):
        assert name in text
    assert next(tree.iter("img")).get("alt").startswith("Head motion of sub-01_task-rest over 40")
    titles = [text_of(element) for element in figure_of(tmp_path, "sub-01_task-rest").iter()]
    for title in ("translation", "rotation", "framewise displacement", "standardised DVARS"):
        assert title in titles
    assert "time (s)" in titles and "volume (the first is 0)" in titles


def test_links_of_a_run_page_lead_to_files(tmp_path):
    manifest = make_run(tmp_path, run=ODD_NAME)
    (tmp_path / f"sub-01/func/{ODD_NAME}_desc-hmc_bold.nii.gz").touch()
    write_run_page(manifest, tmp_path)
    write_study_page(tmp_path)
    for page in (tmp_path / "pages" / f"{ODD_NAME}.html", tmp_path / "index.html"):
        links = links_of(parse_page(page.read_text(encoding="utf-8")))
        assert links
        for link in links:
            assert (page.parent / unquote(link)).is_file(), link


def test_names_are_escaped_everywhere(tmp_path):
    write_run_page(make_run(tmp_path, run=ODD_NAME, warnings=["TR <unknown> & odd"]), tmp_path)
    write_study_page(tmp_path)
    for html in (page_of(tmp_path, ODD_NAME), (tmp_path / "index.html").read_text()):
        assert ODD_NAME not in html
        assert ODD_NAME in text_of(parse_page(html))
    assert "TR <unknown> & odd" in text_of(parse_page(page_of(tmp_path, ODD_NAME)))
    assert ODD_NAME in [text_of(e) for e in figure_of(tmp_path, ODD_NAME).iter(f"{SVG}text")]


def test_bytes_are_equal_in_another_folder_and_process(tmp_path):
    script = (
        "import sys; from pathlib import Path; from keepstill.report import *; "
        "out = Path(sys.argv[1]); write_study_page(out); "
        "[write_run_page(m, out) for m in sorted((out / 'manifests').glob('*'))]"
    )
    pages = []
    for folder in ("first", "elsewhere/second"):
        output_dir = tmp_path / folder
        for index in range(3):
            make_run(output_dir, f"sub-0{index}_task-rest", seed=index, failed=[5], n_volumes=70)
        command = [sys.executable, "-c", script, str(output_dir)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ENGINE_ROOT})
        files = [*output_dir.glob("pages/*"), *output_dir.glob("figures/*")]
        files.append(output_dir / "index.html")
        assert len(files) == 7
        pages.append({path.name: path.read_bytes() for path in files})
    assert pages[0] == pages[1]
    for content in pages[0].values():
        assert str(tmp_path).encode() not in content


def test_only_pages_and_figures_are_added(tmp_path):
    manifest = make_run(tmp_path)
    before = set(tmp_path.rglob("*"))
    write_run_page(manifest, tmp_path)
    write_study_page(tmp_path)
    new = {str(p.relative_to(tmp_path)) for p in set(tmp_path.rglob("*")) - before if p.is_file()}
    assert new == {
        "figures/sub-01_task-rest.svg",
        "pages/sub-01_task-rest.html",
        "index.html",
    }


def test_failed_volumes_are_named_and_leave_gaps(tmp_path):
    failed = [7, 12, 13, 14, 39]
    write_run_page(make_run(tmp_path, failed=failed), tmp_path)
    tree = parse_page(page_of(tmp_path, "sub-01_task-rest"))
    assert "5 of 40 volumes failed: 7, 12–14, 39" in text_of(tree)
    bodies = [[text_of(cell) for cell in row.iter("td")] for row in tree.iter("tr")]
    rows = {cells[0]: cells for cells in bodies if len(cells) == 5}
    assert set(rows) == {str(volume) for volume in failed}
    assert rows["12"] == ["12", "24.0", "4", "0.0123", "97"]
    figure = text_of(figure_of(tmp_path, "sub-01_task-rest"))
    assert "failed volumes: 5" in figure


def section_of(tree, title):
    """Text of the section below a heading."""
    sections = (s for s in tree.iter("section") if s.find("h2") is not None)
    return next(text_of(s) for s in sections if text_of(s.find("h2")) == title)


def test_flagged_volumes_are_those_of_the_table(tmp_path):
    """Failed volumes are flagged too, and named on their own."""
    choices = {"outliers": [9, 10, 22], "failed": [21], "non_steady": [0, 1, 2]}
    write_run_page(make_run(tmp_path, **choices), tmp_path)
    section = section_of(parse_page(page_of(tmp_path, "sub-01_task-rest")), "Outlier volumes")
    assert "9–10, 22" in section and "21" not in section
    assert "0–2" in section
    figure = text_of(figure_of(tmp_path, "sub-01_task-rest"))
    assert "before the steady state: 3" in figure and "failed volumes: 1" in figure


def test_bright_first_volumes_do_not_set_the_scale(tmp_path):
    columns = make_columns(40, 0.0)
    columns["std_dvars"][:4] = 1e6
    write_run_page(make_run(tmp_path, columns=columns, non_steady=[0, 1, 2]), tmp_path)
    labels = [text_of(e) for e in figure_of(tmp_path, "sub-01_task-rest").iter(f"{SVG}text")]
    assert not [label for label in labels if "1e6" in label or "000000" in label]


def test_values_of_failed_volumes_are_not_drawn(tmp_path):
    columns = make_columns(40, 0.02)
    columns["trans_x"][20] = 1e6
    write_run_page(make_run(tmp_path, columns=columns, failed=[20]), tmp_path)
    labels = [text_of(e) for e in figure_of(tmp_path, "sub-01_task-rest").iter(f"{SVG}text")]
    assert not [label for label in labels if "1e6" in label or "000000" in label]


@pytest.mark.parametrize(
    ("case", "choices"),
    [
        ("two volumes", {"n_volumes": 2}),
        ("many volumes", {"n_volumes": 1500, "failed": [700, 701]}),
        ("all still", {"step_mm": 0.0}),
        ("huge motion", {"step_mm": 9.0}),
        ("all failed", {"n_volumes": 5, "failed": [0, 1, 2, 3, 4]}),
        ("no DVARS", {"columns": {"std_dvars": np.full(40, np.nan)}}),
        ("no TR, no tSNR", {"tr_s": None, "summary": {"tsnr_before": None, "tsnr_after": None}}),
    ],
)
def test_odd_runs_have_valid_pages(tmp_path, case, choices):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_run_page(make_run(tmp_path, **choices), tmp_path)
        write_study_page(tmp_path)
    text = text_of(parse_page(page_of(tmp_path, "sub-01_task-rest")))
    for word in (" nan", " inf", "None ", "-0.00"):
        assert word not in text, case
    parse_page((tmp_path / "index.html").read_text(encoding="utf-8"))
    labels = text_of(figure_of(tmp_path, "sub-01_task-rest"))
    assert ("time (s)" in labels) == ("tr_s" not in choices)
    assert ("no values" in labels) == (case in ("all failed", "no DVARS"))


def test_figure_of_a_long_run_stays_small(tmp_path):
    write_run_page(make_run(tmp_path, n_volumes=1500), tmp_path)
    assert (tmp_path / "figures" / "sub-01_task-rest.svg").stat().st_size < 300_000


def test_single_values_between_gaps_are_drawn_as_dots(tmp_path):
    columns = make_columns(100, 0.0)
    columns["std_dvars"][:] = np.nan
    columns["std_dvars"][50] = 1.0
    write_run_page(make_run(tmp_path, n_volumes=100, columns=columns), tmp_path)
    last_panel = figure_of(tmp_path, "sub-01_task-rest").find(f".//{SVG}g[@id='axes_4']")
    assert len(list(last_panel.iter(f"{SVG}use"))) > 0
    assert "no values" not in text_of(last_panel)


def test_study_lists_the_largest_mean_displacement_first(tmp_path):
    for run, mean_fd_mm in (("sub-a", 0.1), ("sub-b", 0.9), ("sub-c", None), ("sub-d", 0.3)):
        make_run(tmp_path, run, summary={"mean_fd_mm": mean_fd_mm})
    write_study_page(tmp_path)
    tree = parse_page((tmp_path / "index.html").read_text(encoding="utf-8"))
    rows = list(tree.iter("tr"))[1:]
    assert [text_of(row.find("th")) for row in rows] == ["sub-b", "sub-d", "sub-a", "sub-c"]
    assert text_of(rows[0].findall("td")[2]) == "0.900"
    assert text_of(rows[3].findall("td")[2]) == "n/a"


def test_study_shows_failures_and_what_differs(tmp_path):
    make_run(tmp_path, "sub-a", failed=[3])
    make_run(tmp_path, "sub-b", settings={"fd_radius_mm": 80.0})
    write_study_page(tmp_path)
    text = text_of(parse_page((tmp_path / "index.html").read_text(encoding="utf-8")))
    assert "1 (runs: 1)" in text
    assert "fd_radius_mm: 50.0 (runs: 1), 80.0 (runs: 1)" in text
    assert "interpolation_degree" not in text


def test_study_without_runs_says_so(tmp_path):
    write_study_page(tmp_path)
    tree = parse_page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "No run is complete yet." in text_of(tree)


def test_study_costs_less_than_a_kilobyte_a_run(tmp_path):
    sizes = []
    for count in (1, 41):
        for index in range(count):
            make_run(tmp_path, f"sub-{index:04}_ses-1_task-rest_run-1", 300, 0.1, seed=index)
        write_study_page(tmp_path)
        sizes.append((tmp_path / "index.html").stat().st_size)
    assert (sizes[1] - sizes[0]) / 40 < 1000


def test_pages_load_nothing_from_outside(tmp_path):
    write_run_page(make_run(tmp_path), tmp_path)
    write_study_page(tmp_path)
    for html in (page_of(tmp_path, "sub-01_task-rest"), (tmp_path / "index.html").read_text()):
        assert "http" not in html
        assert "url(" not in html
        assert "@import" not in html


def test_settings_that_are_not_the_default_stand_out(tmp_path):
    write_run_page(make_run(tmp_path, settings={"fd_radius_mm": 80.0}), tmp_path)
    tree = parse_page(page_of(tmp_path, "sub-01_task-rest"))
    rows = [[text_of(cell) for cell in row.iter("td")] for row in tree.iter("tr")]
    assert ["fd_radius_mm", "80.0", "50.0"] in rows
    assert ["fd_outlier_mm", "0.5", "the same"] in rows


def test_sparkline_keeps_peaks_and_counts_missing_as_zero():
    values = np.zeros(6000)
    values[[0, 4321]] = np.nan, 2.0
    values.setflags(write=False)
    path = sparkline(values)
    assert path.startswith(f"M0 {SPARK_HEIGHT}h") and path.endswith(f"V{SPARK_HEIGHT}")
    assert f"v-{SPARK_HEIGHT}h2v{SPARK_HEIGHT}" in path
    assert path.count("h") == SPARK_POINTS
    widths = [int(part.split("v")[0].split("V")[0]) for part in path.split("h")[1:]]
    assert sum(widths) == SPARK_WIDTH


def test_sparkline_of_nothing_is_empty():
    assert sparkline(np.empty(0)) == ""


@pytest.mark.parametrize(
    ("volumes", "words"),
    [([], ""), ([0], "0"), ([3, 4, 5, 9], "3–5, 9"), ([0, 2, 4], "0, 2, 4"), ([1, 2], "1–2")],
)
def test_volumes_are_named_in_stretches(volumes, words):
    assert name_volumes(np.array(volumes, dtype=np.intp)) == words
    covered = [v for a, b in consecutive(np.array(volumes, dtype=np.intp)) for v in range(a, b + 1)]
    assert covered == volumes


def test_numbers_and_sizes():
    assert [number(None, 2), number(float("nan"), 2), number(1.2345, 2)] == ["n/a", "n/a", "1.23"]
    assert number(-0.001, 2) == "0.00"
    assert [size(12), size(999_600), size(61_234_567)] == ["12 B", "1 MB", "61.2 MB"]


def test_what_is_no_manifest_is_refused(tmp_path):
    path = tmp_path / "sub-01.json"
    for text in ("{", "[]", '{"run": "sub-01"}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"sub-01\.json: not a manifest"):
            read_run(path)


def test_a_manifest_without_a_figure_that_pages_show_is_refused(tmp_path):
    manifest = make_run(tmp_path)
    values = json.loads(manifest.read_text())
    del values["summary"]["mean_fd_mm"]
    manifest.write_text(json.dumps(values))
    with pytest.raises(InputError, match="mean_fd_mm"):
        write_study_page(tmp_path)


def test_a_manifest_without_confounds_is_refused(tmp_path):
    manifest = make_run(tmp_path)
    values = json.loads(manifest.read_text())
    values["outputs"] = {"sub-01_bold.nii.gz": {"sha256": "", "bytes": 1}}
    manifest.write_text(json.dumps(values))
    with pytest.raises(InputError, match="names 1 outputs and none ends in"):
        write_run_page(manifest, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 columns, 0 rows"),
        ("rmsd\tstatus\n0.1\tok\n", "unreadable"),
        ("dvars\tstatus\nmuch\tok\n", "could not convert"),
        ("dvars\tstatus\n1.0\n", "unreadable"),
    ],
)
def test_a_broken_table_is_refused(tmp_path, text, message):
    path = tmp_path / "run_desc-confounds_timeseries.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_confounds(path, ["dvars"])


def test_a_missing_table_is_refused(tmp_path):
    manifest = make_run(tmp_path)
    Path(tmp_path / read_run(manifest).confounds).unlink()
    with pytest.raises(InputError, match="missing; realign the run again"):
        write_run_page(manifest, tmp_path)


def test_an_optional_column_may_be_missing(tmp_path):
    columns = make_columns(10, 0.02)
    del columns["expected_error"]
    write_table(tmp_path / "t.tsv", columns, ["ok"] * 10)
    confounds = read_confounds(tmp_path / "t.tsv", ["dvars"], ["expected_error"])
    assert np.isnan(confounds.columns["expected_error"]).all()
    assert np.isfinite(confounds.columns["dvars"]).sum() == 9


def make_simulated(tmp_path, n_volumes=12, failed=()):
    """A run that is 0.25 mm off in volume 3 and right elsewhere, and the truth of it."""
    manifest = make_run(tmp_path / "out", n_volumes=n_volumes, failed=list(failed))
    truth = np.array([phantom.rigid((0.1 * t, 0, 0.2), (0, 0.3 * t, 0)) for t in range(n_volumes)])
    truth[0] = np.eye(4)
    found = truth.copy()
    found[3, 0, 3] += 0.25
    transforms = "sub-01/func/sub-01_task-rest_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt"
    (tmp_path / "out" / transforms).write_text(itk_transforms(found))
    values = json.loads(manifest.read_text())
    values["outputs"][transforms] = {"sha256": "e" * 64, "bytes": 1000}
    manifest.write_text(json.dumps(values))
    stem = f"{tmp_path}/sub-01_task-rest_"
    path = Path(stem + TRANSFORMS)
    path.write_text(itk_transforms(truth))
    path.with_suffix(".json").write_text(json.dumps({BOUND: {"NoisyReference": 0.005}}))
    nib.Nifti1Image(np.ones((4, 5, 6), np.uint8), np.diag([3, 3, 3, 1.0])).to_filename(stem + BRAIN)
    return manifest, path


def test_a_simulated_run_shows_its_error(tmp_path):
    """Five panels, mean and worst in words and numbers, the same bytes twice."""
    manifest, truth = make_simulated(tmp_path)
    made = []
    for _ in range(2):
        write_run_page(manifest, tmp_path / "out", truth)
        made.append([read(tmp_path / "out" / path) for path in PAGE_OF_A_RUN])
    assert made[0] == made[1]
    page, picture = made[0]
    assert "Mean error against truth" in page and "in five panels" in page
    assert f"<dd>{0.25 / 11:.4f} <span>mm" in page and "<dd>0.2500 <span>mm" in page
    assert "error against truth" in picture
    assert f"mean {0.25 / 11:.4f}, worst 0.2500" in picture and "bound 0.0050" in picture
    height = float(ET.fromstring(picture).get("height").removesuffix("pt")) * 96 / 72
    assert f'height="{height:.0f}"' in page


def test_failed_volumes_have_no_error(tmp_path):
    manifest, truth = make_simulated(tmp_path, failed=[3])
    write_run_page(manifest, tmp_path / "out", truth)
    assert "mean 0.0000, worst 0.0000" in read(tmp_path / "out" / PAGE_OF_A_RUN[1])


def test_without_a_truth_there_is_no_error(tmp_path):
    manifest, _ = make_simulated(tmp_path)
    write_run_page(manifest, tmp_path / "out")
    assert all("against truth" not in read(tmp_path / "out" / path) for path in PAGE_OF_A_RUN)


def test_a_damaged_truth_is_told(tmp_path):
    manifest, truth = make_simulated(tmp_path)
    truth.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"truth unreadable .*; simulate the study again"):
        write_run_page(manifest, tmp_path / "out", truth)


def read(path):
    return path.read_text(encoding="utf-8")
