"""Computes matmul FLOPs by formula, since XLA counts the body of a loop only once."""

from stepdistill_jax.models.config import ModelConfig, Side


def train_flops(config: ModelConfig, *, rows: int, input_length: int, target_length: int) -> float:
    """Returns the matmul FLOPs of a forward and a backward pass over padded rows.

    Example: a row of T5 v1.1 large with 512 inputs and 114 targets takes 1.47e12 FLOPs.

    Args:
        rows: number of rows, including rows of padding only.
    """
    # The backward pass costs twice as much as the forward pass. For weights frozen by LoRA, both cost the same.
    weights, adapters, scores = _forward_flops(config, input_length, target_length)
    trained = 3 * adapters + (3 if config.lora is None else 2) * weights
    return float(rows * (trained + 3 * scores))


def recomputed_flops(
    config: ModelConfig, *, rows: int, input_length: int, target_length: int
) -> float:
    """Returns the matmul FLOPs that the backward pass repeats under `config.remat_policy`.

    `elementwise` repeats no matmul. `minimal` repeats the two matmuls inside attention. `full` repeats the forward
    pass of each layer. The output layer is never repeated.
    """
    weights, adapters, scores = _forward_flops(config, input_length, target_length)
    head = 2 * target_length * config.decoder.emb_dim * config.vocab_size
    again = {"elementwise": 0, "minimal": scores, "full": weights - head + adapters + scores}
    return float(rows * again[config.remat_policy])


def _forward_flops(config: ModelConfig, inputs: int, targets: int) -> tuple[int, int, int]:
    """Returns a row's forward FLOPs: (matmuls with weights, matmuls with adapters, matmuls inside attention)."""
    encoder, decoder, ranks = config.encoder, config.decoder, config.lora
    weights, adapters, scores = 2 * targets * decoder.emb_dim * config.vocab_size, 0, 0

    def add(positions: int, width: int, features: int, projection: str) -> None:
        """Adds the FLOPs of a kernel [width, features] and of its adapter."""
        nonlocal weights, adapters
        rank = getattr(ranks, projection) if ranks else 0
        # two FLOPs per weight and position; an adapter is [width, rank] times [rank, features]
        weights += 2 * positions * width * features
        adapters += 2 * positions * rank * (width + features)

    def attend(side: Side, queries: int, keys: int, width: int) -> None:
        """Adds the FLOPs of attention in all layers of a side.

        Keys and values are computed from states [keys, width].
        """
        nonlocal scores
        layers, kv_width = side.num_layers, side.num_kv_heads * side.head_dim
        add(layers * queries, side.emb_dim, side.joined_kv, "query")
        add(layers * queries, side.joined_kv, side.emb_dim, "out")
        add(layers * keys, width, kv_width, "key")
        add(layers * keys, width, kv_width, "value")
        # scores and the mean of values, two FLOPs each; with plain operations, a causal mask saves no FLOPs
        scores += layers * 4 * queries * keys * side.joined_kv

    for side, length in ((encoder, inputs), (decoder, targets)):
        attend(side, length, length, side.emb_dim)
        gates = len(config.mlp_activations) * side.num_layers
        add(gates * length, side.emb_dim, side.mlp_dim, "wi")
        add(side.num_layers * length, side.mlp_dim, side.emb_dim, "wo")
    attend(decoder, targets, inputs, encoder.emb_dim)
    return weights, adapters, scores
