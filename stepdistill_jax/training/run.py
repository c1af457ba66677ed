"""Everything that a run is made of, checked before the first compile; and its `run.json`."""

import dataclasses
import json
import os
import pathlib
import subprocess
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from stepdistill_jax.checkpoints.manager import is_workdir
from stepdistill_jax.data.prepare import ensure_prepared
from stepdistill_jax.data.prepared import EMBEDDED, default_data_dir
from stepdistill_jax.errors import InputError
from stepdistill_jax.files import read_json, write_json
from stepdistill_jax.formats.directory import (
    TaskInfo,
    read_model_files,
    write_model_files,
)
from stepdistill_jax.formats.hf import load_params
from stepdistill_jax.models.config import T5Config, t5_v1_1
from stepdistill_jax.progress import log
from stepdistill_jax.sharding import batch_shards, make_mesh
from stepdistill_jax.tasks.load import TaskData, has_split, load_task
from stepdistill_jax.text.vocabulary import BYTES
from stepdistill_jax.training.batches import Batches
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.evaluate import Validator
from stepdistill_jax.training.optimizer import make_optimizer
from stepdistill_jax.training.state import (
    TrainState,
    abstract_state,
    init_state,
    shardings_of,
    state_from_params,
)
from stepdistill_jax.versions import version_block

RUN = "run.json"
# what may differ between a run and its resume: none of these changes the loss that is minimised
FREE_FIELDS = ("layout", "num_microbatches", "checkpoint_every")
VALIDATION = "validation"


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of one training run."""

    config: TrainConfig
    workdir: pathlib.Path
    mesh: Mesh
    data: TaskData
    batches: Batches
    model: T5Config
    tx: optax.GradientTransformation
    abstract: TrainState
    validator: Validator | None

    def initial_state(self) -> TrainState:
        """Step 0: the weights of `init_from`, or random ones."""
        if self.config.init_from is None:
            return init_state(self.model, self.tx, self.abstract, seed=self.config.seed)
        shardings = shardings_of(self.abstract.params)
        params = load_params(self.config.init_from, self.model, shardings)
        return state_from_params(params, self.tx, self.abstract, seed=self.config.seed)


def assemble(config: TrainConfig, workdir: os.PathLike | str, data_dir: os.PathLike | str | None):
    """Opens data, model and mesh for a config.

    Raises:
        InputError: anything that does not fit together, before a step is compiled.
    """
    workdir, data_dir = pathlib.Path(workdir), pathlib.Path(data_dir or default_data_dir())
    mesh = make_mesh(config.layout)
    vocabulary, model = None, None
    if config.init_from is not None:
        if is_workdir(config.init_from):
            raise InputError(
                f"INIT_FROM: {config.init_from} is a training run;"
                " `stepdistill export` makes a model directory of it"
            )
        files = read_model_files(config.init_from)
        vocabulary = getattr(files.vocabulary, "path", BYTES)
        model = dataclasses.replace(
            files.config,
            dtype=config.dtype,
            dropout_rate=config.dropout_rate,
            remat_policy=config.remat_policy,
        )
        log(f"INIT_FROM {config.init_from}: its config.json decides the model, not MODEL_SIZE")

    if config.task == EMBEDDED:
        ensure_prepared(config.task, data_dir)
    source = {
        "objectives": config.objectives,
        "vocabulary": vocabulary,
        "data_dir": data_dir,
        "task_module": config.task_module,
    }
    data = load_task(config.task, split="train", **source)
    if model is None:
        model = t5_v1_1(
            config.model_size,
            vocab_size=data.vocab_size,
            dtype=config.dtype,
            dropout_rate=config.dropout_rate,
            remat_policy=config.remat_policy,
        )
    if data.vocab_size > model.vocab_size:
        raise InputError(
            f"ids of {config.task} go up to {data.vocab_size - 1}, but the model's vocab_size is"
            f" {model.vocab_size}"
        )
    cut = {
        "batch_size": config.batch_size,
        "input_length": config.input_length,
        "target_length": config.target_length,
        "seed": config.seed,
        "pack": config.pack,
    }
    batches = Batches(
        data,
        row_multiple=batch_shards(mesh) * config.num_microbatches,
        data_fraction=config.data_fraction,
        **cut,
    )
    tx = make_optimizer(config)
    abstract = abstract_state(model, tx, mesh)
    validator = None
    if has_split(config.task, VALIDATION, data_dir=data_dir, task_module=config.task_module):
        held_out = load_task(config.task, split=VALIDATION, **source)
        validator = Validator.create(
            held_out,
            Batches(held_out, row_multiple=batch_shards(mesh), shuffle=False, **cut),
            config=model,
            abstract=abstract,
            mesh=mesh,
            max_decode_len=max_decode_len(data, config.target_length),
            batch_size=_round_up(config.batch_size, batch_shards(mesh)),
        )
    else:
        log(f"{config.task} has no {VALIDATION} split: the best step is the last one")
    return Run(config, workdir, mesh, data, batches, model, tx, abstract, validator)


def max_decode_len(data: TaskData, target_length: int) -> int:
    """Tokens of the longest label of the train split with its end, rounded up to a multiple of 8."""
    longest = max(int(np.diff(store.rows[0]["targets"].offsets).max()) for store in data.stores)
    return _round_up(min(longest, target_length), 8)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def describe(run: Run) -> dict[str, Any]:
    """What `run.json` keeps: enough to know later what was run, and to refuse another resume."""
    fingerprints = {"train": run.data.fingerprint}
    if run.validator is not None:
        fingerprints[VALIDATION] = run.validator.data.fingerprint
    described = {
        "config": run.config.to_json(),
        "model": dataclasses.asdict(run.model),
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(run.abstract.params)),
        "weights": {o.name: o.weight for o in run.data.objectives},
        "seed": run.config.seed,
        "fingerprint": fingerprints,
        "examples": run.batches.num_examples,
        "cut": run.batches.cut_counts(),
        "versions": version_block(),
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "mesh": dict(run.mesh.shape),
        "commit": _commit(),
    }
    return json.loads(json.dumps(described, default=str))


def _commit() -> str | None:
    """Of the checkout that the package runs from; None where it is installed."""
    folder = pathlib.Path(__file__).parent
    done = subprocess.run(
        ["git", "-C", folder, "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    tracked = subprocess.run(
        ["git", "-C", folder, "ls-files", "--error-unmatch", __file__], capture_output=True
    )
    return done.stdout.strip() if done.returncode == tracked.returncode == 0 else None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`FIELD was A, is B` for each setting that would change the result of a resumed run."""
    found = []
    for key in ("config", "fingerprint", "model"):
        old, new = before.get(key, {}), now[key]
        for name in sorted(old.keys() | new.keys()):
            if key == "config" and name in FREE_FIELDS:
                continue
            if old.get(name) != new.get(name):
                shown = name.upper() if key == "config" else f"{key}.{name}"
                found.append(f"{shown} was {old.get(name)!r}, is {new.get(name)!r}")
    return found


def claim_workdir(run: Run, config_text: str | None) -> None:
    """Writes `run.json`, `config.gin` and the model files, or checks them against an earlier life.

    Raises:
        InputError: the workdir holds another run; names what differs.
    """
    now = describe(run)
    path = run.workdir / RUN
    if path.exists():
        if found := differences(read_json(path), now):
            raise InputError(
                f"{run.workdir}: holds a run with other settings ({'; '.join(found)});"
                " use the same ones to resume it, or another --workdir"
            )
    elif run.workdir.exists() and not run.workdir.is_dir():
        raise InputError(f"--workdir {run.workdir}: is a file, a folder is wanted")
    if jax.process_index() != 0:
        return
    run.workdir.mkdir(parents=True, exist_ok=True)
    if config_text:
        (run.workdir / "config.gin").write_text(config_text, encoding="utf-8")
    if not path.exists():
        write_model_files(run.workdir, run.model, run.data.vocabulary, task_info(run, now))
        write_json(path, now)


def task_info(run: Run, described: dict[str, Any]) -> TaskInfo:
    """What a server needs to know to ask the trained model, and where the model comes from."""
    return TaskInfo(
        task=run.config.task,
        objectives=run.data.objectives,
        input_length=run.config.input_length,
        target_length=run.config.target_length,
        max_decode_len=max_decode_len(run.data, run.config.target_length),
        metric=run.data.metric,
        labels=run.data.labels,
        provenance={
            name: described[name]
            for name in ("config", "fingerprint", "versions", "device", "commit")
        },
    )
