"""Models of the Hugging Face hub by their name, `OWNER/NAME`: downloaded once, then found in its cache."""

import functools
import pathlib
import re
from collections.abc import Sequence

from stepdistill_jax.data.vocabulary import TOKENIZER_CONFIG
from stepdistill_jax.errors import InputError, printable
from stepdistill_jax.formats.directory import CONFIG, TASK_INFO
from stepdistill_jax.formats.vocabulary_files import SPIECE, TOKENIZER_MODEL
from stepdistill_jax.formats.weights import INDEX_SUFFIX, WEIGHT_FILES, has_weights
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import is_remote

SITE, TIMEOUT_SECS = "huggingface.co", 20.0
# the hub has pages of these names, so nobody is called so: a folder of models that is not there
_NO_OWNERS = ("models", "datasets", "spaces", "docs")


def local_model(given: str) -> str:
    """Returns the folder of a model: `given`, or where a model of the hub with this name lies.

    Args:
        given: `init_from`: a folder, or `OWNER/NAME` where there is no such folder.

    Raises:
        InputError: a name that cannot be downloaded; says what to run where there is internet.
    """
    owner, _, name = given.partition("/")
    named = all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in (owner, name))
    if is_remote(given) or not named or owner in _NO_OWNERS or pathlib.Path(given).exists():
        return given
    return _of_hub(given)


@functools.cache
def _of_hub(name: str) -> str:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        # one question, without the retries that other calls make for half a minute
        listed = huggingface_hub.model_info(name, timeout=TIMEOUT_SECS).siblings or []
        files = needed_files([file.rfilename for file in listed], name)
        log(f"`init_from` {name}: {', '.join(files)} from {SITE}, or from its cache here")
        return huggingface_hub.snapshot_download(name, allow_patterns=files)
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"`init_from` {name}: no such folder here, and no public model of this name at {SITE}"
        ) from None
    except InputError:
        raise
    except Exception as error:  # of the network, in many classes
        reason = printable(error, 200)
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except Exception:  # it was never downloaded
        folder = None
    if folder and (folder / CONFIG).is_file() and has_weights(folder):
        log(f"`init_from` {name}: {SITE} does not answer; taken from its cache here")
        return str(folder)
    target = f"models/{name.partition('/')[2]}"
    raise InputError(
        f"`init_from` {name}: no such folder here, and {SITE} cannot be asked for it ({reason}); where"
        f" there is internet run `hf download {name} --local-dir {target}`, copy that folder here, and"
        f" give `init_from={target}`"
    )


def needed_files(listed: Sequence[str], name: str) -> list[str]:
    """Returns which files of a model are read: one format of its weights, the first in our order.

    >>> needed_files(["README.md", "config.json", "pytorch_model.bin", "spiece.model", "tf_model.h5"], "o/n")
    ['config.json', 'spiece.model', 'pytorch_model.bin']

    Args:
        listed: names of all files, those of its folders included.
        name: of the model, for messages.

    Raises:
        InputError: no weights that can be read.
    """
    files = [
        f for f in (CONFIG, SPIECE, TOKENIZER_MODEL, TOKENIZER_CONFIG, TASK_INFO) if f in listed
    ]
    for weights in WEIGHT_FILES:
        if weights in listed:
            return [*files, weights]
        if (index := weights + INDEX_SUFFIX) in listed:
            stem, _, ending = weights.rpartition(".")
            shards = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{ending}")
            return [*files, index, *(f for f in listed if shards.fullmatch(f))]
    raise InputError(
        f"`init_from` {name}: the model at {SITE} has none of the files {', '.join(WEIGHT_FILES)}"
    )
