"""Learning rates against their formulas, and what a run keeps of them."""

import jax
import numpy as np
import optax
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.training import LearningRate, OptimizerConfig, OptimizerFunction, TrainConfig
from stepdistill_jax.training.learning_rate import SHAPES, constant, cosine, linear, rsqrt
from stepdistill_jax.training.optimizer import make_optimizer, make_schedule

PEAK, LAST, END = 0.5, 20, 0.125


def written_out(shape, warmup, end, step):
    """One value by its formula; T5X's `constant * rsqrt_normalized_decay` for `rsqrt`."""
    if shape == "rsqrt":
        return PEAK * np.sqrt(warmup) / np.sqrt(max(step, warmup))
    if step < warmup:
        return PEAK * step / warmup
    share = min((step - warmup) / (LAST - warmup), 1)  # of the way down
    if shape == "linear":
        return PEAK + (end - PEAK) * share
    if shape == "cosine":
        return end + (PEAK - end) * (1 + np.cos(np.pi * share)) / 2
    return PEAK


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rate_is_its_formula_at_every_step(shape, warmup):
    """Also compiled, and beyond the last step, where a run that trains further goes."""
    warmup = max(warmup, 1) if shape == "rsqrt" else warmup
    for end in (0.0, END) if shape in ("linear", "cosine") else (0.0,):
        rate = LearningRate(shape, warmup, end).schedule(PEAK, LAST)
        wanted = [written_out(shape, warmup, end, step) for step in range(LAST + 6)]
        for got in (jax.vmap(rate)(np.arange(LAST + 6)), [rate(s) for s in range(LAST + 6)]):
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "warmup"), [("linear", 0), ("cosine", 3), ("rsqrt", 3)])
def test_a_name_is_the_rate_of_that_shape(name, warmup):
    def of(optimizer):
        config = TrainConfig("t", train_steps=LAST, learning_rate=PEAK, optimizer=optimizer)
        return make_schedule(config)(np.arange(LAST))

    named = of(OptimizerConfig(schedule=name, warmup_steps=warmup))
    np.testing.assert_array_equal(named, of(OptimizerConfig(schedule=LearningRate(name, warmup))))


def test_what_a_rate_says_itself_goes_before_the_run():
    rate = cosine(learning_rate=0.25, train_steps=10).schedule(PEAK, LAST)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(15)], [0.25, 0.125, 0, 0])


def test_the_configurables_are_the_shapes_of_their_names():
    made = {rate.shape: rate for rate in (linear(2), cosine(2), rsqrt(2), constant(2))}
    assert made == {shape: LearningRate(shape, 2) for shape in SHAPES}
    assert rsqrt().warmup_steps == 10_000  # T5's


def test_the_optimizer_takes_its_steps_at_the_rate():
    """The first step of AdamW is the rate times the sign of the gradient."""
    for schedule in (cosine(warmup_steps=2), "cosine"):
        warm = {} if schedule != "cosine" else {"warmup_steps": 2}
        optimizer = OptimizerConfig(schedule=schedule, clip_norm=1e30, **warm)
        tx = make_optimizer(
            TrainConfig("t", train_steps=LAST, learning_rate=PEAK, optimizer=optimizer)
        )
        params = {"w": np.float32([1.0, -2.0])}
        state = optax.tree.set(tx.init(params), count=5)
        updates, _ = tx.update({"w": np.float32([3.0, -4.0])}, state, params)
        assert np.sign(updates["w"]).tolist() == [-1, 1]
        # the moments are empty: (1 - b1) g / (1 - b1^6) over the root of (1 - b2) g^2 / (1 - b2^6)
        moved = 0.1 / (1 - 0.9**6) / np.sqrt(0.001 / (1 - 0.999**6))
        wanted = written_out("cosine", 2, 0.0, 5) * moved
        np.testing.assert_allclose(np.abs(updates["w"]), wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: LearningRate("cosin"), "did you mean 'cosine'"),
        (lambda: OptimizerConfig(schedule="liner"), "optimizer.schedule` must be one of linear, cosine, rsqrt, constant, not 'liner'; did you mean 'linear'"),
        (lambda: OptimizerConfig(schedule="rsqrt"), "optimizer.warmup_steps` must be a whole number of at least 1, not 0"),
        (lambda: OptimizerConfig(schedule=cosine(), warmup_steps=3), "`optimizer.warmup_steps`: @cosine() does not use it; set cosine.warmup_steps"),
        (lambda: rsqrt(0), "`rsqrt.warmup_steps` must be a whole number of at least 1, not 0"),
        (lambda: cosine(end_value=-1), "`cosine.end_value` must be a number of at least 0, not -1"),
        (lambda: constant(learning_rate=0), "`constant.learning_rate` must be a number above 0, not 0"),
        (lambda: linear(train_steps=0), "`linear.train_steps` must be a whole number of at least 1"),
        (lambda: LearningRate("constant", end_value=0.1), "constant takes no end_value"),
        (lambda: TrainConfig("t", optimizer=cosine()), "`optimizer` must be an `OptimizerConfig`, or @name()"),
    ],
)  # fmt: skip
def test_a_bad_rate_is_refused(make, wanted):
    with pytest.raises(InputError) as caught:
        make()
    assert wanted in str(caught.value)


def test_run_json_holds_a_rate_as_plain_values():
    config = TrainConfig("t", optimizer=OptimizerConfig(schedule=cosine(5)))
    assert config.to_json()["optimizer"]["schedule"] == {
        "shape": "cosine",
        "warmup_steps": 5,
        "end_value": 0.0,
        "learning_rate": None,
        "train_steps": None,
    }
    assert (
        OptimizerFunction(optax.sgd, {"learning_rate": cosine(5)}).to_json()["arguments"][
            "learning_rate"
        ]
        == (config.to_json()["optimizer"]["schedule"])
    )
