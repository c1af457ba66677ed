import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.models.encoder_decoder import OutputLayer
from stepdistill_jax.training.loss import ObjectiveSums, loss_scale, objective_sums

RNG = np.random.default_rng(0)


def sums_of(logits, group, num_objectives=2):
    """The totals where the states are the logits."""
    output = OutputLayer(jnp.eye(logits.shape[-1]))
    return objective_sums(jnp.asarray(logits), output, group, jnp.zeros(num_objectives))[1]


def random_group(rows=3, length=7, vocab=11, num_objectives=2):
    return RNG.normal(size=(rows, length, vocab)).astype(np.float32), {
        "decoder_target_tokens": RNG.integers(0, vocab, (rows, length)),
        "decoder_objective_ids": RNG.integers(0, num_objectives + 1, (rows, length)),
        "decoder_loss_weights": RNG.uniform(0.5, 2.0, (rows, length)).astype(np.float32),
    }


def test_uniform_logits_give_the_docstrings_loss():
    group = {
        "decoder_target_tokens": np.array([[1, 2, 3, 1, 2, 0]]),
        "decoder_objective_ids": np.array([[1, 1, 2, 2, 2, 0]]),
        "decoder_loss_weights": np.array([[1.0, 1, 1, 1, 1, 0]], np.float32),
    }
    sums = sums_of(jnp.zeros((1, 6, 4)), group)
    np.testing.assert_allclose(sums.loss, np.log(4) * np.array([2, 3]), rtol=1e-6)
    np.testing.assert_array_equal(sums.count, [2, 3])
    np.testing.assert_allclose(sums.weighted_loss(jnp.array([1.0, 0.5])), 2.0794, atol=1e-4)


def test_sums_equal_a_loop_in_numpy():
    logits, group = random_group()
    loss, correct, count = np.zeros((3, 2))
    for r, row in enumerate(logits):
        for p, scores in enumerate(row):
            objective = group["decoder_objective_ids"][r, p]
            if objective == 0:
                continue
            weight, target = (
                group["decoder_loss_weights"][r, p],
                group["decoder_target_tokens"][r, p],
            )
            exp = np.exp(scores.astype(np.float64))
            loss[objective - 1] -= weight * np.log(exp[target] / exp.sum())
            correct[objective - 1] += weight * (scores.argmax() == target)
            count[objective - 1] += weight
    sums = sums_of(logits, group)
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(sums.correct, correct, rtol=1e-5)
    np.testing.assert_allclose(sums.count, count, rtol=1e-5)


def test_sums_of_several_tasks_are_those_of_each_ones_tokens():
    logits, group = random_group()
    tasks = RNG.integers(1, 4, group["decoder_objective_ids"].shape)
    output = OutputLayer(jnp.eye(logits.shape[-1]))
    of_tasks = group | {"decoder_task_ids": tasks}
    sums = objective_sums(jnp.asarray(logits), output, of_tasks, jnp.zeros(6), 2)[1]
    for task in (1, 2, 3):
        alone = group | {"decoder_objective_ids": group["decoder_objective_ids"] * (tasks == task)}
        for field in ("loss", "correct", "count"):
            columns = getattr(sums, field)[2 * task - 2 : 2 * task]
            np.testing.assert_allclose(columns, getattr(sums_of(logits, alone), field), rtol=1e-6)
    together, folded = sums_of(logits, group), sums.over_tasks(2, 3)
    np.testing.assert_allclose(folded.loss, together.loss, rtol=1e-6)
    np.testing.assert_allclose(folded.count, together.count, rtol=1e-6)


def test_an_objective_without_tokens_adds_zero_not_nan():
    logits, group = random_group()
    group["decoder_objective_ids"] = np.ones_like(group["decoder_objective_ids"])
    sums = sums_of(logits, group)
    assert sums.count[1] == 0
    expected = sums.loss[0] / sums.count[0]
    np.testing.assert_allclose(sums.weighted_loss(jnp.array([1.0, 5.0])), expected, rtol=1e-6)


def test_merging_empty_sums_changes_nothing_and_order_does_not_matter():
    parts = [sums_of(logits, g) for logits, g in (random_group(), random_group())]
    one, other = parts[0].merge(parts[1]), parts[1].merge(parts[0])
    for field in ("loss", "correct", "count"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        np.testing.assert_array_equal(
            getattr(parts[0].merge(ObjectiveSums.empty(2)), field), getattr(parts[0], field)
        )


@pytest.mark.parametrize(
    "counts,expected", [((2.0, 4.0), (0.5, 0.125)), ((0.0, 4.0), (0.0, 0.125))]
)
def test_the_scale_divides_a_weight_by_its_count(counts, expected):
    np.testing.assert_allclose(loss_scale(jnp.array(counts), jnp.array([1.0, 0.5])), expected)
