"""Asks a large model for the rationales and labels of questions.

`teacher.annotate` is the function `annotate`, which hides the module of the same name. Import other names of
that module with `from stepdistill_jax.teacher.annotate import ...`.
"""

from stepdistill_jax.teacher.annotate import annotate
from stepdistill_jax.teacher.settings import Settings

__all__ = ["Settings", "annotate"]
