"""`stepdistill predict`: writes labels and scores for the rows in a file."""

import argparse
import contextlib
import signal
from typing import Any

from stepdistill_jax.commands.arguments import (
    add_data_arguments,
    add_decode_arguments,
    add_map_argument,
    decode_options_of,
    parse_map,
)
from stepdistill_jax.commands.terminal import say
from stepdistill_jax.errors import EXIT_STOPPED, InputError

STOP_CODES: dict[int, int] = {signal.SIGTERM: EXIT_STOPPED, signal.SIGINT: 130}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `predict`."""
    parser.add_argument("path", metavar="WORKDIR_OR_MODEL", help="model to predict with")
    parser.add_argument(
        "input",
        metavar="INPUT.jsonl",
        help='file of rows {"input": ...}, which may also have "id", "label" and'
        ' "choices"; a file named .csv or .tsv is read as CSV or TSV',
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT.jsonl",
        help='file to write, with rows {"id", "label", "score"} (--choices adds "probability"'
        ' and "choices"); after a stop, run the same command again to continue',
    )
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="prepared dataset whose metric and labels are used (default: the model's own task)",
    )
    add_decode_arguments(parser, prompts=True)
    add_map_argument(parser, "a pair OURS=YOURS for each field that has another name in your rows")
    parser.add_argument(
        "--with-rationale", action="store_true", help="also decode a rationale, for inspection"
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do at a bad row: stop, or skip it and list it in"
        " OUTPUT.skipped.jsonl (default: stop)",
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `inference.predict`, and prints its summary on process 0."""
    if args.task_module:
        raise InputError(
            "--module: predict imports no SeqIO task; leave the flag out, or pass it to `evaluate` for a split"
            " of a SeqIO task"
        )
    join_and_cache(args.path)
    from stepdistill_jax.inference import predict
    from stepdistill_jax.inference.accuracy import in_words
    from stepdistill_jax.runtime.distributed import is_process_0
    from stepdistill_jax.runtime.on_processes import on_all_processes
    from stepdistill_jax.runtime.stores import existing_folder

    # checked first, so that a mistyped model is reported before errors of the input
    on_all_processes(lambda: existing_folder(args.path))
    with stopped_by_signals():
        result = predict(
            args.path,
            args.input,
            args.output,
            task=args.task,
            with_rationale=args.with_rationale,
            on_error=args.on_error,
            field_map=parse_map(args.field_map),
            data_dir=args.data_dir,
            **decode_options_of(args),
        )
    if is_process_0():
        say(f"{args.output}: {in_words(result)}")
    return result


def join_and_cache(path: str) -> None:
    """Joins the other processes of the job, and configures JAX for the model at `path`.

    For a workdir, the compile cache is a folder next to it.
    """
    from stepdistill_jax.runtime.distributed import join

    join()
    from stepdistill_jax.formats.directory import is_ctranslate2
    from stepdistill_jax.runtime import compile_cache
    from stepdistill_jax.runtime.checkpoints.manager import is_workdir

    if is_ctranslate2(path):  # JAX computes nothing then, and must not take an accelerator's memory
        import jax

        jax.config.update("jax_platforms", "cpu")
    if is_workdir(path):  # nothing is written next to a model directory, which may lie anywhere
        compile_cache.enable(compile_cache.folder_for(path))


def stopped_by_signals() -> contextlib.AbstractContextManager:
    """Returns a context in which signals stop the command: SIGTERM with exit status 75, Ctrl-C with 130.

    Finished rows are kept. With several processes, the context changes nothing, since `jax.distributed`
    handles SIGTERM.
    """
    import jax

    from stepdistill_jax.runtime.signals import UNWIND_SECS, StopSignals, leave

    def stop(name: str) -> None:
        if name == "SIGINT":
            raise KeyboardInterrupt
        leave(name, "stopped")

    if jax.process_count() > 1:
        return contextlib.nullcontext()
    # Python runs no handler during a compile or a batch, which may take minutes; a kill loses nothing
    return StopSignals(stop, codes=STOP_CODES, limit_secs=UNWIND_SECS)
