"""Versions and devices for `stepdistill --version`, `run.json` and bug reports."""

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

    Starts JAX's backend, and imports none of the other libraries.

    Returns:
        `stepdistill_jax`, `python`, `platform`, one entry for each of `LIBRARIES` (None: not
        installed), `devices` (such as `"2 x cpu (cpu)"`: count, platform, kind), `local_devices` (of
        this process) and `process_count`.
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
