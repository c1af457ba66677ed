"""Run by processes of a job: `train` on the built-in dataset; its summary goes to a file."""

import json
import pathlib
import sys

import jax

from stepdistill_jax.training import TrainConfig, train

given = json.loads(sys.argv[1])
assert jax.device_count() == given["device_count"]
workdir = given["workdir"].format(process=jax.process_index())
try:
    summary = train(TrainConfig(**given["config"]), workdir=workdir, data_dir=given["data_dir"])
except SystemExit as stop:
    print("left with", stop.code, file=sys.stderr, flush=True)
    raise
name = f"summary_{jax.process_count()}_{jax.process_index()}.json"
(pathlib.Path(workdir) / name).write_text(json.dumps(summary))
