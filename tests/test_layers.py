"""Modules import from the layers below them, never upwards."""

import ast
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "workflow" / "scripts"
ENGINE = SCRIPTS / "keepstill"
# From the bottom up; modules of one line do not import each other.
LAYERS = (
    ("", "errors"),
    ("files", "arrivals", "settings", "kernels", "start", "misnamed", "segments"),
    (
        *("geometry", "masks", "moving", "smooth", "survey", "lost_slices", "blobs", "team"),
        *("breathing", "cuts"),
    ),
    ("nifti", "bids", "lanes", "itk_bridge"),
    ("manifest", "run_table", "multi_echo"),
    ("stage", "scopes"),
    ("read", "reference"),
    ("estimate", "reslice", "figures", "maps", "write", "mean_echo"),
    ("scanner_effects", "activity", "error_bars", "transforms", "wide_start"),
    ("other_contrast",),
    ("run_model",),
    ("last_step", "realigned"),
    ("confounds", "truth"),
    ("sidecars",),
    ("collect", "report", "phantom", "apply", "summary", "verify"),
    ("realign", "echoes"),
    ("itk_engine", "ahead"),
    ("ranks", "warm", "progress"),
    ("config", "shared_reference"),
    ("config_files", "study", "simulate"),
    ("preflight", "selftest", "ladder"),
    ("job_requests",),
    ("tune",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Costly packages, and the one module that may import each. The ladder is a room of its own: a small
# second implementation, which has its own of both.
ONLY_IN = {
    "mpi4py": ("ranks.py", "ladder/teams.py"),
    "itk": ("itk_bridge.py", "ladder/itk_bridge.py"),
}

MODULES = sorted(ENGINE.rglob("*.py"))


def room(path):
    """Name of a module in LAYERS: its first folder or its own name."""
    name = path.relative_to(ENGINE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imported(path):
    """Full names of what a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_layer():
    assert {room(path) for path in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ENGINE)))
def test_no_upward_import(path):
    own = room(path)
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top in ONLY_IN:
            own_path = path.relative_to(ENGINE).as_posix()
            assert own_path in ONLY_IN[top], f"{own_path} imports {top}"
        target = rest.split(".")[0]
        if top == "keepstill" and target in LEVEL and target not in ("", own):
            assert LEVEL[target] < LEVEL[own], f"{own} imports {target}, which is not below it"


def test_the_ladder_shares_no_way_of_estimating():
    """The five classic rungs are second implementations: no kernel and no estimate of ours."""
    for name in ("classic", "reslicing", "loops", "teams", "itk_bridge", "rungs"):
        rooms = {
            module.split(".")[1]
            for module in imported(ENGINE / "ladder" / f"{name}.py")
            if module.startswith("keepstill.")
        }
        assert rooms <= {"ladder", "errors"}, name


def test_an_upward_import_would_be_seen(tmp_path):
    sneaky = tmp_path / "sneaky.py"
    sneaky.write_text("def f():\n    from keepstill.ranks import share\n    import mpi4py.MPI\n")
    assert {"keepstill.ranks", "keepstill.ranks.share", "mpi4py.MPI"} <= set(imported(sneaky))


def test_estimation_sees_arrays_only():
    """No path and no communicator below the border."""
    for name in ("estimate", "reslice", "reference", "masks", "geometry", "figures", "maps"):
        tops = {module.split(".")[0] for module in imported(ENGINE / f"{name}.py")}
        assert not tops & {"pathlib", "os", "io", "nibabel", "mpi4py"}, name


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.name)
def test_entry_points_are_thin(script):
    assert len(script.read_text().splitlines()) <= 40
