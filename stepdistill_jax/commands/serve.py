"""`stepdistill serve`: serves labels over HTTP."""

import argparse
from typing import Any

from stepdistill_jax.commands.arguments import add_decode_arguments, decode_options_of
from stepdistill_jax.commands.predict import join_and_cache
from stepdistill_jax.commands.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `serve`."""
    parser.add_argument("path", metavar="WORKDIR_OR_MODEL", help="model to serve")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine only; there is neither TLS nor a"
        " password)",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port; 0 means any free port (default: 8000)"
    )
    parser.add_argument(
        "--max-wait-ms",
        type=float,
        default=5.0,
        metavar="X",
        help="longest time, in ms, that a row waits for other rows to fill a batch (default: 5)",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="largest number of unanswered rows; further rows are refused with status 503 (default: 256)",
    )
    parser.add_argument(
        "--timeout-secs",
        type=float,
        default=30.0,
        metavar="X",
        help="seconds after which a request ends with status 504 (default: 30)",
    )
    parser.add_argument(
        "--grace-secs",
        type=float,
        default=20.0,
        metavar="X",
        help="seconds to answer requests in progress after SIGTERM or Ctrl-C (default: 20)",
    )
    add_decode_arguments(parser, prompts=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serves labels until a signal arrives, then prints how many rows were answered."""
    join_and_cache(args.path)
    from stepdistill_jax.runtime.distributed import end_soon
    from stepdistill_jax.serving import serve

    result = serve(
        args.path,
        host=args.host,
        port=args.port,
        max_wait_ms=args.max_wait_ms,
        max_queue=args.max_queue,
        timeout_secs=args.timeout_secs,
        grace_secs=args.grace_secs,
        **decode_options_of(args),
    )
    say(f"{result['rows']} rows answered, {result['unanswered']} requests unanswered")
    result["stopped"] = result["unanswered"] > 0
    if result.pop("busy"):  # no client waits for that work, so the exit need not, either
        end_soon(1 if result["stopped"] else 0)
    return result
