"""Realign a run with another tool, in the environment that has it (envs/peers.txt).

    python benchmarks/peer_realign.py nipy|ants BOLD OUT

OUT gets (n, 4, 4) matrices, world mm (RAS+) of volume 0 -> world mm of each volume, as .npy.
"""

import sys

import numpy as np

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def by_nipy(bold: str) -> np.ndarray:
    """`nipy.algorithms.registration.Realign4d`, its defaults; all slices at one time."""
    import nipy
    from nipy.algorithms.registration import Realign4d

    realigned = Realign4d(nipy.load_image(bold), tr=None)
    realigned.estimate(refscan=0)
    return np.array([transform.as_affine() for transform in realigned._transforms[0]])


def by_ants(bold: str) -> np.ndarray:
    """`ants.motion_correction`, BOLDRigid, against volume 0."""
    import ants

    image = ants.image_read(bold)
    fixed = ants.slice_image(image, axis=3, idx=0)
    found = ants.motion_correction(image, fixed, type_of_transform="BOLDRigid")
    return np.array([_of_ants(files[0]) for files in found["motion_parameters"]])


def _of_ants(path: str) -> np.ndarray:
    """Matrix of a transform file, from where it sends four points, LPS mm."""
    import ants

    transform = ants.read_transform(path)
    corners = [np.array(transform.apply_to_point(list(point))) for point in np.eye(4)[:, :3]]
    out = np.eye(4)
    out[:3, 3] = corners[3]
    out[:3, :3] = np.column_stack(corners[:3]) - corners[3][:, None]
    return LPS_FROM_RAS @ out @ LPS_FROM_RAS


def main() -> None:
    """Parse, realign, save."""
    tool, bold, out = sys.argv[1:]
    np.save(out, {"nipy": by_nipy, "ants": by_ants}[tool](bold))


if __name__ == "__main__":
    main()
