"""Reads original files, prepares datasets and opens prepared ones.

Importing this package does not load TensorFlow. In this package, the function `prepare` hides the module of
the same name. Import the module's other names with `from stepdistill_jax.data.prepare import ...`.
"""

from stepdistill_jax.data.prepare import ensure_prepared, prepare
from stepdistill_jax.data.prepared import PreparedDataset, default_data_dir, open_prepared

__all__ = ["PreparedDataset", "default_data_dir", "ensure_prepared", "open_prepared", "prepare"]
