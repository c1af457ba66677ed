"""Measures the warm latency of one row: our engines, `generate`, and `stepdistill serve` under load.

    python benchmarks/latency.py --task cqa --size small --vocab-size 32128 --json
    python benchmarks/latency.py --rates 10 20 30 --seconds 60 --engines ctranslate2_int8 --json

All use the same random weights (benchmarks/models.py) and the prompts of a split, and turn text into text.
First each engine runs alone, in its own process (benchmarks/apart.py), with the same tokenizer and batches
of one row. The first round compiles and does not count. The float32 labels must be equal.

Then `stepdistill serve`, in its own process on the same cores, answers over HTTP: first one client that
waits for each answer (rate "alone"), then clients that arrive at random times with a given rate, whether
or not the server keeps up (a Poisson process). Their latency counts from the time at which the client was
due: counting from the time of sending would hide the wait for earlier requests. `refused` counts the
requests that a full queue rejected. This process is the client, and shares the cores with the server.
"""

import argparse
import asyncio
import contextlib
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import timing
from apart import TORCH, Apart

ENGINES = ("jax", "ctranslate2", "ctranslate2_int8")
START_SECS = 600  # limit for a server to compile its programs
PERCENTILES = (50, 95, 99)

Ask = Callable[[str], str]  # input of a row -> its label


class Table(list):
    """A list of dicts with the same keys, which are the columns when it is printed."""

    def __str__(self) -> str:
        rows = [list(self[0]), *([f"{value}" for value in row.values()] for row in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.rjust, row, widths)) for row in rows)
        return "".join(f"\n  {line}" for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="test", help="split of the dataset")
    parser.add_argument("--size", default="small", help="size of T5 v1.1: tiny, small, base, ...")
    parser.add_argument(
        "--vocab-size", type=int, help="rows of the embedding; default: the vocabulary's size"
    )
    parser.add_argument("--rows", type=int, default=50, help="largest number of prompts")
    parser.add_argument(
        "--input-length",
        type=int,
        default=128,
        help="largest number of tokens in a prompt; longer prompts are truncated",
    )
    parser.add_argument(
        "--max-decode-len", type=int, default=8, help="largest number of tokens in a label"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights and of the arrivals"
    )
    parser.add_argument(
        "--engines", nargs="*", choices=ENGINES, default=ENGINES[:2], help="engines of the server"
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[5.0, 10.0, 20.0, 40.0],
        help="requests per second",
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds at each rate")
    parser.add_argument("--batch-size", type=int, default=16, help="largest batch of the server")
    parser.add_argument("--max-wait-ms", type=float, default=5.0, help="flag of the server")
    parser.add_argument("--max-queue", type=int, default=64, help="flag of the server")


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns percentiles of latencies, in milliseconds."""
    ordered = sorted(seconds)
    return {
        f"p{p}_ms": round(1000 * ordered[-(-p * len(ordered) // 100) - 1], 2) for p in PERCENTILES
    }


def our_engine(directory: pathlib.Path, args: argparse.Namespace) -> Ask:
    """Returns a function that answers one row like `serve`, without HTTP."""
    from stepdistill_jax.inference.engines import open_engine
    from stepdistill_jax.inference.options import DecodeOptions
    from stepdistill_jax.inference.prompting import prompting_for
    from stepdistill_jax.serving.answerer import Answerer

    engine = open_engine(directory, DecodeOptions(batch_size=1))
    answerer = Answerer(engine, prompting_for(engine))

    def ask(text: str) -> str:
        return answerer.answers([answerer.question({"input": text}, 1)])[0]["label"]

    return ask


def peer(directory: pathlib.Path, args: argparse.Namespace) -> Ask:
    """Returns a function that answers one row with transformers."""
    from stepdistill_jax.formats.directory import read_model_files
    from stepdistill_jax.inference.prompting import encode_input

    torch = timing.peer_module("torch", args.threads)
    transformers = timing.peer_module("transformers")
    transformers.logging.set_verbosity_error()
    vocabulary = read_model_files(directory).vocabulary
    model = transformers.T5ForConditionalGeneration.from_pretrained(directory).eval()
    # transformers 5 ties the two by default, which would be another model
    assert model.lm_head.weight is not model.shared.weight

    def ask(text: str) -> str:
        ids, _ = encode_input(vocabulary, "predict: " + text, args.input_length)
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            outputs = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                num_beams=1,
                max_new_tokens=args.max_decode_len,
                # transformers 5 makes a cache with as many layers as the encoder
                use_cache=model.config.num_decoder_layers <= model.config.num_layers,
            )
        return vocabulary.decode(outputs[0, 1:].tolist())

    return ask


class Asked:
    """A contender that answers row by row; `make` is one of the functions above."""

    def __init__(self, make: Callable[..., Ask], texts: list[str], *args: Any):
        self._ask, self._texts = make(*args), texts
        self._latencies: list[float] = []

    def answers(self) -> dict[str, str]:
        return {text: self._ask(text) for text in self._texts}

    def latencies(self) -> list[float]:
        """Returns the seconds for each row, in all rounds except the warm-up."""
        return self._latencies

    def contender(self, number: int) -> Callable[[], int]:
        def work() -> int:
            for text in self._texts:
                began = time.perf_counter()
                self._ask(text)
                if number:
                    self._latencies.append(time.perf_counter() - began)
            return len(self._texts)

        return work


@contextlib.contextmanager
def server(directory: pathlib.Path, args: argparse.Namespace) -> Iterator[str]:
    """Yields the address of a warm `stepdistill serve`, which must end without an error."""
    options = ("batch_size", "max_wait_ms", "max_queue")
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in options]
    process = subprocess.Popen(
        [sys.executable, "-m", "stepdistill_jax", "serve", directory, "--port=0", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr
        lines, url = [], None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving at (http://\S+);", line):
                url = found[1]
                break
        assert url, "".join(lines)
        # keep reading, so that the pipe does not fill up
        threading.Thread(target=lambda: sys.stderr.writelines(process.stderr), daemon=True).start()
        wait_until_ready(url, process)
        yield url
        process.terminate()
        assert process.wait(60) == 0, "serve failed when it was stopped"
    finally:
        process.kill()
        process.wait()


def wait_until_ready(url: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + START_SECS
    while time.monotonic() < end:
        assert process.poll() is None, "serve has ended"
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/ready"):
            return
        time.sleep(0.05)
    raise TimeoutError(f"serve was not ready after {START_SECS} s")


class Client:
    """Reuses connections to a server, and checks the answers that come back."""

    def __init__(self, url: str, labels: dict[str, str]):
        """`labels` are the expected labels by input."""
        self._host, port = url.removeprefix("http://").split(":")
        self._port, self._labels = int(port), labels
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.seconds: list[float] = []
        self.refused = self.wrong = 0

    async def ask(self, text: str, due: float) -> None:
        """Sends one row that was due at the time `due` (by `time.perf_counter`)."""
        body = json.dumps({"input": text}).encode()
        pair = self._idle.pop() if self._idle else None
        reader, writer = pair or await asyncio.open_connection(self._host, self._port)
        head = (
            f"POST /predict HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer_head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", answer_head)
        assert length
        answer = json.loads(await reader.readexactly(int(length[1])))
        status = int(answer_head.split()[1])
        if status == 200:
            self.seconds.append(time.perf_counter() - due)
            self.wrong += answer["label"] != self._labels[text]
        else:
            assert status == 503, answer
            self.refused += 1
        self._idle.append((reader, writer))

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def alone(client: Client, texts: list[str], seconds: float) -> int:
    """Runs one client that waits for each answer; returns the number of requests."""
    began, number = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        await client.ask(texts[number % len(texts)], time.perf_counter())
        number += 1
    client.close()
    return number


async def open_loop(
    client: Client, texts: list[str], rate: float, seconds: float, seed: int
) -> int:
    """Runs clients that arrive at random times, `rate` per second; returns the number of requests."""
    arrivals, now, tasks = random.Random(seed), 0.0, []
    began = time.perf_counter()
    while (now := now + arrivals.expovariate(rate)) < seconds or not tasks:
        await asyncio.sleep(max(0.0, began + now - time.perf_counter()))
        tasks.append(asyncio.create_task(client.ask(texts[len(tasks) % len(texts)], began + now)))
    await asyncio.gather(*tasks)
    client.close()
    return len(tasks)


def mean_batch(url: str, before: tuple[float, float]) -> tuple[float, tuple[float, float]]:
    """Returns the mean number of rows per batch since `before`, and the current (rows, batches)."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    rows, batches = (
        float(re.search(rf"^stepdistill_batch_rows_{name} (\S+)$", text, re.M)[1])
        for name in ("sum", "count")
    )
    return round((rows - before[0]) / max(batches - before[1], 1.0), 2), (rows, batches)


def over_http(
    directory: pathlib.Path, name: str, args: argparse.Namespace, labels: dict[str, str]
) -> Table:
    """Returns a table with a row for the single client and a row for each rate."""
    texts, table = list(labels), Table()
    with server(directory, args) as url:
        _, counts = mean_batch(url, (0.0, 0.0))
        for rate in (None, *args.rates):
            client = Client(url, labels)
            if rate is None:
                requests = alone(client, texts, args.seconds)
            else:
                requests = open_loop(client, texts, rate, args.seconds, args.seed)
            began = time.perf_counter()
            count = asyncio.run(requests)
            wall = time.perf_counter() - began
            assert client.seconds, "every request was refused: use lower --rates"
            if not name.endswith("int8"):
                assert client.wrong == 0, f"{client.wrong} labels differ from this process's own"
            batch, counts = mean_batch(url, counts)
            table.append(
                {
                    "engine": name,
                    "rate": rate or "alone",
                    "requests": count,
                    "answered_per_second": round(len(client.seconds) / wall, 2),
                    "refused": client.refused,
                    **percentiles(client.seconds),
                    "rows_per_batch": batch,
                }
            )
            print(f"{name} at {rate or 'one'}: {table[-1]}", file=sys.stderr)
    return table


def main() -> None:
    args = timing.start(__doc__.splitlines()[0], add_arguments, rounds=3)
    timing.peer_module("torch")
    timing.peer_module("ctranslate2")
    timing.peer_module("uvicorn")
    from models import save_random_model

    from stepdistill_jax.data.prepare import ensure_prepared
    from stepdistill_jax.data.vocabulary import load_vocabulary
    from stepdistill_jax.errors import InputError
    from stepdistill_jax.formats.directory import TaskInfo
    from stepdistill_jax.inference import export
    from stepdistill_jax.inference.prompting import BARE_LABEL_LENGTH, BARE_OBJECTIVES

    for flag, value in (("--rates", min(args.rates)), ("--seconds", args.seconds)):
        if not value > 0:
            raise InputError(f"{flag}: expected more than 0, got {value}")
    dataset = ensure_prepared(args.task, args.data_dir)
    lines = dataset.file(args.split).read_text().splitlines()
    texts = list(dict.fromkeys(json.loads(line)["input"] for line in lines))[: args.rows]
    if not texts:
        raise InputError(f"{args.task}: {args.split} has no rows")
    vocabulary = load_vocabulary(dataset.spiece_model)
    with contextlib.ExitStack() as closing:
        scratch = closing.enter_context(tempfile.TemporaryDirectory())
        of = {name: pathlib.Path(scratch) / name for name in ENGINES}
        save_random_model(
            of["jax"],
            vocabulary,
            size=args.size,
            vocab_size=args.vocab_size,
            seed=args.seed,
            task_info=TaskInfo(
                args.task,
                BARE_OBJECTIVES[:1],
                input_length=args.input_length,
                target_length=BARE_LABEL_LENGTH,
                max_decode_len=args.max_decode_len,
            ),
        )
        for name, quantization in (("ctranslate2", "float32"), ("ctranslate2_int8", "int8")):
            export(of["jax"], of[name], format="ctranslate2", quantization=quantization)
        makers = {
            "ours": (our_engine, of["jax"]),
            "transformers": (peer, of["jax"]),
            "ours_ctranslate2": (our_engine, of["ctranslate2"]),
            "ours_ctranslate2_int8": (our_engine, of["ctranslate2_int8"]),
        }
        with contextlib.ExitStack() as ending:
            apart = {
                name: ending.enter_context(
                    Apart(
                        Asked,
                        *(make, texts, directory, args),
                        environment=TORCH if name == "transformers" else None,
                    )
                )
                for name, (make, directory) in makers.items()
            }
            answers = {name: one.call("answers") for name, one in apart.items()}
            for name in ("transformers", "ours_ctranslate2"):
                assert answers[name] == answers["ours"], f"{name} answers with different labels"
            rates = timing.alternate({n: one.contender for n, one in apart.items()}, args.rounds)
            latencies = {name: one.call("latencies") for name, one in apart.items()}
        http = Table()
        for name in args.engines:
            http += over_http(of[name], name, args, answers["ours"])
    one_row = Table({"engine": name, **percentiles(found)} for name, found in latencies.items())
    timing.report(
        args,
        rates,
        unit="rows_per_second",
        environments={name: one.environment for name, one in apart.items()},
        prompts=len(texts),
        one_row=one_row,
        **({"http": http} if http else {}),
    )


if __name__ == "__main__":
    timing.run(main)
