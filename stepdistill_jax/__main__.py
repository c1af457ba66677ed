"""Runs the command `stepdistill` when Python is started as `python -m stepdistill_jax`."""

import sys

from stepdistill_jax.commands.main import main

sys.exit(main())
