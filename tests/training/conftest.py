"""What several tests of steps train on."""

import functools

import jax
import numpy as np
import pytest

from stepdistill_jax.models.t5 import init_params
from stepdistill_jax.objectives import step_by_step
from stepdistill_jax.tasks.load import TaskData
from stepdistill_jax.tasks.token_store import TokenExample, write_store


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TaskData:
    """40 examples, every seventh without a rationale, lengths very uneven, weights of their own."""
    rng = np.random.default_rng(0)

    def ids(low, high):
        return [*rng.integers(3, 128, rng.integers(low, high)).tolist(), 1]

    def example(i):
        inputs, rationale = ids(3, 30), ids(5, 40) if i % 7 else []
        return TokenExample([(inputs, ids(1, 4)), (inputs, rationale)], weight=1 + i % 3)

    store = write_store(
        tmp_path_factory.mktemp("store"), ("label", "rationale"), map(example, range(40))
    )
    return TaskData(
        name="synthetic",
        split="train",
        objectives=step_by_step(1.0, 0.7),
        stores=(store,),
        rates=(1.0,),
        metric="text_match",
        vocabulary=None,
        labels=(),
    )


@pytest.fixture(scope="module")
def params(request):
    """Of the module's MODEL, drawn by NumPy: `init_state` would be one more program to compile."""
    rng = np.random.default_rng(0)
    init = functools.partial(init_params, request.module.MODEL)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
