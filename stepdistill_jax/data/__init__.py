"""Reads original files, prepares datasets and opens prepared ones.

Importing this package does not load TensorFlow. The attribute `data.prepare` is the function `prepare`, not the
module. Import other names of the module with `from stepdistill_jax.data.prepare import ...`.
"""

from stepdistill_jax.data.prepare import ensure_prepared, prepare
from stepdistill_jax.data.prepared import PreparedDataset, default_data_dir, open_prepared

__all__ = ["PreparedDataset", "default_data_dir", "ensure_prepared", "open_prepared", "prepare"]
