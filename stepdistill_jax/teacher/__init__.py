"""Asks a large model for the rationales and labels of questions.

In this package, `annotate` is the function, not its module. Import the module's other names with
`from stepdistill_jax.teacher.annotate import ...`.
"""

from stepdistill_jax.teacher.annotate import annotate
from stepdistill_jax.teacher.settings import Settings

__all__ = ["Settings", "annotate"]
