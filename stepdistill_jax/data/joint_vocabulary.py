"""Trains one vocabulary for several prepared datasets."""

import os
import pathlib
import socket
from collections.abc import Sequence

from stepdistill_jax.data import train_vocabulary as training
from stepdistill_jax.data.prepared import PreparedDataset
from stepdistill_jax.data.writing import vocabulary_texts
from stepdistill_jax.runtime.fingerprints import digest


def joint_vocabulary(datasets: Sequence[PreparedDataset], folder: pathlib.Path) -> str:
    """Returns the path of a vocabulary trained on the train splits of all datasets.

    The first call trains it and stores it in `folder`. A single dataset keeps its own vocabulary.

    Raises:
        InputError: a dataset has no train split, or a file of a dataset has changed.
    """
    if len(datasets) == 1:
        return os.fspath(datasets[0].spiece_model)
    datasets = sorted(datasets, key=lambda d: d.name)
    name = "+".join(d.name for d in datasets)
    path = (
        folder / "vocabularies" / f"{name}-{digest([d.fingerprint for d in datasets])[:16]}.model"
    )
    if not path.is_file():
        files = [d.file("train") for d in datasets]
        rows = sum(d.splits["train"] for d in datasets)
        characters = sum(file.stat().st_size for file in files)
        texts = [text for file in files for text in vocabulary_texts(file, 4 * rows, characters)]
        path.parent.mkdir(parents=True, exist_ok=True)
        # several processes of a job may train it; each writes the same bytes, to a file of its own
        own = path.with_name(f".{path.name}-{socket.gethostname()}-{os.getpid()}")
        training.train_vocabulary(texts, own)
        os.replace(own, path)
    return os.fspath(path)
