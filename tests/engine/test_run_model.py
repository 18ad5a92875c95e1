"""What a run was made of is found in its residuals: fields of aliasing, shading, steps."""

from dataclasses import replace

import numpy as np
import pytest

import modelled
import naive
import runs
from keepstill import activity, geometry, phantom, run_model
from keepstill.estimate import allowed_step
from keepstill.kernels.aliasing import take_off_aliasing
from keepstill.kernels.sums import outside_normal
from keepstill.reference import Acquisition, prepare_reference
from keepstill.run_model import NO_MODEL, RunModel, fitted_to
from keepstill.scanner_effects import ScannerEffects, change_of

SHAPE, SIZES_MM = (32, 36, 24), (6.0, 6.0, 6.0)
N_VOLUMES = 48
NOISE, STRENGTH = 2.0, 20.0
# Steps weigh as they move a head.
RIDGE = run_model._RIDGE
WEIGHT = np.array([1.0] * 3 + [65.0] * 3)
UNIT_MM = 80.0


@pytest.fixture(scope="module")
def reference(head):
    affine = phantom.grid_affine(SHAPE, SIZES_MM)
    _, volumes = runs.head_run(head, np.array([np.eye(4)]), SHAPE, affine, tsnr=100)
    return prepare_reference(volumes[0], affine, modelled.SETTINGS, Acquisition(ghost_axis=1))


@pytest.fixture(scope="module")
def maps(reference):
    """Voxel -> voxel by motions of many phases, (m, 4, 4)."""
    rng = np.random.default_rng(0)
    drawn = [rng.uniform(-6, 6, 3) for _ in range(N_VOLUMES)]
    motions = [phantom.rigid(shift, rng.uniform(-3, 3, 3)) for shift in drawn]
    to_voxel = geometry.inverse(reference.affine)
    return np.array([to_voxel @ motion @ reference.affine for motion in motions])


@pytest.fixture(scope="module")
def spans(reference):
    """Some rows lose their first point in some volumes."""
    rows = reference.last.points.rows
    out = np.zeros((N_VOLUMES, len(rows), 2), np.int64)
    out[:, :, 1] = rows[:, 3]
    out[:, :, 0] = np.random.default_rng(1).integers(0, 2, out.shape[:2]).clip(max=rows[:, 3])
    return out


@pytest.fixture(scope="module")
def steps():
    """Steps (m, 8) of some 0.02 mm that the volumes still have to take, none on average."""
    out = np.random.default_rng(2).normal(size=(N_VOLUMES, 8)) * 0.02
    out[:, :6] /= WEIGHT
    out[:, 6:] = 0
    return out - out.mean(axis=0)


def made_of(model, reference, maps, spans, steps):
    """Residuals of steps, of what a model predicts, and of noise."""
    points, rng = reference.last.points, np.random.default_rng(3)
    residuals = steps.astype(np.float32) @ points.jacobian
    residuals += NOISE * rng.normal(size=residuals.shape)
    for values, to_moving, of_volume in zip(residuals, maps, spans, strict=True):
        if model.fields is not None:
            take_off_aliasing(values, points, of_volume, to_moving[:3], -model.fields)
        effects = ScannerEffects(-model.effects.shading, -model.effects.ghost)
        effects.take_off(values, reference, of_volume, to_moving)
        values[~naive.is_in_span(points, of_volume)] = 0
    residuals.setflags(write=False)
    return fitted_to(reference, residuals, range(len(maps)), spans, maps)


def naive_voxels(rows):
    """Indices z, y, x of the points of rows."""
    points = [(z, y, x + i) for y, z, x, n, _ in rows for i in range(n)]
    return np.array(points).T


def steps_after(model, reference, fitted, maps):
    """What is left of each volume's residuals, and the step that it finds then."""
    left, found, last = [], [], reference.last
    for residuals, spans, to_moving in zip(fitted.residuals, fitted.spans, maps, strict=True):
        values = residuals.copy()
        model.take_off(values, reference, spans, to_moving)
        normal = last.normal - outside_normal(last.points, spans)
        right = last.points.test_jacobian.astype(float) @ values.astype(float)
        found.append(allowed_step(normal, right, reference.basis)[0][:, 0])
        left.append(values)
    return np.array(left), np.array(found)


def size_mm(steps):
    return np.abs(steps[:, :6] * WEIGHT).max()


def test_fields_that_a_run_is_made_of(reference, maps, spans, steps):
    """Fields to the ridge's and noise's 7%, steps to a tenth; without fields they go astray."""
    n = reference.last.points.values.size
    fields = (STRENGTH * np.random.default_rng(4).normal(size=(7, n))).astype(np.float32)
    fields[0] = 0
    fitted = made_of(RunModel(fields), reference, maps, spans, steps)
    model = modelled.model_of(reference, fitted)
    assert not model.effects.shading.any()
    error = np.sqrt(np.square(model.fields - fields).mean(axis=1))
    assert error.max() < 0.07 * STRENGTH
    assert model.wave_power == pytest.approx(6 * STRENGTH**2, rel=0.1)
    left, found = steps_after(model, reference, fitted, maps)
    assert left.std() < 1.5 * NOISE < 0.1 * fitted.residuals.std()
    assert size_mm(found - steps) < 0.1 * size_mm(steps)
    _, astray = steps_after(NO_MODEL, reference, fitted, maps)
    assert size_mm(astray - steps) > 0.5 * size_mm(steps)


@pytest.mark.parametrize("strength", [0.03, -0.01, 0.0])
def test_ghost_that_stays_with_the_scanner(reference, maps, spans, steps, strength):
    """To a tenth of a percent of the image; shading is not made of it."""
    made = RunModel(None, ScannerEffects(np.zeros((4, 4)), strength))
    found = modelled.model_of(reference, made_of(made, reference, maps, spans, steps)).effects
    assert found.ghost == pytest.approx(strength, abs=0.001)
    assert not found.shading.any()


def test_a_ghost_turns_about_its_own_place(reference, maps):
    """What the slopes say is what the image half a field of view away does, on both halves."""
    to_moving = maps[1]
    half = np.array([0.0, SHAPE[1] // 2, 0.0])
    rows = reference.last.points.rows
    z, y, x = naive_voxels(rows)
    moved = half - np.linalg.inv(to_moving[:3, :3]) @ half
    slopes = moved @ reference.ghost_slopes
    image = np.roll(reference.volume, SHAPE[1] // 2, axis=1)
    gradient = np.array([np.gradient(image, axis=a)[z, y, x] for a in (2, 1, 0)])
    sign = np.where(y >= SHAPE[1] // 2, 1, -1)
    np.testing.assert_allclose(slopes, sign * (moved @ gradient), rtol=1e-4, atol=1e-3)


def test_nothing_but_noise_is_a_weak_model(reference, maps, spans, steps):
    """Fields as strong as seven numbers make them of noise; the steps are none the worse."""
    fitted = made_of(NO_MODEL, reference, maps, spans, steps)
    model = modelled.model_of(reference, fitted)
    assert not model.effects.shading.any()
    assert np.sqrt(np.square(model.fields).mean()) < 3 * NOISE / np.sqrt(N_VOLUMES)
    left, found = steps_after(model, reference, fitted, maps)
    assert size_mm(found - steps) < 0.1 * size_mm(steps)
    of_noise = left - steps.astype(np.float32) @ reference.last.points.jacobian
    seen = [naive.is_in_span(reference.last.points, of_volume) for of_volume in spans]
    of_noise = of_noise[:, np.all(seen, axis=0)]
    assert of_noise.var() == pytest.approx((1 - model.explained) * NOISE**2, rel=0.01)
    assert 6 / N_VOLUMES < model.explained < 7 / N_VOLUMES


@pytest.mark.parametrize("n_volumes", [12, 48])
def test_freedom_of_fields(reference, maps, spans, steps, n_volumes):
    """7 less what the ridge holds, by the normal matrices themselves; less for a still head."""
    points = reference.last.points
    for moving in (maps[:n_volumes], np.repeat(maps[:1], n_volumes, axis=0)):
        fitted = made_of(NO_MODEL, reference, moving, spans[:n_volumes], steps[:n_volumes])
        some = points._replace(rows=points.rows[::40])
        of_some = fitted._replace(spans=fitted.spans[:, ::40])
        normals = naive.normals_of_fields(some, of_some, RIDGE)
        held = np.mean([RIDGE * np.trace(np.linalg.inv(a)[1:, 1:]) for a in normals])
        found = modelled.model_of(reference, fitted).explained * n_volumes
        assert found == pytest.approx(7 - held, abs=0.1)
    assert found < 3


def shading_of(size, reference, seed):
    """A quadratic form of the scanner's position, of some size 80 mm from the head's middle."""
    form = size * np.random.default_rng(seed).normal(size=(4, 4))
    to_unit = geometry.compose(
        np.diag([1 / UNIT_MM] * 3 + [1.0]),
        geometry.translation(-reference.centre_mm),
        reference.affine,
    )
    return to_unit.T @ (form + form.T) / 2 @ to_unit


def over_the_head(form, reference):
    """A form's values at the points, about their mean."""
    voxels = np.array([voxel for voxel, _ in naive.voxels_of(reference.last.points.rows)])
    values = np.einsum("ni,ij,nj->n", voxels, form, voxels)
    return values - values.mean()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_shading_that_a_run_is_made_of(reference, maps, spans, steps, seed):
    shading = shading_of(0.15, reference, seed)
    fitted = made_of(RunModel(None, ScannerEffects(shading)), reference, maps, spans, steps)
    model = modelled.model_of(reference, fitted)
    expected, found = (over_the_head(form, reference) for form in (shading, model.effects.shading))
    assert expected.std() > 0.1
    assert (found - expected).std() < 0.1 * expected.std()
    _, after = steps_after(model, reference, fitted, maps)
    assert size_mm(after - steps) < 0.1 * size_mm(steps)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shading_along_any_axis(reference, maps, spans, steps, axis):
    """Rows of points run along x: a shading along them counts as one across them does."""
    shading = np.zeros((4, 4))
    shading[axis, 3] = shading[3, axis] = 0.5 * 0.3 * SIZES_MM[axis] / UNIT_MM
    fitted = made_of(RunModel(None, ScannerEffects(shading)), reference, maps, spans, steps)
    model = modelled.model_of(reference, fitted)
    expected, found = (over_the_head(form, reference) for form in (shading, model.effects.shading))
    assert (found - expected).std() < 0.1 * expected.std()


def test_a_tiny_shading_is_not_believed(reference, maps, spans, steps):
    shading = shading_of(0.02, reference, 1)
    assert 0.005 < over_the_head(shading, reference).std() < 0.035
    fitted = made_of(RunModel(None, ScannerEffects(shading)), reference, maps, spans, steps)
    assert not modelled.model_of(reference, fitted).effects.shading.any()


def test_shading_needs_points_that_all_see(reference, maps, spans, steps):
    shading = shading_of(0.15, reference, 1)
    halves = spans.copy()
    middle = spans[::2].sum(axis=2) // 2
    halves[::2, :, 1], halves[1::2, :, 0] = middle, spans[1::2].sum(axis=2) // 2
    fitted = made_of(RunModel(None, ScannerEffects(shading)), reference, maps, halves, steps)
    model = modelled.model_of(reference, fitted)
    assert not model.effects.shading.any() and np.isfinite(model.fields).all()


def test_a_ghost_that_no_point_shows_makes_no_shading(reference, maps, spans, steps):
    """As of a head on a black background: its column is 0, and once was taken for certain."""
    black = np.where(reference.volume > 200, reference.volume, np.float32(0))
    black = prepare_reference(black, reference.affine, modelled.SETTINGS)
    rows = black.last.points.rows
    whole = np.zeros((N_VOLUMES, len(rows), 2), np.int64)
    whole[:, :, 1] = rows[:, 3]
    fitted = made_of(NO_MODEL, black, maps, whole, steps)
    assert not modelled.model_of(black, fitted).effects.shading.any()
    shading = shading_of(0.15, black, 2)
    fitted = made_of(RunModel(None, ScannerEffects(shading)), black, maps, whole, steps)
    found = over_the_head(modelled.model_of(black, fitted).effects.shading, black)
    expected = over_the_head(shading, black)
    assert (found - expected).std() < 0.15 * expected.std()


def active_parts(reference):
    """1 in three balls of a fifteenth of the head, 0 elsewhere, at the reference's points."""
    places = np.array(naive_voxels(reference.last.points.rows)).T
    centres = places[np.random.default_rng(5).choice(len(places), 3, replace=False)]
    near = np.array([np.square(places - centre).sum(axis=1) for centre in centres]).min(axis=0)
    return near <= np.quantile(near, 1 / 15)


def with_activity(fitted, reference, strength):
    """The same residuals with blocks of a task, in parts of the head."""
    on = np.where(np.arange(len(fitted.slots)) % 16 < 8, strength, -strength)
    residuals = fitted.residuals + np.outer(on, active_parts(reference)).astype(np.float32)
    for values, spans in zip(residuals, fitted.spans, strict=True):
        values[~naive.is_in_span(reference.last.points, spans)] = 0
    return fitted._replace(residuals=residuals)


def test_activity_is_not_taken_for_motion(reference, maps, spans, steps):
    """As strong as the noise, half of the steps' error it makes is gone, and all of its pattern."""
    fitted = with_activity(made_of(NO_MODEL, reference, maps, spans, steps), reference, NOISE)
    model = modelled.model_of(reference, fitted)
    parts = active_parts(reference)
    found = model.activity.pattern != 0
    assert found[parts].mean() > 0.9 and found[~parts].mean() < 0.1  # the low-pass adds a rim
    _, seen = steps_after(model, reference, fitted, maps)
    _, astray = steps_after(replace(model, activity=None), reference, fitted, maps)
    assert size_mm(seen - steps) < 0.5 * size_mm(astray - steps)


def test_steps_leave_no_trace_in_the_probe(reference, maps, spans, steps):
    fitted = with_activity(made_of(NO_MODEL, reference, maps, spans, steps), reference, NOISE)
    probe = modelled.model_of(reference, fitted).activity.probe.astype(float)
    moved = reference.last.points.jacobian[:6].astype(float)
    assert np.abs(moved @ probe).max() < 1e-4 * np.abs(moved * probe).sum(axis=1).max()


@pytest.mark.parametrize("power", [-60, 60])
def test_activity_is_found_in_any_unit_of_intensity(reference, power):
    """A map of the course is as large as intensities: its numbers, and their sums, stay numbers."""
    rng = np.random.default_rng(6)
    on = np.where(np.arange(N_VOLUMES) % 16 < 8, 1.0, -1.0)
    parts = rng.random(3000) < 0.07
    plain = (rng.normal(size=(N_VOLUMES, 3000)) + np.outer(on, parts)).astype(np.float32)
    found = [activity._course(np.ldexp(plain, p)) for p in (0, power)]
    np.testing.assert_array_equal(*found)
    assert np.sign(found[0] * found[0][0]).tolist() == np.sign(on * on[0]).tolist()
    assert 0.5 <= np.abs(found[0]).max() < 1


def test_noise_is_no_activity(reference, maps, spans, steps):
    for made in (NO_MODEL, RunModel(None, ScannerEffects(np.zeros((4, 4)), 0.03))):
        fitted = made_of(made, reference, maps, spans, steps)
        assert modelled.model_of(reference, fitted).activity is None


@pytest.fixture(scope="module")
def both(reference, maps, spans, steps):
    """Residuals with fields, shading and activity, and the model of one rank with one thread."""
    n = reference.last.points.values.size
    fields = np.random.default_rng(4).normal(size=(7, n)).astype(np.float32)
    model = RunModel(fields, ScannerEffects(shading_of(0.15, reference, 2)))
    fitted = with_activity(made_of(model, reference, maps, spans, steps), reference, 2 * NOISE)
    return fitted, modelled.model_of(reference, fitted)


@pytest.mark.parametrize(("n_ranks", "n_threads"), [(1, 2), (2, 1), (3, 2), (20, 1)])
def test_the_same_bytes_for_any_number_of_ranks_and_threads(reference, both, n_ranks, n_threads):
    """On each rank; of twenty ranks some have no block."""
    fitted, expected = both
    assert expected.effects.shading.any() and len(reference.blocks) - 1 < 20
    for model in modelled.models_of_ranks(reference, fitted, n_ranks, n_threads):
        assert model.fields.tobytes() == expected.fields.tobytes()
        assert model.effects.shading.tobytes() == expected.effects.shading.tobytes()
        assert model.activity.pattern.tobytes() == expected.activity.pattern.tobytes()
        assert model.activity.probe.tobytes() == expected.activity.probe.tobytes()


def test_no_model_takes_nothing_off(reference, both, maps):
    fitted, _ = both
    values = fitted.residuals[0].copy()
    NO_MODEL.take_off(values, reference, fitted.spans[0], maps[0])
    np.testing.assert_array_equal(values, fitted.residuals[0])


def test_the_change_of_a_shading(reference, maps):
    """Its value at the source, less that at the voxel."""
    form = shading_of(0.3, reference, 5)
    voxel = np.array([4.0, -2.0, 7.0, 1.0])
    source = maps[3] @ voxel
    expected = source @ form @ source - voxel @ form @ voxel
    assert voxel @ change_of(form, maps[3]) @ voxel == pytest.approx(expected, rel=1e-9)
