"""Examples per second of training: our packed step, and the paper's loop in torch.

    python benchmarks/train_throughput.py --size small --batch-size 64 --vocab-size 32128 --json

An example is its label row and its rationale row. Both sides start from the same random weights,
draw the same examples, and must give the same loss without dropout before anything is timed. The
peer is what the paper's public code does (Hsieh et al. 2023, arXiv:2305.02301), on today's
`transformers`: two forward passes a step, labels and rationales each padded to their longest row,
the sum of both mean losses by weight, gradients clipped to 1, AdamW in its fused form.
`ours_shared_encoder` is our step on the same examples, each encoded once for both targets; another
loss, so it is compared with nothing.
"""

import argparse
import tempfile
from typing import Any

import timing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="small", help="of T5 v1.1: tiny, small, base, ...")
    parser.add_argument("--vocab-size", type=int, help="rows of the embedding; default: the task's")
    parser.add_argument("--batch-size", type=int, default=32, help="examples a step")
    parser.add_argument("--steps", type=int, default=2, help="steps in a timed turn")
    parser.add_argument("--input-length", type=int, help="tokens of a packed row of ours")
    parser.add_argument("--target-length", type=int, help="the same for targets")
    parser.add_argument("--dropout-rate", type=float, default=0.1, help="of both")
    parser.add_argument("--autocast", action="store_true", help="time torch in bfloat16, too")


class Ours:
    """The trainer's step, on batches made while it is timed."""

    def __init__(self, args: argparse.Namespace, data: Any):
        import jax

        from stepdistill_jax.batches.batch import Batches
        from stepdistill_jax.models.config import t5_config
        from stepdistill_jax.models.sharding import Layout, make_mesh
        from stepdistill_jax.models.t5 import T5
        from stepdistill_jax.training.config import TrainConfig
        from stepdistill_jax.training.optimizer import make_optimizer
        from stepdistill_jax.training.state import abstract_state, init_state
        from stepdistill_jax.training.step import jit_eval_step, jit_train_step

        self.block, self.steps = jax.block_until_ready, args.steps
        self.batches = Batches(data, args.batch_size, args.input_length, args.target_length, seed=0)
        vocab_size = max(data.vocab_size, args.vocab_size or 0)
        self.config = t5_config(
            "t5_v1_1", args.size, vocab_size=vocab_size, dropout_rate=args.dropout_rate
        )
        self.weights = [o.weight for o in data.objectives]
        mesh = make_mesh(Layout(), jax.devices()[:1])
        tx = make_optimizer(TrainConfig(task=args.task, train_steps=10_000))
        abstract = abstract_state(self.config, tx, mesh)
        self.state = init_state(self.config, tx, abstract, seed=0)
        self.parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        model = T5(self.config)
        self.evaluate = jit_eval_step(abstract, mesh, model=model, num_objectives=len(self.weights))
        self.update = jit_train_step(
            abstract, mesh, model=model, tx=tx, objective_weights=tuple(self.weights)
        )
        self.compiled: set[int] = set()

    def loss(self) -> float:
        """Of the first batch, without dropout."""
        import numpy as np

        sums = self.evaluate(self.state.params, self.batches(0))
        return float(sums.weighted_loss(np.asarray(self.weights, np.float32)))

    def contender(self, number: int):
        steps = range(number * self.steps, (number + 1) * self.steps)
        for step in steps:  # packing needs few row counts, each is compiled once
            batch = self.batches(step)
            rows = len(batch[0]["encoder_input_tokens"])
            if rows not in self.compiled:
                self.compiled.add(rows)
                self.state, _ = self.update(self.state, batch)
        self.block(self.state.params)

        def work() -> int:
            for step in steps:
                self.state, _ = self.update(self.state, self.batches(step))
            self.block(self.state.params)
            return len(steps) * self.batches.batch_size

        return work


class Peer:
    """A torch model with our weights, and the loop around it."""

    def __init__(self, directory: str, ours: Ours, threads: int, autocast: bool):
        self.torch = timing.peer_module("torch", threads)
        transformers = timing.peer_module("transformers")
        transformers.logging.set_verbosity_error()
        self.model = transformers.T5ForConditionalGeneration.from_pretrained(directory)
        self.ours, self.autocast = ours, autocast
        # transformers 5 ties the output layer of a T5 that is made from a configuration
        assert self.model.lm_head.weight is not self.model.shared.weight
        parameters = sum(p.numel() for p in self.model.parameters())
        assert parameters == ours.parameters, f"{parameters} parameters, ours {ours.parameters}"
        self.optimizer = self.torch.optim.AdamW(
            self.model.parameters(), lr=5e-5, weight_decay=0.0, fused=True
        )

    def batch(self, step: int) -> list[dict[str, Any]]:
        """The examples of our step: for each objective its rows, padded to the longest."""
        import numpy as np

        drawn, batches = self.ours.batches.examples(step), self.ours.batches
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
        return sum(weight * loss for weight, loss in zip(self.ours.weights, losses, strict=True))

    def loss(self) -> float:
        """Of the first batch, without dropout."""
        self.model.eval()
        with self.torch.no_grad():
            return float(self.forward(self.batch(0)))

    def contender(self, number: int):
        steps = range(number * self.ours.steps, (number + 1) * self.ours.steps)
        self.model.train()

        def work() -> int:
            for step in steps:
                loss = self.forward(self.batch(step))
                loss.backward()
                self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            return len(steps) * self.ours.batches.batch_size

        return work


def main() -> None:
    args = timing.start(__doc__.splitlines()[0], add_arguments, rounds=3)
    timing.peer_module("torch", args.threads)
    from stepdistill_jax.formats.directory import write_model_files
    from stepdistill_jax.formats.hf import save_params
    from stepdistill_jax.tasks.load import load_task

    shared_args = argparse.Namespace(**vars(args))
    timing.fill_in_lengths(args)
    timing.fill_in_lengths(shared_args, "shared_encoder")
    data = load_task(args.task, split="train", data_dir=args.data_dir)
    ours = Ours(args, data)
    shared = Ours(
        shared_args,
        load_task(args.task, split="train", objectives="shared_encoder", data_dir=args.data_dir),
    )
    contenders = {"ours": ours.contender, "ours_shared_encoder": shared.contender}
    losses = {"ours": ours.loss()}
    with tempfile.TemporaryDirectory() as directory:
        write_model_files(directory, ours.config, data.vocabulary, None)
        save_params(directory, ours.state.params, ours.config)
        for name in ("transformers", "transformers_bfloat16")[: 1 + args.autocast]:
            peer = Peer(directory, ours, args.threads, autocast=name.endswith("bfloat16"))
            losses[name] = peer.loss()
            contenders[name] = peer.contender
            allowed = 0.02 if peer.autocast else 1e-4
            gap = abs(losses[name] / losses["ours"] - 1)
            assert gap < allowed, f"not the same work: losses of the first batch {losses}"
    rates = timing.alternate(contenders, args.rounds)
    timing.report(
        args,
        rates,
        unit="examples_per_second",
        parameters=ours.parameters,
        first_loss=losses,
        shared_encoder_lengths=[shared_args.input_length, shared_args.target_length],
    )


if __name__ == "__main__":
    timing.run(main)
