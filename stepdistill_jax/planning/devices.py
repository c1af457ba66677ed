"""Devices to compile for that are not there: virtual CPU devices, or a TPU topology."""

import importlib.util
import os
from typing import Any

import jax

from stepdistill_jax.errors import InputError

# What libtpu asks a TPU machine for; without answers it looks for them on the network, and complains.
# They do not decide what is compiled: the topology's name does.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
}

# memory of one chip, from the makers' data sheets
TPU_MEMORY = {
    "TPU v4": 32 * 2**30,
    "TPU v5 lite": 16 * 2**30,
    "TPU v5": 95 * 2**30,  # v5p
    "TPU v6 lite": 32 * 2**30,
}


def virtual_devices(count: int, *, most: int | None = None) -> list[Any]:
    """CPU devices, at least `count`, which this makes where JAX has none yet: then `most`.

    JAX fixes its devices when the first one is asked for: call this before anything else does, or in
    a process that already has as many.

    Raises:
        InputError: JAX has devices, and not so many.
    """
    most = most or count
    try:
        jax.config.update("jax_num_cpu_devices", most)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:  # devices are there
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"`devices={count}`: this process already has {len(devices)} CPU devices; plan in a process"
            f" of its own, or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:most]


def topology_devices(name: str) -> list[Any]:
    """Devices of a TPU slice such as `v5e:8x8`, to compile for with libtpu; none has to be there.

    Raises:
        InputError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"`topology` {name}: the TPU compiler is not installed; pip install 'stepdistill-jax[tpu]'"
        )
    for variable, value in _NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    # arrays that are really made, such as a random key, stay on the CPU
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"`topology` {name}: {str(error).splitlines()[0]}; a name is KIND:AxB or KIND:AxBxC, for"
            " example v5e:8x8, v5p:4x4x4 or v6e:16x16"
        ) from None
