"""Pages that XLA gives back are kept on a CPU, and nothing is touched elsewhere."""

import os
import platform
import subprocess
import sys

import pytest

from stepdistill_jax.runtime import host_memory

LOOP = """
import resource, sys
from stepdistill_jax.runtime.host_memory import keep_pages
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_a_step_clears_its_pages_once():
    assert faults("keep") < faults("leave") / 4


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
    monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: ("none", ""))
    found = lambda name: object() if name == plugin else None  # noqa: E731
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", found)
    assert host_memory._on_cpu() is on_cpu
    assert not host_memory.keep_pages(), "another C library"
