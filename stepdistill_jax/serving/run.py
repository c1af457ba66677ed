"""Defines `serve`, which opens a model and answers requests until a signal arrives."""

import contextlib
import os
from typing import Any

import jax

from stepdistill_jax.errors import InputError, how_to_install
from stepdistill_jax.inference.allowed_answers import allow
from stepdistill_jax.inference.engines import open_engine
from stepdistill_jax.inference.options import decode_options
from stepdistill_jax.inference.prompting import prompting_for, rationale_prompting_for
from stepdistill_jax.runtime.checks import number, whole
from stepdistill_jax.runtime.signals import StopSignals
from stepdistill_jax.serving.answerer import Answerer


def serve(
    path: os.PathLike | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_wait_ms: float = 5.0,
    max_queue: int = 256,
    timeout_secs: float = 30.0,
    grace_secs: float = 20.0,
    **options: Any,
) -> dict[str, Any]:
    """Serves a model over HTTP until SIGTERM or Ctrl-C.

    Rows in requests get the same answers as rows of a file get from `predict`.

    After the first signal, the server only answers the requests in progress. A second signal ends the process
    at once, with status 128 + the signal's number. Signals are handled only in the main thread.

    Args:
        path: workdir, or model directory in Hugging Face's or CTranslate2's layout.
        port: 0 means any free port, which is logged.
        max_wait_ms: how long, in ms, an idle engine waits for more rows before it starts a batch.
        max_queue: largest number of unanswered rows. A request that would exceed it gets status 503, or 413 if its
            own rows exceed it.
        timeout_secs: seconds after which a request gets status 504.
        grace_secs: seconds for which requests are still answered after a signal.
        **options: fields of `DecodeOptions`.

    Returns:
        `rows`: count of answered rows.
        `unanswered`: count of requests still in progress after `grace_secs`.
        `busy`: whether the engine is still working.

    Raises:
        InputError: an option or the model is bad, a library of the extra `[serve]` is missing, or the
            server cannot listen at the address.
        Exception: the warm-up failed.
    """
    number("max_wait_ms", max_wait_ms, least=0, below=1e6)
    whole("max_queue", max_queue, 1, 10**6 - 1)
    number("timeout_secs", timeout_secs, least=0.001, below=1e6)
    number("grace_secs", grace_secs, least=0, below=1e6)
    chosen = decode_options(serve, options)
    if jax.process_count() > 1:
        raise InputError(
            f"serve runs in a single process, but this job has {jax.process_count()}; start one process"
        )
    try:
        from stepdistill_jax.serving import app, server
    except ImportError as error:
        raise InputError(
            f"serve: {error.name or error} cannot be imported; {how_to_install('serve')}"
        ) from None
    with (
        StopSignals(server.stopped_before_listening) as signals,
        contextlib.closing(server.bind(host, port)) as listener,
    ):
        model = open_engine(path, chosen)
        prompting = prompting_for(model, chosen)
        allowed = allow(chosen, prompting, model)
        answerer = Answerer(model, prompting, allowed, rationale_prompting_for(model, chosen))
        limits = app.Limits(max_wait_ms / 1000, max_queue, timeout_secs)
        service = app.Service(answerer, limits)
        server.run(service, listener, grace_secs, signals)
        if service.failure:
            raise service.failure
        return {
            "rows": service.answered,
            "unanswered": service.unanswered,
            "busy": service.batcher.close(),
        }
