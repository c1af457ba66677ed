"""Runs N processes of one command on this host: the common part of `local.sh` and `multi_gpu.sh`.

It uses only the standard library, since it runs under the system's `python3`, in any environment. Each
process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID and a STEPDISTILL_JOB_TOKEN, which is
new at each start. `stepdistill` reads these variables before it uses JAX.
"""

import argparse
import contextlib
import ctypes
import os
import queue
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

STOPPED = 75  # exit status after a signal and a clean save
LOST = 128 + signal.SIGABRT  # JAX's coordination service ends a lost process's peers by it
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # each is forwarded as SIGTERM
# variables that the scripts set, shown by --dry-run
SHOWN = ("JAX_PLATFORMS", "XLA_FLAGS", "EXPECT_DEVICES")


def main():
    """Starts the processes, restarts all of them if one is lost, and returns the exit status."""
    args = parse()
    if args.dry_run:
        for process in range(args.n):
            added = {k: os.environ[k] for k in SHOWN if k in os.environ}
            added |= variables(process, args, "PORT")
            shown = [f"{k}={shlex.quote(v)}" for k, v in added.items()]
            print(" ".join(shown), shlex.join(args.command))
        return 0
    for attempt in range(args.max_restarts + 1):
        group = Group(args)
        code, line = verdict(group.run(), group.signalled)
        again = code == LOST and not group.signalled
        left = args.max_restarts - attempt
        if again and left:
            line += f"; starting again, {left} left"
        elif again:
            line += "; start the same command again to resume"
        if line:
            say(line)
        if not (again and left):
            break
    return code


def parse():
    """Parses the flags; users read about them in the scripts' `--help`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-n", type=int, required=True)
    parser.add_argument("--gpus", action="store_true", help="process K sees only the K-th GPU")
    parser.add_argument("--max-restarts", type=int, default=2)
    parser.add_argument("--grace", type=float, default=5, help="seconds")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("command", nargs="+")
    return parser.parse_args()


def variables(process, args, port):
    """Returns the variables that `process` has in addition to our environment."""
    added = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(args.n),
        "JAX_PROCESS_ID": str(process),
    }
    return added | ({"JAX_LOCAL_DEVICE_IDS": str(process)} if args.gpus else {})


class Group:
    """The processes of one attempt."""

    def __init__(self, args):
        self.grace = args.grace
        self.signalled = False
        self.ends = queue.Queue()  # (process, exit status), in the order of their ends
        port, token = free_port(), {"STEPDISTILL_JOB_TOKEN": secrets.token_hex(16)}
        self.processes, self.threads = [], []
        # blocks signals until all processes have started and can be notified
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        for k in range(args.n):
            try:
                environment = token | os.environ | variables(k, args, port)
                process = start(args.command, environment, k, mask)
            except OSError as error:
                self._kill()
                say(f"error: cannot start {args.command[0]!r}: {error.strerror}")
                raise SystemExit(2) from None
            self.processes.append(process)
            for stream in filter(None, (process.stdout, process.stderr)):
                self._thread(relay, stream, f"[{k}] ".encode())
            self._thread(lambda k=k, p=process: self.ends.put((k, shell_code(p.wait()))))
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # nohup
                signal.signal(number, self._forward)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _thread(self, target, *args):
        self.threads.append(threading.Thread(target=target, args=args, daemon=True))
        self.threads[-1].start()

    def run(self):
        """Waits for all; returns [(process, exit status, whether we had stopped it)], in order of ending."""
        ended, deadline, stopped = [], None, False
        while len(ended) < len(self.processes):
            try:
                wait = None if deadline is None else max(0, deadline - time.monotonic())
                process, code = self.ends.get(timeout=wait)
                ended.append((process, code, stopped))
                if deadline is None and code not in (0, STOPPED):
                    deadline = time.monotonic() + self.grace
            except queue.Empty:
                (self._kill if stopped else self._terminate)()
                stopped, deadline = True, time.monotonic() + self.grace
        self._kill()  # children that a process left behind
        for thread in self.threads:
            thread.join(timeout=2)
        return ended

    def _forward(self, *_):
        """Forwards the first signal, so that all save and exit; kills all at the second."""
        (self._kill if self.signalled else self._terminate)()
        self.signalled = True

    def _terminate(self):
        for process in self.processes:
            process.send_signal(signal.SIGTERM)  # does nothing once it has ended

    def _kill(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # also its children, which share its session


def start(command, environment, process, mask):
    """Starts a process in its own session, so that Ctrl-C reaches it only through us.

    Process 0 writes to our standard output.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def in_child():
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if libc:  # PR_SET_PDEATHSIG: even `kill -9` of the launcher leaves no orphans
            libc.prctl(1, signal.SIGTERM)

    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if process == 0 else subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=in_child,
    )


def relay(stream, prefix):
    """Copies lines to standard error, each after its process number; keeps reading if nobody listens."""
    for line in stream:
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), prefix + line.rstrip(b"\n") + b"\n")


def verdict(ends, signalled):
    """Returns the job's exit status, and a line that explains a status other than 0."""
    failed = [(k, code) for k, code, stopped in ends if code not in (0, STOPPED) and not stopped]
    if not failed:  # we stop processes only after one has failed
        stopped = any(code == STOPPED for _, code, _ in ends)
        return (STOPPED, "stopped; the same command resumes") if stopped else (0, "")
    # the process that failed first: a peer's loss ends a process by SIGABRT, sometimes with status 1, never
    # by another signal
    process, code = min(failed, key=lambda end: (end[1] == LOST, not signal_name(end[1])))
    by = signal_name(code)
    if not by:
        same = sorted(k for k, c in failed if c == code)
        stopped = any(stopped for _, _, stopped in ends)
        line = f"process {', '.join(map(str, same))} failed with exit status {code}"
        return code, line + ("; ended the others" if stopped else "")
    if signalled:
        return code, f"process {process} ended by {by} after the signal, without a save"
    line = f"a peer process was lost: process {process} ended first, by {by}"
    if code == LOST:
        line += " (JAX does that when another process died or hangs: see that process's last lines)"
    return LOST, line


def signal_name(code):
    """Returns `SIGKILL` for 137; an empty text if the exit status does not come from a signal."""
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return ""


def shell_code(returncode):
    """Returns a return code as a shell reports it: 137 for -9."""
    return returncode if returncode >= 0 else 128 - returncode


def free_port():
    """Returns a TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def say(line):
    """Prints one line of the launcher on standard error."""
    with contextlib.suppress(OSError):
        print(f"launch: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
