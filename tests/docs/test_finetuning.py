"""docs/guide/finetuning.md: its settings are the config's, its numbers those of the pages that it names."""

import pathlib
import re

import pytest

from stepdistill_jax.commands.gin_config import load_config

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "guide" / "finetuning.md").read_text(encoding="utf-8")


def rows_of(text: str, first: str) -> list[list[str]]:
    """Cells of the table whose head begins with `first`."""
    _, _, rest = text.partition(f"\n{first}")
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_the_settings_are_those_of_the_config():
    config, _ = load_config("finetune", ["TASK=mine", "INIT_FROM=models/t5"])
    said = {row[0]: row[1] for row in rows_of(PAGE, "| setting |")}
    weights = [o.weight for o in config.objectives]
    assert said == {
        "LEARNING_RATE": f"{config.learning_rate:.0e}, AdamW, falling linearly to 0".replace(
            "e-05", "e-5"
        ),
        "TRAIN_STEPS": f"{config.train_steps:,}",
        "BATCH_SIZE": f"{config.batch_size} examples",
        "INPUT_LENGTH, TARGET_LENGTH": f"{config.input_length}, {config.target_length}",
        "EVAL_EVERY": f"{config.eval_every}",
        "DTYPE": config.dtype,
        "loss weights of label and rationale": ", ".join(f"{w:g}" for w in weights),
    }
    assert (config.optimizer.name, config.optimizer.schedule) == ("adamw", "linear")
    assert f"Keep `train.dropout_rate` at {config.dropout_rate}" in " ".join(PAGE.split())


@pytest.mark.parametrize("part", sorted(set(re.findall(r"--gin_file (\S+\.gin)", PAGE))))
def test_a_part_of_the_page_fits_the_config(part):
    load_config("finetune", ["TASK=mine", "INIT_FROM=models/t5"], [part])


def test_the_papers_accuracies_are_those_of_its_page():
    paper = rows_of((DOCS / "lab" / "paper.md").read_text(), "| T5 v1.1 base, all gold labels |")
    by_task = {row[0].split(" (")[0]: (row[1], row[3]) for row in paper}
    here = rows_of(PAGE, "| | labels alone |")
    assert {row[0]: (row[1], row[2]) for row in here} == by_task
    for _, alone, both, difference in here:
        assert difference == f"{float(both) - float(alone):+.2f}"


def test_the_measured_accuracies_are_those_of_their_page():
    measured = (DOCS / "lab" / "experiments.md").read_text()
    found = re.findall(r"\d\.\d{3} ± \d\.\d{3}", "".join(PAGE.partition("## How many")[2]))
    assert len(found) == 2  # the table is on the page of the experiments
    for number in found:
        assert number in measured
