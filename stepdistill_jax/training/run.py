"""Assembles the parts of a run and checks them before the first compile."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.batches.packing import round_up
from stepdistill_jax.data.prepare import ensure_prepared
from stepdistill_jax.data.prepared import EMBEDDED, data_folder, prepared_fingerprint
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.formats.directory import GENERATION_CONFIG, read_model_files
from stepdistill_jax.formats.hub import local_model
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.families import FAMILIES, model_config
from stepdistill_jax.models.sharding import batch_shards, make_mesh
from stepdistill_jax.runtime.checkpoints.manager import is_workdir, resolve_step
from stepdistill_jax.runtime.checks import one_of
from stepdistill_jax.runtime.on_processes import on_process_0
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import as_path, local_path
from stepdistill_jax.tasks.load import has_split
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.training.attention_choice import settle_attention
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.data import (
    TRAIN,
    VALIDATION,
    batches_of,
    in_cheapest_rows,
    load_split,
    vocabulary_of,
    with_row_lengths,
)
from stepdistill_jax.training.initial_weights import InitialWeights
from stepdistill_jax.training.optimizer import make_optimizer
from stepdistill_jax.training.state import (
    TrainState,
    abstract_state,
    init_state,
    state_from_params,
)
from stepdistill_jax.training.validation import Validator
from stepdistill_jax.training.workdir import RUN, check_workdir, read_run

MODEL_SETTINGS = (
    "dtype",
    "dropout_rate",
    "dropout_broadcast",
    "attention",
    "remat_policy",
    "scan_layers",
    "lora",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The objects that a training run uses."""

    config: TrainConfig
    workdir: pathlib.Path
    mesh: Mesh
    data: TaskData
    batches: Batches
    model: ModelConfig
    tx: optax.GradientTransformation
    abstract: TrainState
    validator: Validator | None
    initial: InitialWeights | None = None
    dataset: str | None = None  # fingerprint of the prepared dataset; None for a SeqIO task

    def initial_state(self) -> TrainState:
        """Returns the state at step 0, with random weights or those of `init_from`. Adapters are always new."""
        seed = self.config.seed
        if self.initial is None:
            return init_state(self.model, self.tx, self.abstract, seed=seed)
        params = self.initial.load(self.mesh, seed)
        return state_from_params(params, self.tx, self.abstract, seed=seed)


def assemble(
    config: TrainConfig, workdir: os.PathLike | str, data_dir: os.PathLike | str | None
) -> Run:
    """Loads the data of a config, and creates the mesh, the model's configuration and so on.

    Raises:
        InputError: settings, data, model and devices do not fit together. Raised before a step is compiled.
    """
    workdir, data_dir = as_path(workdir), data_folder(data_dir)
    check_workdir(workdir)
    tx = make_optimizer(config)  # early, since a user's function may fail
    mesh = make_mesh(config.layout)
    shards = batch_shards(mesh)
    vocabulary, given = (
        (vocabulary_of(config), None) if config.init_from is None else _given_model(config, workdir)
    )
    if config.task == EMBEDDED:
        ensure_prepared(config.task, data_dir)
    read = {"vocabulary": vocabulary, "data_dir": data_dir}
    data = load_split(config, TRAIN, **read)
    model = new_model(config, data) if given is None else given
    data.check_ids(model.vocab_size)
    batches = batches_of(config, data, row_multiple=shards * config.num_microbatches)
    # process 0 decides for all, since the others may not see the same files
    inputs, targets = on_process_0(lambda: _row_lengths(config, batches, model, workdir))
    rows = (inputs, targets)
    # another run's rows may be too short for this data; `claim_workdir` refuses that run later
    batches = with_row_lengths(batches, rows)
    model = settle_attention(model, mesh, batches.lengths)
    abstract = abstract_state(model, tx, mesh)
    initial = None
    if config.init_from is not None:
        initial = _initial_weights(config, workdir, model, abstract)
    validator = None
    if (held_out := _held_out(config, data, **read)) is not None:
        held_out.check_ids(model.vocab_size)
        validator = Validator.create(
            held_out,
            with_row_lengths(
                batches_of(config, held_out, row_multiple=shards, shuffle=False), rows
            ),
            # plain operations: a validation compiles for many lengths, for which no kernel was tested
            config=dataclasses.replace(model, attention="xla", scan_layers=True),
            abstract=abstract,
            mesh=mesh,
            max_decode_len=max_decode_len(data, config),
            batch_size=round_up(config.batch_size, shards),
        )
        names = validator.try_out()
        if config.best_metric is not None and config.best_metric not in names:
            raise InputError(
                f"`best_metric`: validation of {config.task} has no metric {config.best_metric!r}; it has"
                f" {', '.join(names)}{nearest(config.best_metric, names)}"
            )
    elif config.best_metric is not None:
        raise InputError(
            f"`best_metric`: {config.task} has no {VALIDATION} split, so no metric can rank the steps;"
            " leave the setting out"
        )
    else:
        log(f"{config.task} has no {VALIDATION} split: the best step is the last one")
    dataset = prepared_fingerprint(config.task, data_dir)
    return Run(
        config, workdir, mesh, data, batches, model, tx, abstract, validator, initial, dataset
    )


def _row_lengths(
    config: TrainConfig, batches: Batches, model: ModelConfig, workdir: pathlib.Path
) -> tuple[int, int]:
    """Returns the input and target length of packed rows. A resumed run keeps its lengths."""
    if config.pack and (workdir / RUN).is_file():
        # older versions did not choose lengths; their rows have the maximum lengths of inputs and targets
        kept = read_run(workdir).get("row_lengths")
        return (config.input_length, config.target_length) if kept is None else tuple(kept)
    return in_cheapest_rows(config, batches, model).row_lengths


def _held_out(config: TrainConfig, train: TaskData, **read: Any) -> TaskData | None:
    """Returns the validation split, or None if there are no labelled validation rows."""
    where = {"data_dir": read["data_dir"], "task_module": config.task_module}
    if not has_split(config.task, VALIDATION, **where):
        return None
    data = load_split(config, VALIDATION, objectives=train.objectives, **read)
    labelled = [{p.name for p in d.parts if p.label_column is not None} for d in (train, data)]
    if not labelled[1]:
        return None
    for name in sorted(labelled[0] - labelled[1]):
        log(f"{name} has no {VALIDATION} split: validation leaves it out")
    return data


def model_settings(config: TrainConfig) -> dict[str, Any]:
    """Returns the model settings that always come from the config, even with `init_from`."""
    return {name: getattr(config, name) for name in MODEL_SETTINGS}


def new_model(config: TrainConfig, data: TaskData | None) -> ModelConfig:
    """Returns the model of a run that starts from random weights.

    The model has the vocabulary of `data`, or the model family's published vocabulary if `data` is None.
    """
    one_of("model_family", config.model_family, FAMILIES)
    if data is None:
        ids: dict[str, int] = {"vocab_size": FAMILIES[config.model_family].vocab_size}
    else:
        ids = {"vocab_size": data.vocab_size, "bos_id": data.vocabulary.framing.bos_id}
    return model_config(config.model_family, config.model_size, **ids, **model_settings(config))


def _given_model(config: TrainConfig, workdir: pathlib.Path) -> tuple[str, ModelConfig]:
    """Returns the vocabulary and configuration of `init_from`. A resumed run reads both from its workdir."""
    assert config.init_from is not None
    resumed = (workdir / GENERATION_CONFIG).is_file()  # the last file that a claim writes
    files = read_model_files(workdir if resumed else _init_path(config.init_from))
    log(
        f"`init_from` {config.init_from}: the model's size comes from its config.json; `model_size` is ignored"
    )
    return files.vocabulary.source, dataclasses.replace(files.config, **model_settings(config))


def _init_path(init_from: str) -> pathlib.Path:
    """Returns the path of `init_from`, a workdir or a model. Downloads a model of the hub."""
    init_from = local_model(init_from)
    return as_path(init_from) if is_workdir(init_from) else local_path(init_from, "`init_from`")


def _initial_weights(
    config: TrainConfig, workdir: pathlib.Path, model: ModelConfig, abstract: TrainState
) -> InitialWeights:
    """Returns the weights that `init_rules` select from `init_from`. A new run checks and logs the selection."""
    assert config.init_from is not None
    path = as_path(config.init_from)
    # process 0 decides for all, since the others may not see the same files
    resumed, step = on_process_0(lambda: _begun(workdir, path))
    if not resumed:
        path = as_path(local_model(config.init_from))
    initial = InitialWeights(path, step, config.init_rules, model, abstract)
    if resumed:
        return initial
    lines = initial.report()
    if jax.process_index() == 0:
        for line in lines:
            log(line)
    return initial


def _begun(workdir: pathlib.Path, path: pathlib.Path) -> tuple[bool, int | None]:
    """Returns whether the run has begun, and the number of the step that gives it its initial weights.

    This is a step of the workdir `path`. It is None if `path` is not a workdir.
    """
    if (workdir / RUN).is_file():
        return True, read_run(workdir).get("initialised", {}).get("step")
    return False, resolve_step(path, "best") if is_workdir(path) else None


def max_decode_len(data: TaskData, config: TrainConfig) -> int:
    """Returns the maximum length of a decoded answer, in tokens.

    This is the config's `max_decode_len`, if it is set and answers contain only a label. Otherwise it is the
    length of the first objective's longest target, at most `target_length`, rounded up to a multiple of 8.
    """
    if config.max_decode_len is not None and not data.objectives[0].writes_more:
        return config.max_decode_len
    longest = max(
        int(rows["targets"].lengths.max())
        for part in data.parts
        for column, rows in zip(part.columns, part.store.rows, strict=True)
        if column.objective == 1
    )
    return round_up(min(longest, config.target_length), 8)
