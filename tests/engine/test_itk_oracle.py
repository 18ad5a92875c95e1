"""ITK as an independent oracle for B-spline values and derivatives."""

import itk
import numpy as np
import pytest

from keepstill.moving import Asked, Coefficients, fill_values, prepare_moving
from keepstill.reference import world_gradient


@pytest.fixture(scope="module")
def volume():
    rng = np.random.default_rng(4)
    made = rng.normal(size=(12, 14, 16)).astype(np.float32)
    made.setflags(write=False)
    return made


def interpolator(volume, degree):
    image = itk.image_from_array(np.array(volume))
    kind = itk.BSplineInterpolateImageFunction[type(image), itk.D, itk.F]
    function = kind.New()
    function.SetSplineOrder(degree)
    function.SetInputImage(image)
    return image, function


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
def test_values(volume, degree):
    _image, function = interpolator(volume, degree)
    moving = prepare_moving(volume, degree, Coefficients(volume.shape))
    rows, spans = np.array([[0, 0, 0, 1, 0]]), np.array([[0, 1]])
    rng = np.random.default_rng(degree)
    for _ in range(40):
        position = rng.uniform(1, np.array(volume.shape[::-1]) - 2)
        out = np.empty(1, np.float32)
        matrix = np.diag([0.0, 0.0, 0.0, 1.0])  # no passes: by the sum over all taps
        matrix[:3, 3] = position
        assert fill_values(out, Asked(rows, spans), moving, matrix) == 1
        index = itk.ContinuousIndex[itk.D, 3]()
        for axis in range(3):
            index[axis] = float(position[axis])
        expected = function.EvaluateAtContinuousIndex(index)
        assert out[0] == pytest.approx(expected, abs=3e-5)


def test_derivatives(volume):
    _image, function = interpolator(volume, 5)
    affine = np.array([[-3.0, 0, 0, 5], [0, 2.9, 0.5, -4], [0, -0.6, 3.4, 8], [0, 0, 0, 1.0]])
    gradient = world_gradient(volume, affine)
    rng = np.random.default_rng(9)
    for _ in range(40):
        x, y, z = (int(rng.integers(2, n - 2)) for n in volume.shape[::-1])
        index = itk.ContinuousIndex[itk.D, 3]()
        index[0], index[1], index[2] = float(x), float(y), float(z)
        by_voxel = np.array(function.EvaluateDerivativeAtContinuousIndex(index))
        expected = np.linalg.inv(affine[:3, :3]).T @ by_voxel
        found = [component[z, y, x] for component in gradient]
        np.testing.assert_allclose(found, expected, atol=3e-5)
