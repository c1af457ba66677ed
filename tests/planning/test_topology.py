"""The real compilers on our step and decoder, without a TPU or GPU; need the extra [tpu] or [aot-cuda]."""

import json
import os
import subprocess
import sys

import pytest

from stepdistill_jax.planning import devices

# rows, layouts and devices that both compilers take in a minute or two
CHILD = """
import json, sys
from stepdistill_jax.planning import plan, plan_decode
from stepdistill_jax.training.config import TrainConfig

topology, layout, folder = sys.argv[1:]
config = TrainConfig(
    task="none", batch_size=8, input_length=128, target_length=64, dtype="bfloat16", layout="fsdp",
    attention="xla",  # a kernel does products twice
)
found = plan(config, topology=topology, layout=layout, data_dir=folder)
# 8 rows a device: of fewer XLA makes 8 for cuBLAS
rows = 8 * found["devices"]
found["decoder"] = plan_decode(config, topology=topology, rows=rows, data_dir=folder)
print(json.dumps(found))
"""
# says that it has the compiler, and keeps it until it is told to go
HOLDER = """
import sys
from stepdistill_jax.planning.devices import topology_devices
print(len(topology_devices("v5e:2x2")), flush=True)
sys.stdin.read()
"""


def compiler_of(platform):
    """Skips where it is not installed."""
    if platform == "tpu":
        pytest.importorskip("libtpu", reason="no TPU compiler: pip install '.[tpu]'")
    elif not any(devices._found(f"jax_plugins.xla_cuda{version}") for version in (13, 12)):
        pytest.skip("no compiler for NVIDIA GPUs: pip install '.[aot-cuda]'")


def child(code, *argv, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"XLA_FLAGS": ""}, **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("platform", "topology", "layout", "kind", "memory"),
    [
        ("tpu", "v5e:2x2", "fsdp", "TPU v5 lite", 16 * 2**30),
        ("cuda", "cuda:4", "fsdp", "NVIDIA H100 80GB HBM3", 84_942_979_072),
        ("cuda", "cuda:1", "data", "NVIDIA H100 80GB HBM3", 84_942_979_072),
    ],
)
def test_the_compiler_takes_the_step_and_the_decoder(
    platform, topology, layout, kind, memory, tmp_path
):
    compiler_of(platform)
    out, err = (started := child(CHILD, topology, layout, tmp_path)).communicate()
    assert started.returncode == 0, err
    found = json.loads(out.splitlines()[-1])
    assert (found["device_kind"], found["hbm"]) == (kind, memory)
    assert found["limit"] == (memory if platform == "tpu" else round(0.75 * memory))
    (candidate,) = found["candidates"]
    assert candidate["fits"]
    assert candidate["layout"][layout] == found["devices"]
    sizes = candidate["per_device"]
    # tiles pad small arrays
    assert sizes["arguments"] == pytest.approx(sizes["params"] + sizes["optimizer"], rel=0.1)
    bound = candidate["bound"]
    assert bound["unknown_loops"] == 0
    assert not bound["calls_without_formula"]
    # what the program multiplies, its loops counted, is what the model needs
    assert bound["flops"] == pytest.approx(candidate["flops"]["per_device"], rel=0.02)
    # weights are read at least once forward and once backward, and so are state and gradients
    assert bound["bytes"] > 2 * sizes["params"] + 2 * sizes["optimizer"]
    check_decoder(found["decoder"], found["model"])


def check_decoder(decoder, model):
    bound, tokens = decoder["bound"], decoder["tokens"]
    assert decoder["fits"]
    assert (decoder["input_length"], tokens) == (128, 8)
    # each device has its part of the parameters, and reads it
    whole = 4 * 2 * model["emb_dim"] * model["vocab_size"]
    assert bound["bytes"] > decoder["per_device"]["params"]
    assert 1 < decoder["devices"] * decoder["per_device"]["params"] / whole < 1.2
    # at each token 8 rows go through the output layer, and none in the loop of fewer rows
    (head,) = [p["flops"] for p in bound["parts"] if p["part"] == "output layer and loss"]
    assert head == pytest.approx(2 * 8 * tokens * model["emb_dim"] * model["vocab_size"], rel=0.02)
    assert 0 < bound["token_ms"] * tokens < bound["bound_ms"]
    if decoder["device_kind"].startswith("NVIDIA"):
        # one layer of a dozen operations, and as many around it: a loop over layers would copy matrices
        assert model["num_decoder_layers"] == 1 and 16 < bound["kernels_per_token"] < 32


@pytest.mark.slow
def test_two_plans_for_a_tpu_run_side_by_side():
    compiler_of("tpu")
    first, second = child(HOLDER), child(HOLDER)
    assert first.stdout.readline() == second.stdout.readline() == "4\n"
    for one in (first, second):
        _, err = one.communicate()
        assert one.returncode == 0, err
