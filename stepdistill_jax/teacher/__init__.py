"""Asks a large model for the rationales and labels of questions.

Here `annotate` is the function, not its module: write `from stepdistill_jax.teacher.annotate import ...`
for anything else in the module.
"""

from stepdistill_jax.teacher.annotate import annotate
from stepdistill_jax.teacher.settings import Settings

__all__ = ["Settings", "annotate"]
