"""Waits for all processes of a job before JAX joins them, and reports the missing ones, which JAX does not.

Every other process sends the job's token and its own index to process 0, at the coordinator's address. Process 0
answers with the order to start, or the list of missing processes.
"""

import contextlib
import errno
import hmac
import ipaddress
import re
import selectors
import socket
import time

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.fingerprints import sha256_of

GREETING = "stepdistill-rendezvous"
_GREETING = re.compile(rf"{GREETING} ([0-9a-f]{{64}}) (\d{{1,6}}) (\d{{1,6}})", re.ASCII)
GO, MISSING, REFUSED, STRANGER = "go", "missing", "refused", "stranger"
RETRY_SECS = 0.5
GREETING_SECS = (
    1.0  # longest wait for the greeting of a new connection; our processes send it at once
)
ANSWER_SECS = 10.0  # more than process 0 needs to answer after its own time-out


class ProcessesMissing(TimeoutError):
    """Some processes of the job did not start in time. The message lists their indices."""


def rendezvous(
    host: str,
    port: int,
    *,
    num_processes: int,
    process_id: int,
    timeout_secs: float,
    bind: tuple[str, int] | None = None,
    secret: str | None = None,
) -> None:
    """Waits until all processes of the job have called this function.

    Args:
        host: host of process 0, spelled the same in all processes.
        bind: address that process 0 listens on; None means `own_address(...)`.
        secret: string that all processes of the job share. None means the address of process 0, which keeps
            out other jobs, but not an attacker.

    Raises:
        ProcessesMissing: some processes have not started in time. All processes that have started raise this error.
        InputError: two processes have equal indices or different `num_processes`, or the port cannot be opened.
    """
    deadline = time.monotonic() + timeout_secs
    token = sha256_of(secret or f"{host}:{port}")
    if process_id:
        greeting = f"{GREETING} {token} {num_processes} {process_id}\n"
        _greet(host, port, greeting, num_processes, deadline, timeout_secs)
        return
    with _listen(bind or own_address(host, port, timeout_secs), deadline) as server:
        _collect(server, token, num_processes, deadline, timeout_secs)


def own_address(host: str, port: int, timeout_secs: float) -> tuple[str, int]:
    """Returns the (IP address, port) on which process 0 must listen, so that others reach it as `host`.

    If `host` is a name other than `localhost` that resolves to a loopback address here, the IP address is "",
    which means all addresses.

    Raises:
        InputError: this machine cannot resolve `host`, even after `timeout_secs` seconds.
    """
    deadline = time.monotonic() + timeout_secs
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            break
        except OSError as error:  # a cluster may publish its machines' names late
            if time.monotonic() > deadline:
                raise InputError(
                    f"the coordinator's host {host!r} is unknown here ({error.strerror})"
                ) from None
            time.sleep(RETRY_SECS)
    # IPv4 first: every client tries it if a name has both
    address = str(min(found, key=lambda entry: entry[0])[4][0])
    # Debian resolves a machine's own name to 127.0.1.1, other hosts resolve it to the real address
    named = host != "localhost" and host != address
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return ("" if named and loopback else address), port


def _listen(address: tuple[str, int], deadline: float) -> socket.socket:
    both = not address[0] and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in address[0] else socket.AF_INET
    while True:
        try:
            return socket.create_server(address, family=family, dualstack_ipv6=both, backlog=1024)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise InputError(
                    f"process 0 runs on a machine without the coordinator's address {address[0]};"
                    " start it on the machine with that address, or set JAX_COORDINATOR_BIND_ADDRESS to the"
                    " HOST:PORT to listen on"
                ) from None
            # an earlier start of the job may be about to release the port
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise InputError(
                    f"port {address[1]} of the coordinator cannot be opened ({error.strerror});"
                    " another program or an earlier start of the job is using it"
                ) from None
            time.sleep(RETRY_SECS)


def _collect(
    server: socket.socket, token: str, num_processes: int, deadline: float, timeout_secs: float
) -> None:
    """Waits on process 0 for the other processes, then tells them to start.

    If the job cannot start, each process that is present gets the reason.
    """
    present: dict[int, socket.socket] = {}  # connection of each process that has greeted
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as connections:
        selector.register(server, selectors.EVENT_READ)

        def leave(connection: socket.socket) -> None:
            selector.unregister(connection)
            connection.close()

        while len(present) < num_processes - 1:
            left = max(deadline - time.monotonic(), 0)
            ready = selector.select(left)
            if not ready or not left:  # `left`: unrelated connections must not extend the deadline
                missing = sorted(set(range(1, num_processes)) - present.keys())
                message = _missing(missing, num_processes, timeout_secs)
                _send(present, f"{MISSING} {message}")
                raise ProcessesMissing(message)
            for key, _ in ready:
                if key.fileobj is server:
                    with contextlib.suppress(OSError):  # the client has already disconnected
                        connection = connections.enter_context(server.accept()[0])
                        connection.settimeout(GREETING_SECS)
                        selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                greeting = _GREETING.fullmatch(_receive(connection, packets=2))
                if greeting is None:  # the client has disconnected, or is not a process of a job
                    present = {i: c for i, c in present.items() if c is not connection}
                    leave(connection)
                    continue
                if not hmac.compare_digest(greeting[1], token):
                    _send({-1: connection}, STRANGER)
                    leave(connection)
                    continue
                count, number = int(greeting[2]), int(greeting[3])
                if refusal := _refusal(count, number, num_processes, present):
                    _send({**present, -1: connection}, f"{REFUSED} {refusal}")
                    raise InputError(refusal)
                present[number] = connection
        # GO is sent only now, when all processes are here, so none of them joins JAX alone
        _send(present, GO)


def _greet(
    host: str,
    port: int,
    greeting: str,
    num_processes: int,
    deadline: float,
    timeout_secs: float,
) -> None:
    """Sends the greeting to process 0, and waits for the answer. Runs on the other processes."""
    reason = ""
    while time.monotonic() < deadline:
        reply = ""
        try:
            with socket.create_connection((host, port), timeout=ANSWER_SECS) as connection:
                # process 0 began to wait earlier, so it answers within its own time-out from now
                connection.settimeout(timeout_secs + ANSWER_SECS)
                connection.sendall(greeting.encode())
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
        if kind == STRANGER:
            reason = (
                "another job answers there, or this process has another STEPDISTILL_JOB_TOKEN or"
                " another spelling of the coordinator's address"
            )
        time.sleep(RETRY_SECS)
    raise ProcessesMissing(f"{_missing([0], num_processes, timeout_secs)}; {host}:{port}: {reason}")


def _receive(connection: socket.socket, packets: int = 64) -> str:
    """Returns the line that the other side has sent, or "" if the connection has ended.

    At most `packets` packets are read, so that a client that sends single bytes cannot block the caller.
    """
    received = b""
    with contextlib.suppress(OSError):
        for _ in range(packets):
            if received.endswith(b"\n") or not (part := connection.recv(4096)):
                break
            received += part
    return received.decode("ascii", errors="replace").strip()


def _send(connections: dict[int, socket.socket], line: str) -> None:
    for connection in connections.values():
        with contextlib.suppress(OSError):  # the other process has died in the meantime
            connection.sendall(f"{line}\n".encode())


def _refusal(count: int, number: int, num_processes: int, present: dict) -> str | None:
    if count != num_processes:
        return f"process {number} was started as one of {count}, but process 0 as one of {num_processes}"
    if not 0 < number < num_processes or number in present:
        return f"two processes of the job have index {number}; give each process its own index"
    return None


def _missing(numbers: list[int], num_processes: int, timeout_secs: float) -> str:
    return (
        f"after {timeout_secs:g} s {len(numbers)} of {num_processes} processes"
        f" {'is' if len(numbers) == 1 else 'are'} missing: index"
        f" {', '.join(map(str, numbers))} (counted from 0); was the command started on every host?"
    )
