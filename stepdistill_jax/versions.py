"""Collects the versions and devices that `stepdistill --version` and `run.json` report."""

import importlib.metadata
import platform
from typing import Any

from stepdistill_jax import __version__

# distributions on which numbers, files or the order of the data depend
LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "seqio",
    "tensorflow-datasets",
    "tensorflow",
    "tensorflow-text",
    "transformers",
    "safetensors",
    "sentencepiece",
    "numpy",
)


def version_block() -> dict[str, Any]:
    """Returns the versions of the package, Python and the libraries, and the devices.

    The function starts JAX's backend.

    Returns:
        `stepdistill_jax`, `python`, `platform`, and each of `LIBRARIES`: versions; None if not installed.
        `devices`: the devices of all processes, such as `"2 x cpu (cpu)"`.
        `local_devices`: number of this process's devices.
        `process_count`: number of processes.
    """
    block: dict[str, Any] = {
        "stepdistill_jax": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in LIBRARIES:
        try:
            block[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            block[name] = None
    return block | _devices()


def _devices() -> dict[str, Any]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:  # a requested backend cannot start, which a report should show
        return {"devices": f"none: {' '.join(str(error).split())}"}
    return {
        "devices": f"{len(devices)} x {devices[0].platform} ({devices[0].device_kind})",
        "local_devices": jax.local_device_count(),
        "process_count": jax.process_count(),
    }
