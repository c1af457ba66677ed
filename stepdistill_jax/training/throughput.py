"""Computes the training speed from the contents of batches and the time between steps."""

import time

import jax

from stepdistill_jax.batches.host import HostBatch
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.flops import train_flops
from stepdistill_jax.runtime.chips import chip_of


class Throughput:
    """Turns the times of steps into rates."""

    def __init__(self, config: ModelConfig, *, batch_size: int):
        """Starts the clock."""
        self._config, self._batch_size = config, batch_size
        self._last = time.monotonic()
        chip = chip_of(jax.devices()[0].device_kind)
        self._peak = None if chip is None else chip.bfloat16 * jax.device_count()

    def pause(self) -> None:
        """Excludes the time since the last step from the next step's time, for example after a validation."""
        self._last = time.monotonic()

    def now(self) -> float:
        """Returns the current time of the clock that measures steps, in seconds."""
        return time.monotonic()

    def halfway(self, ended: float) -> float:
        """Estimates when a step ended: halfway between the end of the previous step and the time `ended`."""
        return (self._last + ended) / 2

    def of_step(self, batch: HostBatch, ended: float) -> dict[str, float]:
        """Returns the metrics `timing/...` and `non_padding_fraction/...` of a step that has ended.

        The step's time is measured from the end of the previous step, or from a later call of `pause`.

        Args:
            ended: time at which the step ended, on the clock of `now`.
        """
        seconds, self._last = max(ended - self._last, 1e-9), ended
        flops = sum(
            train_flops(self._config, rows=rows, input_length=inputs, target_length=targets)
            for rows, inputs, targets in batch.shapes
        )
        # 8 rows of 64 input and 32 target tokens: 512 and 256 cells
        cells = [sum(rows * lengths[i] for rows, *lengths in batch.shapes) for i in (0, 1)]
        metrics = {
            "non_padding_fraction/inputs": batch.input_tokens / cells[0],
            "non_padding_fraction/targets": batch.target_tokens / cells[1],
            "timing/examples_per_second": self._batch_size / seconds,
            # without the tokens of a decoder prefix, which the model does not predict
            "timing/target_tokens_per_second": sum(batch.objective_tokens) / seconds,
            "timing/tflops_per_second": flops / seconds / 1e12,
        }
        if self._peak is not None:
            metrics["timing/mfu"] = flops / seconds / self._peak
        return metrics
