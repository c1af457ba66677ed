"""Runs uvicorn on a socket until a signal arrives."""

import asyncio
import contextlib
import errno
import ipaddress
import socket
from typing import Any, NoReturn

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import whole
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.signals import StopSignals
from stepdistill_jax.serving.app import STOPPING, Service
from stepdistill_jax.serving.requests import MAX_HEAD_BYTES

KEEP_ALIVE_SECS = (
    75  # proxies keep idle connections for a minute, and should be the ones to close them
)


def stopped_before_listening(name: str) -> NoReturn:
    """Exits with status 0, after a signal that arrives before the server listens."""
    log(f"{name}: stopped before it was listening")
    raise SystemExit(0)


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to an address. Connections are refused until `run` listens.

    Raises:
        InputError: the address does not exist or is in use.
    """
    whole("port", port, 0, 2**16 - 1)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        family, kind, protocol, _, address = found
        # asyncio sets TCP_NODELAY only if the socket names its protocol. Without it, an answer (two
        # packets) waits 40 ms for the client to acknowledge the first one.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise InputError(
                f"port {port} on {host} is in use; choose another one with `port` (0 means any free port)"
            ) from None
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"`host` {host} `port` {port}: cannot listen at this address ({reason}); choose another one"
        ) from None
    return listener


def run(service: Service, listener: socket.socket, grace_secs: float, signals: StopSignals) -> None:
    """Serves until a signal arrives, and then answers requests in progress for up to `grace_secs`."""
    server = _Server(
        uvicorn.Config(
            service,
            http=_Protocol,
            loop="asyncio",  # uvloop ignores the buffer of `_Protocol`
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,  # incomplete heads; `Service` checks the rest
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECS,
            timeout_graceful_shutdown=grace_secs,  # type: ignore[arg-type]  # goes to `wait_for`
        )
    )

    def stop(name: str) -> None:
        log(f"{name}: {service.open} requests are in progress and will be answered")
        service.state = STOPPING
        server.should_exit = True

    def fail() -> None:
        server.config.timeout_graceful_shutdown = 0  # nothing will answer the requests in progress
        server.should_exit = True

    service.on_failure = fail
    listener.listen(server.config.backlog)  # before the log line: its reader may connect at once
    host, port = listener.getsockname()[:2]
    log(f"serving at http://{f'[{host}]' if ':' in host else host}:{port}; warming up")
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        log(
            f"warning: `host` {host}: anyone who can reach this port can use the model;"
            " see docs/guide/serving.md"
        )
    signals.act = stop
    server.run([listener])


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to `StopSignals`.

    Uvicorn's own handling would raise a signal again after the server has stopped.
    """

    @contextlib.contextmanager
    def capture_signals(self):
        yield


class _Protocol(H11Protocol, asyncio.BufferedProtocol):
    """Parses HTTP with h11, which limits the size of an incomplete request head."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # with asyncio's default of 256 KiB, a client that sends chunks of one byte would block all others
        # for seconds
        self._buffer = bytearray(4096)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._buffer[:nbytes]))
