"""Compares examples per second of training: our step with a shipped config, and the paper's torch loop.

    python benchmarks/train_throughput.py --config paper_cqa --size small --vocab-size 32128 --json

An example has a label row and a rationale row. `ours` is the step of `stepdistill train CONFIG`, with packed
rows and random weights of `--family` as INIT_FROM. The peer does the same as the paper's public code (Hsieh
et al. 2023, arXiv:2305.02301) with current `transformers`: two forward passes per step, labels and
rationales each padded to their longest row, the weighted sum of both mean losses, gradients clipped to 1,
fused AdamW. Both start from the same weights and draw the same examples. Before the timing, the benchmark
checks that both have the same loss without dropout.

Each runs in its own process with its best environment (docs/lab/training_speed.md), and they take turns.
Further contenders: `transformers_bfloat16`; `ours_shared_encoder`, our step with one encoding of each
example for both targets (its loss differs, so losses are not compared); and `ours_by_hand`, our step with
packed rows of `--row-lengths`.
"""

import argparse
import contextlib
import pathlib
import tempfile
from typing import Any

import timing
from apart import TORCH, Apart

PEERS = ("transformers", "transformers_bfloat16", "ours_shared_encoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="paper_cqa", help="a config file, or the name of a shipped config"
    )
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE, as for `train`")
    parser.add_argument(
        "--family", default="t5_v1_1", help="family of the model: t5_v1_1, t5gemma, ..."
    )
    parser.add_argument("--size", default="small", help="size of the model: tiny, small, base, ...")
    parser.add_argument(
        "--vocab-size", type=int, help="rows of the embedding; default: the vocabulary's size"
    )
    parser.add_argument("--batch-size", type=int, help="examples per step; default: the config's")
    parser.add_argument("--steps", type=int, default=2, help="steps in a timed turn")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS[:1])
    parser.add_argument(
        "--row-lengths", nargs=2, type=int, help="tokens of packed rows of `ours_by_hand`"
    )


def run_config(args: argparse.Namespace, model: str, *more: str) -> Any:
    """Returns the `TrainConfig` of the command line, with the initial weights in `model`."""
    from stepdistill_jax.commands.gin_config import load_config

    settings = [f"TASK={args.task}", f"INIT_FROM={model}", *args.set, *more]
    if args.batch_size:
        settings.append(f"BATCH_SIZE={args.batch_size}")
    return load_config(args.config, settings)[0]


class Ours:
    """The step and batches of `stepdistill train`."""

    def __init__(self, args: argparse.Namespace, model: str, *settings: str):
        from stepdistill_jax.models.cpu_speed import keep_pages

        keep_pages()  # before JAX starts, as `train` does
        import jax

        from stepdistill_jax.models.encoder_decoder import EncoderDecoder
        from stepdistill_jax.training.run import assemble
        from stepdistill_jax.training.step import jit_eval_step, jit_train_step

        config = run_config(args, model, *settings)
        run = assemble(config, pathlib.Path(model).with_name("none"), args.data_dir)
        self.block, self.steps, self.batches = jax.block_until_ready, args.steps, run.batches
        self.weights, self.model = [o.weight for o in run.data.objectives], run.model
        self.state = run.initial_state()
        t5, of_run = EncoderDecoder(run.model), (run.abstract, run.mesh)
        self.evaluate = jit_eval_step(*of_run, model=t5, num_objectives=len(self.weights))
        self.update = jit_train_step(
            *of_run, model=t5, tx=run.tx, objective_weights=tuple(self.weights)
        )
        self.compiled: set[int] = set()

    def facts(self) -> dict[str, Any]:
        import jax

        shared = ", masks shared along the length" if self.model.dropout_broadcast else ""
        return {
            "dropout": f"{self.model.dropout_rate:g}{shared}",
            "batch_size": self.batches.batch_size,
            "rows": list(self.batches.row_lengths),
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
        }

    def loss(self) -> float:
        """Returns the loss of the first batch, without dropout."""
        import numpy as np

        sums = self.evaluate(self.state.params, self.batches(0))
        return float(sums.weighted_loss(np.asarray(self.weights, np.float32)))

    def run(self, steps: range) -> int:
        """Runs these steps and returns their number of examples."""
        for step in steps:
            self.state, _ = self.update(self.state, self.batches(step))
        self.block(self.state.params)
        return len(steps) * self.batches.batch_size

    def contender(self, number: int):
        steps = range(number * self.steps, (number + 1) * self.steps)
        self.run(steps[:1])  # untimed, after a pause: see `main`
        for step in steps:  # compiles each number of rows that occurs, of which there are few
            if (rows := len(self.batches(step)[0]["encoder_input_tokens"])) not in self.compiled:
                self.compiled.add(rows)
                self.run(range(step, step + 1))
        return lambda: self.run(steps)


class Peer:
    """A torch model with our weights, and its training loop."""

    def __init__(self, args: argparse.Namespace, model: str, autocast: bool = False):
        self.torch = timing.peer_module("torch", args.threads)
        transformers = timing.peer_module("transformers")
        transformers.logging.set_verbosity_error()
        from stepdistill_jax.training.data import TRAIN, batches_of, load_split, vocabulary_of

        config = run_config(args, model)
        vocabulary = vocabulary_of(config)
        data = load_split(config, TRAIN, vocabulary=vocabulary, data_dir=args.data_dir)
        self.batches, self.steps = batches_of(config, data), args.steps
        self.weights = [o.weight for o in data.objectives]
        self.model = transformers.AutoModelForSeq2SeqLM.from_pretrained(model)
        self.autocast = autocast
        self.optimizer = self.torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True
        )

    def facts(self) -> dict[str, Any]:
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dropout": f"{self.model.config.dropout_rate:g}",
        }

    def batch(self, step: int) -> list[dict[str, Any]]:
        """Returns the examples of our step: the rows of each objective, padded to the longest."""
        import numpy as np

        drawn, batches = self.batches.examples(step), self.batches
        groups = []
        for rows in batches.data.stores[0].rows:
            places = [i for i in drawn.indices if rows["targets"].lengths[i]]
            sides = {}
            for side, length in (
                ("inputs", batches.input_length),
                ("targets", batches.target_length),
            ):
                ids = [rows[side][i] for i in places]
                ids = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in ids]
                sides[side] = np.zeros((len(ids), max(map(len, ids))), np.int64)
                for row, values in zip(sides[side], ids, strict=True):
                    row[: len(values)] = values
            inputs, targets = map(self.torch.from_numpy, sides.values())
            groups.append(
                {
                    "input_ids": inputs,
                    "attention_mask": (inputs > 0).long(),
                    "labels": targets.masked_fill(targets == 0, -100),
                }
            )
        return groups

    def forward(self, groups: list[dict[str, Any]]) -> Any:
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.autocast):
            losses = [self.model(**group).loss for group in groups]
        return sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True))

    def loss(self) -> float:
        """Returns the loss of the first batch, without dropout."""
        self.model.eval()
        with self.torch.no_grad():
            return float(self.forward(self.batch(0)))

    def run(self, steps: range) -> int:
        """Runs these steps and returns their number of examples."""
        self.model.train()
        for step in steps:
            loss = self.forward(self.batch(step))
            loss.backward()
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return len(steps) * self.batches.batch_size

    def contender(self, number: int):
        steps = range(number * self.steps, (number + 1) * self.steps)
        self.run(steps[:1])  # untimed, after a pause: see `main`
        return lambda: self.run(steps)


def save_model(args: argparse.Namespace, directory: str) -> None:
    """Writes the initial weights of all contenders: random, with the task's vocabulary."""
    from models import save_random_model

    from stepdistill_jax.data.prepare import ensure_prepared
    from stepdistill_jax.data.vocabulary import load_vocabulary

    vocabulary = load_vocabulary(ensure_prepared(args.task, args.data_dir).spiece_model)
    settings = {"family": args.family, "size": args.size, "vocab_size": args.vocab_size}
    dropout = run_config(args, directory).dropout_rate  # the peer reads it from the directory
    save_random_model(directory, vocabulary, **settings, ends=1.0, dropout_rate=dropout)


def contenders(args: argparse.Namespace) -> dict[str, tuple]:
    """Returns the constructor, further arguments and environment of each contender."""
    known: dict[str, tuple] = {
        "ours": (Ours, (), {}),
        "transformers": (Peer, (), TORCH),
        "transformers_bfloat16": (Peer, (True,), TORCH),
        "ours_shared_encoder": (Ours, ("OBJECTIVES=shared_encoder",), {}),
    }
    names = ["ours", *args.peers]
    if args.row_lengths:
        inputs, targets = args.row_lengths
        rows = (f"ROW_INPUT_LENGTH={inputs}", f"ROW_TARGET_LENGTH={targets}")
        known["ours_by_hand"] = (Ours, rows, {})
        names.append("ours_by_hand")
    return {name: known[name] for name in names}


def check(facts: dict[str, dict[str, Any]], losses: dict[str, float]) -> None:
    """Checks that all contenders but the shared encoder do the same work."""
    for name, loss in losses.items():
        allowed = 0.02 if name.endswith("bfloat16") else 1e-4
        gap = abs(loss / losses["ours"] - 1)
        assert gap < allowed, f"not the same work: losses of the first batch {losses}"
    counts = {name: fact["parameters"] for name, fact in facts.items()}
    assert len(set(counts.values())) == 1, f"not the same model: parameters {counts}"


def main() -> None:
    args = timing.start(__doc__.splitlines()[0], add_arguments, rounds=3)
    timing.peer_module("torch")
    with contextlib.ExitStack() as closing:
        model = f"{closing.enter_context(tempfile.TemporaryDirectory())}/model"
        save_model(args, model)
        apart = {
            name: closing.enter_context(Apart(make, args, model, *more, environment=environment))
            for name, (make, more, environment) in contenders(args).items()
        }
        facts = {name: one.call("facts") for name, one in apart.items()}
        losses = {n: one.call("loss") for n, one in apart.items() if n != "ours_shared_encoder"}
        check(facts, losses)
        # A process that slept during other turns takes up to 1.4 times as long for its first step, which
        # does not happen in a training run. So each turn begins with a step that is not timed.
        rates = timing.alternate({n: one.contender for n, one in apart.items()}, args.rounds)
    timing.report(
        args,
        rates,
        unit="examples_per_second",
        environments={name: one.environment for name, one in apart.items()},
        parameters=facts["ours"]["parameters"],
        batch_size=facts["ours"]["batch_size"],
        dropout={name: fact["dropout"] for name, fact in facts.items()},
        packed_rows={n: f["rows"] for n, f in facts.items() if "rows" in f},
        first_loss=losses,
    )


if __name__ == "__main__":
    timing.run(main)
