"""Registers `cqa_svamp`, a mixture of two prepared datasets, as an example for your own mixtures.

In a config, set TASK = "cqa_svamp" and TASK_MODULE = "stepdistill_jax.tasks.cqa_svamp".
"""

import seqio

from stepdistill_jax.data.prepared import how_to_prepare
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks import register_prepared

for name in sorted({"cqa", "svamp"} - set(register_prepared())):
    raise InputError(f"cqa_svamp: {name} is not prepared; {how_to_prepare(name)}")
seqio.MixtureRegistry.add("cqa_svamp", ["cqa", "svamp"], default_rate=1.0)
