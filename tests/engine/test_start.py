"""What a program does before its imports."""

import subprocess
import sys

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
    subprocess.run([sys.executable, "-c", CODE], check=True)
