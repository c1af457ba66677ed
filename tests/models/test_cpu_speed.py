"""What is done another way on a CPU gives what the plain way gives; malloc is left alone elsewhere."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.models import cpu_speed

LOOP = """
import resource, sys
from stepdistill_jax.models.cpu_speed import keep_pages
if sys.argv[1] == "keep":
    assert keep_pages()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: (jnp.outer(x, x) @ (x[:, None] + x[:300])).sum())  # a buffer of 16 MB
x = jnp.arange(2000.0)
step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*argv):
    command = [sys.executable, "-c", LOOP, *argv]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_a_step_clears_its_pages_once():
    # a busy machine adds some to either, now and then
    assert any(faults("keep") < faults("leave") / 4 for _ in range(3))


@pytest.mark.parametrize(
    ("platforms", "plugin", "on_cpu"),
    [
        ("cpu", "libtpu", True),
        ("cuda,cpu", None, False),
        ("", "libtpu", False),
        ("", "jax_plugins", False),
        ("", None, True),
    ],
)
def test_accelerators_are_left_alone(platforms, plugin, on_cpu, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(cpu_speed.platform, "libc_ver", lambda: ("none", ""))
    found = lambda name: object() if name == plugin else None  # noqa: E731
    monkeypatch.setattr(cpu_speed.importlib.util, "find_spec", found)
    assert cpu_speed._on_cpu() is on_cpu
    assert not cpu_speed.keep_pages(), "another C library"


@pytest.mark.parametrize("vocab", [1, 7, 300])
def test_argmax_takes_the_first_of_equals(vocab):
    logits = np.random.default_rng(0).integers(-3, 3, (50, vocab)).astype(np.float32)
    np.testing.assert_array_equal(cpu_speed.argmax(jnp.asarray(logits)), logits.argmax(-1))


@pytest.mark.parametrize(("batch", "length"), [(64, 64), (48, 100), (7, 300), (3, 5), (5, 2000)])
def test_blocks_of_rows_hold_each_row_once_in_order(batch, length):
    """In blocks of at most 1024 ids, except where the only divisors of the batch are far smaller."""
    ids = jnp.arange(batch * length).reshape(batch, length)
    blocks = []

    def encode(x):
        blocks.append(x.shape)
        return jnp.stack([x, -x], axis=-1)

    encoded = jax.jit(lambda x: cpu_speed.in_row_blocks(encode, x))(ids)
    np.testing.assert_array_equal(encoded, np.stack([ids, -ids], axis=-1))
    fits = {(64, 64): 16, (48, 100): 8, (5, 2000): 1}.get((batch, length), batch)
    assert (fits, length) in blocks
