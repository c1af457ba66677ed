"""Update rules of a user's: built once, described, refused in one line, cut like the parameters."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.sharding import Layout, make_mesh
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
from stepdistill_jax.training import LearningRate, OptimizerFunction, TrainConfig
from stepdistill_jax.training.learning_rate import constant, cosine, linear
from stepdistill_jax.training.optimizer import make_optimizer, make_schedule
from stepdistill_jax.training.state import abstract_state, create_state
from stepdistill_jax.training.step import train_step

MODEL = T5Config(
    vocab_size=128,
    emb_dim=64,
    num_heads=8,
    head_dim=8,
    mlp_dim=128,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,
)
PARAMS = {"w": np.float32([[1.0, -2.0], [0.5, 4.0]]), "scale": np.float32([3.0, 5.0])}


def config(function, **arguments):
    return TrainConfig(
        "t", train_steps=10, learning_rate=0.5, optimizer=OptimizerFunction(function, arguments)
    )


def matrices(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def masked_adamw(learning_rate, weight_decay=0.1):
    return optax.adamw(learning_rate, weight_decay=weight_decay, mask=matrices)


def half_trained(learning_rate):
    """Lion for the matrices; the rest is left as it is."""

    def labels(params):
        return jax.tree.map(lambda x: "lion" if x.ndim > 1 else "frozen", params)

    rules = {"lion": optax.lion(learning_rate), "frozen": optax.set_to_zero()}
    return optax.partition(rules, labels)


def every_second(learning_rate):
    """optax's own sum over steps."""
    return optax.MultiSteps(optax.sgd(learning_rate), 2).gradient_transformation()


def noisy(learning_rate):
    """A state with a random key."""
    return optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(3)), optax.sgd(learning_rate))


def injected(learning_rate):
    return optax.inject_hyperparams(optax.sgd)(learning_rate)


def scheduled_decay(learning_rate):
    return optax.chain(optax.add_decayed_weights(learning_rate), optax.scale(-1.0))


def test_the_function_gets_its_arguments_and_its_rule_is_all_there_is():
    """A gradient of norm 50 is not clipped; the rate is the cosine of the run, halfway at its half."""
    tx = make_optimizer(config(optax.sgd, learning_rate=cosine()))
    state = optax.tree.set(tx.init(PARAMS), count=5)
    grads = {"w": np.float32([[30.0, 0.0], [0.0, 40.0]]), "scale": np.float32([0.0, 0.0])}
    updates, _ = tx.update(grads, state, PARAMS)
    np.testing.assert_allclose(updates["w"], -0.25 * grads["w"], rtol=1e-6)


def test_the_metrics_know_a_rate_of_ours_alone():
    rates = make_schedule(config(optax.sgd, learning_rate=linear()))(np.arange(10))
    np.testing.assert_allclose(rates, 0.5 * (10 - np.arange(10)) / 10, rtol=1e-6)
    assert make_schedule(config(optax.sgd, learning_rate=0.1)) is None
    assert make_schedule(config(every_second, learning_rate=constant())) is not None


def test_runs_of_equal_settings_share_the_transformation():
    """And what is compiled with it; other arguments are another one."""
    made = [
        make_optimizer(config(optax.lion, learning_rate=cosine(), b1=b1)) for b1 in (0.9, 0.9, 0.8)
    ]
    assert made[0] is made[1]
    assert made[0] is not made[2]
    lists = [config(optax.lion, learning_rate=0.1, mask={"w": [True]}) for _ in range(2)]
    assert lists[0].optimizer == lists[1].optimizer
    assert hash(lists[0].optimizer) == hash(lists[1].optimizer)


def test_run_json_tells_the_function_and_all_its_plain_arguments():
    """A default of the function is part of what was run; what is no plain value is code."""
    told = config(masked_adamw, learning_rate=0.25).to_json()["optimizer"]
    assert told == {
        "function": f"{__name__}.masked_adamw",
        "arguments": {"learning_rate": 0.25, "weight_decay": 0.1},
    }
    told = config(optax.sgd, learning_rate=constant(4)).to_json()["optimizer"]
    assert told["function"] == "optax.sgd"  # not the private module that holds it
    assert told["arguments"]["learning_rate"] == dataclasses.asdict(LearningRate("constant", 4))
    assert told["arguments"]["nesterov"] is False


def collecting(*_, b1=0.9, **kw):
    return optax.lion(b1=b1, **kw)


def test_run_json_tells_the_arguments_that_a_function_collects():
    told = [
        config(collecting, learning_rate=cosine(), b2=b2).to_json()["optimizer"]["arguments"]
        for b2 in (0.99, 0.9)
    ]
    rate = dataclasses.asdict(LearningRate("cosine"))
    assert told == [{"b1": 0.9, "learning_rate": rate, "b2": b2} for b2 in (0.99, 0.9)]
    make_optimizer(config(collecting, learning_rate=cosine(), b2=0.9)).init(PARAMS)


def test_whether_the_peak_reaches_the_function_is_known():
    of_its_own = cosine(learning_rate=0.1)
    for value, takes in ((cosine(3), True), (0.5, True), (0.1, False), (of_its_own, False)):
        own = OptimizerFunction(optax.sgd, {"learning_rate": value})
        assert own.takes(0.5) is takes
        assert str(own) == f"optax.sgd(learning_rate={value!r})"
    assert repr(of_its_own) == "cosine(learning_rate=0.1)"


# what is refused


def returns_a_number(learning_rate):
    return learning_rate


def returns_multi_steps(learning_rate):
    return optax.MultiSteps(optax.sgd(learning_rate), 2)


def raises(learning_rate):
    return 1 / 0


def raises_below(learning_rate):
    return optax.adamw(learning_rate, b3=1)


def init_raises(learning_rate):
    def init(params):
        return params["no_such"]

    return optax.GradientTransformation(init, optax.sgd(1.0).update)


def update_wants_more(learning_rate):
    def update(updates, state, params=None, *, value):
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def another_state(learning_rate):
    return optax.GradientTransformation(lambda p: jnp.int32(0), lambda u, s, p=None: (u, s + 0.5))


def other_shapes(learning_rate):
    def update(updates, state, params=None):
        return jax.tree.map(jnp.sum, updates), state

    return optax.GradientTransformation(lambda params: (), update)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (returns_a_number, "must return an optax.GradientTransformation, not a builtins.float"),
        (returns_multi_steps, "must return an optax.GradientTransformation, not a optax."),
        (raises, r"raised ZeroDivisionError at .*test_optimizer_function\.py:\d+: division by zero"),
        (raises_below, r"raised TypeError at .*test_optimizer_function\.py:\d+: .*'b3'"),
        (init_raises, r"init raised KeyError at .*test_optimizer_function\.py:\d+: 'no_such'"),
        (update_wants_more, r"update, called with gradients, state and parameters, raised TypeError .*'value'"),
        (another_state, "update must return a state whose shapes and types are unchanged"),
        (other_shapes, "update must return updates with the parameters' shapes"),
    ],
)  # fmt: skip
def test_a_function_that_a_step_cannot_call_is_refused_by_name_and_place(function, wanted):
    """Before anything is compiled: its arrays are shapes here."""
    with pytest.raises(InputError) as caught:
        make_optimizer(config(function, learning_rate=0.1)).init(PARAMS)
    message = str(caught.value)
    assert re.search(wanted, message), message
    place = rf"`optimizer`: {re.escape(__name__)}\.{function.__name__} \(.*\.py:\d+\): "
    assert re.match(place, message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: config(optax.sgd), "`optimizer`: optax.sgd: missing a required argument: 'learning_rate'"),
        (lambda: config(optax.sgd, learning_rate=0.1, b1=1), "got an unexpected keyword argument 'b1'"),
        (lambda: config(optax.sgd, learning_rate=optax.sgd), "`optax.sgd.learning_rate` must be plain"),
        (lambda: config(optax.sgd, learning_rate=np.ones(3)), "`optax.sgd.learning_rate` must be plain"),
        (lambda: OptimizerFunction(3), "`optimizer` must be a function"),
        (lambda: TrainConfig("t", optimizer=optax.sgd(0.1)), "`optimizer` must be an `OptimizerConfig`, or"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_described_or_called_with_are_refused(make, wanted):
    with pytest.raises(InputError) as caught:
        make()
    assert wanted in str(caught.value)


# the state on devices


@pytest.mark.parametrize(
    "function",
    [optax.lion, optax.sgd, masked_adamw, half_trained, every_second, noisy, optax.adafactor],
    ids=lambda f: f.__name__,
)
def test_the_state_is_cut_like_the_parameters(function):
    """Each array of a parameter's name and shape; counts, keys and masks are on every device."""
    given = {"momentum": 0.9} if function is optax.sgd else {}
    tx = make_optimizer(config(function, learning_rate=cosine(), **given))
    abstract = abstract_state(MODEL, tx, make_mesh(Layout(fsdp=8)))
    params = {
        jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_flatten_with_path(abstract.params)[0]
    }
    moments = 0
    for path, x in jax.tree_util.tree_flatten_with_path(abstract.opt_state)[0]:
        name = next((n for n in params if jax.tree_util.keystr(path).endswith(n)), None)
        if name is not None and params[name].shape == x.shape:
            assert x.sharding == params[name].sharding
            moments += any(params[name].sharding.spec)
        else:
            assert x.sharding.is_fully_replicated or function is optax.adafactor
    assert moments > 5 or function is noisy  # which has a key and counts alone


def test_adapters_alone_have_a_state():
    lora = dataclasses.replace(MODEL, lora=LoraConfig(query=2))
    tx = make_optimizer(config(optax.lion, learning_rate=0.1))
    abstract = abstract_state(lora, tx, make_mesh(Layout(fsdp=8)))
    names = [
        path[-1].key
        for path, x in jax.tree_util.tree_flatten_with_path(abstract.opt_state)[0]
        if x.ndim
    ]
    assert set(names) == {"lora_a", "lora_b"}


@pytest.mark.parametrize("function", [half_trained, noisy], ids=["masked", "key"])
def test_any_state_comes_back_from_a_checkpoint(tmp_path, function):
    tx, mesh = make_optimizer(config(function, learning_rate=cosine())), make_mesh(Layout(fsdp=8))
    abstract = abstract_state(MODEL, tx, mesh)

    def value(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(x.size)
        return jax.device_put(np.full(x.shape, x.size, x.dtype), x.sharding)

    state = jax.tree.map(value, abstract)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state.params, state.replace(params=None), {"step": 1, "validated": False})
    checkpoints.wait()
    _, rest = checkpoints.restore(1, abstract.params, abstract.replace(params=None))
    checkpoints.close()

    def same(got, wanted):
        if jax.dtypes.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, wanted = jax.random.key_data(got), jax.random.key_data(wanted)
        np.testing.assert_array_equal(got, wanted)

    jax.tree.map(same, rest.opt_state, state.opt_state)


@pytest.mark.slow
def test_eight_devices_take_the_steps_of_one(data, take_steps):
    batches = [Batches(data, 16, 64, 64, seed=0, row_multiple=16)(step) for step in range(3)]
    tx = make_optimizer(config(half_trained, learning_rate=constant(learning_rate=1e-3)))
    taken = {"tx": tx, "weights": (1.0, 0.7)}
    one, losses = take_steps(MODEL, batches, Layout(), 1, **taken)
    cut, cut_losses = take_steps(MODEL, batches, Layout(fsdp=8), 8, **taken)
    for a, b in zip(losses, cut_losses, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-6)
    start, _ = take_steps(MODEL, [], Layout(), 1, **taken)
    for a, b in zip(jax.tree.leaves(start.params), jax.tree.leaves(one.params), strict=True):
        assert np.any(a != b) == (a.ndim > 1)  # the others are left as they are
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(cut.params), strict=True):
        # Lion's sign flips where a gradient is as good as 0: by two rates in a few places
        assert np.mean(np.abs(np.array(a) - np.array(b)) > 1e-5) < 0.01


# the step


@pytest.fixture(scope="module")
def batch(data):
    return Batches(data, batch_size=12, input_length=32, target_length=48, seed=0, row_multiple=8)(
        0
    )


def spoilt(batch):
    nan = np.float32(np.nan)
    name = "decoder_loss_weights"
    return tuple(group | {name: nan * group[name]} for group in batch)


@pytest.mark.parametrize(
    "function",
    [optax.sgd, injected, scheduled_decay, noisy, every_second],
    ids=lambda f: f.__name__,
)
def test_a_skipped_step_leaves_any_state_and_does_not_delay_the_schedule(
    one_layer, batch, function
):
    """Two good steps with a bad one between: the last takes the rate of the third step."""
    model, params = one_layer(dropout_rate=0.0)
    tx = make_optimizer(config(function, learning_rate=linear()))
    step = jax.jit(functools.partial(train_step, model=model, tx=tx, objective_weights=(1.0, 0.7)))
    states = [create_state(params, tx, seed=0)]
    for given in (batch, spoilt(batch), batch):
        states.append(step(states[-1], given)[0])
    start, first, skipped, last = (jax.tree.map(np.asarray, s.params) for s in states)
    np.testing.assert_array_equal(skipped["token_embedder"], first["token_embedder"])

    def numbers(tree):
        keys = jax.dtypes.prng_key
        return [
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, keys) else x
            for x in jax.tree.leaves(tree)
        ]

    for a, b in zip(numbers(states[2].opt_state), numbers(states[1].opt_state), strict=True):
        np.testing.assert_array_equal(a, b)
    if function is noisy:  # its noise is its own
        return
    gradient = jax.grad(lambda p: step_loss(model, p, batch))
    moved = last["token_embedder"] - skipped["token_embedder"]
    rates = 0.5 * np.array([10, 8]) / 10  # of steps 0 and 2
    if function is scheduled_decay:
        grads = gradient(skipped)["token_embedder"]
        np.testing.assert_allclose(moved, -grads - rates[1] * skipped["token_embedder"], atol=1e-5)
    elif function is every_second:
        assert np.array_equal(first["token_embedder"], start["token_embedder"])
        np.testing.assert_allclose(
            moved, -rates[1] * gradient(start)["token_embedder"], rtol=1e-4, atol=1e-6
        )
    else:
        np.testing.assert_allclose(
            moved, -rates[1] * gradient(skipped)["token_embedder"], rtol=1e-4, atol=1e-6
        )


def step_loss(model, params, batch):
    """The weighted means of the two objectives, by the formula."""
    (group,) = batch
    states = model.apply({"params": params}, group, method="states")
    logits = states @ params["token_embedder"].T
    targets, ids = group["decoder_target_tokens"], group["decoder_objective_ids"]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    masks = [(ids == i) * group["decoder_loss_weights"] for i in (1, 2)]
    return sum(w * (nll * m).sum() / m.sum() for w, m in zip((1.0, 0.7), masks, strict=True))
