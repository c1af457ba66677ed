"""Measures rows per second and peak memory of `stepdistill prepare esnli`, on made-up rows.

    python benchmarks/prepare_throughput.py --json

It makes the files of the train split in a temporary folder: sentences of random words, as long as SNLI's, and
teacher texts, a tenth with a defect, 5,500 per file as in the original. Memory is the sum of the resident
sets of the process and its children, read from /proc ten times a second (Linux only); pages that they share
count twice.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROWS = 549_367  # of e-SNLI's train split
TEXTS_PER_FILE = 5_500
LABELS = ("entailment", "neutral", "contradiction")


def make(folder: pathlib.Path, rows: int) -> None:
    """Writes esnli_train.json and its teacher files."""
    draw = random.Random(0)
    letters = "abcdefghijklmnoprstuvw"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (i + 5) for i in range(len(words))]  # roughly the distribution of words in text
    many = iter(draw.choices(words, weights, k=rows * 60))

    def sentence(least: int, most: int) -> str:
        return " ".join(next(many) for _ in range(draw.randint(least, most))).capitalize() + "."

    (folder / "llm").mkdir(parents=True)
    texts: list[str] = []
    with open(folder / "esnli_train.json", "w") as f:
        for i in range(rows):
            premise, hypothesis, label = sentence(8, 20), sentence(4, 11), draw.randrange(3)
            row = {"premise": premise, "hypothesis": hypothesis, "label": label}
            row |= {"explanation_1": sentence(6, 18), "explanation_2": "", "explanation_3": ""}
            f.write(json.dumps(row) + "\n")
            answer = LABELS[label if draw.random() < 0.8 else draw.randrange(3)]
            text = f"{sentence(6, 18)}\nAnswer: {answer}\n\nPremise: A"
            if draw.random() < 0.1:
                text = draw.choice((text[: len(text) // 3], "", f"Answer: {answer}.", text + text))
            texts.append(text)
            if len(texts) == TEXTS_PER_FILE or i == rows - 1:
                name = f"train_CoT_{i // TEXTS_PER_FILE}.json"
                (folder / "llm" / name).write_text(json.dumps(texts))
                texts = []


def resident(pid: int) -> int:
    """Returns the resident bytes of a process and its descendants."""
    try:
        pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
        tasks = list(pathlib.Path(f"/proc/{pid}/task").iterdir())
        children = {int(c) for task in tasks for c in (task / "children").read_text().split()}
    except (OSError, IndexError):  # it has ended in the meantime
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident, children))


def prepare(source: pathlib.Path, data_dir: pathlib.Path) -> tuple[float, int, dict]:
    """Returns (seconds, peak bytes, result) of the command, including its start."""
    began, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "stepdistill_jax", "prepare", "esnli", "--json"]
    command += ["--source", str(source), "--data-dir", str(data_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    output = process.stdout.read()
    if process.returncode:
        sys.exit(f"prepare failed with exit code {process.returncode}")
    return time.perf_counter() - began, peak, json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of train ({ROWS})")
    parser.add_argument("--json", action="store_true", help="end the output with a JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        print(f"making {args.rows} rows", file=sys.stderr)
        make(root / "esnli", args.rows)
        results = {}
        for name in ("ours", "unchanged"):  # the second run finds an up-to-date dataset
            seconds, peak, result = prepare(root / "esnli", root / "data")
            assert sum(split["rows"] for split in result["splits"].values()) == args.rows
            results[name] = {
                "rows_per_second": args.rows / seconds,
                "seconds": seconds,
                "peak_bytes": peak,
            }
            print(
                f"{name}: {args.rows / seconds:.0f} rows/s, {seconds:.0f} s, peak"
                f" {peak / 1e6:.0f} MB of all processes"
            )
    if args.json:
        cores = len(os.sched_getaffinity(0))
        print(json.dumps({**results, "peers": {}, "ratio": {}, "rows": args.rows, "cores": cores}))


if __name__ == "__main__":
    main()
