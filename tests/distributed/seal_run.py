"""Run by processes of a job: saves steps 1 and 2, or reads them; each says which files it has read.

Given, as JSON: `workdir`, `kill` (the process that dies before step 2 is sealed, or null) and `save`.
"""

import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np
from jax.sharding import PartitionSpec

from stepdistill_jax.models.sharding import Layout, make_mesh
from stepdistill_jax.runtime.checkpoints import manager, reading
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints

given, me = json.loads(sys.argv[1]), jax.process_index()
mesh, read, seal, plain = make_mesh(Layout(fsdp=-1)), [], manager.seal, reading.crc32


def noted(file, *others):
    read.append([file.name, os.fstat(file.fileno()).st_size])
    return plain(file, *others)


def sealed(folder, *others):
    if folder.name == "2" and given["kill"] == me:
        os.kill(os.getpid(), signal.SIGKILL)
    seal(folder, *others)


def tree(step):
    """Two arrays that the processes share, one that each has."""
    rng, cut = np.random.default_rng(step), PartitionSpec("fsdp")
    specs = {"a": cut, "b": cut, "whole": PartitionSpec()}
    values = {name: rng.standard_normal((64, 512)).astype(np.float32) for name in specs}
    return {
        name: jax.make_array_from_callback(
            value.shape, jax.sharding.NamedSharding(mesh, specs[name]), value.__getitem__
        )
        for name, value in values.items()
    }


reading.crc32, manager.seal = noted, sealed
checkpoints = Checkpoints(given["workdir"])
for step in (1, 2) if given["save"] else ():
    checkpoints.save(step, tree(step), {"m": tree(step)["a"]}, {"step": step, "validated": False})
latest = checkpoints.latest_step()
checkpoints.close()
said = {"latest": latest, "read": read}
pathlib.Path(given["workdir"], f"said_{me}.json").write_text(json.dumps(said))
