"""Transforms of other tools, against nitransforms and scipy, and by what they say of each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreign import SHAPE, poses, put_all, put_rows, space_of
from keepstill import phantom
from keepstill.errors import InputError
from keepstill.transforms import Space, read_any
from keepstill.write import itk_transforms

GRIDS = [
    phantom.grid_affine(SHAPE, (3.0, 3.0, 4.0), axes, oblique_deg=oblique)
    for axes, oblique in (("LAS", 0), ("RAS", 0), ("LPS", 0), ("LAS", 11), ("RAS", 20), ("PSR", 7))
]


@pytest.mark.parametrize("affine", GRIDS)
def test_known_motion_in_every_format(affine, tmp_path):
    expected = poses()
    for name, path in put_all(tmp_path, expected, affine).items():
        found = read_any(path, space_of(affine))
        # nitransforms rounds an edge of AFNI's plumb grid to 0.1 um: 1e-5 mm in 100.
        tolerance = 1e-4 if name == "aff12" else 1e-9
        np.testing.assert_allclose(found, expected, atol=tolerance, err_msg=name)


def test_itk_text_is_exact_to_the_last_bit(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text(itk_transforms(poses()))
    np.testing.assert_array_equal(read_any(path, space_of(GRIDS[3])), poses())


def test_itk_centre_of_rotation(tmp_path):
    """By ITK itself."""
    import itk

    transform = itk.AffineTransform[itk.D, 3].New()
    matrix = poses()[1]
    transform.SetCenter([10.0, -20.0, 30.0])
    lps = np.diag([-1.0, -1, 1])
    transform.SetMatrix(itk.matrix_from_array(lps @ matrix[:3, :3] @ lps))
    transform.SetTranslation([1.0, 2.0, 3.0])
    itk.transformwrite([transform], str(tmp_path / "x.txt"))
    space = Space(np.eye(4), SHAPE, 1, lambda t: np.zeros(SHAPE))
    (found,) = read_any(tmp_path / "x.txt", space)
    for point in np.random.default_rng(1).normal(size=(5, 3)) * 50:
        expected = lps @ transform.TransformPoint(lps @ point)
        np.testing.assert_allclose(found[:3, :3] @ point + found[:3, 3], expected, atol=1e-9)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["RAS", "LAS"]))
@settings(max_examples=20, deadline=None)
def test_fsl_and_spm_say_the_same(tmp_path_factory, seed, axes):
    """FSL (rx, ry, rz, tx, ty, tz) = SPM (rx, ry, -rz, -tx, ty, tz) about the world's origin."""
    folder = tmp_path_factory.mktemp("same")
    shape = (21, 21, 21)
    affine = phantom.grid_affine(shape, (3.0, 3.0, 3.0), axes)
    rng = np.random.default_rng(seed)
    shifts, turns = rng.uniform(-3, 3, (2, 3)), rng.uniform(-0.3, 0.3, (2, 3))
    shifts[0] = turns[0] = 0
    rp = put_rows(folder / "rp_a.txt", np.hstack([shifts, turns]))
    signs = np.array([1, 1, -1]), np.array([-1, 1, 1])
    par = put_rows(folder / "a.par", np.hstack([turns * signs[0], shifts * signs[1]]))
    volume = np.zeros(shape, np.float32)
    volume[10, 10, 10] = 1
    space = Space(affine, shape, 2, lambda t: volume)
    np.testing.assert_allclose(affine @ [10, 10, 10, 1], [0, 0, 0, 1], atol=1e-9)
    np.testing.assert_allclose(read_any(rp, space), read_any(par, space), atol=1e-9)


def refused(path, words):
    """Whether a file is refused in one line that names it and says so."""
    with pytest.raises(InputError) as caught:
        read_any(path, space_of(GRIDS[0]))
    said = str(caught.value)
    return words in said and str(path) in said and "\n" not in said


def test_what_is_no_file_of_transforms_is_refused_in_words(tmp_path):
    assert refused(tmp_path / "none.txt", "not readable (No such file or directory)")
    assert refused(put_rows(tmp_path / "a.1D", np.zeros((5, 6))), "do not say what they turn about")
    assert refused(
        put_rows(tmp_path / "a.txt", np.zeros((5, 6))), "unknown kind of transforms; needs ITK"
    )
    assert refused(put_rows(tmp_path / "a.par", np.ones((5, 6))), "no row of zeros")
    assert refused(put_rows(tmp_path / "rp_a.txt", np.zeros((5, 7))), "7 columns in row 1; needs 6")
    assert refused(
        put_rows(tmp_path / "rp_b.txt", np.zeros((4, 6))), "4 transforms found, the run has 5"
    )
    odd = put_rows(tmp_path / "a.aff12.1D", np.tile(3.0 * np.eye(4)[:3].ravel(), (5, 1)))
    assert refused(odd, "volume 0 is no motion (determinant 27)")
    (tmp_path / "b.par").write_text("0 0 0 0 0 zero\n" * 5)
    assert refused(tmp_path / "b.par", "needs numbers")
    (tmp_path / "c.lta").write_bytes(b"\xff\xfe\x00")
    assert refused(tmp_path / "c.lta", "no text")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(empty, "a folder without files MAT_0000")
    put_rows(empty / "MAT_0001", np.eye(4))
    assert refused(empty, "MAT_0000 is missing")
    put_rows(empty / "MAT_0000", np.eye(4)[:2])
    assert refused(empty, "2 rows found; needs 4")
    text = itk_transforms(poses())
    (tmp_path / "x.txt").write_text(text.replace("AffineTransform_d", "Euler3DTransform_d"))
    assert refused(tmp_path / "x.txt", "Euler3DTransform_double_3_3 found")
    (tmp_path / "y.txt").write_text(text.replace("Parameters: ", "Parameters: 1 ", 1))
    assert refused(tmp_path / "y.txt", "no ITK transforms")
    (tmp_path / "z.txt").write_text(text.replace("Parameters: 1.0", "Parameters: nan"))
    assert refused(tmp_path / "z.txt", "is no motion")
