"""Trains one small T5 twice on CQA: with our step, and with the method written out in torch.

The torch side does what the code published with the paper does, in our words: each step has a padded
batch of labels and a padded batch of rationales, two forward passes, alpha x one loss plus
(1 - alpha) x the other, a clip, AdamW without weight decay, a learning rate that falls linearly.
Our side is `training.step.train_step` on packed rows. Both start from one Hugging Face directory and
take the same examples in each step.

    python tests/parity/reference_loop.py --source CQA_FOLDER --plot docs/images/reference_loop.png
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np
import safetensors.numpy

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.formats import hf
from stepdistill_jax.formats.directory import read_config, write_model_files
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, init_params
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.sharding import Layout, make_mesh, place_rows
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.data import batches_of, load_split, with_row_lengths
from stepdistill_jax.training.optimizer import make_optimizer
from stepdistill_jax.training.state import abstract_state, shardings_of, state_from_params
from stepdistill_jax.training.step import jit_train_step

ALPHA = 0.5
# relative, of each loss at each step
CURVE_TOLERANCE = 3e-5
# factor of the start's last norm, see make_setting
FINAL_SCALE = 0.45
NAMES = ("label", "rationale")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a loop leaves: `losses` [steps, 2] nats per token, `norms` [steps] of the gradient before
    the clip, `params` by Hugging Face name."""

    losses: np.ndarray
    norms: np.ndarray
    params: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both loops share."""

    model_dir: pathlib.Path
    batches: Batches
    config: TrainConfig


def published_config(
    *,
    steps: int = 50,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    dtype: str = "float32",
) -> TrainConfig:
    """The published method on `cqa`, without dropout.

    The learning rate is 20 times the paper's, so that the losses move in 50 steps.
    """
    return TrainConfig(
        task="cqa",
        objectives=step_by_step(ALPHA, 1 - ALPHA),
        batch_size=batch_size,
        input_length=256,
        target_length=128,
        train_steps=steps,
        learning_rate=learning_rate,
        dropout_rate=0.0,
        dtype=dtype,
    )


def make_setting(
    config: TrainConfig, data_dir: os.PathLike | str, folder: os.PathLike | str
) -> Setting:
    """Random weights (T5 v1.1, width 64, 2 + 2 layers) in `folder`, and batches of the task."""
    data = load_split(config, "train", vocabulary=None, data_dir=data_dir)
    model = model_config(
        "t5_v1_1", "tiny", vocab_size=data.vocab_size, num_decoder_layers=2, dropout_rate=0.0
    )
    write_model_files(folder, model, data.vocabulary, None)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    # what the head reads is made smaller: else the gradient is clipped in every step, and a factor
    # of the loss would not be seen
    params["decoder"]["decoder_norm"]["scale"] *= FINAL_SCALE
    hf.save_params(folder, params, model)
    batches = with_row_lengths(batches_of(config, data), (256, 128))
    return Setting(pathlib.Path(folder), batches, config)


def unpacked(setting: Setting, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each objective (inputs, targets) [rows, longest], 0 is padding, from the token store.

    An example without a rationale has no row in the second: trained on an empty answer it would
    teach the model to say nothing.
    """
    store, drawn = setting.batches.data.stores[0], setting.batches.examples(step).indices
    found = []
    for rows in store.rows:
        present = [i for i in drawn if rows["targets"].lengths[i]]
        found.append(tuple(padded([rows[f][i] for i in present]) for f in ("inputs", "targets")))
    return found


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """[rows, longest] ids, 0 after each row's own."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def published_adamw(parameters, learning_rate: float):
    """The public code's optimizer: `AdamW` of transformers 4.24, with its trainer's settings.

    Its epsilon is added before the bias is corrected, torch's after.
    """
    import torch

    class AdamW(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            b1, b2 = 0.9, 0.999
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                taken = state["taken"] = state.get("taken", 0) + 1
                mean = b1 * state.get("mean", 0.0) + (1 - b1) * p.grad
                square = b2 * state.get("square", 0.0) + (1 - b2) * p.grad**2
                state["mean"], state["square"] = mean, square
                rate = self.param_groups[0]["lr"] * (1 - b2**taken) ** 0.5 / (1 - b1**taken)
                p -= rate * mean / (square.sqrt() + 1e-8)

    return AdamW(parameters, {"lr": learning_rate})


def train_with_torch(
    setting: Setting,
    rows: Callable[[Setting, int], list[tuple[np.ndarray, np.ndarray]]] = unpacked,
) -> Trained:
    """The method in torch and `transformers`; `rows` gives the padded batches of a step."""
    import torch
    import transformers

    model = transformers.T5ForConditionalGeneration.from_pretrained(setting.model_dir)
    model.train()  # its dropout rate is 0
    # transformers ties heads that are not tied: then the two would not be the same model
    assert model.lm_head.weight is not model.shared.weight
    assert not model.config.scale_decoder_outputs and model.config.dropout_rate == 0
    steps, peak = setting.config.train_steps, setting.config.learning_rate
    if setting.config.optimizer.eps_before_correction:
        optimizer = published_adamw(model.parameters(), peak)
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=peak, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses, norms = np.zeros((steps, 2)), np.zeros(steps)
    for step in range(steps):
        objectives = []
        for inputs, targets in rows(setting, step):
            ids, wanted = torch.from_numpy(inputs), torch.from_numpy(targets)
            labels = wanted.masked_fill(wanted == 0, -100)  # no loss on padding
            objectives.append(model(input_ids=ids, attention_mask=ids != 0, labels=labels).loss)
        label, rationale = objectives
        optimizer.zero_grad()
        (ALPHA * label + (1 - ALPHA) * rationale).backward()
        norms[step] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses[step] = label.item(), rationale.item()
    trained = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    return Trained(losses, norms, trained)


def train_with_ours(setting: Setting) -> Trained:
    """The same by `training.step.train_step`, on one device."""
    mesh = make_mesh(Layout(), jax.devices()[:1])
    tx = make_optimizer(setting.config)
    model = dataclasses.replace(read_config(setting.model_dir), dtype=setting.config.dtype)
    abstract = abstract_state(model, tx, mesh)
    params = hf.load_params(setting.model_dir, model, shardings_of(abstract.params))
    state = state_from_params(params, tx, abstract, seed=0)
    step_fn = jit_train_step(
        abstract,
        mesh,
        model=EncoderDecoder(model),
        tx=tx,
        objective_weights=tuple(o.weight for o in setting.config.objectives),
    )
    steps = setting.config.train_steps
    losses, norms = np.zeros((steps, 2)), np.zeros(steps)
    for step in range(steps):
        batch = setting.batches(step)
        assert batch[0]["decoder_segment_ids"].max() > 2, "rows are not packed"
        state, metrics = step_fn(state, place_rows(batch, mesh))
        losses[step] = metrics["sums"].loss / metrics["sums"].count
        norms[step] = metrics["grad_norm"]
    return Trained(losses, norms, hf.to_hf(state.params, model))


def curve_gaps(ours: Trained, reference: Trained) -> np.ndarray:
    """[steps, 2] relative difference of the losses."""
    return np.abs(ours.losses / reference.losses - 1)


def parameter_gaps(
    ours: Trained, reference: Trained, start: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """For each parameter: norm of the difference over the norm of the way travelled from `start`
    (`of_the_way`) and over the parameter's own norm (`of_the_norm`), and the largest `element`."""
    assert ours.params.keys() == reference.params.keys() == start.keys()
    gaps = {}
    for name, theirs in reference.params.items():
        gap = ours.params[name] - theirs
        distance, travelled = np.linalg.norm(gap), np.linalg.norm(theirs - start[name])
        gaps[name] = {
            "of_the_way": float(distance / travelled),
            "of_the_norm": float(distance / np.linalg.norm(theirs)),
            "element": float(np.abs(gap).max()),
        }
    return gaps


def start_params(setting: Setting) -> dict[str, np.ndarray]:
    """The weights both began with, by Hugging Face name."""
    return safetensors.numpy.load_file(setting.model_dir / "model.safetensors")


def draw(ours: Trained, reference: Trained, path: os.PathLike | str) -> None:
    """Loss curves of both loops, and their relative difference below, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loss, gap) = plt.subplots(
        2, 1, figsize=(7, 5.5), height_ratios=(3, 2), sharex=True, layout="constrained"
    )
    step = np.arange(1, len(ours.losses) + 1)
    gaps = curve_gaps(ours, reference)
    for i, (name, colour, marker) in enumerate(
        zip(NAMES, ("#0072B2", "#D55E00"), "os", strict=True)
    ):
        loss.plot(
            step, reference.losses[:, i], color=colour, lw=5, alpha=0.3, label=f"{name}, torch"
        )
        loss.plot(step, ours.losses[:, i], color=colour, lw=1.3, label=f"{name}, this package")
        # where both are the same number there is no point: 0 has no place on a logarithmic axis
        shown = np.where(gaps[:, i] > 0, gaps[:, i], np.nan)
        gap.plot(step, shown, color=colour, lw=1, marker=marker, ms=3, label=name)
    gap.axhline(CURVE_TOLERANCE, color="0.4", lw=0.8, ls="--")
    gap.annotate("tolerance of the test", (step[-1], CURVE_TOLERANCE), (0, -3), textcoords="offset points",
                 ha="right", va="top", fontsize=8, color="0.4")  # fmt: skip
    loss.set(ylabel="loss, nats per token")
    gap.set(xlabel="step", ylabel="relative difference", yscale="log", ylim=(3e-8, 1e-3))
    loss.legend(frameon=False, ncols=2)
    gap.legend(frameon=False, loc="upper left", ncols=2)
    for axis in (loss, gap):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(ours: Trained, reference: Trained, start: dict[str, np.ndarray]) -> str:
    """The figures of docs/lab/numerics.md, as lines."""
    gaps, losses = curve_gaps(ours, reference), reference.losses
    lines = [
        f"{name}: loss {losses[0, i]:.4f} -> {losses[-1, i]:.4f} in {len(losses)} steps;"
        f" largest relative difference {gaps[:, i].max():.1e}"
        for i, name in enumerate(NAMES)
    ]
    clipped = int((reference.norms > 1).sum())
    lines.append(f"gradient clipped in {clipped} of {len(losses)} steps")
    per_parameter = parameter_gaps(ours, reference, start)
    for kind in ("of_the_way", "of_the_norm", "element"):
        name = max(per_parameter, key=lambda n: per_parameter[n][kind])
        lines.append(f"parameters, largest {kind}: {per_parameter[name][kind]:.1e} ({name})")
    return "\n".join(lines)


def main() -> None:
    """Trains with both loops, prints the figures, and draws the plot if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="folder with the original files of CQA")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32, help="examples a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="float32", help="of our activations")
    parser.add_argument("--plot", help="PNG to write")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare("cqa", source=flags.source, data_dir=folder)
        config = published_config(
            steps=flags.steps,
            batch_size=flags.batch_size,
            learning_rate=flags.learning_rate,
            dtype=flags.dtype,
        )
        setting = make_setting(config, folder, pathlib.Path(folder) / "start")
        ours, reference = train_with_ours(setting), train_with_torch(setting)
        print(report(ours, reference, start_params(setting)))
        if flags.plot:
            draw(ours, reference, flags.plot)


if __name__ == "__main__":
    main()
