"""`python -m stepdistill_jax` is `stepdistill`."""

import sys

from stepdistill_jax.commands.main import main

sys.exit(main())
