"""Makes models for the benchmarks: random weights, in a directory that `predict` opens."""

import os
from typing import Any


def save_random_model(
    directory: os.PathLike | str,
    vocabulary: Any,
    *,
    size: str,
    family: str = "t5_v1_1",
    vocab_size: int | None = None,
    seed: int = 0,
    ends: float = 3.0,
    task_info: Any = None,
    **overrides: Any,
) -> None:
    """Writes a model whose answers end sometimes, or never.

    Args:
        directory: a new directory.
        vocabulary: vocabulary of the prompts.
        size: size of the family.
        family: a name of `models.families.FAMILIES`.
        vocab_size: rows of the embedding, if more than the vocabulary's.
        seed: seed of the weights.
        ends: factor of the output row of the end of sequence: at 3 it is sometimes the likeliest token of
            a T5 v1.1, at 0 never.
        task_info: contents of `stepdistill.json`; None writes no such file.
        **overrides: other fields of the family's configuration.
    """
    import jax

    from stepdistill_jax.data.vocabulary import EOS_ID
    from stepdistill_jax.formats.directory import write_model_files
    from stepdistill_jax.formats.hf import save_params
    from stepdistill_jax.models.encoder_decoder import init_params
    from stepdistill_jax.models.families import model_config

    vocab_size = max(vocabulary.size, vocab_size or 0)
    bos_id = vocabulary.framing.bos_id
    config = model_config(family, size, vocab_size=vocab_size, bos_id=bos_id, **overrides)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))
    if config.logits_via_embedding:
        head = params[config.target_embedder]  # [vocab_size, emb_dim]
        params[config.target_embedder] = head.at[EOS_ID].multiply(ends)
    else:
        head = params["logits_dense"]["kernel"]  # [emb_dim, vocab_size]
        params["logits_dense"]["kernel"] = head.at[:, EOS_ID].multiply(ends)
    write_model_files(directory, config, vocabulary, task_info)
    save_params(directory, params, config)
