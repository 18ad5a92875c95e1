"""The phantom: a head of blobs and shells, moved by a known motion and seen by a scanner.

Whatever needs a made-up head takes it from here. The head is a formula of continuous space
(`head`), put on a grid of 1 mm or finer and blurred by the point spread (`fine`), moved (`motion`)
and sampled (`scanner`) without any use of the run's own voxel grid, so that no interpolator is
favoured; a `run` adds noise and other troubles, and `bound` says how well its motion can be known.
"""

from keepstill.geometry import displacement_mm
from keepstill.phantom.ball import ball, soft_ball
from keepstill.phantom.bound import Bound, cramer_rao, mean_displacement_mm
from keepstill.phantom.contrast import PLAIN, Contrast, default_echo_times_ms
from keepstill.phantom.fine import FineHead, fine_head, fine_heads
from keepstill.phantom.motion import (
    drawn_poses,
    numbers_of,
    pose_of,
    read_poses,
    rigid,
)
from keepstill.phantom.run import Effects, Run, clean_volume, make_run, volume_of
from keepstill.phantom.scanner import Scanner, grid_affine

__all__ = [
    "PLAIN",
    "Bound",
    "Contrast",
    "Effects",
    "FineHead",
    "Run",
    "Scanner",
    "ball",
    "clean_volume",
    "cramer_rao",
    "default_echo_times_ms",
    "displacement_mm",
    "drawn_poses",
    "fine_head",
    "fine_heads",
    "grid_affine",
    "make_run",
    "mean_displacement_mm",
    "numbers_of",
    "pose_of",
    "read_poses",
    "rigid",
    "soft_ball",
    "volume_of",
]
