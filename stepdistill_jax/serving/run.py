"""`serve`: opens the model, listens, and answers until it is told to stop."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax

from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.allowed import allow, check_choices
from stepdistill_jax.inference.engines import open_engine
from stepdistill_jax.inference.prompting import how_to_ask
from stepdistill_jax.models.sharding import Layout
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
    step: str | int = "best",
    batch_size: int | None = None,
    layout: str | Layout = "data",
    max_decode_len: int | None = None,
    num_beams: int = 1,
    length_penalty: float | None = None,
    choices: os.PathLike | str | Sequence[str] | None = None,
    choices_temperature: float = 1.0,
    prefix: str | None = None,
    engine: str | None = None,
    quantization: str | None = None,
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
        step, batch_size, layout, max_decode_len, num_beams, length_penalty, choices,
            choices_temperature, prefix, engine, quantization: as for `predict`.

    Returns:
        `rows` that were answered; `unanswered` requests, for which `grace_secs` was too short; `busy`,
        whether the engine is still at work on something that nobody waits for.

    Raises:
        InputError: bad options or model, a missing extra, or a port that cannot be listened on.
        Exception: what made the warm-up fail: damaged weights, a device out of memory.
    """
    for flag, value, least in (
        ("--max-wait-ms", max_wait_ms, 0),
        ("--max-queue", max_queue, 1),
        ("--timeout-secs", timeout_secs, 0.001),
        ("--grace-secs", grace_secs, 0),
    ):
        if not least <= value < 1e6:
            raise InputError(f"{flag}: {least} or more is wanted, got {value!r}")
    check_choices(choices, choices_temperature, num_beams, max_decode_len)
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
        model = open_engine(
            path,
            engine,
            step=step,
            batch_size=batch_size,
            layout=layout,
            num_beams=num_beams,
            length_penalty=length_penalty,
            quantization=quantization,
        )
        asking = how_to_ask(model, max_decode_len=max_decode_len, prefix=prefix)
        allowed = None
        if choices is not None:
            allowed = allow(choices, asking, model, choices_temperature)
        limits = app.Limits(max_wait_ms / 1000, max_queue, timeout_secs)
        service = app.Service(Answerer(model, asking, allowed), limits)
        server.run(service, listener, grace_secs, signals)
        if service.failure:
            raise service.failure
        return {
            "rows": service.answered,
            "unanswered": service.unanswered,
            "busy": service.batcher.close(),
        }
