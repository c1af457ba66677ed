"""What several tests of steps train on."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.models.dropout import Dropout
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, init_params
from stepdistill_jax.models.sharding import Layout, make_mesh, place_rows
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.tasks.token_store import TokenExample, write_store
from stepdistill_jax.training.state import abstract_state, state_from_params
from stepdistill_jax.training.step import jit_train_step

ONE_DEVICE = Layout()


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
    return TaskData.of_store("synthetic", "train", step_by_step(1.0, 0.7), store, None)


@functools.cache
def drawn(model, seed):
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return jax.tree.map(np.asarray, jax.jit(init_params, static_argnums=0)(model, key))


@pytest.fixture(scope="session")
def take_steps():
    """`take_steps(model, batches, layout, devices, tx=..., weights=...)`: (state, metrics of each step)."""

    def taken(
        model, batches, layout=ONE_DEVICE, devices=1, *, tx, weights, seed=3, num_microbatches=1
    ):
        mesh = make_mesh(layout, jax.devices()[:devices])
        abstract = abstract_state(model, tx, mesh)
        static = {"model": EncoderDecoder(model), "tx": tx, "objective_weights": weights}
        step = jit_train_step(abstract, mesh, **static, num_microbatches=num_microbatches)
        # the parameters of `init_state`, which would compile a program for each layout
        state, found = state_from_params(drawn(model, seed), tx, abstract, seed=seed), []
        for batch in batches:
            state, metrics = step(state, place_rows(batch, mesh))
            found.append(metrics)
        return state, found

    return taken


class OneLayer(nn.Module):
    """As much of a model as a step needs; with a T5's layers it would compile for seconds."""

    config: T5Config

    @nn.compact
    def states(self, batch, *, enable_dropout=False):
        shape = self.config.vocab_size, self.config.emb_dim
        table = self.param("token_embedder", nn.initializers.normal(1.0), shape)
        x = table[batch["decoder_input_tokens"]]
        return Dropout(self.config.dropout_rate)(x, deterministic=not enable_dropout)


@pytest.fixture(scope="session")
def one_layer():
    """`one_layer(dropout_rate)`: (a model of one tied embedding, its parameters), for `train_step`."""

    def made(dropout_rate):
        config = T5Config(
            vocab_size=128,
            emb_dim=16,
            num_heads=2,
            head_dim=8,
            mlp_dim=32,
            num_encoder_layers=1,
            num_decoder_layers=1,
            dropout_rate=dropout_rate,
            logits_via_embedding=True,
        )
        table = np.random.default_rng(0).normal(size=(128, 16)).astype(np.float32)
        return OneLayer(config), {"token_embedder": table}

    return made
