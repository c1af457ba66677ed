"""Reads every import of the package: imports only go down, and the heavy libraries stay where they are."""

import ast
import pathlib

import pytest

import stepdistill_jax

PACKAGE = pathlib.Path(stepdistill_jax.__file__).parent
NAME = "stepdistill_jax"

# lowest first; what stands on one floor may not import its neighbours, but for the first
FLOORS = (
    (
        *(
            "errors",
            "files",
            "host_memory",
            "objectives",
            "overwriting",
            "progress",
            "roll_call",
            "schedules",
            "store_path",
        ),
        *("text", "versions"),
    ),
    ("data",),
    ("models",),
    ("sharding", "distributed", "compile_cache"),
    ("formats",),
    ("checkpoints",),
    ("inference",),
    ("tasks",),
    ("training",),
    ("planning", "teacher", "experiments"),
    ("commands",),
    ("__main__",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

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


MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


def test_every_module_has_a_floor():
    units = {name.split("/")[0].removesuffix(".py") for name in MODULES} - {"__init__"}
    assert units <= set(FLOOR_OF), f"without a floor: {units - set(FLOOR_OF)}"


def test_imports_only_go_down():
    modules = [m for m in MODULES if m != "__init__.py"]
    assert len(modules) > 100
    wrong = [w for m in modules for w in wrong_imports(m, (PACKAGE / m).read_text())]
    assert wrong == []


def test_the_package_itself_imports_nothing():
    assert imports((PACKAGE / "__init__.py").read_text(), NAME) == []


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("models/t5.py", "from stepdistill_jax.training.config import TrainConfig"),
        ("models/t5.py", "from stepdistill_jax import training"),
        ("models/t5.py", "import stepdistill_jax.models.sharding"),
        ("models/t5.py", "from ..training import config"),
        ("sharding.py", "from stepdistill_jax.commands import main"),
        ("inference/predict.py", "def f():\n    from stepdistill_jax.tasks import load"),
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
