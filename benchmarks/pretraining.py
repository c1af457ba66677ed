"""Measures the gain of a small pretraining on real data: span corruption on the datasets' own texts.

    python benchmarks/pretraining.py --workdir runs/pretraining

The corpus consists of the questions and rationales of the train splits. A tiny T5 trains on it for `--steps`
steps. Then a model is trained step by step on each dataset, from that base and from random weights, with
the same vocabulary, seeds and steps. A stopped benchmark resumes when it is started again. It prints a
table, then one JSON line.
"""

import argparse
import json
import pathlib
import statistics
from typing import Any

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.data.train_vocabulary import train_vocabulary
from stepdistill_jax.experiments.sweep import Cell, sweep
from stepdistill_jax.inference.export import export
from stepdistill_jax.models.cpu_speed import keep_pages
from stepdistill_jax.runtime import compile_cache
from stepdistill_jax.tasks import add_span_corruption
from stepdistill_jax.training.loop import train
from stepdistill_jax.versions import version_block

TASK = "texts_of_the_datasets"
LENGTHS = ["INPUT_LENGTH=128", "TARGET_LENGTH=32"]
BASES = {
    "random": 1,
    "pretrained": None,
}  # steps of span corruption; in a single step, the learning rate is near 0
FIGURES = ("loss/label", "loss/rationale", "label_accuracy")


def corpus(folder: pathlib.Path, tasks: list[str], data_dir: pathlib.Path | None) -> int:
    """Writes train.jsonl, validation.jsonl and spiece.model; returns the number of texts."""
    datasets = [open_prepared(task, data_dir) for task in tasks]
    texts: dict[str, list[str]] = {}
    for split in ("train", "validation"):
        rows = [e for d in datasets for e in d.examples(split)]
        texts[split] = [" ".join(filter(None, (e.input, e.rationale))) for e in rows]
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[split]]
        # validation decodes the missing spans, which is slow and of no use here: a few texts are enough
        kept = lines if split == "train" else lines[:: max(1, len(lines) // 200)]
        (folder / f"{split}.jsonl").write_text("".join(kept), encoding="utf-8")
    labels = [e.label for d in datasets for e in d.examples("train") if e.label]
    vocabulary = folder / "spiece.model"
    if not vocabulary.exists():  # the vocabulary is also trained on the texts of the main runs
        train_vocabulary([*texts["train"], *labels, "predict: ", "explain: "], vocabulary)
    return len(texts["train"])


def base(args: argparse.Namespace, name: str, steps: int) -> dict[str, Any]:
    """Trains by span corruption, exports to WORKDIR/NAME_base, and returns the validation loss."""
    workdir, exported = args.workdir / name, args.workdir / f"{name}_base"
    config, text = load_config(
        "cqa_cpu_tiny", [f"TASK={TASK}", f"TRAIN_STEPS={steps}", "EVAL_EVERY=1000", *LENGTHS]
    )
    train(config, workdir=workdir, data_dir=args.data_dir, config_text=text)
    if not exported.exists():
        export(workdir, exported, step="last")
    return {"steps": steps, "loss": round(last_validation(workdir)["loss/label"], 3)}


def main_job(args: argparse.Namespace, tasks: list[str]) -> list[Cell]:
    """Returns the main runs: one for each dataset, seed and base."""
    return [
        Cell(
            name,
            1.0,
            seed,
            {"TASK": task},
            *load_config(
                f"{task}_cpu_tiny",
                [
                    f"INIT_FROM={args.workdir / f'{name}_base'}",
                    f"TRAIN_STEPS={args.main_steps}",
                    f"SEED={seed}",
                ],
            ),
        )
        for task in tasks
        for seed in range(args.seeds)
        for name in BASES
    ]


def last_validation(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the values of the last validation, without the prefix `eval/validation/`."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    prefix = "eval/validation/"
    *_, last = (row for row in rows if f"{prefix}loss/label" in row)
    return {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix)}


def main() -> None:
    """Pretrains, trains from both bases, and compares."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/pretraining"))
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument("--tasks", default="cqa,svamp", help="prepared datasets")
    parser.add_argument("--steps", type=int, default=13000, help="steps of pretraining")
    parser.add_argument("--main-steps", type=int, default=300, help="steps of a main run")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds of the main runs")
    args = parser.parse_args()
    keep_pages()
    args.workdir.mkdir(parents=True, exist_ok=True)
    args.workdir = args.workdir.resolve()
    tasks = args.tasks.split(",")
    compile_cache.enable(compile_cache.folder_for(args.workdir / "cell"))
    texts = corpus(args.workdir, tasks, args.data_dir)
    add_span_corruption(
        TASK,
        files={split: args.workdir / f"{split}.jsonl" for split in ("train", "validation")},
        vocabulary=args.workdir / "spiece.model",
        inputs_length=128,
        masks=4,
    )
    bases = {name: base(args, name, steps or args.steps) for name, steps in BASES.items()}
    cells = main_job(args, tasks)
    done = sweep(cells, workdir=args.workdir / "main", data_dir=args.data_dir, split=None)
    if done["failed_cells"]:
        raise SystemExit(1)
    found: dict[str, dict[str, Any]] = {}
    print(f"| dataset | base | {' | '.join(FIGURES)} |\n|---|---|{'---|' * len(FIGURES)}")
    for task in tasks:
        for name in bases:
            runs = [
                last_validation(args.workdir / "main" / c.path)
                for c in cells
                if (c.arm, c.config.task) == (name, task)
            ]
            means = {k: round(statistics.mean(run[k] for run in runs), 3) for k in FIGURES}
            found[f"{task} {name}"] = means | {"runs": [[run[k] for k in FIGURES] for run in runs]}
            print(f"| {task} | {name} | {' | '.join(f'{v:.3f}' for v in means.values())} |")
    print(
        json.dumps(
            {
                "benchmark": "pretraining",
                "texts": texts,
                "bases": bases,
                "main_steps": args.main_steps,
                "seeds": args.seeds,
                "found": found,
                **version_block(),
            }
        )
    )


if __name__ == "__main__":
    main()
