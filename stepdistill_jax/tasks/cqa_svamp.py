"""The mixture `cqa_svamp` of two prepared datasets, for one model of both; a model for your own.

A config names it: TASK = "cqa_svamp", TASK_MODULE = "stepdistill_jax.tasks.cqa_svamp".
"""

import seqio

from stepdistill_jax.tasks import register_prepared

register_prepared()
seqio.MixtureRegistry.add("cqa_svamp", ["cqa", "svamp"], default_rate=1.0)
