"""The oracle of parity: random models of `transformers` (torch), one for each family."""

import importlib.util
import pathlib
import sys

import pytest

from stepdistill_jax.models.families import FAMILIES


def _load_oracle():
    # a test file cannot import its neighbours by name
    name, path = "stepdistill_models_oracle", pathlib.Path(__file__).with_name("oracle.py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def oracle():
    """The module `oracle.py`; torch is not needed for all of it."""
    return _load_oracle()


@pytest.fixture(scope="session")
def make_random_hf(oracle):
    """`oracle.random_hf`; skips without torch."""
    pytest.importorskip("torch", reason="torch is not installed: no oracle to compare with")
    return oracle.random_hf


# ul2 is T5 v1.1 with another activation
# T5 v1.1 with another activation, and with other sizes; test_families.py and golden/ compare mT5, too
SLOW_FAMILIES = {name: pytest.param(name, marks=pytest.mark.slow) for name in ("ul2", "mt5")}


@pytest.fixture(scope="session", params=[SLOW_FAMILIES.get(name, name) for name in FAMILIES])
def family(request, make_random_hf, tmp_path_factory):
    """(name, model of `transformers`, its directory)."""
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, make_random_hf(directory, family=request.param), directory


@pytest.fixture(scope="session")
def padded_batch(oracle):
    """(source, target) ids longer than `max_distance`, with rows of several lengths."""
    return oracle.padded_batch()


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


@pytest.fixture(scope="session")
def equations():
    """Of a program of `jax.make_jaxpr`: all equations, those of loops and calls included."""
    return lambda program: _equations(program.jaxpr)
