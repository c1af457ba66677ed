"""Measures the peak memory of tokenising a prepared dataset, with few and with many made-up rows.

    python benchmarks/tokenising_memory.py --json

It makes rows with a rationale and prepares them in a temporary folder. Then another process opens the
task, which tokenises the train split, and reports its peak memory (VmHWM, Linux only). If memory does not
grow with the rows, the ratio of the peaks is 1.
"""

import argparse
import itertools
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import timing

ROWS = (100_000, 1_000_000)
NAME = "made_up"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs=2, type=int, default=ROWS, help="numbers of train rows: few, many"
    )
    parser.add_argument("--json", action="store_true", help="end the output with a JSON object")
    parser.add_argument("--only", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(tokenise(args.only)))
        return
    results = {f"{rows:,} rows": prepared_and_tokenised(rows) for rows in args.rows}
    few, many = (result["peak_bytes"] for result in results.values())
    print("| | peak | store | rows per second |")
    print("|---|---|---|---|")
    for name, r in results.items():
        sizes = [f"{r[key] / 1e6:,.1f} MB" for key in ("peak_bytes", "store_bytes")]
        print(f"| {name} | {' | '.join(sizes)} | {r['rows_per_second']:,.0f} |")
    print(f"\nThe second peak is {many / few:.3f} times the first")
    if args.json:
        facts = {"peak_ratio": many / few, "device": timing.device(), "load": timing.load()}
        print(json.dumps({"rows": results, **facts}))


def prepared_and_tokenised(rows: int) -> dict[str, Any]:
    """Returns the results for one number of rows."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        make(root / "source", rows)
        command = [sys.executable, "-m", "stepdistill_jax", "prepare", "jsonl", "--name", NAME]
        command += ["--source", str(root / "source"), "--data-dir", str(root / "data")]
        subprocess.run(command, stdout=sys.stderr, check=True)
        done = subprocess.run(
            [sys.executable, __file__, "--only", str(root / "data")],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.pop("rows") == rows
    print(f"{rows} rows: {result}", file=sys.stderr, flush=True)
    return result


def make(folder: pathlib.Path, rows: int) -> None:
    """Writes train.jsonl (inputs of about 20 words, targets of 15) and a small validation.jsonl."""
    draw = random.Random(0)
    letters = "abcdefghijklmnoprstuvw"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(20_000)]
    spread = list(
        itertools.accumulate(1 / (i + 5) for i in range(len(words)))
    )  # roughly as in text
    folder.mkdir()
    for split, count in (("train", rows), ("validation", 10)):
        with open(folder / f"{split}.jsonl", "w") as f:
            for i in range(count):
                few = draw.choices(words, cum_weights=spread, k=draw.randint(25, 45))
                cut = len(few) * 4 // 7
                row = {"input": f"{' '.join(few[:cut])} {i}", "label": "yes" if i % 3 else "no"}
                f.write(json.dumps(row | {"rationale": " ".join(few[cut:])}) + "\n")


def tokenise(data_dir: pathlib.Path) -> dict[str, Any]:
    """Tokenises like the first start of a training run."""
    from stepdistill_jax.tasks.load import load_task
    from stepdistill_jax.tasks.supervision import Supervision

    began = time.perf_counter()
    data = load_task(NAME, split="train", supervision=Supervision(), data_dir=data_dir)
    seconds = time.perf_counter() - began
    (store,) = data.stores
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    return {
        "rows": store.num_examples,
        "rows_per_second": store.num_examples / seconds,
        "peak_bytes": peak,
        "store_bytes": sum(path.stat().st_size for path in store.directory.iterdir()),
    }


if __name__ == "__main__":
    timing.run(main)
