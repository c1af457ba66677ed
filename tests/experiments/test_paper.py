"""The paper's tables: every cell composes, with the paper's settings; its figures stand beside what is measured."""

import dataclasses
import itertools
import pathlib
import re
import shlex

import pytest

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.commands.main import main
from stepdistill_jax.data.objectives import ARMS
from stepdistill_jax.experiments import paper
from stepdistill_jax.experiments.comparison import compare
from stepdistill_jax.experiments.report import headline
from stepdistill_jax.experiments.results import arm_of, read_runs
from stepdistill_jax.experiments.tables import accuracy_table
from stepdistill_jax.training.config import OptimizerConfig

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "lab" / "paper.md").read_text("utf-8")

# the same with rationales by GPT-NeoX 20B, which are not among the public files
GPT_NEOX = {"esnli": 0.8912, "anli": 0.4815, "cqa": 0.6325, "svamp": 0.6300}

DATASETS = {"esnli": "e-SNLI", "anli": "ANLI", "cqa": "CommonsenseQA", "svamp": "SVAMP"}
SIZES = ("small", "base", "large", "xl", "xxl")
OBJECTIVES = ("label_only", "single_task", "step_by_step", "label_only_llm", "step_by_step_llm")
FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)


def cells():
    """(dataset, size, arm, fraction) of each cell of the table."""
    return list(itertools.product(DATASETS, SIZES, OBJECTIVES, FRACTIONS))


def flags(size, arm, fraction):
    """What follows `paper_DATASET` in the command of a cell, for `train`, `plan` and `inspect`."""
    parts = [f"paper/{size}.gin", f"objectives/{arm}.gin"]
    return [*(x for p in parts for x in ("--gin_file", p)), "--set", f"DATA_FRACTION={fraction}"]


def config_of(task, size, arm, fraction):
    *files, _, setting = flags(size, arm, fraction)
    return load_config(f"paper_{task}", [setting], files[1::2])[0]


@pytest.mark.parametrize("task", DATASETS)
def test_every_cell_composes(task):
    # shares of the data are told apart once for each size and arm, not in all 500 cells
    mine = [c for c in cells() if c[0] == task]
    assert len(mine) == 125
    shares = len(FRACTIONS)
    for i in range(len(mine) // shares):
        _, size, arm, fraction = mine[i * shares + i % shares]
        config = config_of(task, size, arm, fraction)
        assert config.objectives == ARMS[arm]()
        assert (config.task, config.model_size, config.data_fraction) == (task, size, fraction)
        assert config.init_from == f"models/t5-v1_1-{size}"
        assert (config.batch_size, config.train_steps) == (
            (32, 4_000) if size == "xxl" else (64, 10_000)
        )
        assert (config.input_length, config.target_length) == (1024, 256)
        assert (config.learning_rate, config.dtype) == (5e-5, "float32")
        assert config.optimizer == OptimizerConfig(clip_norm=1.0, weight_decay=0.0)


@pytest.mark.parametrize("arm", OBJECTIVES)
def test_every_arm_runs_to_the_letter(arm):
    parts = ["paper/exact.gin", f"objectives/{arm}.gin"]  # in either order
    config, _ = load_config("paper_cqa", ["TASK=cqa_paper"], parts)
    assert load_config("paper_cqa", ["TASK=cqa_paper"], parts[::-1])[0] == config
    assert (config.eval_every, config.checkpoint_every, config.max_decode_len) == (250, 250, 63)
    assert config.optimizer == OptimizerConfig(eps_before_correction=True)
    if arm.startswith("label_only"):  # `--model_type standard` has no prefix
        assert [o.input_template for o in config.objectives] == ["{input}"]
    else:
        assert config.objectives == ARMS[arm]()
    described = [dataclasses.asdict(o) for o in config.objectives]
    assert arm_of(described) == arm  # as `report` calls it


@pytest.mark.parametrize(
    ("name", "task", "arm"),
    [
        ("cqa_base_label_only", "cqa", "label_only"),
        ("cqa_base_step_by_step", "cqa", "step_by_step"),
        ("svamp_base_step_by_step", "svamp", "step_by_step"),
    ],
)
def test_the_short_names_are_cells(name, task, arm):
    assert load_config(name)[0] == config_of(task, "base", arm, 1.0)


def test_the_page_has_the_papers_figures_and_commands_that_compose(capsys):
    for name, title in DATASETS.items():
        figures = [*paper.ACCURACY[name].values(), GPT_NEOX[name]]
        shown = " | ".join(f"{100 * figure:.2f}" for figure in figures)
        assert f"\n| {title} (`paper_{name}`) | {shown} |\n" in PAGE
    assert f"That is {len(cells())} cells" in PAGE
    commands = re.findall(r"^    stepdistill (.*)$", PAGE.replace("\\\n", " "), re.M)
    (exact,) = (shlex.split(line) for line in commands if "paper/exact.gin" in line)
    set_ = [v for f, v in itertools.pairwise(exact) if f == "--set"]
    assert load_config(exact[1], set_, ["paper/exact.gin"])[0].task == "cqa_paper"
    typed = {line.split()[0]: shlex.split(line) for line in commands if "exact" not in line}
    assert set(typed) == {"train", "prepare", "sweep", "report"}
    argv = typed["train"]
    given = {flag: [v for f, v in itertools.pairwise(argv) if f == flag] for flag in argv}
    config, _ = load_config(argv[1], given["--set"], given["--gin_file"])
    assert config == config_of("cqa", "xl", "single_task", 0.25)
    assert main([*typed["sweep"], "--print", "local"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 5 * 4
    assert all("paper/base.gin" in line for line in lines)


def test_runs_like_the_papers_stand_beside_its_figures(
    make_run, delivery_data_dir, monkeypatch, tmp_path
):
    monkeypatch.setattr(paper, "BASE_PARAMETERS", 172864)
    monkeypatch.setitem(paper.ACCURACY, "delivery", paper.ACCURACY["cqa"])
    for arm in ("label_only", "single_task", "rationale_input"):
        make_run(tmp_path / arm, arm, 1.0, 0, [True] * 500)
    make_run(tmp_path / "quarter", "single_task", 0.25, 0, [True] * 500)
    runs, _ = read_runs([tmp_path], split="test", data_dir=delivery_data_dir)
    (comparison,), _ = compare(runs)
    table = accuracy_table(comparison, "accuracy")
    assert table.head[-1] == "paper, T5 base"
    figures = {(row[0], row[1]): row[-1] for row in table.rows}
    assert figures == {
        ("label_only", "1"): "0.6219",
        ("single_task", "0.25"): "",
        ("single_task", "1"): "0.6137",
        ("rationale_input", "1"): "",
    }
    (said,) = [
        sentence
        for sentence in headline(comparison)
        if "a teacher must write this for test rows" in sentence
    ]
    assert said.startswith(
        "In addition to the input, rationale_input reads each row's rationale, so a teacher"
    )
