"""`stepdistill predict`: labels and scores for the rows of a JSON-lines file."""

import argparse
import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator
from typing import Any

from stepdistill_jax.commands.arguments import add_data_arguments
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
    add_model_arguments(parser)
    add_asking_arguments(parser)
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


def add_asking_arguments(parser: argparse.ArgumentParser) -> None:
    """How a text is asked: also of `serve`."""
    parser.add_argument(
        "--max-decode-len",
        type=int,
        metavar="N",
        help="most tokens of a label (default: what training found enough)",
    )
    parser.add_argument(
        "--prefix",
        metavar="TEXT",
        help="text before each input (default: the model's own; `predict: ` if it names none)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What chooses the model and how it decodes: also of `evaluate`."""
    parser.add_argument(
        "--step",
        default="best",
        metavar="best|last|N",
        help="which checkpoint of a workdir (default: best by validation)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="rows at once, on all devices together (default: 64 for each that has rows of its own)",
    )
    parser.add_argument(
        "--layout",
        default="data",
        metavar="NAME",
        help="how all devices of all processes share the work: `data` (default) gives each the whole"
        " model and rows of its own; `tensor` or `fsdp` cuts a model that one cannot hold",
    )
    parser.add_argument(
        "--num-beams",
        type=int,
        default=1,
        metavar="N",
        help="answers pursued at once by beam search (default: 1, the likeliest token each time)",
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        metavar="X",
        help="with beams: a score is divided by length ** X (default: 1; above 0 favours long"
        " answers)",
    )
    parser.add_argument(
        "--choices",
        metavar="FILE|row|labels",
        help="score each allowed label instead of decoding, so that the answer is always one of them:"
        " a file of labels, each row's `choices`, or the task's labels",
    )
    parser.add_argument(
        "--choices-temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="of the probabilities of choices (default: 1; `evaluate --choices` names a better one)",
    )
    parser.add_argument(
        "--engine",
        choices=("jax", "ctranslate2"),
        help="what decodes (default: ctranslate2 on a directory of `export --format ctranslate2`, else"
        " jax)",
    )
    parser.add_argument(
        "--quantization",
        choices=("int8",),
        help="jax: weights in memory as int8 with a scale for each output, a quarter of the bytes to read"
        " (default: float32); a CTranslate2 directory has that of its export",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `inference.predict` and prints its summary; of several processes, the first one does."""
    if args.module:
        raise InputError(
            "--module: predict imports no SeqIO task; leave it out, labels are compared as the"
            " model's own task says (`evaluate --module` reads a split of such a task)"
        )
    join_and_cache(args.path)
    from stepdistill_jax.inference import predict
    from stepdistill_jax.inference.counts import in_words
    from stepdistill_jax.runtime.distributed import is_process_0

    with stopped_by_signals():
        result = predict(
            args.path,
            args.input,
            args.output,
            task=args.task,
            step=args.step,
            batch_size=args.batch_size,
            layout=args.layout,
            max_decode_len=args.max_decode_len,
            num_beams=args.num_beams,
            length_penalty=args.length_penalty,
            choices=args.choices,
            choices_temperature=args.choices_temperature,
            with_rationale=args.with_rationale,
            prefix=args.prefix,
            on_error=args.on_error,
            engine=args.engine,
            quantization=args.quantization,
            data_dir=args.data_dir,
        )
    if is_process_0():
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
