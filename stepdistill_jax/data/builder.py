"""Prepared rows as a TFDS dataset; with `tasks/` the only place that imports TensorFlow."""

import contextlib
import functools
import io
import os
import pathlib
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.prepared import TFDS_VERSION
from stepdistill_jax.errors import InputError
from stepdistill_jax.progress import progress

VERSION = TFDS_VERSION


@functools.cache
def tensorflow() -> types.ModuleType:
    """TensorFlow, hidden from every accelerator: it would else take the memory that JAX needs.

    Raises:
        InputError: TensorFlow cannot be imported here, or was already used on an accelerator.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with _quiet():
            import tensorflow as tf

            _hide_accelerators(tf)
    except ImportError as error:
        raise InputError(
            f"TensorFlow is not installed here ({error}); preparing and tokenising data needs it,"
            " and it has no wheel for every platform: do this step on Linux"
        ) from None
    return tf


def _hide_accelerators(tf: types.ModuleType) -> None:
    for kind in ("GPU", "TPU"):
        try:
            tf.config.set_visible_devices([], kind)
        except RuntimeError:
            # raised once TensorFlow has made its devices; without an accelerator nothing is lost
            if tf.config.get_visible_devices(kind):
                raise InputError(
                    f"TensorFlow already holds a {kind}: a task module must not run TensorFlow"
                    " operations when it is imported"
                ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from standard error what native code logs meanwhile; an error shows it after all.

    TensorFlow writes of oneDNN and CUDA, while it loads and while it looks for devices, whatever its
    log level.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        except BaseException:
            caught.seek(0)
            os.write(saved, caught.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def features() -> Any:
    """TFDS features of a row; they mirror Example, absent texts are empty."""
    tensorflow()
    import tensorflow_datasets as tfds

    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "input": text(),
            "label": text(),
            "rationale": text(),
            "llm_label": text(),
            "weight": tfds.features.Scalar(np.float32),
            "choices": tfds.features.Sequence(text()),
            "rationales": tfds.features.Sequence(
                {"text": text(), "source": text(), "label": text()}
            ),
        }
    )


def to_features(example: Example) -> dict[str, Any]:
    """An Example as TFDS encodes it."""
    return {
        "id": example.id,
        "input": example.input,
        "label": example.label,
        "rationale": example.rationale,
        "llm_label": example.llm_label,
        "weight": example.weight,
        "choices": list(example.choices),
        "rationales": [
            {"text": r.text, "source": r.source, "label": r.label} for r in example.rationales
        ],
    }


def build(name: str, splits: Mapping[str, Sequence[Example]], data_dir: pathlib.Path) -> None:
    """Writes `data_dir/name/1.0.0/`, which `tfds.load(name, data_dir=data_dir)` opens.

    Rows keep their order: read unshuffled, they come as given.

    Args:
        name: lower_snake name of the dataset.
        splits: examples by split.
        data_dir: root folder; TFDS refuses to overwrite what is there.
    """
    tensorflow()
    import tensorflow_datasets as tfds

    class PreparedRows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Rows that a reader has checked; made anew for each dataset, since TFDS names classes."""

        VERSION = tfds.core.Version(TFDS_VERSION)

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features(), disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows):
            for i, example in enumerate(rows):
                yield i, to_features(example)
                bar.update()

    PreparedRows.name = name
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    total = sum(len(rows) for rows in splits.values())
    with (
        progress(total, f"writing {name}, rows") as bar,
        contextlib.redirect_stdout(io.StringIO()),  # a banner about downloads; there are none
    ):
        PreparedRows(data_dir=os.fspath(data_dir)).download_and_prepare(download_config=config)
