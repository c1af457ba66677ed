"""Gets models of the Hugging Face hub by name, `OWNER/NAME`. A model is downloaded only once."""

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
from stepdistill_jax.runtime.stores import is_remote, nearby

SITE, TIMEOUT_SECS = "huggingface.co", 20.0
# the hub has pages of these names, so no owner has such a name: `models/x` can only be a folder
_NO_OWNERS = ("models", "datasets", "spaces", "docs")


def local_model(given: str) -> str:
    """Returns the folder of a model, which is downloaded if it is on the hub.

    Args:
        given: value of `init_from`: a folder, or `OWNER/NAME` if there is no such folder.

    Raises:
        InputError: the model cannot be downloaded.
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
        # one request, without the retries of half a minute that other calls make
        listed = huggingface_hub.model_info(name, timeout=TIMEOUT_SECS).siblings or []
        files = needed_files([file.rfilename for file in listed], name)
        log(f"`init_from` {name}: taking {', '.join(files)} from {SITE} or its local cache")
        return huggingface_hub.snapshot_download(name, allow_patterns=files)
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"`init_from` {name}: no such folder here, and no public model of this name at"
            f" {SITE}{nearby(name)}"
        ) from None
    except InputError:
        raise
    except Exception as error:  # network errors have many classes
        reason = printable(error, 200)
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except Exception:  # never downloaded
        folder = None
    if folder and (folder / CONFIG).is_file() and has_weights(folder):
        log(
            f"`init_from` {name}: {SITE} does not answer, so the model is taken from the local cache"
        )
        return str(folder)
    problem = f"`init_from` {name}: no such folder here, and {SITE} cannot be reached ({reason})"
    owner, _, model = name.partition("/")
    if pathlib.Path(
        owner
    ).is_dir():  # then `runs/mine` is rather a mistyped path than a model of the hub
        raise InputError(
            f"{problem}{nearby(name) or f'; {owner}/ has no folder of a similar name'}"
        )
    raise InputError(
        f"{problem}; on a machine with internet access run `hf download {name} --local-dir models/{model}`,"
        f" copy that folder here, and set `init_from=models/{model}`"
    )


def needed_files(listed: Sequence[str], name: str) -> list[str]:
    """Returns the files to download, with the weights in only one format.

    >>> needed_files(["README.md", "config.json", "pytorch_model.bin", "spiece.model", "tf_model.h5"], "o/n")
    ['config.json', 'spiece.model', 'pytorch_model.bin']

    Args:
        listed: names of all the model's files at the hub.

    Raises:
        InputError: the model has no weights in a format that we read.
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
