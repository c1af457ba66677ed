"""The gradient of a kernel is added up in float32, on one device and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.layers import dense
from stepdistill_jax.models.sharding import make_mesh

ROWS, LENGTH, INPUTS, OUTPUTS = 8, 64, 16, 24


def layer(**changes):
    config = model_config("t5_v1_1", "tiny", vocab_size=128, dtype="bfloat16", **changes)
    return dense(config, OUTPUTS, ("embed", "mlp"), 0.02, projection="wi")


@pytest.mark.parametrize("devices", [1, 8])
def test_bfloat16_rows_give_a_kernel_gradient_of_float32_sums(devices):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (ROWS, LENGTH, INPUTS), jnp.bfloat16)
    slope = jax.random.normal(keys[1], (ROWS, LENGTH, OUTPUTS), jnp.bfloat16)
    params = jax.jit(layer().init)(keys[2], x)
    mesh = make_mesh("fsdp", jax.devices()[:devices])
    x, slope = (jax.device_put(a, NamedSharding(mesh, P("fsdp"))) for a in (x, slope))
    kernel_cut = NamedSharding(mesh, P("fsdp", None))
    params = jax.tree.map(
        lambda a: jax.device_put(a, kernel_cut), {"params": {"kernel": kernel_of(params)}}
    )

    def loss(params):
        return jnp.vdot(layer().apply(params, x).astype(jnp.float32), slope.astype(jnp.float32))

    found = kernel_of(jax.jit(jax.grad(loss), out_shardings=kernel_cut)(params))
    exact = np.einsum("bli,blo->io", np.float64(x), np.float64(slope))
    # a gradient that was bfloat16 anywhere on its way is off by 2e-3 of it
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert found.dtype == np.float32
    assert error < 1e-6


def test_a_frozen_kernel_has_no_product_for_its_gradient():
    lora = layer(lora=LoraConfig(wi=4))
    x = jnp.ones((ROWS, LENGTH, INPUTS))
    variables = jax.jit(lora.init)(jax.random.key(0), x)
    frozen = variables["params"].pop("kernel")

    def loss(trained, x):
        return lora.apply({"params": {**trained, "kernel": frozen}}, x).astype(jnp.float32).sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(variables["params"], x)
    # three forward, two gradients each of both thin kernels, and the slope through the frozen one
    assert str(program).count("dot_general[") == 3 + 4 + 1


def kernel_of(variables):
    return getattr(kernel := variables["params"]["kernel"], "value", kernel)
