"""Provides devices to compile for: virtual CPUs, a TPU slice, or one host's H100s."""

import importlib.util
import os
import pathlib
from typing import Any

import jax

from stepdistill_jax.errors import InputError, how_to_install
from stepdistill_jax.runtime.chips import chip_of

# Properties of a TPU machine that libtpu reads. If they are missing, libtpu searches the network and logs errors.
# Their values do not affect compilation, which depends only on the topology's name.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    # without this, a second plan on the machine aborts, since libtpu locks a TPU that does not exist
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

DEFAULT_HBM = 80 * 10**9  # bytes of an A100 or H100
GPU = "cuda"  # the first part of the name of a GPU topology, such as `cuda:8`
MOST_GPUS = 8  # GPUs of one host, all connected by NVLink
GPU_TARGET = pathlib.Path(__file__).with_name("h100_sxm.txtpb")
# share of a GPU's memory that JAX takes, unless one of the variables below is set
DEFAULT_FRACTION = 0.75
_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def memory_fraction() -> float:
    """Returns the share of a GPU's memory that JAX takes: three quarters by default.

    `XLA_CLIENT_MEM_FRACTION` or else `XLA_PYTHON_CLIENT_MEM_FRACTION` sets another share.

    Raises:
        InputError: the value is not a number above 0 and at most 1.
    """
    name = next((name for name in _FRACTION if os.environ.get(name)), None)
    if name is None:
        return DEFAULT_FRACTION
    try:
        share = float(os.environ[name])
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"{name}={os.environ[name]}: expected a share above 0 and at most 1")
    return share


def memory_of(kind: str, hbm: int | None) -> int:
    """Returns the bytes of a device's memory: `hbm` if given, else the chip's memory, or 80e9 for an unknown chip."""
    chip = chip_of(kind)
    return hbm or (DEFAULT_HBM if chip is None else chip.memory)


def usable_share(device: Any) -> float:
    """Returns the share of a device's memory that a step may take.

    This is 1 on a TPU, whose compiler refuses a step that does not fit. On a GPU and on a virtual device, this
    is `memory_fraction()`.
    """
    return 1.0 if device.platform == "tpu" else memory_fraction()


def virtual_devices(count: int, *, most: int | None = None) -> list[Any]:
    """Returns between `count` and `most` CPU devices. A `most` of None means `count`.

    Makes JAX create `most` devices if no code has used devices yet.

    Raises:
        InputError: JAX already has CPU devices, but fewer than `count`.
    """
    most = most or count
    try:
        jax.config.update("jax_num_cpu_devices", most)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:  # devices exist already
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"`devices={count}`: this process already has {len(devices)} CPU devices; plan in a new"
            f" process, or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:most]


def topology_devices(name: str) -> list[Any]:
    """Returns the abstract devices of a TPU slice (such as `v5e:8x8`) or of one host's H100s (`cuda:8`).

    Raises:
        InputError: the compiler for these devices is not installed, or does not know the topology.
    """
    kind, _, sizes = name.partition(":")
    # below, `jax_platforms` keeps real arrays, such as a random key, on the CPU
    if kind == GPU:
        return _gpus(name, sizes)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"`topology` {name}: the TPU compiler is not installed; {how_to_install('tpu')}"
        )
    for variable, value in _NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"`topology` {name}: {str(error).splitlines()[0]}; expected KIND:AxB or KIND:AxBxC, for"
            " example v5e:8x8, v5p:4x4x4 or v6e:16x16, or cuda:8 for 8 H100s"
        ) from None


def _gpus(name: str, count: str) -> list[Any]:
    if not count.isdigit() or not 1 <= int(count) <= MOST_GPUS:
        raise InputError(
            f"`topology` {name}: expected {GPU}:1 to {GPU}:{MOST_GPUS}, the H100s of one host"
        )
    if not any(_found(f"jax_plugins.xla_cuda{version}") for version in (13, 12)):
        raise InputError(
            f"`topology` {name}: the compiler for NVIDIA GPUs is not installed (about 3 GB; no GPU is"
            f" needed); {how_to_install('aot-cuda')}"
        )
    # without this variable, the plugin looks for a driver
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    target = GPU_TARGET.read_text(encoding="utf-8")
    # slices x hosts x devices of a host
    found = topologies.get_topology_desc(
        platform=GPU, target_config=target, topology=f"1x1x{int(count)}"
    )
    return list(found.devices)


def _found(module: str) -> bool:
    """Returns whether a module and its parent package are installed."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
