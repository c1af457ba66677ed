"""The mutual-information loss of MI-DSS, which ties an example's rationale to its label."""

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

    Of each target the probabilities of its tokens, each a softmax over the vocabulary, are reduced
    to their maxima: z_v = max over the label's tokens, r_v over the rationale's. The loss of a pair is

        CE(z, r) = - sum over v of z_v log softmax(r)_v

    with no gradient through z. Its mean over the pairs of the global batch is added with `weight`,
    so the rationale is drawn to the words that the label predicts.

    The paper has the cross-entropy of the two reductions as its bound of the mutual information; how
    it is computed is taken from its code (github.com/xinchen9/cot_distillation_ACL2024, commit
    59ca033, `model_utils.py`): r is taken as logits, so it meets a second softmax, z does not sum to
    1, and z is detached. One thing differs. The code takes the maxima over padding, too, so its loss
    depends on the other rows of a batch; here they are over the target's own tokens, the end of
    sequence included.

    With 2 ids, a label whose tokens have the probabilities (0.9, 0.1) and (0.2, 0.8), so z = (0.9,
    0.8), and a rationale of (0.5, 0.5), the loss is 1.7 ln 2 = 1.178.

    The logits of a slice are made at once, in float32: the largest array of the step.

    Attributes:
        weight: at least 0, or a `Schedule`; the paper's code has 0.1 (`beta`) next to 0.5 for label
            and rationale.
    """

    name = "mutual_information"
    weight: Weight = 0.1

    def total(
        self, states: jax.Array, output: OutputLayer, group: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Sum of CE(z, r) over the pairs of these rows, in nats."""
        probabilities = jax.nn.softmax(output.logits(states))
        pairs = self.is_pair(group)[..., None]

        def reduced(objective: int) -> jax.Array:
            maxima = self.pooled(probabilities, group, objective, jax.ops.segment_max)
            return jnp.where(pairs, maxima, 0.0)  # -inf where there are no tokens

        label, rationale = jax.lax.stop_gradient(reduced(1)), reduced(2)
        return -(label * jax.nn.log_softmax(rationale)).sum()
