"""`stepdistill demo`: trains three small models from scratch, and compares them."""

import argparse

ARMS = ("label_only", "copy_control", "step_by_step")
DEFAULT_WORKDIR = "runs/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `demo`."""
    from stepdistill_jax.commands.arguments import add_data_dir_argument

    parser.add_argument(
        "--workdir",
        default=DEFAULT_WORKDIR,
        help=f"folder for the runs of the demo (default: {DEFAULT_WORKDIR})",
    )
    add_data_dir_argument(parser)


def run(args: argparse.Namespace) -> dict:
    """Prepares the data, shows two rows, trains three arms, and prints a table of results."""
    from stepdistill_jax.commands import inspect as inspect_command
    from stepdistill_jax.commands.arguments import require_seqio
    from stepdistill_jax.commands.gin_config import load_config
    from stepdistill_jax.commands.terminal import console
    from stepdistill_jax.data.prepare import ensure_prepared
    from stepdistill_jax.experiments.demo import demo
    from stepdistill_jax.models.cpu_speed import keep_pages
    from stepdistill_jax.training import inspect

    keep_pages()
    require_seqio("demo")
    screen = console()
    arms = {name: load_config(f"demo_{name}") for name in ARMS}
    config = arms["step_by_step"][0]
    ensure_prepared(config.task, args.data_dir)
    screen.rule("Two examples as the model sees them")
    inspect_command.show(inspect(config, data_dir=args.data_dir, rows=2), screen, brief=True)
    screen.rule("Training")
    summary = demo(arms, workdir=args.workdir, data_dir=args.data_dir)
    screen.rule("Same labels, same recipe, same steps")
    _show(summary, screen)
    return summary


def _show(summary: dict, console) -> None:
    from rich.table import Table

    from stepdistill_jax.experiments.demo import device_name

    table = Table(
        caption=f"labels: number of training examples; seconds: time on {device_name()},\n"
        f"with compilation and validation; tokens/row: number of tokens decoded for a label"
    )
    table.add_column("arm")
    for column in ("labels", "steps", "seconds", "test accuracy", "tokens/row"):
        table.add_column(column, justify="right")
    for arm in summary["arms"]:
        table.add_row(
            arm["arm"],
            str(arm["labels"]),
            str(arm["steps"]),
            "done before" if arm["seconds"] is None else f"{arm['seconds']:.0f}",
            f"{arm['test_accuracy']:.3f}",
            f"{arm['tokens_per_row']:.2f}",
        )
    console.print(table)
    console.print(
        f"Accuracy of always answering the commonest label: {summary['majority_baseline']:.3f}."
        " All arms decode the same number of tokens: a label costs the same to serve.\n"
        "The arms share labels, recipe and steps. With another recipe and several times the steps,"
        " label-only training can learn this task, too."
    )
    console.print(f"Curves: {summary['plot']}\n")
    for row in summary["rows"]:
        console.print(f"  [bold]{row['input']}[/bold]")
        console.print(f"    label {row['label']} (gold {row['gold']}); why: {row['rationale']}")
    console.print(
        "\nNext, on your own rows (JSON lines with input, label and rationale):\n"
        "  stepdistill prepare jsonl --source my_rows.jsonl --name mine\n"
        "  stepdistill inspect demo_step_by_step --set TASK=mine --set INPUT_LENGTH=128 --set TARGET_LENGTH=64\n"
        "  stepdistill train demo_step_by_step --workdir runs/mine --set TASK=mine"
        " --set INPUT_LENGTH=128 --set TARGET_LENGTH=64    # longer texts are truncated\n"
        "  stepdistill evaluate runs/mine --task mine --split test\n"
        "  stepdistill predict runs/mine questions.jsonl answers.jsonl\n"
        "  stepdistill export runs/mine my_model",
        highlight=False,
        soft_wrap=True,  # lines to copy
    )
