"""`stepdistill predict`: labels and scores for the rows of a JSON-lines file."""

import argparse
import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator
from typing import Any

from stepdistill_jax.commands.arguments import (
    add_data_arguments,
    add_decode_arguments,
    decode_options_of,
)
from stepdistill_jax.commands.terminal import say
from stepdistill_jax.errors import EXIT_STOPPED, InputError

STOP_CODES: dict[int, int] = {signal.SIGTERM: EXIT_STOPPED, signal.SIGINT: 130}
STOP_SECS = 2.0  # for Python to unwind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `predict`."""
    parser.add_argument("path", metavar="WORKDIR_OR_MODEL", help="what to predict with")
    parser.add_argument(
        "input",
        metavar="INPUT.jsonl",
        help='rows {"input": ...}, and if known "id", "label", "choices"',
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT.jsonl",
        help='rows {"id", "label", "score"}, with --choices "probability" and "choices", too; a stopped'
        " run goes on where it was",
    )
    parser.add_argument(
        "--task", metavar="NAME", help="prepared dataset that says how labels are compared"
    )
    add_decode_arguments(parser, prompts=True)
    parser.add_argument(
        "--with-rationale", action="store_true", help="also decode a rationale, for looking"
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a bad row: stop, or leave it out and list it in OUTPUT.skipped.jsonl (default: stop)",
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `inference.predict` and prints its summary; of several processes, the first one does."""
    if args.task_module:
        raise InputError(
            "--module: predict imports no SeqIO task; leave it out, labels are compared as the"
            " model's own task says (`evaluate --module` reads a split of such a task)"
        )
    join_and_cache(args.path)
    from stepdistill_jax.inference import predict
    from stepdistill_jax.inference.counts import in_words
    from stepdistill_jax.runtime.distributed import is_first

    with stopped_by_signals():
        result = predict(
            args.path,
            args.input,
            args.output,
            task=args.task,
            with_rationale=args.with_rationale,
            on_error=args.on_error,
            data_dir=args.data_dir,
            **decode_options_of(args),
        )
    if is_first():
        say(f"{args.output}: {in_words(result)}")
    return result


def join_and_cache(path: str) -> None:
    """Joins the other processes, and sets JAX up for what `path` is.

    What is compiled for a workdir is kept beside it.
    """
    from stepdistill_jax.runtime.distributed import join

    join()
    from stepdistill_jax.formats.directory import is_ctranslate2
    from stepdistill_jax.runtime import compile_cache
    from stepdistill_jax.runtime.checkpoints.manager import is_workdir

    if is_ctranslate2(path):  # JAX computes nothing: it must not take an accelerator's memory
        import jax

        jax.config.update("jax_platforms", "cpu")
    if is_workdir(path):  # a model directory may lie anywhere
        compile_cache.enable(compile_cache.beside(path))


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """A SIGTERM leaves with 75, Ctrl-C with 130: what is done is kept, and a second start goes on.

    Python runs a handler only between its own instructions, and a compile or a batch of a large model
    may be minutes without one. So a thread reads the signals, too: it ends the process 2 seconds after
    the first, and at a second one. Nothing is lost by that, as nothing is by a kill.

    With several processes `jax.distributed` catches SIGTERM, and they stop together after a batch.
    """
    import jax

    from stepdistill_jax.runtime.progress import log

    def stop(_number, _frame) -> None:
        log("stopped by SIGTERM; start again to go on")
        raise SystemExit(STOP_CODES[signal.SIGTERM])

    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    threading.Thread(target=_end_when_stuck, args=(reads,), daemon=True).start()
    handler_before = signal.signal(signal.SIGTERM, stop)
    fd_before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        signal.signal(signal.SIGTERM, handler_before)
        os.close(writes)


def _end_when_stuck(reads: int) -> None:
    """Reads the numbers of signals as they come; the other end is closed when the command is left."""
    from stepdistill_jax.runtime.progress import log

    first = None
    with os.fdopen(reads, "rb", buffering=0) as told:
        while data := told.read(1):
            if data[0] not in STOP_CODES:
                continue
            if first is not None:
                os._exit(128 + data[0])
            first = data[0]
            if not select.select([told], [], [], STOP_SECS)[0]:
                log(
                    f"stopped {STOP_SECS:.0f} s after {signal.Signals(first).name}; start again to go on"
                )
                os._exit(STOP_CODES[first])
