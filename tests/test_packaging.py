"""What pip gets: bounded dependencies, pins for all of them, and a wheel that works from anywhere."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
INFERENCE = "requirements-inference.txt"
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "constraints.txt")
SOURCES += (INFERENCE,)
FOLDERS = ("stepdistill_jax", "gin", "configs")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins():
    """Specifiers of constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(r.specifier).startswith("==") for r in requirements)
    return {canonicalize_name(r.name): r for r in requirements}


def direct(project) -> list[Requirement]:
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in project["dependencies"] + extras]


def test_the_project_names_released_versions_only():
    text = (ROOT / "pyproject.toml").read_text()
    for word in ("git+", "-nightly", ".dev", " @ http"):
        assert word not in text
        assert word not in (ROOT / "constraints.txt").read_text()


def test_every_direct_dependency_is_bounded_on_both_sides(project):
    for requirement in direct(project):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators in ({">=", "<"}, {"=="}), str(requirement)


def test_the_pins_satisfy_what_the_project_asks_for(project, pins):
    for requirement in direct(project):
        pin = pins[canonicalize_name(requirement.name)]
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_what_is_installed_here_is_what_is_pinned(project, pins):
    """So that the tests speak of the pinned versions."""
    import importlib.metadata

    for requirement in direct(project):
        pin = pins[canonicalize_name(requirement.name)]
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        assert pin.specifier.contains(installed), f"{requirement.name} {installed}, pinned {pin}"


def test_python_versions_are_those_with_tensorflow_text(project):
    assert project["requires-python"] == ">=3.11,<3.14"


def test_the_extras_of_the_documentation_are_there(project):
    page = (ROOT / "docs" / "guide" / "demo.md").read_text()
    table = page[page.index("| extra |") :]
    assert set(re.findall(r"`\[([\w-]+)\]`", table)) == set(project["optional-dependencies"])


def test_tensorflow_is_asked_for_only_where_tensorflow_text_has_wheels(project):
    by_name = {r.name: r for r in map(Requirement, project["dependencies"])}
    windows = {"sys_platform": "win32", "platform_machine": "AMD64"}
    for name in ("seqio", "tensorflow", "tensorflow-datasets"):
        marker = by_name[name].marker
        assert not marker.evaluate(windows)
        assert not marker.evaluate({"sys_platform": "darwin", "platform_machine": "x86_64"})
        for machine in ("x86_64", "aarch64"):
            assert marker.evaluate({"sys_platform": "linux", "platform_machine": machine})


def test_what_serves_a_model_is_the_project_without_tensorflow_and_seqio(project):
    """Which `predict`, `evaluate`, `export` and `serve` import neither of, tests in tests/inference say."""
    builders = {"seqio", "tensorflow", "tensorflow-datasets", "tensorflow-text"}
    needed = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    lines = (ROOT / INFERENCE).read_text().splitlines()
    listed = {line for line in lines if not line.startswith("#")}
    assert listed == {x for x in needed if Requirement(x).name not in builders}
    assert builders <= {Requirement(x).name for x in needed}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    """A copy of the sources, so that a build leaves nothing behind in the checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "gin" / "notes.txt~").write_text("an editor's left-over")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout) -> pathlib.Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", checkout / "wheels", checkout], check=True)
    (path,) = (checkout / "wheels").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """The wheel, alone in a folder; its dependencies are this environment's."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", target, wheel], check=True)
    return target


def run(installed: pathlib.Path, folder: pathlib.Path, *command: str) -> str:
    env = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def gin_files(folder: str) -> set[str]:
    return {p.relative_to(ROOT / folder).as_posix() for p in (ROOT / folder).rglob("*.gin")}


def test_the_wheel_holds_the_package_with_its_parts_and_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("gin", "configs"):
        assert {f"stepdistill_jax/_{folder}/{name}" for name in gin_files(folder)} <= names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "stepdistill_jax").rglob("*.py")}
    assert modules <= names
    assert "stepdistill_jax/planning/h100_sxm.txtpb" in names
    templates = {p for p in (ROOT / "stepdistill_jax").rglob("templates/*") if p.is_file()}
    assert {p.relative_to(ROOT).as_posix() for p in templates} <= names
    assert not [name for name in names if name.endswith("~")]


def test_the_wheel_puts_one_name_into_site_packages(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"stepdistill_jax"}


def test_the_sdist_builds_the_same_wheel(checkout):
    code = "import setuptools.build_meta as b; b.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("gin", "configs"):
        assert {f"{folder}/{name}" for name in gin_files(folder)} <= names
    assert {"setup.py", "LICENSE", "constraints.txt", INFERENCE} <= names


def test_the_installed_wheel_is_the_one_that_runs(installed, tmp_path):
    out = run(installed, tmp_path, "-c", "import stepdistill_jax; print(stepdistill_jax.__file__)")
    assert out.startswith(str(installed))


@pytest.mark.parametrize("entry", ["module", "script"])
def test_the_installed_command_shows_its_help_from_anywhere(installed, tmp_path, entry):
    script = str(installed / "bin" / "stepdistill")
    command = ["-m", "stepdistill_jax"] if entry == "module" else [script]
    assert "usage: stepdistill" in run(installed, tmp_path, *command, "--help")


def test_every_config_loads_by_name_from_the_wheel_and_gin_is_gin_config(installed, tmp_path):
    code = """
import gin
from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.commands.shipped import shipped_configs, shipped_folder
print(shipped_folder("gin"))
for name in shipped_configs():
    needed = ["TASK=mine", "INIT_FROM=models/t5"] if name == "finetune" else []
    load_config(name, needed)
    print(name)
assert callable(gin.configurable)
"""
    folder, *names = run(installed, tmp_path, "-c", code).splitlines()
    assert folder == str(installed / "stepdistill_jax" / "_gin")
    assert {f"{name}.gin" for name in names} == gin_files("configs")


def test_gin_is_gin_config_in_the_checkout_too():
    code = "import gin; gin.configurable; print(gin.__file__)"
    out = run(ROOT, ROOT, "-c", code)
    assert "site-packages" in out or "dist-packages" in out


def test_the_changelog_knows_the_version():
    import stepdistill_jax

    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[({re.escape(stepdistill_jax.__version__)}|Unreleased)\]", text, re.M)


def test_makefile_and_ci_run_the_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    called = set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.M))
    assert {"lint", "test"} <= called <= targets
    assert {"demo", "test", "test-slow", "lint", "format"} <= targets
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
