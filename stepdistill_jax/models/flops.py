"""Matmul FLOPs of a T5 by formula (XLA's own count sees a loop body once)."""

from stepdistill_jax.models.config import T5Config


def train_flops(config: T5Config, *, rows: int, input_length: int, target_length: int) -> float:
    """FLOPs of the matmuls of a forward and a backward pass over padded rows.

    The backward pass is twice the forward: a gradient for each factor of a product. Under LoRA the
    frozen weights have none, so their products count once.

    T5 v1.1 large with 512 inputs and 114 targets is 1.47e12 a row.

    Args:
        config: the model.
        rows: rows of the batch, padded ones included.
        input_length: encoder positions of a row.
        target_length: decoder positions of a row.
    """
    weights, adapters, scores = _forward_flops(config, input_length, target_length)
    trained = 3 * adapters + (3 if config.lora is None else 2) * weights
    return float(rows * (trained + 3 * scores))


def recomputed_flops(
    config: T5Config, *, rows: int, input_length: int, target_length: int
) -> float:
    """FLOPs of the matmuls that the backward pass does again under the config's `remat_policy`.

    `minimal` keeps what products with weights give and recomputes attention's own two products;
    `full` recomputes each layer's forward pass. Neither recomputes the output layer.
    """
    weights, adapters, scores = _forward_flops(config, input_length, target_length)
    head = 2 * target_length * config.emb_dim * config.vocab_size
    again = {"elementwise": 0, "minimal": scores, "full": weights - head + adapters + scores}
    return float(rows * again[config.remat_policy])


def _forward_flops(config: T5Config, inputs: int, targets: int) -> tuple[int, int, int]:
    """A row's forward pass: products with weights, with adapters, and inside attention."""
    c = config
    joined = c.num_heads * c.head_dim
    gates = len(c.mlp_activations)
    # per position: the weights, and the adapters' of LoRA, of one layer
    attention, mlp = 2 * 4 * c.emb_dim * joined, 2 * (gates + 1) * c.emb_dim * c.mlp_dim
    thin_attention = thin_mlp = thin_cross_inputs = 0
    if (lora := c.lora) is not None:
        one = 2 * (c.emb_dim + joined)
        thin_cross_inputs = one * (lora.key + lora.value)
        thin_attention = one * (lora.query + lora.out) + thin_cross_inputs
        thin_mlp = 2 * (gates * lora.wi + lora.wo) * (c.emb_dim + c.mlp_dim)

    def layers(attention: int, mlp: int, cross_inputs: int) -> int:
        encoder = inputs * (attention + mlp)
        decoder = targets * (2 * attention - cross_inputs + mlp) + inputs * cross_inputs
        return c.num_encoder_layers * encoder + c.num_decoder_layers * decoder

    weights = layers(attention, mlp, attention // 2) + 2 * targets * c.emb_dim * c.vocab_size
    adapters = layers(thin_attention, thin_mlp, thin_cross_inputs)
    scores = c.num_encoder_layers * inputs * inputs
    scores += c.num_decoder_layers * targets * (targets + inputs)
    return weights, adapters, 4 * joined * scores
