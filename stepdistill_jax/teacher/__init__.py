"""Rationales from a large model: questions in, questions with rationales and the teacher's labels out.

The function `annotate` takes the name of its module here: write
`from stepdistill_jax.teacher.annotate import ...` for anything else that is in it.
"""

from stepdistill_jax.teacher.annotate import annotate
from stepdistill_jax.teacher.settings import Settings

__all__ = ["Settings", "annotate"]
