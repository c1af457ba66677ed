"""`xla_flags.sh`: what it adds, what it leaves alone, and that XLA knows the names."""

import pathlib
import re
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
FILE = LAUNCH / "xla_flags.sh"


def added(platform, **environment):
    """(XLA_FLAGS, LIBTPU_INIT_ARGS) after `add_xla_flags PLATFORM`."""
    script = f'. {FILE}; add_xla_flags {platform}; echo "${{XLA_FLAGS-}}|${{LIBTPU_INIT_ARGS-}}"'
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [flags.split() for flags in done.stdout.rstrip("\n").split("|")]


def test_gpu_flags_are_for_xla_and_tpu_flags_for_libtpu():
    xla, libtpu = added("gpu")
    assert xla and not libtpu and all(flag.startswith("--xla_gpu_") for flag in xla)
    xla, libtpu = added("tpu")
    assert libtpu and not xla


@pytest.mark.parametrize(
    "own", ["--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm"]
)
@pytest.mark.parametrize("after", ["", " --xla_foo=1", "\n--xla_foo=1"])
def test_what_the_user_set_stays_and_comes_first(own, after):
    recommended, _ = added("gpu")
    xla, _ = added("gpu", XLA_FLAGS=own + after)
    mine = (own + after).split()
    others = [f for f in recommended if not f.startswith("--xla_gpu_enable_triton_gemm=")]
    assert xla == mine + others and len(others) == len(recommended) - 1


def test_a_longer_name_is_another_flag():
    longer = "--xla_gpu_enable_triton_gemm_any=true"
    xla, _ = added("gpu", XLA_FLAGS=longer)
    assert "--xla_gpu_enable_triton_gemm=false" in xla


def test_another_platform_is_refused():
    script = f". {FILE}; add_xla_flags rocm"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "'rocm'" in done.stderr


def test_every_flag_has_a_source_above_it():
    lists = re.findall(r"_flags=\(\n(.*?)^\)", FILE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(lists) == 2
    for lines in lists:
        sourced = after_flag = False
        for line in map(str.strip, lines.splitlines()):
            if line.startswith("#"):
                source = "https://" in line or "in the same file" in line
                sourced, after_flag = source or (sourced and not after_flag), False
            else:
                assert sourced, line
                after_flag = True


def test_xla_knows_every_gpu_flag_that_we_name():
    """An unknown one would end every process at its start; the CPU's XLA reads the same flags."""
    named = re.findall(r"--xla_gpu_\w+=\w+", FILE.read_text())
    flags, _ = added("gpu")
    assert set(flags) <= set(named)
    script = "import jax; jax.numpy.zeros(3)"
    for extra, known in ((named, True), ([*named, "--xla_gpu_no_such_flag=1"], False)):
        environment = {"XLA_FLAGS": " ".join(extra), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
        assert (done.returncode == 0) == known, done.stderr
        assert (b"Unknown flag" in done.stderr) == (not known)
