"""Predicts, before any device is rented, what a run will need.

`plan` compiles the training step on abstract arrays, and `plan_decode` compiles the decoder.
"""

from stepdistill_jax.planning.decoding import plan_decode as plan_decode
from stepdistill_jax.planning.plan import plan as plan
