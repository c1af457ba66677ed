"""Reads every import of the package: imports only go down, and the heavy libraries stay where they are."""

import ast
import pathlib

import pytest

import stepdistill_jax

PACKAGE = pathlib.Path(stepdistill_jax.__file__).parent
NAME = "stepdistill_jax"

# The shelves in the order of the data, lowest first. A room is a folder with the folders inside it;
# rooms on one floor do not import each other.
FLOORS = (
    ("errors", "versions"),
    ("runtime",),
    ("data", "models"),
    ("tasks", "formats", "decoding"),
    ("batches", "inference"),
    ("training",),
    ("teacher", "experiments", "planning", "serving"),
    ("commands",),
    ("__main__",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
ROOT_MODULES = {"__init__", "__main__", "errors", "versions"}
MOST_PAIRS = 70  # of folders, one of which imports the other

# library -> where it may be imported
CONFINED = {
    "tensorflow": ("data/builder.py", "tasks/"),
    "tensorflow_datasets": ("data/builder.py", "tasks/"),
    "tensorflow_text": ("tasks/",),
    "seqio": ("tasks/",),
    "torch": ("formats/torch_bin.py", "teacher/"),
    "gin": ("commands/",),
}


def imports(source: str, module: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of each import, at any depth; `from a import b` gives `a.b`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level]
                base = ".".join([*above, *([base] if base else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    found.append((node.lineno, argument.value))
    return found


def wrong_imports(relative: str, source: str) -> list[str]:
    """What a file of the package may not import, one line each."""
    unit = relative.split("/")[0].removesuffix(".py")
    module = ".".join([NAME, *relative.removesuffix(".py").split("/")])
    wrong = []
    for line, name in imports(source, module):
        parts = name.split(".")
        if parts[0] == NAME and len(parts) > 1 and parts[1] in FLOOR_OF and parts[1] != unit:
            here, there = FLOOR_OF[unit], FLOOR_OF[parts[1]]
            if there > here or (there == here and here > 0):
                wrong.append(f"{relative}:{line}: {unit} must not import {parts[1]}")
        allowed = CONFINED.get(parts[0])
        if allowed is not None and not relative.startswith(allowed):
            wrong.append(f"{relative}:{line}: {parts[0]} belongs into {', '.join(allowed)}")
    return wrong


SOURCES = {p.relative_to(PACKAGE).as_posix(): p.read_text() for p in PACKAGE.rglob("*.py")}


def folder_pairs() -> set[tuple[str, str]]:
    """(folder, folder that one of its files imports from), the root's own modules left out."""
    pairs = set()
    for relative, source in SOURCES.items():
        here = relative.rpartition("/")[0]
        module = ".".join([NAME, *relative.removesuffix(".py").split("/")])
        for _, name in imports(source, module):
            parts = name.split(".")
            if parts[0] != NAME:
                continue
            there = next(
                (
                    "/".join(parts[1:end])
                    for end in range(len(parts), 1, -1)
                    if PACKAGE.joinpath(*parts[1:end]).is_dir()
                ),
                "",
            )
            if here and there and here != there:
                pairs.add((here, there))
    return pairs


def test_every_module_has_a_floor():
    units = {name.split("/")[0].removesuffix(".py") for name in SOURCES} - {"__init__"}
    assert units == set(FLOOR_OF)


def test_only_four_modules_lie_loose_at_the_root():
    loose = {name.removesuffix(".py") for name in SOURCES if "/" not in name}
    assert loose == ROOT_MODULES


def test_imports_only_go_down():
    assert len(SOURCES) > 100
    wrong = [line for r, s in SOURCES.items() if r != "__init__.py" for line in wrong_imports(r, s)]
    assert wrong == []


def test_few_folders_import_each_other():
    pairs = folder_pairs()
    assert ("training", "batches") in pairs  # imports are seen
    assert len(pairs) <= MOST_PAIRS, sorted(pairs)


def test_the_package_itself_imports_nothing_but_what_is_asked_for():
    assert {name for _, name in imports(SOURCES["__init__.py"], NAME)} == {"importlib"}


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("models/t5.py", "from stepdistill_jax.training.config import TrainConfig"),
        ("models/t5.py", "from stepdistill_jax import training"),
        ("models/t5.py", "import stepdistill_jax.data.objectives"),
        ("models/t5.py", "from ..training import config"),
        ("runtime/files.py", "from stepdistill_jax.commands import main"),
        ("inference/predict.py", "def f():\n    from stepdistill_jax.batches import batch"),
        ("inference/predict.py", "def f():\n    import tensorflow as tf"),
        ("inference/predict.py", "import importlib\nimportlib.import_module('seqio')"),
        ("data/prepare.py", "import tensorflow_datasets as tfds"),
        ("training/loop.py", "import gin"),
        ("formats/hf.py", "from torch import nn"),
        ("experiments/demo.py", "from stepdistill_jax.teacher import annotate"),
    ],
)
def test_a_step_up_is_seen(relative, source):
    assert len(wrong_imports(relative, source)) == 1


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("training/loop.py", "from stepdistill_jax.models.t5 import T5"),
        ("training/loop.py", "from stepdistill_jax.training.step import train_step"),
        ("data/text_metrics.py", "from stepdistill_jax.errors import InputError"),
        ("commands/main.py", "from stepdistill_jax import __version__\nimport gin"),
        ("data/builder.py", "import tensorflow_datasets as tfds"),
        ("tasks/registry.py", "import seqio\nimport tensorflow as tf"),
    ],
)
def test_a_step_down_is_fine(relative, source):
    assert wrong_imports(relative, source) == []
