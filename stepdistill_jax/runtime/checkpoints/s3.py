"""Orbax on `s3://`: TensorStore has a driver for it that Orbax does not ask for yet."""

import functools
import os

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from stepdistill_jax.errors import InputError

S3 = "s3://"
_PLACES = (
    (tensorstore_utils, "_normalize_path"),
    (tensorstore_utils, "_use_gcs_driver"),
    (gcs_utils, "get_kvstore_for_gcs"),
)


@functools.cache
def enable() -> None:
    """Has Orbax name TensorStore's `s3` driver where it names `gcs` for `gs://`, in this process.

    Orbax 0.12 knows local folders and `gs://` only, at three places (google/orbax#2739 is open). What
    it writes in S3 is what it writes elsewhere: no other code of it depends on the store, given
    `AtomicityMode.COMMIT_FILE`.

    Raises:
        InputError: this Orbax has other places.
    """
    missing = [name for module, name in _PLACES if not hasattr(module, name)]
    if missing:
        raise InputError(
            f"s3:// is not possible with this orbax-checkpoint (it has no {missing[0]});"
            " install 0.12.8, or use gs:// or a local workdir"
        )
    normalize, use_gcs, gcs_spec = (getattr(module, name) for module, name in _PLACES)

    def _normalize_path(path: str) -> str:
        if path.startswith(S3):
            return S3 + os.path.normpath(path.removeprefix(S3))
        return normalize(path)

    def _use_gcs_driver(directory: str) -> bool:
        return directory.startswith(S3) or use_gcs(directory)

    def get_kvstore_for_gcs(path: str) -> dict:
        if not path.startswith(S3):
            return gcs_spec(path)
        bucket, _, key = path.removeprefix(S3).partition("/")
        return {"driver": "s3", "bucket": bucket, "path": key, **_service()}

    for (module, name), new in zip(
        _PLACES, (_normalize_path, _use_gcs_driver, get_kvstore_for_gcs), strict=True
    ):
        setattr(module, name, new)


def _service() -> dict[str, str]:
    """An S3 service that is not Amazon's, from the variable that s3fs reads, too."""
    if not (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        return {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"endpoint": endpoint, "aws_region": region}
