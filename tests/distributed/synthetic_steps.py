"""Run by processes of a job: some steps on synthetic rows; each process writes what it saw.

An example's first two input tokens are its number. Given, as JSON: `out`, a folder, and `runs`, each
with `name`, `layout` (a name, or fields of `Layout`), `stop` (the step to reach) and, for a run that
is saved and goes on, `workdir`.
"""

import collections
import hashlib
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp

from stepdistill_jax.batches import batch as batch_module
from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.sharding import Layout, make_mesh, place_rows, replicated
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.tasks.token_store import TokenExample, write_store
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.data import on_this_host, placed
from stepdistill_jax.training.optimizer import make_optimizer
from stepdistill_jax.training.state import abstract_state, init_state
from stepdistill_jax.training.step import in_mesh, jit_train_step

EXAMPLES, BATCH_SIZE, STEPS = 40, 16, 10  # an epoch ends in the middle of a step
MODEL = T5Config(
    vocab_size=128,
    emb_dim=64,
    num_heads=8,
    head_dim=8,
    mlp_dim=128,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,
)
WEIGHTS = (1.0, 0.7)
batch_module.SHARD_EXAMPLES = 4  # four shards, of which a process makes its own


def batches_of() -> Batches:
    rng = np.random.default_rng(0)

    def ids(low, high):
        return [*rng.integers(3, 128, rng.integers(low, high)).tolist(), 1]

    def example(i):
        inputs = [3 + i // 8, 3 + i % 8, *ids(1, 28)]
        return TokenExample([(inputs, ids(1, 4)), (inputs, ids(5, 40) if i % 7 else [])])

    with tempfile.TemporaryDirectory() as folder:
        store = write_store(folder, ("label", "rationale"), map(example, range(EXAMPLES)))
        data = TaskData.of_store("synthetic", "train", step_by_step(*WEIGHTS), store, None)
        return Batches(data, BATCH_SIZE, 64, 64, seed=0, row_multiple=16)


def local_rows(placed: jax.Array) -> np.ndarray:
    """[rows, length] of this process's devices, each row once."""
    rows = {shard.index[0].start or 0: shard.data for shard in placed.addressable_shards}
    return np.concatenate([np.asarray(rows[first]) for first in sorted(rows)])


def fed(group) -> tuple[collections.Counter, list[int]]:
    """(example, objective) -> times, and target tokens of each objective, of this process's rows."""
    names = ("encoder_input_tokens", "encoder_segment_ids", "decoder_segment_ids")
    tokens, segments, targets = (local_rows(group[name]) for name in names)
    objectives, seen = local_rows(group["decoder_objective_ids"]), collections.Counter()
    for row in range(len(tokens)):
        for segment in range(1, segments[row].max() + 1):
            tens, ones = tokens[row][segments[row] == segment][:2] - 3
            (objective,) = set(objectives[row][targets[row] == segment].tolist())
            seen[f"{8 * tens + ones} {objective}"] += 1
    return seen, [int((objectives == o).sum()) for o in (1, 2)]


def bytes_of(tree) -> tuple[int, int]:
    """(of this process's devices, each slice once; of all)."""
    held = total = 0
    for x in jax.tree.leaves(tree):
        held += sum({str(s.index): s.data.nbytes for s in x.addressable_shards}.values())
        total += x.nbytes
    return held, total


def main(out: pathlib.Path, batches: Batches, tx, name, layout, stop, workdir=None) -> None:
    mesh = make_mesh(layout if isinstance(layout, str) else Layout(**layout))
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))

    def gathered(tree):
        return [np.array(x) for x in jax.tree.leaves(whole(tree))]

    def digest(tree) -> str:
        return hashlib.sha256(b"".join(x.tobytes() for x in gathered(tree))).hexdigest()

    abstract = abstract_state(MODEL, tx, mesh)
    checkpoints = Checkpoints(workdir) if workdir else None
    if checkpoints and (step := checkpoints.latest_step()) is not None:
        params, rest = checkpoints.restore(step, abstract.params, abstract.replace(params=None))
        state = rest.replace(params=params)
    else:
        state = init_state(MODEL, tx, abstract, seed=3)
    saw = {
        "mesh": dict(mesh.shape),
        "start": int(state.step),
        "start_digest": workdir and [digest(state.params), digest(state.opt_state)],
        "params": bytes_of(state.params),
        "opt_state": bytes_of(state.opt_state),
        "losses": [],
        "fed": [],
        "tokens": [],
        "made": [],
        "known": [],
    }
    static = {"model": EncoderDecoder(MODEL), "tx": tx, "objective_weights": WEIGHTS}
    lower = jit_train_step(abstract, mesh, **static).__wrapped__.lower
    step_fn = in_mesh(lower, mesh)(abstract, place_rows(batches(0), mesh)).compile()
    # gloo gives up on a peer that is still compiling 30 s later
    ocp.multihost.sync_global_processes(f"compiled {name}")
    for own in on_this_host(batches, int(state.step), stop, mesh):
        batch = placed(own, mesh)
        seen, tokens = fed(batch[0])
        state, metrics = step_fn(state, batch)
        saw["losses"].append(float(metrics["loss"]))
        saw["fed"].append(seen)
        saw["tokens"].append(tokens)
        saw["made"].append(own.shards)
        saw["known"].append([*own.objective_tokens, own.input_tokens, own.shapes])
    saw["end_digest"] = workdir and [digest(state.params), digest(state.opt_state)]
    if checkpoints:
        metrics = {"step": stop, "validated": False}
        checkpoints.save(stop, state.params, state.replace(params=None), metrics)
        checkpoints.close()
    final = gathered(state.params)
    (out / f"{name}_{jax.process_index()}.json").write_text(json.dumps(saw))
    if jax.process_index() == 0:
        np.savez(out / f"{name}.npz", *final)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    out = pathlib.Path(given["out"])
    out.mkdir(parents=True, exist_ok=True)
    schedule = TrainConfig(task="synthetic", train_steps=STEPS, learning_rate=1e-3)
    for one in given["runs"]:
        main(out, batches_of(), make_optimizer(schedule), **one)
