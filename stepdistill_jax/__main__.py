"""Runs the command `stepdistill` for `python -m stepdistill_jax`."""

import sys

from stepdistill_jax.commands.main import main

sys.exit(main())
