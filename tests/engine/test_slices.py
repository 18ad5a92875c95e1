"""The picture of slices: rows, orientation, what is left out."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

from keepstill import phantom
from keepstill.report.slices import SHOWN, choose_slices, find_images, mosaic, slices_svg

SHAPE = (16, 20, 12)
IMAGE = "{http://www.w3.org/2000/svg}image"


def write_images(folder, axcodes="RAS", other=None):
    """Images of a head whose right front is bright; `other` is a map on a grid of its own."""
    affine = phantom.grid_affine(SHAPE, (3.0, 3.0, 4.0), axcodes)
    canonical = np.zeros(SHAPE, np.float32)
    canonical[3:13, 3:17, 2:10] = 100
    canonical[9:13, 10:17, 2:10] = 120
    plain = phantom.grid_affine(SHAPE, (3.0, 3.0, 4.0), "RAS")
    for name, ending in SHOWN.items():
        volume = (canonical > 0) * 1.0 if name in ("brain", "coverage") else canonical
        stored = nib.as_closest_canonical(nib.Nifti1Image(volume.astype(np.float32), plain))
        transform = nib.orientations.ornt_transform(
            nib.io_orientation(plain), nib.io_orientation(affine)
        )
        image = stored.as_reoriented(transform)
        if name == other:
            image = nib.Nifti1Image(np.ones((5, 5, 5), np.float32), np.eye(4))
        nib.save(image, folder / f"sub-01_task-rest{ending}")
    return find_images(folder, [path.name for path in folder.iterdir()])


def pictures(svg):
    """Embedded images, (ny, nx, 3 or 4)."""
    links = [
        value
        for element in ET.fromstring(svg).iter(IMAGE)
        for key, value in element.attrib.items()
        if key.endswith("href")
    ]
    data = [base64.b64decode(link.partition(",")[2]) for link in links]
    return [imread(io.BytesIO(content), format="png") for content in data]


def test_three_rows_of_slices(tmp_path):
    svg = slices_svg("sub-01_task-rest", write_images(tmp_path))
    found = pictures(svg)
    assert [picture.shape[:2] for picture in found] == [(20, 8 * 16)] * 3
    words = " ".join(re.sub(r"<[^>]+>", " ", svg).split())
    assert "reference" in words and "before" in words and "black 0 to yellow 120" in words


@pytest.mark.parametrize("axcodes", ["LAS", "LPS", "PSL"])
def test_every_storage_order_looks_the_same(axcodes, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    plain = slices_svg("a", write_images(tmp_path / "one"))
    assert slices_svg("a", write_images(tmp_path / "other", axcodes)) == plain


def test_right_is_right_and_front_is_up(tmp_path):
    image = np.zeros((*SHAPE, 3))
    image[14, 17, 5] = 1
    shown = mosaic(image, np.array([4, 5]))
    assert shown.shape == (20, 32, 3)
    assert np.argwhere(shown[..., 0]).tolist() == [[20 - 1 - 17, 16 + 14]]


def test_a_map_on_another_grid_is_left_out(tmp_path):
    found = pictures(slices_svg("a", write_images(tmp_path, other="before")))
    assert len(found) == 2


def test_slices_reach_from_foot_to_top():
    brain = np.zeros(SHAPE, bool)
    assert choose_slices(brain).tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    brain[5, 5, 3:6] = True
    assert choose_slices(brain).tolist() == [3, 4, 5]


def test_without_the_images_there_is_no_picture(tmp_path):
    write_images(tmp_path)
    names = [path.name for path in tmp_path.iterdir()]
    (tmp_path / "sub-01_task-rest_desc-brain_mask.nii.gz").unlink()
    assert find_images(tmp_path, names) == {}
