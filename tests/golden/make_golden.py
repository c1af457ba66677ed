"""Writes golden.npz: what a tiny model of each family computes, from weights that numpy draws.

Run it only where a change of numerics is meant; it prints how much changed. The weights and ids come
from numpy's seeded generator, so a change of JAX's own is not the cause of a difference.

    python tests/golden/make_golden.py
"""

import functools
import importlib.metadata
import json
import math
import pathlib
import tempfile

import flax.traverse_util
import jax
import numpy as np
import optax

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.decoding.greedy import greedy_decode
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, init_params
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.sharding import Layout, make_mesh, place_rows
from stepdistill_jax.models.t5gemma import T5GemmaConfig, gemma_side
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.tasks.token_store import TokenExample, write_store
from stepdistill_jax.training.state import abstract_state, create_state
from stepdistill_jax.training.step import jit_train_step

PATH = pathlib.Path(__file__).with_name("golden.npz")
SEED = 20261124
STEPS = 5
FAMILIES = ("t5_v1_0", "t5_v1_1", "mt5", "byt5", "umt5", "ul2", "t5gemma")


# nearly all of the time is compilation, so XLA optimises little
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tiny(family: str) -> ModelConfig:
    """A model of a family in a few thousand parameters; ByT5 keeps its deeper encoder.

    T5Gemma has unequal sides, fewer key/value heads, windows shorter than the rows and caps that bend.
    """
    if family == "t5gemma":
        return T5GemmaConfig(
            vocab_size=128,
            encoder=gemma_side(16, 4, 2, 8, 24, 3, window=5, score_softcap=3.0),
            decoder=gemma_side(12, 2, 1, 8, 20, 2, window=4, score_softcap=3.0),
            logits_softcap=3.0,
        )
    return model_config(
        family,
        "tiny",
        vocab_size=128,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=24,
        max_distance=16,
        num_buckets=8,
        dropout_rate=0.0,
    )


def numpy_params(config: ModelConfig, seed: int):
    """Parameters drawn by numpy, path by path; scales and biases away from 1 and 0."""
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    rng = np.random.default_rng(seed)
    flat = {}
    for path, x in sorted(flax.traverse_util.flatten_dict(shapes, sep="/").items()):
        values = rng.normal(size=x.shape)
        if path.endswith("scale"):
            values = 1 - config.norm_offset + 0.3 * values
            if config.logits_softcap and "decoder_norm" in path:
                values = values + 3  # else no logit is near the cap
        elif path.endswith("kernel"):
            values = values * x.shape[-2] ** -0.5
        elif path.endswith("embedder") and config.logits_via_embedding:
            # else a tied model repeats its last token
            values = values * (0.06 if config.scaled_embeddings else 0.2)
        flat[path] = values.astype(np.float32)
    # a random model never says its end: that row is made longer
    if config.logits_via_embedding:
        flat[config.target_embedder][1] *= 2.5 if config.scaled_embeddings else 1.4
    else:
        flat["logits_dense/kernel"][:, 1] *= 2 if config.position_bias == "layer" else 3
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def of_family(family: str) -> dict[str, np.ndarray]:
    """Logits of a padded batch longer than `max_distance`; greedy ids, scores and margins."""
    config = tiny(family)
    params = numpy_params(config, SEED + FAMILIES.index(family))
    rng = np.random.default_rng(SEED)
    source = rng.integers(2, 128, (6, 24)).astype(np.int32)
    source[1, 7:] = source[3, 15:] = 0
    target = rng.integers(2, 128, (6, 20)).astype(np.int32)
    target[0, 4:] = 0
    batch = {
        "encoder_input_tokens": source,
        "encoder_segment_ids": (source > 0).astype(np.int32),
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_segment_ids": (target > 0).astype(np.int32),
    }
    logits = np.asarray(quick_jit(EncoderDecoder(config).apply)({"params": params}, batch))
    decode = quick_jit(functools.partial(greedy_decode, config=config, max_decode_len=8))
    ids, scores, _ = decode(params, encoder_input_tokens=source)
    return {
        # every eighth of the logits that count, to keep the file small
        f"{family}/logits": logits[target > 0][::8],
        f"{family}/greedy_ids": np.asarray(ids),
        f"{family}/greedy_scores": np.asarray(scores),
    }


def batches(folder) -> Batches:
    """Packed batches of 24 synthetic examples, every fifth without a rationale."""
    rng = np.random.default_rng(SEED)

    def ids(low, high):
        return [*rng.integers(3, 128, rng.integers(low, high)).tolist(), 1]

    examples = []
    for i in range(24):
        inputs, label, rationale = ids(3, 12), ids(1, 4), ids(4, 12)
        rows = [(inputs, label), (inputs, rationale if i % 5 else [])]
        examples.append(TokenExample(rows, weight=1 + i % 2))
    store = write_store(folder, ("label", "rationale"), examples)
    data = TaskData.of_store("golden", "train", step_by_step(), store, None)
    return Batches(data, batch_size=8, input_length=32, target_length=24, seed=SEED)


def of_training() -> dict[str, np.ndarray]:
    """The first packed batch, and the losses of 5 steps of T5 v1.1 with the paper's optimizer."""
    config = tiny("t5_v1_1")
    mesh = make_mesh(Layout(), jax.devices()[:1])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.0))
    abstract = abstract_state(config, tx, mesh)
    step_fn = jit_train_step(
        abstract, mesh, model=EncoderDecoder(config), tx=tx, objective_weights=(0.5, 0.5)
    )
    with tempfile.TemporaryDirectory() as folder:
        made = batches(pathlib.Path(folder) / "store")
        steps = [made(step) for step in range(STEPS)]
    state = jax.device_put(
        create_state(numpy_params(config, SEED), tx, seed=0),
        jax.tree.map(lambda x: x.sharding, abstract),
    )
    losses = []
    for batch in steps:
        state, metrics = step_fn(state, place_rows(batch, mesh))
        losses.append(np.asarray(metrics["sums"].loss / metrics["sums"].count))
    return {f"batch/{name}": x for name, x in steps[0][0].items()} | {"losses": np.stack(losses)}


def make() -> dict[str, np.ndarray]:
    """Everything that the file holds but `about`."""
    found = of_training()
    for family in FAMILIES:
        found |= of_family(family)
    return found


def gap(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference in units of the root mean square of `want`; infinite if shapes differ."""
    if got.shape != want.shape:
        return math.inf
    rms = np.sqrt(np.mean(np.square(want, dtype=np.float64)))
    return float(np.abs(got.astype(np.float64) - want).max() / (rms or 1))


def main() -> None:
    """Writes the file and prints what differs from the one before."""
    made = make()
    if PATH.exists():
        with np.load(PATH) as old:
            for name, x in made.items():
                change = gap(x, old[name]) if name in old else math.inf
                print(f"{name}: changed by {change:.1e}")
    libraries = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    about = {"seed": SEED, "device": jax.devices()[0].device_kind, "versions": versions}
    np.savez_compressed(PATH, about=json.dumps(about), **made)
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
