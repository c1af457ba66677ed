"""`serve`: opens the model, listens, and answers until it is told to stop."""

import contextlib
import os
from typing import Any

import jax

from stepdistill_jax.errors import InputError
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
    """Answers over HTTP what `predict` answers through files, until SIGTERM or Ctrl-C.

    Signals are seen in the main thread. The first one stops it: no connection is accepted any more, and
    requests that are under way are answered. A second one ends the process at once, with 128 and the
    signal's number.

    Args:
        path: workdir or model directory, of Hugging Face's layout or CTranslate2's.
        host, port: where it listens; port 0 is any that is free, and is named in the log.
        max_wait_ms: how long a row waits for others while the engine is idle.
        max_queue: most rows that are not yet answered; what comes beyond is refused with 503.
        timeout_secs: after which a request is given up, with 504.
        grace_secs: for the requests that are under way when it is told to stop.
        **options: fields of `DecodeOptions`.

    Returns:
        `rows` that were answered; `unanswered` requests, for which `grace_secs` was too short; `busy`,
        whether the engine is still at work on something that nobody waits for.

    Raises:
        InputError: bad options or model, a missing extra, or a port that cannot be listened on.
        Exception: what made the warm-up fail: damaged weights, a device out of memory.
    """
    number("max_wait_ms", max_wait_ms, least=0, below=1e6)
    whole("max_queue", max_queue, 1, 10**6 - 1)
    number("timeout_secs", timeout_secs, least=0.001, below=1e6)
    number("grace_secs", grace_secs, least=0, below=1e6)
    chosen = decode_options(serve, options)
    if jax.process_count() > 1:
        raise InputError(
            f"serve is one process, and this one is one of {jax.process_count()}; start it by itself"
        )
    try:
        from stepdistill_jax.serving import app, server
    except ImportError as error:
        raise InputError(
            f"serve: {error.name or error} cannot be imported; pip install 'stepdistill-jax[serve]'"
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
