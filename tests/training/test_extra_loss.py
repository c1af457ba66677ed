"""The step's gradient, with weights that change and one more term, against the formula written out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.schedules import linear_schedule
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.sharding import Layout, make_mesh, place_rows
from stepdistill_jax.training import ExtraLoss, TrainConfig
from stepdistill_jax.training.state import abstract_state, create_state, shardings_of
from stepdistill_jax.training.step import jit_train_step, train_step

MODEL = dataclasses.replace(
    model_config("t5_v1_1", "tiny", vocab_size=128),
    emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_encoder_layers=1, dropout_rate=0.0,
)  # fmt: skip
# of label, rationale and the extra loss; the second stays
WEIGHTS = (linear_schedule(1.0, 0.0, 10), 0.7)


@dataclasses.dataclass(frozen=True)
class ZLoss(ExtraLoss):
    """T5X's, of the rationale alone: slices then have very different counts."""

    name = "z_loss"

    def count(self, group):
        return (group["decoder_objective_ids"] == 2).sum()

    def total(self, states, output, group):
        z = jax.nn.logsumexp(output.logits(states), axis=-1)
        return (z**2 * (group["decoder_objective_ids"] == 2)).sum()


@pytest.fixture(scope="module")
def batch(data):
    return Batches(data, batch_size=12, input_length=32, target_length=48, seed=0, row_multiple=8)(
        0
    )


def written_out(logits_of, params, batch):
    """(loss, its three means), gradient as a function of the three weights; `logits_of(params, group)`."""

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def formula(params, weights):
        (group,) = batch
        logits = logits_of(params, group)
        targets, ids = group["decoder_target_tokens"], group["decoder_objective_ids"]
        z = jax.nn.logsumexp(logits, axis=-1)
        nll = z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        label, rationale = ((ids == i) * group["decoder_loss_weights"] for i in (1, 2))
        means = [
            (nll * label).sum() / label.sum(),
            (nll * rationale).sum() / rationale.sum(),
            (z**2 * (ids == 2)).sum() / (ids == 2).sum(),
        ]
        return jnp.vdot(weights, jnp.stack(means)), jnp.stack(means)

    return lambda weights: formula(params, jnp.asarray(weights, jnp.float32))


TX = optax.sgd(0.1, momentum=0.9)  # its trace after one step is the gradient itself
STATIC = {
    "tx": TX,
    "objective_weights": WEIGHTS,
    "extra_loss": ZLoss(linear_schedule(0.0, 0.2, 10)),
}


def check(step_fn, params, batch, at, formula):
    """Loss, weights and gradient of single steps from these steps on."""
    for step in at:
        state = create_state(params, TX, seed=0).replace(step=jnp.int32(step))
        state, metrics = step_fn(state, batch)
        weights = [1 - min(step, 10) / 10, 0.7, 0.2 * min(step, 10) / 10]
        (loss, means), wanted = formula(weights)
        np.testing.assert_allclose(metrics["weights"], weights, atol=1e-6)
        np.testing.assert_allclose(metrics["sums"].loss / metrics["sums"].count, means, rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        gradient = jax.tree.map(np.array, state.opt_state[0].trace)
        for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
            assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


def test_two_slices_give_the_gradient_of_the_formula_at_each_step(one_layer, batch):
    counts = [int(ZLoss().count({k: v[i::2] for k, v in batch[0].items()})) for i in (0, 1)]
    assert counts[0] != counts[1]  # else a mean of means would pass
    model, params = one_layer(dropout_rate=0.0)

    def logits(params, group):
        states = model.apply({"params": params}, group, method="states")
        return states @ params["token_embedder"].T

    step_fn = jax.jit(functools.partial(train_step, model=model, num_microbatches=2, **STATIC))
    check(step_fn, params, batch, (0, 5, 12), written_out(logits, params, batch))
    assert step_fn._cache_size() == 1


@pytest.mark.slow
def test_eight_devices_give_that_of_a_t5_too(params, batch):
    mesh = make_mesh(Layout(data=8))
    abstract = abstract_state(MODEL, TX, mesh)
    step_fn = jit_train_step(
        abstract, mesh, model=EncoderDecoder(MODEL), num_microbatches=1, **STATIC
    )

    def placed(state, batch):
        return step_fn(jax.device_put(state, shardings_of(abstract)), place_rows(batch, mesh))

    def logits(params, group):
        return EncoderDecoder(MODEL).apply({"params": params}, group)

    check(placed, params, batch, (5,), written_out(logits, params, batch))


@dataclasses.dataclass(frozen=True)
class NoName(ZLoss):
    name = "Z loss"


@dataclasses.dataclass(frozen=True)
class Label(ZLoss):
    name = "label"


@pytest.mark.parametrize(
    "make, wanted",
    [
        (lambda: ZLoss(-0.1), "`ZLoss.weight` must be a number of at least 0, not -0.1"),
        (NoName, "`NoName.name` must be lower_snake_case, such as my_task, not 'Z loss'"),
        (lambda: "z_loss", "`extra_loss` must be an `ExtraLoss` of yours, not 'z_loss'"),
        (lambda: ZLoss, "`extra_loss` must be an `ExtraLoss` of yours"),
        (Label, "`extra_loss`: an objective already has the name 'label'"),
    ],
)
def test_a_bad_extra_loss_is_refused(make, wanted):
    with pytest.raises(InputError) as caught:
        TrainConfig("delivery", extra_loss=make())
    assert wanted in str(caught.value)


def test_settings_that_cannot_be_compared_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Listed(ZLoss):
        factors: tuple | list = ()

    assert TrainConfig("delivery", extra_loss=Listed(factors=(1, 2))).extra_loss.factors == (1, 2)
    with pytest.raises(
        InputError, match=r"Listed must be a frozen dataclass of plain values: .*list"
    ):
        TrainConfig("delivery", extra_loss=Listed(factors=[1, 2]))


def test_run_json_tells_class_and_settings():
    told = TrainConfig("delivery", extra_loss=ZLoss(0.5)).to_json()["extra_loss"]
    assert told == {"class": f"{__name__}.ZLoss", "weight": 0.5}
    assert TrainConfig("delivery").to_json()["extra_loss"] is None
