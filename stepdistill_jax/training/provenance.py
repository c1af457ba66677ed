"""Writes `run.json` (a run's settings, versions and devices), and checks that a resume keeps the settings."""

import dataclasses
import datetime
import json
import pathlib
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from stepdistill_jax.data import schedules
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import GENERATION_CONFIG, TaskInfo, write_model_files
from stepdistill_jax.formats.hub import local_model
from stepdistill_jax.models.config import OLD_REMAT_POLICIES
from stepdistill_jax.models.lora import split
from stepdistill_jax.runtime.checkpoints.manager import is_workdir, params_digest
from stepdistill_jax.runtime.files import atomic_write, read_json, write_json
from stepdistill_jax.runtime.fingerprints import digest, sampled_digest
from stepdistill_jax.runtime.on_processes import on_all_processes, on_process_0, require_same
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.data import VALIDATION
from stepdistill_jax.training.initial_weights import InitialWeights
from stepdistill_jax.training.learning_rate import FALLING
from stepdistill_jax.training.run import MODEL_SETTINGS, Run, max_decode_len
from stepdistill_jax.training.workdir import GIN, RUN, check_config, read_run
from stepdistill_jax.versions import version_block

# Settings that may differ between a run and its resume. None of them changes the loss that is minimised.
# `train_steps` may also grow, if no learning rate depends on it. The path `init_from` may change, since the
# fingerprint identifies its content.
FREE_FIELDS = (
    "layout",
    "attention",
    "scan_layers",
    "num_microbatches",
    "checkpoint_every",
    "init_from",
    "profile_steps",
    "watchdog_medians",
    "watchdog_min_secs",
    # how a run handles failures may change in order to continue after one
    "on_nonfinite",
    "max_consecutive_nonfinite",
    "spike_factor",
    "grace_secs",
)
# entries of `fingerprint`, as named in messages
FINGERPRINTS = {
    "train": "the train data",
    VALIDATION: "the validation data",
    "init_from": "the weights of `init_from`",
}
SHOWN_DIGITS = 12  # of a fingerprint's 64
SEEN_SECS = 30.0  # longest wait until a file of another host is visible on a network disk
# fields that may differ each time the run is started
LIFE_FIELDS = (
    "versions",
    "device",
    "device_count",
    "process_count",
    "mesh",
    "commit",
    "started",
)


def describe(run: Run) -> dict[str, Any]:
    """Returns the content of `run.json`, with which a resumed run is compared."""
    fingerprint = {"train": run.data.fingerprint}
    cut = {"train": run.batches.cut_counts()}
    if run.validator is not None:
        fingerprint[VALIDATION] = run.validator.data.fingerprint
        cut[VALIDATION] = run.validator.batches.cut_counts()
    if run.initial is not None and (weights := _weights_digest(run.initial)) is not None:
        fingerprint["init_from"] = weights
    described = {
        "config": run.config.to_json(),
        "model": dataclasses.asdict(run.model),
        "parameters": _count(run.abstract.params),
        "trained_parameters": _count(split(run.abstract.params)[0]),
        "weights": {o.name: schedules.described(o.weight) for o in run.data.objectives},
        "seeds": dict.fromkeys(("init", "dropout", "data_order"), run.config.seed),
        "fingerprint": fingerprint,
        "examples": run.batches.num_examples,
        "row_lengths": list(run.batches.row_lengths),
        "cut": cut,
        "versions": version_block(),
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "mesh": dict(run.mesh.shape),
        "commit": _commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if (
        run.initial is not None and not (run.workdir / RUN).exists()
    ):  # a resumed run keeps the entry of its first start
        described["initialised"] = run.initial.described()
    return json.loads(json.dumps(described, default=str))


def _count(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def _weights_digest(initial: InitialWeights) -> str | None:
    """Returns a digest of `init_from`, or None if its directory or step is gone.

    For a workdir, it covers the manifest of the step's parameters. For a model directory, it covers config.json
    and the file sizes, but not the weights.
    """
    directory = initial.path
    if initial.step is not None and is_workdir(directory):
        return params_digest(directory, initial.step)
    if not directory.is_dir():
        return None
    files = sorted(p for p in directory.iterdir() if p.is_file())
    sizes = {p.name: p.stat().st_size for p in files}
    config = directory / "config.json"  # a T5X checkpoint has none
    return digest([sizes, config.read_text(encoding="utf-8") if config.is_file() else ""])


def _commit() -> str | None:
    """Returns the commit of the package's checkout, or None if there is no checkout or no git."""
    folder = pathlib.Path(__file__).parent
    try:
        tracked, described = (
            subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
            for command in (
                ("ls-files", "--error-unmatch", __file__),
                ("describe", "--always", "--dirty"),
            )
        )
    except OSError:
        return None
    return described.stdout.strip() if tracked.returncode == described.returncode == 0 else None


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the defaults of settings that are missing in an older `run.json`, also inside nested settings."""
    found = json.loads(json.dumps(TrainConfig(task="").to_json()))
    for name, value in config.items():
        default = found.get(name)
        if isinstance(default, dict) and isinstance(value, dict) and value.keys() <= default.keys():
            value = default | value
        found[name] = value
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns `FIELD was A, is B` for each setting or fingerprint that would change a resumed run's result."""
    found = []
    for key in ("config", "fingerprint", "model"):
        old, new = before.get(key, {}), now[key]
        if key == "config":
            old = with_defaults(old)
            old["remat_policy"] = OLD_REMAT_POLICIES.get(old["remat_policy"], old["remat_policy"])
            old["objectives"] = [{"decoder_prefix": ""} | o for o in old["objectives"]]
        for name in sorted(old.keys() | new.keys()):
            skipped = FREE_FIELDS if key == "config" else MODEL_SETTINGS if key == "model" else ()
            if key == "config" and name == "train_steps" and old[name] < new[name]:
                found += _why_not_longer(old, new)
                continue
            gone = key == "fingerprint" and name == "init_from" and name not in new
            if name in skipped or gone:
                continue
            if old.get(name) != new.get(name):
                if key == "fingerprint":
                    digits = (str(of.get(name))[:SHOWN_DIGITS] for of in (old, new))
                    what = FINGERPRINTS.get(name, name)
                    found.append("{}: fingerprint was {}, is {}".format(what, *digits))
                    continue
                shown = f"`{name}`" if key == "config" else f"{key}.{name}"
                found.append(f"{shown} was {old.get(name)!r}, is {new.get(name)!r}")
    tokens = [of.get("fingerprint", {}).get("train") for of in (before, now)]
    start, given = (of.get("config", {}).get("init_from") for of in (before, now))
    if tokens[0] != tokens[1] and start != given:  # another vocabulary gives other tokens
        found.insert(0, f"`init_from` was {start!r}, is {given!r}")
    return found


def _why_not_longer(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns [the reason] if a resumed run must not increase `train_steps`, and [] if it may.

    It must not if a learning rate depends on `train_steps`.
    """
    optimizer = now["optimizer"]
    named = optimizer.get("schedule")
    rates = [{"shape": named}] if isinstance(named, str) else [named]
    rates += optimizer.get("arguments", {}).values()
    for rate in rates:
        shape = rate.get("shape") if isinstance(rate, dict) else None
        if shape in FALLING and rate.get("train_steps") is None:
            return [
                f"`train_steps` was {before['train_steps']}, is {now['train_steps']}, and the"
                f" {shape} learning rate of every step depends on it: to train further, start in a"
                " new `workdir` with this one as `init_from`"
            ]
    return []


def claim_workdir(run: Run, described: dict[str, Any], config_text: str | None) -> None:
    """Compares the run with its earlier starts, and writes `run.json`, `config.gin` and the model files.

    Raises:
        InputError: the workdir has a run with other settings or cannot be written, or processes disagree. Raised
            on every process.
    """
    _agree(described)
    path = run.workdir / RUN
    earlier = on_all_processes(lambda: _earlier(run.workdir, described))
    if config_text:
        on_process_0(lambda: check_config(run.workdir / GIN, config_text))
    on_process_0(lambda: _write(run, described, earlier, config_text))
    if jax.process_count() > 1:
        written = on_process_0(lambda: digest(read_json(path)))
        on_all_processes(lambda: _wait_for(path, written))


def _earlier(workdir: pathlib.Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the `run.json` of an earlier start of this run, or None at its first start."""
    path = workdir / RUN
    earlier = read_run(workdir) if path.exists() else None
    if earlier is not None and (found := differences(earlier, described)):
        raise InputError(
            f"{workdir}: holds a run with other settings ({'; '.join(found)});"
            " use the same settings and data to resume it, or another `workdir`"
        )
    return earlier


def _write(run: Run, described: dict[str, Any], earlier: Any, config_text: str | None) -> None:
    """Writes `run.json`, `config.gin` and the model files into the workdir."""
    train_steps = {"train_steps": run.config.train_steps}
    life = {name: described[name] for name in LIFE_FIELDS} | train_steps
    lives = [*earlier["lives"], life] if earlier and "lives" in earlier else [life]
    kept = earlier or described
    longer = kept["config"] | train_steps != kept["config"]  # than in the previous start
    kept = kept | {"config": kept["config"] | train_steps}
    try:
        run.workdir.mkdir(parents=True, exist_ok=True)
        # run.json first: after a kill between these files, it still identifies the folder as this run's
        write_json(run.workdir / RUN, kept | {"lives": lives})
        if longer or not (run.workdir / GENERATION_CONFIG).exists():  # written last
            info = task_info(run, described)
            write_model_files(run.workdir, run.model, run.data.vocabulary, info)
        if config_text:
            with atomic_write(run.workdir / GIN) as f:
                f.write(config_text)
    except OSError as error:
        raise InputError(
            f"`workdir` {run.workdir}: cannot be written ({error.strerror or error}: {error.filename})"
        ) from None


def _agree(described: dict[str, Any]) -> None:
    """Raises InputError if the processes of this run have different configs, data or `init_from`."""
    if jax.process_count() == 1:
        return
    given = described["config"]["init_from"]
    given = given and local_model(given)
    # The fingerprint covers only file sizes. With sharded weights each process reads its part, so two
    # different models of the same size would be combined into a third.
    weights = ""
    if given and pathlib.Path(given).is_dir() and not is_workdir(given):
        weights = sampled_digest(pathlib.Path(given))
    require_same(
        [described["config"], described["fingerprint"], weights], "config, data or `init_from`"
    )


def _wait_for(path: pathlib.Path, written: str) -> None:
    """Waits until this process sees the file that process 0 has just written. Raises InputError after 30 s."""
    deadline = time.monotonic() + SEEN_SECS
    while not (path.exists() and digest(read_json(path)) == written):
        if time.monotonic() > deadline:
            raise InputError(
                f"`workdir` {path.parent}: this process does not see the files that process 0 wrote;"
                " all processes need the same folder, on a disk that their hosts share"
            )
        time.sleep(0.5)


def task_info(run: Run, described: dict[str, Any]) -> TaskInfo:
    """Returns the content of `stepdistill.json`: how to prompt the trained model, and how it was trained."""
    return TaskInfo(
        task=run.config.task,
        objectives=run.data.objectives,
        input_length=run.config.input_length,
        target_length=run.config.target_length,
        max_decode_len=max_decode_len(run.data, run.config),
        metric=run.data.metric,
        labels=run.data.labels,
        input_pair=run.data.input_pair,
        provenance={
            name: described[name]
            for name in ("config", "fingerprint", "versions", "device", "commit")
        }
        | {"dataset": run.dataset},
    )
