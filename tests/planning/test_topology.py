"""The real TPU compiler on our step and decoder, without a TPU; needs libtpu (the extra [tpu])."""

import json
import os
import subprocess
import sys

import pytest

CHILD = """
import json, sys
from stepdistill_jax.planning.devices import topology_devices
devices = topology_devices("v5e:2x2")
import jax, jax.numpy as jnp
from stepdistill_jax.decoding.greedy import greedy_decode
from stepdistill_jax.models.config import t5_config
from stepdistill_jax.models.t5 import abstract_params
from stepdistill_jax.planning import plan
from stepdistill_jax.models.sharding import Layout, batch_sharding, make_mesh, param_shardings
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.step import in_mesh
import flax.linen as nn

config = TrainConfig(
    task="none", batch_size=8, input_length=128, target_length=64, dtype="bfloat16", layout="fsdp"
)
found = plan(config, topology="v5e:2x2", layout="fsdp", data_dir=sys.argv[1])

model = t5_config("t5_v1_1", "tiny", vocab_size=32128, dtype="bfloat16")
mesh = make_mesh(Layout(data=4), devices)
boxed = abstract_params(model)
shardings, params = param_shardings(mesh, boxed), jax.eval_shape(nn.meta.unbox, boxed)
params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
ids = jax.ShapeDtypeStruct((8, 128), jnp.int32, sharding=batch_sharding(mesh))
decode = jax.jit(lambda params, ids: greedy_decode(params, model, ids, max_decode_len=8))
lowered = in_mesh(decode.lower, mesh)(params, ids)
found["decoder"] = lowered.compile().memory_analysis().output_size_in_bytes
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tpu_compiler_takes_the_step_and_the_decoder(tmp_path):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install '.[tpu]'")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device_kind"] == "TPU v5 lite"
    assert found["hbm"] == 16 * 2**30
    (candidate,) = found["candidates"]
    assert candidate["fits"]
    assert candidate["layout"]["fsdp"] == 4
    sizes = candidate["per_device"]
    # tiles pad small arrays
    assert sizes["arguments"] == pytest.approx(sizes["params"] + sizes["optimizer"], rel=0.1)
    assert found["decoder"] >= 8 // 4 * 8 * 4  # ids of two rows, at least
