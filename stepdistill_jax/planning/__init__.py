"""Computes what a run needs before a device is rented: `plan` compiles the step on abstract arrays."""

from stepdistill_jax.planning.decoding import plan_decode as plan_decode
from stepdistill_jax.planning.plan import plan as plan
