"""What a program does before its imports."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

import runs
from keepstill.stage import stage_run

CODE = """
import sys
from keepstill.start import start_quickly
start_quickly()
import numpy as np
import keepstill.collect, keepstill.ranks
from keepstill.geometry import compose
assert (compose(np.eye(4), np.eye(4)) == np.eye(4)).all()
assert "scipy.linalg" not in sys.modules
import scipy.linalg
assert scipy.linalg.det(np.eye(3)) == 1
"""


def test_scipy_stays_away_until_it_is_asked_for():
    """Once kernels are compiled, for which numba asks for it."""
    subprocess.run([sys.executable, "-c", CODE], check=False, capture_output=True)
    subprocess.run([sys.executable, "-c", CODE], check=True)


# What costs a tenth of a second or more to import, and no step of a run needs.
HEAVY = {
    *("scipy.linalg", "pandas", "pyarrow", "bids2table", "snakemake", "jsonschema", "matplotlib"),
    *("jinja2", "mpi4py", "itk", "nibabel.testing", "numba.np.arraymath", "yaml"),
}
STEPS = {
    "stage": ("import keepstill.stage, keepstill.mean_echo, keepstill.lanes", HEAVY | {"numba"}),
    "realign": ("from keepstill.start import start_quickly; start_quickly(); "
                "import keepstill.ranks, keepstill.realign, keepstill.warm", HEAVY | {"nibabel"}),
    "collect": ("from keepstill.start import start_quickly; start_quickly(); "
                "import keepstill.collect", HEAVY),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_step_imports_little(step):
    imports, unwanted = STEPS[step]
    code = f"import sys; {imports}; print(*sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    modules = set(told.split())
    assert "keepstill.settings" in modules
    assert not modules & unwanted


def test_kept_kernels_run_without_what_numba_needs_to_compile(tmp_path):
    """A whole run; the second process finds all kernels compiled."""
    source = runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run())
    code = (
        "import sys; from keepstill.__main__ import main\n"
        f"try: main(['realign', {str(source)!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "finally: print({'numba.np.arraymath', 'scipy.linalg'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code]
    told = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)
    ]
    assert told[1].splitlines()[-1] == "set()"


def test_a_staged_run_is_opened_without_nibabel(tmp_path):
    """By every rank, of which one alone writes headers; what it sees is what staging saw."""
    source = runs.write_run(tmp_path / "a_bold.nii.gz", runs.ball_run())
    stage_run(source, "a", None, tmp_path / "stage")
    code = (
        "import pathlib, sys; from keepstill.read import open_staged\n"
        f"run = open_staged(pathlib.Path({str(tmp_path / 'stage')!r}))\n"
        "print('nibabel' in sys.modules, run.volume(1).sum(), run.layout.affine.tolist())\n"
        "print(run.layout.header['pixdim'][4], 'nibabel' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    image = nib.load(source)
    total = np.asarray(image.dataobj)[..., 1].astype(np.float32).sum()
    assert told.stdout.splitlines() == [f"False {total} {image.affine.tolist()}", "2.0 True"]
