"""How fast a run is, from what its batches hold and the time between steps."""

import time

import jax
import numpy as np

from stepdistill_jax.batches.batch import Batch
from stepdistill_jax.models.config import T5Config
from stepdistill_jax.models.flops import train_flops
from stepdistill_jax.runtime.chips import chip_of


class Throughput:
    """Turns step times into rates; validation and saving are left out by `pause`."""

    def __init__(self, config: T5Config, *, batch_size: int):
        """Starts the clock."""
        self._config, self._batch_size = config, batch_size
        self._last = time.monotonic()
        chip = chip_of(jax.devices()[0].device_kind)
        self._peak = None if chip is None else chip.bfloat16 * jax.device_count()

    def pause(self) -> None:
        """Forgets the time since the last step."""
        self._last = time.monotonic()

    def now(self) -> float:
        """Returns the clock that steps are measured by, in seconds."""
        return time.monotonic()

    def halfway(self, ended: float) -> float:
        """Returns the middle between the last known end and `ended`: two steps share that time."""
        return (self._last + ended) / 2

    def of_step(self, batch: Batch, ended: float) -> dict[str, float]:
        """Returns `timing/...` and fill of a step that ended at `ended` of `now`.

        Its time is that since the step before it ended, or since the last `pause`.
        """
        seconds, self._last = max(ended - self._last, 1e-9), ended
        targets = [g["decoder_segment_ids"] > 0 for g in batch]
        inputs = [g["encoder_segment_ids"] > 0 for g in batch]
        # not those of a decoder prefix, which are given
        real_targets = sum(int((g["decoder_objective_ids"] > 0).sum()) for g in batch)
        flops = sum(
            train_flops(
                self._config,
                rows=i.shape[0],
                input_length=i.shape[1],
                target_length=t.shape[1],
            )
            for i, t in zip(inputs, targets, strict=True)
        )
        metrics = {
            "non_padding_fraction/inputs": _share(inputs),
            "non_padding_fraction/targets": _share(targets),
            "timing/examples_per_second": self._batch_size / seconds,
            "timing/target_tokens_per_second": real_targets / seconds,
            "timing/tflops_per_second": flops / seconds / 1e12,
        }
        if self._peak is not None:
            metrics["timing/mfu"] = flops / seconds / self._peak
        return metrics


def _share(masks: list[np.ndarray]) -> float:
    return float(sum(int(m.sum()) for m in masks) / sum(m.size for m in masks))
