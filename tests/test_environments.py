"""The pip lists, the conda environment and the package agree with each other."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ENVS = ROOT / "envs"
# Those that are installed together, and those that have an environment of their own.
LISTS = ("build", "run", "report", "slurm", "itk", "test")
APART = ("openmpi", "peers")

# Names that conda-forge and bioconda give to packages of the pip lists.
PIP_FROM_CONDA = {
    "matplotlib-base": "matplotlib",
    "snakemake-minimal": "snakemake",
}
HASHED_REQUIREMENT = re.compile(r"^[a-z0-9.-]+==\S+( ; .+?)?( --hash=sha256:[0-9a-f]{64})+$")
INDEX_OR_HOST = re.compile(r"--index|--extra-index|--find-links|--trusted-host|\w+:/|@ |file:")


def requirement_lines(path):
    """Requirements of a pip list, comments and options taken off, one line each."""
    joined = path.read_text(encoding="utf-8").replace("\\\n", " ")
    bare = (" ".join(line.split("#", 1)[0].split()) for line in joined.splitlines())
    return [line for line in bare if line and not line.startswith("-")]


def pinned(*names):
    """Versions of the requirements of these lists, as {name: {version, ...}}."""
    versions = {}
    for name in names:
        for line in requirement_lines(ENVS / name):
            requirement = Requirement(line.split(" --hash", 1)[0])
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"{name}: {line} is no exact version"
            versions.setdefault(canonicalize_name(requirement.name), set()).add(pin.version)
    return versions


def specifiers_of(conda_environment):
    """Specifiers of a conda environment, {pip name: specifier}."""
    dependencies = yaml.safe_load((ENVS / conda_environment).read_text(encoding="utf-8"))[
        "dependencies"
    ]
    entries = [entry for entry in dependencies if isinstance(entry, str)]
    (from_pip,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    specifiers = {}
    for requirement in map(Requirement, entries + from_pip):
        name = PIP_FROM_CONDA.get(requirement.name, requirement.name)
        specifiers[canonicalize_name(name)] = str(requirement.specifier)
    return specifiers


@pytest.fixture
def conda_versions():
    """Specifiers of envs/keepstill.yaml under their pip names."""
    return specifiers_of("keepstill.yaml")


@pytest.fixture
def project():
    """The [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_list_is_covered():
    assert sorted(path.stem for path in ENVS.glob("*.txt")) == sorted(LISTS + APART)
    assert sorted(path.stem for path in ENVS.glob("*.in")) == sorted(LISTS + APART)


@pytest.mark.parametrize("name", LISTS + APART)
def test_every_requirement_is_pinned_and_hashed(name):
    lines = requirement_lines(ENVS / f"{name}.txt")
    assert lines
    assert [line for line in lines if not HASHED_REQUIREMENT.match(line)] == []


@pytest.mark.parametrize(
    "name",
    [
        "keepstill.yaml",
        "itk.yaml",
        *(name + end for name in LISTS + APART for end in (".in", ".txt")),
    ],
)
def test_no_index_host_or_path_is_named(name):
    lines = (ENVS / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if INDEX_OR_HOST.search(line)] == []


@pytest.mark.parametrize("name", LISTS + APART)
def test_compiled_list_has_what_was_asked(name):
    asked, compiled = pinned(f"{name}.in"), pinned(f"{name}.txt")
    assert asked
    assert {package: compiled.get(package) for package in asked} == asked


def test_lists_install_together():
    # A package may have two versions only where a marker splits them inside one list.
    everywhere = pinned(*(f"{name}.txt" for name in LISTS))
    for name in LISTS:
        for package, versions in pinned(f"{name}.txt").items():
            assert versions == everywhere[package], package


def test_conda_versions_are_those_of_the_lists(conda_versions):
    compiled = pinned("build.txt", "run.txt", "report.txt")
    unpinned = {"python", "pip"}
    for package in conda_versions.keys() - unpinned:
        expected = compiled.get(package, {"in no list"})
        assert {conda_versions[package].removeprefix("==")} == expected, package


def test_conda_has_all_direct_dependencies(conda_versions):
    asked = pinned("build.in", "run.in", "report.in")
    assert asked.keys() - conda_versions.keys() == set()


def test_itk_is_added_to_the_conda_environment(conda_versions):
    (itk,) = pinned("itk.in")
    itk_packages = {name for name in pinned("itk.txt") if name.startswith(itk)}
    added = {name: f"=={version}" for name in itk_packages for version in pinned("itk.txt")[name]}
    assert specifiers_of("itk.yaml") == conda_versions | added
    after = [(ENVS / f"{name}.post-deploy.sh").read_text() for name in ("keepstill", "itk")]
    assert after[0].replace("keepstill first", "keepstill-itk first") == after[1]


def test_package_accepts_the_pinned_versions(project):
    compiled = pinned("run.txt", "report.txt")
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, project["dependencies"] + extras):
        (version,) = compiled[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_python_range_is_one(project, conda_versions):
    spec = importlib.util.spec_from_file_location("check_python", ENVS / "check_python.py")
    check_python = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_python)
    (oldest_major, oldest), (newest_major, newest) = check_python.OLDEST, check_python.NEWEST
    checked = SpecifierSet(f">={oldest_major}.{oldest},<{newest_major}.{newest + 1}")
    assert SpecifierSet(project["requires-python"]) == checked
    assert SpecifierSet(conda_versions["python"]) == checked
