"""Which processes of a job are there, asked before JAX joins them: JAX's own time-out names nobody.

Process 0 listens on the coordinator's port, every other process connects and says its number, and
process 0 answers all of them at once: go on, or who is missing. Then JAX's service takes the port.
"""

import contextlib
import errno
import re
import selectors
import socket
import time

from stepdistill_jax.errors import InputError

GREETING = "stepdistill-roll-call"
_GREETING = re.compile(rf"{GREETING} (\d{{1,6}}) (\d{{1,6}})", re.ASCII)
GO, MISSING, REFUSED = "go", "missing", "refused"
RETRY_SECS = 0.5
GREETING_SECS = 1.0  # between a connection and its greeting, which is sent at once
ANSWER_SECS = 10.0  # more than process 0 may need to answer after its own time-out


class ProcessesMissing(TimeoutError):
    """Processes of the job that did not come in time; the message is one line with their numbers."""


def roll_call(
    host: str,
    port: int,
    *,
    num_processes: int,
    process_id: int,
    timeout_secs: float,
    bind: tuple[str, int] | None = None,
) -> None:
    """Returns in every process of the job as soon as all of them have called it.

    Args:
        host, port: where process 0 is reached.
        num_processes: of the job.
        process_id: of the caller, counted from 0.
        timeout_secs: how long the others are waited for.
        bind: where process 0 listens, if not at `port` of all its addresses.

    Raises:
        ProcessesMissing: in every process that came; names those that did not.
        InputError: two processes have the same number, or other ideas of how many there are; or the
            port cannot be opened.
    """
    deadline = time.monotonic() + timeout_secs
    if process_id:
        _answer(host, port, num_processes, process_id, deadline, timeout_secs)
        return
    with _listen(bind or ("", port), deadline) as server:
        _call(server, num_processes, deadline, timeout_secs)


def _listen(address: tuple[str, int], deadline: float) -> socket.socket:
    both = not address[0] and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in address[0] else socket.AF_INET
    while True:
        try:
            return socket.create_server(address, family=family, dualstack_ipv6=both, backlog=1024)
        except OSError as error:
            # an earlier life of the job may be about to leave the port
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise InputError(
                    f"port {address[1]} of the coordinator cannot be opened ({error.strerror});"
                    " another program or an earlier start of the job has it"
                ) from None
            time.sleep(RETRY_SECS)


def _call(server: socket.socket, num_processes: int, deadline: float, timeout_secs: float) -> None:
    """Process 0: waits for the others and tells them the outcome."""
    present: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as connections:
        selector.register(server, selectors.EVENT_READ)
        while len(present) < num_processes - 1:
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                missing = sorted(set(range(1, num_processes)) - present.keys())
                message = _missing(missing, num_processes, timeout_secs)
                _tell(present, f"{MISSING} {message}")
                raise ProcessesMissing(message)
            for key, _ in ready:
                if key.fileobj is server:
                    connection = connections.enter_context(server.accept()[0])
                    connection.settimeout(GREETING_SECS)
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                greeting = _GREETING.fullmatch(_receive(connection, packets=2))
                if greeting is None:  # gone again, or not one of us
                    selector.unregister(connection)
                    present = {i: c for i, c in present.items() if c is not connection}
                    continue
                count, number = map(int, greeting.groups())
                if refusal := _refusal(count, number, num_processes, present):
                    _tell({**present, -1: connection}, f"{REFUSED} {refusal}")
                    raise InputError(refusal)
                present[number] = connection
        _tell(present, GO)


def _answer(
    host: str,
    port: int,
    num_processes: int,
    process_id: int,
    deadline: float,
    timeout_secs: float,
) -> None:
    """Every other process: says its number to process 0 and waits for the outcome."""
    reason = ""
    while time.monotonic() < deadline:
        reply = ""
        try:
            with socket.create_connection((host, port), timeout=ANSWER_SECS) as connection:
                # process 0 began to wait before this moment
                connection.settimeout(timeout_secs + ANSWER_SECS)
                connection.sendall(f"{GREETING} {num_processes} {process_id}\n".encode())
                reply = _receive(connection)
            reason = "another program, or an earlier start of the job, answers there"
        except OSError as error:
            reason = error.strerror or str(error)
        kind, _, message = reply.partition(" ")
        if kind == GO:
            return
        if kind == MISSING:
            raise ProcessesMissing(message)
        if kind == REFUSED:
            raise InputError(message)
        time.sleep(RETRY_SECS)
    raise ProcessesMissing(f"{_missing([0], num_processes, timeout_secs)}; {host}:{port}: {reason}")


def _receive(connection: socket.socket, packets: int = 64) -> str:
    """The line that was sent; empty at the end or where it is not text.

    `packets` bounds how long one who sends drop by drop is listened to.
    """
    received = b""
    with contextlib.suppress(OSError):
        for _ in range(packets):
            if received.endswith(b"\n") or not (part := connection.recv(4096)):
                break
            received += part
    return received.decode("ascii", errors="replace").strip()


def _tell(connections: dict[int, socket.socket], line: str) -> None:
    for connection in connections.values():
        with contextlib.suppress(OSError):  # one that died in the meantime
            connection.sendall(f"{line}\n".encode())


def _refusal(count: int, number: int, num_processes: int, present: dict) -> str | None:
    if count != num_processes:
        return (
            f"process {number} was started as one of {count}, process 0 as one of {num_processes}"
        )
    if not 0 < number < num_processes or number in present:
        return f"two processes of the job are number {number}; each wants a number of its own"
    return None


def _missing(numbers: list[int], num_processes: int, timeout_secs: float) -> str:
    return (
        f"after {timeout_secs:g} s {len(numbers)} of {num_processes} processes"
        f" {'is' if len(numbers) == 1 else 'are'} missing: number"
        f" {', '.join(map(str, numbers))} (counted from 0); was the command started on every host?"
    )
