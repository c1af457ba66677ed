"""Everything that a run is made of, checked before the first compile."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import optax
from jax.sharding import Mesh

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.batches.packing import round_up
from stepdistill_jax.data.objectives import held_out_objectives
from stepdistill_jax.data.prepare import ensure_prepared
from stepdistill_jax.data.prepared import EMBEDDED, data_folder
from stepdistill_jax.data.vocabulary import BYTES
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import GENERATION_CONFIG, read_model_files
from stepdistill_jax.formats.hf import load_params
from stepdistill_jax.models.config import T5Config, t5_config
from stepdistill_jax.models.lora import base_of
from stepdistill_jax.models.sharding import batch_shards, make_mesh
from stepdistill_jax.runtime.checkpoints.manager import is_workdir
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import as_path, local_path
from stepdistill_jax.tasks.load import TaskData, has_split, load_task
from stepdistill_jax.tasks.token_weights import with_token_weights
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.optimizer import make_optimizer
from stepdistill_jax.training.state import (
    TrainState,
    abstract_state,
    init_state,
    shardings_of,
    state_from_params,
    with_new_adapters,
)
from stepdistill_jax.training.validation import Validator
from stepdistill_jax.training.workdir import check_workdir

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
        """Step 0: the weights of `init_from`, or random ones; adapters are always new."""
        if self.config.init_from is None:
            return init_state(self.model, self.tx, self.abstract, seed=self.config.seed)
        plain = dataclasses.replace(self.model, lora=None)
        shardings = shardings_of(base_of(self.abstract.params))
        params = load_params(self.config.init_from, plain, shardings)
        if self.model.lora is not None:
            params = with_new_adapters(params, self.model, self.abstract, seed=self.config.seed)
        return state_from_params(params, self.tx, self.abstract, seed=self.config.seed)


def assemble(
    config: TrainConfig,
    workdir: os.PathLike | str,
    data_dir: os.PathLike | str | None,
    *,
    on_validation_batch: Callable[[], None] = lambda: None,
) -> Run:
    """Opens data, model and mesh for a config; the last argument is the validator's `on_batch`.

    Raises:
        InputError: anything that does not fit together, before a step is compiled.
    """
    workdir, data_dir = as_path(workdir), data_folder(data_dir)
    check_workdir(workdir)
    mesh = make_mesh(config.layout)
    shards = batch_shards(mesh)
    vocabulary, model = BYTES if config.model_family == "byt5" else None, None
    if config.init_from is not None:
        vocabulary, model = _given_model(config, workdir)
    if config.task == EMBEDDED:
        ensure_prepared(config.task, data_dir)
    load = functools.partial(
        load_task,
        config.task,
        vocabulary=vocabulary,
        data_dir=data_dir,
        task_module=config.task_module,
    )
    data = load(split="train", objectives=config.objectives, supervision=config.supervision)
    if config.token_weights is not None:
        data = with_token_weights(
            data,
            config.token_weights,
            supervision=config.supervision,
            data_dir=data_dir,
            task_module=config.task_module,
        )
    if model is None:
        model = t5_config(
            config.model_family,
            config.model_size,
            vocab_size=data.vocab_size,
            dtype=config.dtype,
            dropout_rate=config.dropout_rate,
            remat_policy=config.remat_policy,
            lora=config.lora,
        )
    if data.vocab_size > model.vocab_size:
        raise InputError(
            f"ids of {config.task} go up to {data.vocab_size - 1}, but the model's vocab_size is"
            f" {model.vocab_size}"
        )
    batches = Batches(
        data,
        batch_size=config.batch_size,
        input_length=config.input_length,
        target_length=config.target_length,
        seed=config.seed,
        pack=config.pack,
        row_multiple=shards * config.num_microbatches,
        data_fraction=config.data_fraction,
        loss_mean=config.loss_mean,
    )
    tx = make_optimizer(config)
    abstract = abstract_state(model, tx, mesh)
    validator = None
    if has_split(config.task, VALIDATION, data_dir=data_dir, task_module=config.task_module):
        held_out = load(
            split=VALIDATION,
            objectives=held_out_objectives(data.objectives),
            supervision=config.supervision.for_objectives(data.objectives).held_out(),
        )
        validator = Validator.create(
            held_out,
            dataclasses.replace(
                batches, data=held_out, row_multiple=shards, data_fraction=1.0, shuffle=False
            ),
            config=model,
            abstract=abstract,
            mesh=mesh,
            max_decode_len=max_decode_len(data, config.target_length),
            batch_size=round_up(config.batch_size, shards),
            on_batch=on_validation_batch,
        )
    else:
        log(f"{config.task} has no {VALIDATION} split: the best step is the last one")
    return Run(config, workdir, mesh, data, batches, model, tx, abstract, validator)


def _given_model(config: TrainConfig, workdir: pathlib.Path) -> tuple[str, T5Config]:
    """Vocabulary and configuration of INIT_FROM; on a resume the workdir has them, too."""
    assert config.init_from is not None
    resumed = (workdir / GENERATION_CONFIG).is_file()  # the last file that a claim writes
    if not resumed and is_workdir(config.init_from):
        raise InputError(
            f"INIT_FROM: {config.init_from} is a training run;"
            " `stepdistill export` makes a model directory of it"
        )
    files = read_model_files(workdir if resumed else local_path(config.init_from, "INIT_FROM"))
    log(f"INIT_FROM {config.init_from}: its config.json decides the model, not MODEL_SIZE")
    return files.vocabulary.source, dataclasses.replace(
        files.config,
        dtype=config.dtype,
        dropout_rate=config.dropout_rate,
        remat_policy=config.remat_policy,
        lora=config.lora,
    )


def max_decode_len(data: TaskData, target_length: int) -> int:
    """Tokens of the longest label of the train split with its end, rounded up to a multiple of 8."""
    longest = max(
        int(rows["targets"].lengths.max())
        for store in data.stores
        for column, rows in zip(data.columns, store.rows, strict=True)
        if column.objective == 1
    )
    return round_up(min(longest, target_length), 8)
