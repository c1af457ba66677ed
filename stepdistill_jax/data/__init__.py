"""Datasets: reading originals, preparing them, opening what was prepared. No TensorFlow at import.

The function `prepare` takes the name of its module here: write
`from stepdistill_jax.data.prepare import ...` for anything else that is in it.
"""

from stepdistill_jax.data.prepare import ensure_prepared, prepare
from stepdistill_jax.data.prepared import PreparedDataset, default_data_dir, open_prepared

__all__ = ["PreparedDataset", "default_data_dir", "ensure_prepared", "open_prepared", "prepare"]
