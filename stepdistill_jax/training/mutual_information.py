"""The mutual-information loss of MI-DSS, which relates an example's rationale to its label."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from stepdistill_jax.data.schedules import Weight
from stepdistill_jax.models.encoder_decoder import OutputLayer
from stepdistill_jax.training.extra_loss import PairedLoss


@dataclasses.dataclass(frozen=True)
class MutualInformation(PairedLoss):
    """The mutual-information loss of MI-DSS (Chen et al., Findings of ACL 2024, arXiv:2403.03348).

    The loss moves a rationale towards the words that the label predicts. A pair is the label and the rationale of
    one example; several rationales count as one. For each id v, z_v is its largest probability over the positions
    of the label, and r_v its largest probability over the positions of the rationale. The end of sequence counts as
    a position. The loss of a pair is

        CE(z, r) = - sum over v of z_v log softmax(r)_v

    where z gets no gradient. The mean of CE over the pairs of the global batch, times `weight`, is added to the
    training loss.

    The formula is that of the paper's code (github.com/xinchen9/cot_distillation_ACL2024, commit 59ca033,
    `model_utils.py`), but that code also takes the maxima over padding.

    Example with 2 ids: if the label's tokens have the probabilities (0.9, 0.1) and (0.2, 0.8), z is (0.9,
    0.8). If r is (0.5, 0.5), the loss is 1.7 ln 2 = 1.178.

    A step needs memory for the float32 logits of a whole microbatch.

    Attributes:
        weight: factor of this loss, a number of at least 0, or a `Schedule`, such as @linear_schedule(). The paper's
            code uses 0.1 (there `beta`), together with weights of 0.5 for label and rationale.
    """

    name = "mutual_information"
    weight: Weight = 0.1

    def total(
        self, states: jax.Array, output: OutputLayer, group: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Returns the sum of the loss CE(z, r) over all pairs in `group`, in nats."""
        probabilities = jax.nn.softmax(output.logits(states))
        pairs = self.is_pair(group)[..., None]

        def reduced(objective: int) -> jax.Array:
            maxima = self.pooled(probabilities, group, objective, jax.ops.segment_max)
            # `segment_max` gives -inf for a place without tokens, which would make the sum NaN. With z and r
            # of 0, a place adds 0.
            return jnp.where(pairs, maxima, 0.0)

        label, rationale = jax.lax.stop_gradient(reduced(1)), reduced(2)
        return -(label * jax.nn.log_softmax(rationale)).sum()
