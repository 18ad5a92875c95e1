"""Expected errors: quantiles of displacements that are drawn."""

from dataclasses import replace

import numpy as np
import pytest

from keepstill.error_bars import (
    directions,
    displacement_form,
    expected_errors_mm,
    mean_square_mm2,
    with_error_bars,
    with_explained_noise,
)
from keepstill.estimate import Disagreement, Estimate

RADIUS_MM = 65.0
PROBABILITY = 0.68
UNKNOWN = np.full((6, 6), np.nan)


# Of a ball about the centre: a turn w moves its points by w^2 2/5 R^2 on average.
FORM = np.diag([1.0] * 3 + [0.4 * RADIUS_MM**2] * 3)


def covariance_of(seed, n_directions=6, size_mm=0.01):
    """A covariance of shifts (mm) and turns (rad), of less than full rank if asked for."""
    factor = np.random.default_rng(seed).normal(size=(6, n_directions)) * size_mm
    factor[3:] /= RADIUS_MM
    return factor @ factor.T


def estimate_with(noise, *disagreements):
    given = tuple(Disagreement(*numbers) for numbers in disagreements)
    return Estimate(np.eye(4), "ok", 3, 0.01, 1.0, 1.0, covariance=noise, disagreements=given)


def factors_of(estimates):
    """What the covariance of each volume is multiplied by."""
    found = with_error_bars(dict(enumerate(estimates)))
    return [found[t].covariance[0, 0] / e.covariance[0, 0] for t, e in enumerate(estimates)]


def drawn(covariance, n=200_000):
    return np.random.default_rng(9).multivariate_normal(np.zeros(6), covariance, n, method="svd")


def displacement_mm(errors):
    """Rms over the ball."""
    return np.sqrt(np.einsum("ta,ab,tb->t", errors, FORM, errors))


def test_mean_square_over_a_ball():
    """Of points drawn from the ball, moved by errors that are drawn too."""
    covariance = covariance_of(1)
    errors = drawn(covariance, 20_000)
    points = np.random.default_rng(2).uniform(-RADIUS_MM, RADIUS_MM, (40_000, 3))
    points = points[np.linalg.norm(points, axis=1) <= RADIUS_MM][:20_000]
    moved = errors[: len(points), :3] + np.cross(errors[: len(points), 3:], points)
    assert mean_square_mm2(covariance) == pytest.approx((moved**2).sum(axis=1).mean(), rel=0.03)


def test_displacement_form():
    """Of points anywhere, moved one by one."""
    rng = np.random.default_rng(3)
    points, motions = rng.normal(size=(50, 3)) * 40 + 5, rng.normal(size=(20, 6))
    form = displacement_form(points)
    for motion in motions:
        moved = motion[:3] + np.cross(motion[3:], points)
        assert motion @ form @ motion == pytest.approx((moved**2).sum(axis=1).mean())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_directions", [1, 2, 3, 6])
def test_quantile_of_drawn_errors(seed, n_directions):
    """Wilson & Hilferty's is right to 3% whatever the directions; those of a single one too."""
    covariance = covariance_of(seed, n_directions)
    expected = np.quantile(displacement_mm(drawn(covariance)), PROBABILITY)
    found = expected_errors_mm(covariance[None], FORM, None)
    np.testing.assert_allclose(found, [expected], rtol=0.03)


def test_the_error_of_the_reference_is_everybody_s():
    covariances = np.array([covariance_of(seed) for seed in range(3)])
    found = expected_errors_mm(covariances, FORM, 1)
    assert found[1] == 0
    for t in (0, 2):
        both = displacement_mm(drawn(covariances[t] + covariances[1]))
        assert found[t] == pytest.approx(np.quantile(both, PROBABILITY), rel=0.02)
    assert (found[[0, 2]] > expected_errors_mm(covariances, FORM, None)[[0, 2]]).all()


def test_what_is_not_known_stays_so():
    covariances = np.array([covariance_of(1), UNKNOWN, covariance_of(2)])
    assert np.isnan(expected_errors_mm(covariances, FORM, 0)).tolist() == [False, True, False]
    assert np.isnan(expected_errors_mm(covariances, FORM, 1)).tolist() == [True, False, True]
    assert np.isnan(expected_errors_mm(covariances, FORM, None)).tolist() == [False, True, False]


def test_no_noise_no_error():
    """A run that repeats its reference leaves no residual."""
    nothing = np.zeros((3, 6, 6))
    assert (expected_errors_mm(nothing, FORM, 0) == 0).all()
    assert (expected_errors_mm(nothing, FORM, None) == 0).all()
    estimate = estimate_with(nothing[0], (1.0, 40.0))
    assert (with_error_bars({0: estimate})[0].covariance == 0).all()


@pytest.mark.parametrize(("ratio", "expected"), [(3.0, 3.1), (0.5, 1.0), (1e6, 100.0)])
def test_volumes_that_differ_by_noise_count_as_their_mean(ratio, expected):
    """Ratios that scatter no more than their freedom makes them; never less than noise."""
    scattered = ratio * np.array([0.8, 1.2, 0.8, 1.2])
    estimates = [estimate_with(covariance_of(t), (r, 40.0)) for t, r in enumerate(scattered)]
    estimates.append(replace(estimates[0], status="failed", covariance=UNKNOWN, disagreements=()))
    found = factors_of(estimates)
    assert found[:4] == pytest.approx([expected] * 4) and np.isnan(found[4])


def test_the_cut_that_shows_most_counts():
    """In each volume; of volumes that differ by more than noise, each is believed."""
    calm, moved = [(1.0, 1e9)] * 2, [(5.0, 1e9), (2.0, 1e9)]
    pairs = zip(calm, moved, strict=True)
    estimates = [estimate_with(covariance_of(t), *both) for t, both in enumerate(pairs)]
    assert factors_of(estimates) == pytest.approx([5.2, 2.05], rel=1e-6)


def test_aliasing_comes_to_it():
    """The more of it was taken off, the more may be left: by the square of its power."""
    of_parts = estimate_with(covariance_of(1), (1.0, 1e9))
    found = factors_of([replace(of_parts, aliasing=power) for power in (0.0, 2.0, 4.0)])
    assert found == pytest.approx([1.0, 1.1, 1.4])


def test_ratios_are_believed_as_far_as_they_guess_best():
    """Of ratios that are drawn: no other line through the mean comes nearer to what they are of."""
    rng, freedom, n = np.random.default_rng(6), 12.0, 4000
    truth = 3.0 + rng.gamma(2.0, 1.5, n)
    ratios = truth * rng.chisquare(freedom, n) / freedom
    estimates = [estimate_with(covariance_of(1), (ratio, freedom)) for ratio in ratios]
    found = 1 + (np.array(factors_of(estimates)) - 1) / 1.05
    slope = np.polyfit(ratios, truth, 1)[0]
    assert np.polyfit(ratios, found, 1)[0] == pytest.approx(slope, rel=0.1)
    off = [np.square(guess - truth).mean() for guess in (found, ratios, ratios.mean())]
    assert off[0] < 0.9 * min(off[1:])


def test_a_head_without_cuts_has_the_least_factor():
    assert factors_of([estimate_with(covariance_of(1))]) == pytest.approx([1.0])


@pytest.mark.parametrize("n_directions", [1, 2, 3])
def test_directions_of_an_error(n_directions):
    """Of shifts alone, all alike."""
    covariance = np.diag([0.01] * n_directions + [0.0] * (6 - n_directions))
    assert directions(covariance) == pytest.approx(n_directions)


def test_noise_that_the_model_explains():
    """A quarter: the variance of residuals is 3/4, and so is what they say of the motion."""
    estimate = estimate_with(covariance_of(1), (2.0, 40.0))
    found = with_explained_noise(estimate, 0.25)
    np.testing.assert_allclose(found.covariance * 0.75**2, estimate.covariance)
    assert found.disagreements == estimate.disagreements
    unchanged = with_explained_noise(estimate, 0.0)
    np.testing.assert_array_equal(unchanged.covariance, estimate.covariance)


def test_without_any_known_error():
    found = with_error_bars({0: estimate_with(UNKNOWN), 1: estimate_with(UNKNOWN, (2.0, 40.0))})
    assert all(np.isnan(e.covariance).all() for e in found.values())
