"""The chunked loss beside the plain one: values, gradients, layouts, memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stepdistill_jax.models.sharding import Layout, make_mesh
from stepdistill_jax.training import cross_entropy as module
from stepdistill_jax.training.cross_entropy import cross_entropy

ROWS, LENGTH, EMBED, VOCAB = 8, 7, 16, 48


def problem(dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    states = jax.random.normal(keys[0], (ROWS, LENGTH, EMBED), dtype)
    kernel = jax.random.normal(keys[1], (EMBED, VOCAB))
    targets = jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCAB)
    scale = jax.random.uniform(keys[3], (ROWS, LENGTH)).at[:, -2:].set(0.0)
    return states, kernel, targets, scale


def plain(states, kernel, targets, scale, softcap=None):
    kernel = kernel.astype(states.dtype)
    logits = jnp.einsum("bld,dv->blv", states, kernel, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.vdot(scale, nll), nll, (jnp.argmax(logits, -1) == targets).astype(jnp.float32)


def value_and_grads(function, *args):
    def total(states, kernel):
        value, *rest = function(states, kernel, *args[2:])
        return 3.0 * value, rest  # a factor from outside reaches the gradient

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*args[:2])


# 5 leaves a part of a chunk over; logits are about 4, so the cap bends most of them
@pytest.mark.parametrize(
    ("chunk_tokens", "softcap"), [(1, None), (5, None), (8, 3.0), (56, None), (1000, None)]
)
def test_any_chunk_gives_the_plain_losss_values_and_gradients(chunk_tokens, softcap, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk_tokens)
    ours, theirs = (
        jax.jit(lambda *a, f=f: value_and_grads(f, *a, softcap))(*problem())
        for f in (cross_entropy, plain)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), ours, theirs)


def on_table(states, table, targets, scale):
    return cross_entropy(states, table, targets, scale, tied=True)


def test_a_tied_kernel_gives_the_same_by_the_table_as_it_lies(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 8)
    states, kernel, *rest = problem()
    tied = jax.jit(lambda *a: value_and_grads(on_table, *a)).lower(states, kernel.T, *rest)
    tied = tied.compile()
    found, (states_grad, table_grad) = tied(states, kernel.T, *rest)
    wanted = value_and_grads(plain, states, kernel, *rest)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6),
        (found, (states_grad, table_grad.T)),
        wanted,
    )
    assert f"[{EMBED},{VOCAB}]" not in tied.as_text(), "no table turned round"


def test_bfloat16_states_have_float32_losses_and_kernel_gradients():
    args = problem(jnp.bfloat16)
    (total, (nll, _)), (states_grad, kernel_grad) = value_and_grads(cross_entropy, *args)
    assert total.dtype == nll.dtype == kernel_grad.dtype == jnp.float32
    assert states_grad.dtype == jnp.bfloat16
    (_, (wanted, _)), (states_wanted, kernel_wanted) = value_and_grads(plain, *args)
    np.testing.assert_allclose(nll, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kernel_grad, kernel_wanted, atol=0.02 * np.abs(kernel_wanted).max())
    states_grad, states_wanted = (np.float32(x) for x in (states_grad, states_wanted))
    np.testing.assert_allclose(states_grad, states_wanted, atol=0.02 * np.abs(states_wanted).max())


@pytest.mark.parametrize("layout", ["data", "fsdp", "fsdp_tensor", "tensor"])
def test_each_layout_gives_what_one_device_gives(layout, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 4)
    args = problem()
    wanted = jax.jit(lambda *a: value_and_grads(cross_entropy, *a))(*args)
    mesh = make_mesh(layout)
    rows, kernel = P(("data", "fsdp")), P("fsdp", "tensor")
    shardings = [NamedSharding(mesh, spec) for spec in (rows, kernel, rows, rows)]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, s) for x, s in zip(args, shardings, strict=True)]
        found = jax.jit(lambda *a: value_and_grads(cross_entropy, *a))(*placed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), found, wanted)


def test_a_tied_kernel_gives_the_same_over_fsdp_and_tensor(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 4)
    states, kernel, *rest = problem()
    wanted, (states_grad, kernel_grad) = value_and_grads(plain, states, kernel, *rest)
    mesh, rows = make_mesh("fsdp_tensor"), P(("data", "fsdp"))
    shardings = [NamedSharding(mesh, spec) for spec in (rows, P("tensor", "fsdp"), rows, rows)]
    args = (states, kernel.T, *rest)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, s) for x, s in zip(args, shardings, strict=True)]
        found = jax.jit(lambda *a: value_and_grads(on_table, *a))(*placed)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6),
        found,
        (wanted, (states_grad, kernel_grad.T)),
    )


@pytest.mark.parametrize(
    ("layout", "sums"),
    [
        ("fsdp", [(f"f32[{EMBED // 8},{VOCAB}]", "reduce-scatter")]),
        (
            Layout(data=2, fsdp=4),
            [(f"f32[{EMBED // 4},{VOCAB}]", op) for op in ("reduce-scatter", "all-reduce")],
        ),
    ],
    ids=["fsdp", "hybrid"],
)
def test_under_fsdp_each_device_adds_up_its_part_of_the_kernels_gradient(layout, sums):
    mesh = make_mesh(layout)
    rows = P(("data", "fsdp"))
    shardings = [NamedSharding(mesh, spec) for spec in (rows, P("fsdp"), rows, rows)]
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        for x, s in zip(problem(jnp.bfloat16), shardings, strict=True)
    ]
    gradient = jax.grad(lambda *args: cross_entropy(*args)[0], argnums=1)
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient, out_shardings=shardings[1]).lower(*shapes).compile().as_text()
    added = re.findall(r"= (\S+?)(?:{\S*)? (all-reduce|reduce-scatter)\(", compiled)
    assert added == sums


@pytest.mark.parametrize(("platform", "tokens"), [("gpu", 2048), ("tpu", 512)])
def test_the_tokens_of_a_chunk_are_those_of_the_meshs_devices(platform, tokens):
    """In a program that this machine cannot compile: its products have so many rows."""
    device = jax.sharding.AbstractDevice("a chip", None, platform)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    shapes = [((4, 1024, EMBED), jnp.bfloat16), ((EMBED, VOCAB), jnp.float32)]
    shapes += [((4, 1024), jnp.int32), ((4, 1024), jnp.float32)]
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(cross_entropy)(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert f"f32[{tokens},{VOCAB}] = dot_general" in str(program)


def products(function, *args) -> int:
    return str(jax.make_jaxpr(function)(*args)).count("dot_general[")


def test_a_frozen_kernel_and_a_plain_evaluation_cost_no_product_for_gradients():
    states, kernel, targets, scale = problem()
    loss = lambda *args: cross_entropy(*args, targets, scale)[0]  # noqa: E731
    both = products(jax.grad(loss, argnums=(0, 1)), states, kernel)
    assert both - products(jax.grad(loss), states, kernel) == 1
    assert both - products(loss, states, kernel) == 2


def test_logits_are_never_whole_in_memory():
    rows, length, vocab = 64, 64, 4096
    shapes = ((rows, length, 32), jnp.float32), ((32, vocab), jnp.float32)
    shapes += ((rows, length), jnp.int32), ((rows, length), jnp.float32)
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]
    used = [
        jax.jit(lambda *a, f=f: value_and_grads(f, *a)).lower(*args).compile().memory_analysis()
        for f in (cross_entropy, plain)
    ]
    ours, theirs = (analysis.temp_size_in_bytes for analysis in used)
    logits = rows * length * vocab * 4
    assert theirs > logits and ours < 0.6 * logits  # an eighth of them, a few times
