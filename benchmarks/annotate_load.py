"""Measures rows per second and memory of `annotate` with 64 concurrent requests.

The teacher is a server in its own process that answers after `--delay` seconds, so the numbers measure only
our own work: prompts, HTTP, parsing, cache and output. The peer is the bare `openai` client with the same
number of concurrent requests.
"""

import argparse
import asyncio
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

SERVER = """
import sys, threading
from stepdistill_jax.teacher.stub_server import Reply, StubServer, by_rule
delay = float(sys.argv[1])
with StubServer(lambda request: Reply(by_rule(request).text, delay=delay)).serve() as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""
MIB = 2**20


def main() -> None:
    """Runs `annotate` and the peer, and prints a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument(
        "--delay", type=float, default=0.05, help="seconds until the server answers"
    )
    parser.add_argument("--json", action="store_true", help="end the output with a JSON object")
    parser.add_argument("--worker", choices=("ours", "openai"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work = {"ours": ours, "openai": peer}[args.worker]
        print(json.dumps(measured(work, args)))
        return
    environment = os.environ | {"OPENAI_API_KEY": "unused"}
    command = [sys.executable, "-c", SERVER, str(args.delay)]
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        url = server.stdout.readline().strip()
        write_questions(pathlib.Path(folder) / "in.jsonl", args.rows)
        results = {}
        for name in ("ours", "openai"):
            argv = [*sys.argv[1:], "--worker", name, "--url", url, "--folder", folder]
            done = subprocess.run(
                [sys.executable, __file__, *argv],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[name] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name:<8}{results[name]['rows_per_second']:>10.1f} rows/s"
                f"{results[name]['rows_per_cpu_second']:>10.1f} rows/s of CPU time"
                f"{results[name]['peak_memory_mib']:>10.0f} MiB peak"
            )
        server.stdin.close()
    ratio = results["ours"]["rows_per_second"] / results["openai"]["rows_per_second"]
    print(f"at most {args.concurrency / args.delay:.0f} rows/s at {args.delay:g} s per answer")
    if args.json:
        peers = {"openai": results["openai"]}
        print(
            json.dumps(
                {
                    "ours": results["ours"],
                    "peers": peers,
                    "ratio": {"openai": ratio},
                    "threads": len(os.sched_getaffinity(0)),
                    "device": "cpu",
                }
            )
        )


def write_questions(path: pathlib.Path, count: int) -> None:
    """Writes multiple-choice questions that are as long as CQA's."""
    with open(path, "w") as f:
        for i in range(count):
            question = (
                f"Where would somebody who has {i} parcels look for a place to keep them dry?"
            )
            choices = ["shed", "river", "roof", "street", "garden"]
            f.write(json.dumps({"input": question, "label": "shed", "choices": choices}) + "\n")


def measured(work: Any, args: argparse.Namespace) -> dict[str, float]:
    """Returns rows per second, rows per second of CPU time, and peak resident memory."""
    start = time.perf_counter()
    work(args)
    seconds = time.perf_counter() - start
    busy = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "rows_per_second": args.rows / seconds,
        "rows_per_cpu_second": args.rows / busy,
        "peak_memory_mib": peak / MIB,
    }


def ours(args: argparse.Namespace) -> None:
    """Runs `annotate` with CQA's prompt."""
    from stepdistill_jax.teacher import annotate

    result = annotate(
        args.folder / "in.jsonl",
        args.folder / "out.jsonl",
        task="cqa",
        model="stub",
        base_url=args.url,
        concurrency=args.concurrency,
    )
    if result["with_rationale"] != args.rows:
        raise RuntimeError(f"{args.rows - result['with_rationale']} rows have no rationale")


def peer(args: argparse.Namespace) -> None:
    """Runs only the client on the same prompts; discards the answers."""
    import openai

    from stepdistill_jax.teacher.prompts import load_prompter
    from stepdistill_jax.teacher.questions import read_questions

    prompter = load_prompter("cqa")
    prompts = (prompter.prompt(row) for row in read_questions(args.folder / "in.jsonl"))

    async def go() -> None:
        async with openai.AsyncOpenAI(base_url=args.url) as client:

            async def worker() -> None:
                for prompt in prompts:
                    await client.chat.completions.create(
                        model="stub", messages=[{"role": "user", "content": prompt}]
                    )

            await asyncio.gather(*(worker() for _ in range(args.concurrency)))

    asyncio.run(go())


if __name__ == "__main__":
    main()
