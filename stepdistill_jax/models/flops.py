"""Matmul FLOPs of a T5 by formula (XLA's own count sees a loop body once), and peaks of devices."""

from stepdistill_jax.models.config import T5Config

# bfloat16 dense peak of one device, FLOP/s, from the makers' data sheets
PEAK_FLOPS: dict[str, float] = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device by the start of its name, None where it is not known."""
    return next((p for name, p in PEAK_FLOPS.items() if device_kind.startswith(name)), None)


def train_flops(config: T5Config, *, rows: int, input_length: int, target_length: int) -> float:
    """FLOPs of the matmuls of a forward and a backward pass (3 x forward) over padded rows.

    T5 v1.1 large with 512 inputs and 114 targets is 1.47e12 a row.

    Args:
        config: the model.
        rows: rows of the batch, padded ones included.
        input_length: encoder positions of a row.
        target_length: decoder positions of a row.
    """
    c = config
    joined = c.num_heads * c.head_dim
    projections = 2 * 4 * c.emb_dim * joined
    mlp = 2 * (len(c.mlp_activations) + 1) * c.emb_dim * c.mlp_dim
    encoder = input_length * (projections + mlp + 4 * input_length * joined)
    cross = target_length * (projections // 2 + 4 * input_length * joined)
    cross += input_length * projections // 2  # keys and values of the encoder's states
    decoder = target_length * (projections + mlp + 4 * target_length * joined) + cross
    logits = 2 * target_length * c.emb_dim * c.vocab_size
    forward = c.num_encoder_layers * encoder + c.num_decoder_layers * decoder + logits
    return 3.0 * rows * forward
