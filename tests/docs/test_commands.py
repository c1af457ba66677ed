"""Each command line of README, guide and how-to is one that the program takes, with settings that exist."""

import ast
import functools
import inspect
import pathlib
import re
import shlex

import pytest

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.commands.main import COMMANDS, parser_of
from stepdistill_jax.commands.shipped import find_config
from stepdistill_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md"]
PAGES += [p for room in ("guide", "how-to") for p in sorted((ROOT / "docs" / room).glob("*.md"))]
LINE = re.compile(r"^ *(?:\$ |srun |launch/.* -- )?stepdistill ([^\n]*)$", re.MULTILINE)
PLACEHOLDERS = {"CONFIG", "DIR", "WORKDIR_OR_MODEL"}


def commands_of(page: pathlib.Path) -> list[list[str]]:
    """Arguments of each command line that stands on a line of its own."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    found = [shlex.split(line.partition(" >")[0], comments=True) for line in LINE.findall(text)]
    return [argv for argv in found if argv and argv[0] in COMMANDS and "..." not in argv]


@functools.cache
def parser(command):
    return parser_of(command)[1]


ALL = [(page, argv) for page in PAGES for argv in commands_of(page)]


@pytest.mark.parametrize("page, argv", ALL, ids=[f"{p.stem}-{' '.join(a)}"[:90] for p, a in ALL])
def test_the_program_takes_each_command_of_the_pages(page, argv):
    args = parser(argv[0]).parse_args(argv[1:])
    if getattr(args, "config", None) in (None, *PLACEHOLDERS):
        return
    try:
        find_config(args.config)
    except InputError:  # the reader's own file or dataset, which the test of its page makes
        assert args.config.endswith(".gin") or argv[0] == "inspect", args.config
        return
    shipped = [name for name in args.gin_files if name != "own.gin"]
    needed = ["TASK=any", "INIT_FROM=any"] if args.config == "finetune" else []
    load_config(args.config, [*needed, *args.overrides], shipped, args.gin_bindings)


def test_most_lines_of_the_pages_are_found():
    """A pattern that found nothing would prove nothing."""
    assert len(ALL) > 60
    assert {page.parent.name for page, _ in ALL} >= {"guide", "how-to"}


def test_the_functions_of_the_python_page_take_the_arguments_that_it_gives():
    page = (ROOT / "docs" / "reference" / "python.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    tree = ast.parse(code)
    imports = [s for s in tree.body if isinstance(s, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "page", "exec"), names)
    checked = 0
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        if isinstance(call.func, ast.Name):
            given = {word.arg: None for word in call.keywords}
            inspect.signature(names[call.func.id]).bind(*call.args, **given)
            checked += 1
    assert checked >= 6


def test_the_config_of_the_training_page_loads(tmp_path):
    page = (ROOT / "docs" / "guide" / "training.md").read_text("utf-8")
    (text,) = re.findall(r"`mine\.gin`:\n\n```gin\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.gin").write_text(text)
    config, _ = load_config(tmp_path / "mine.gin")
    assert (config.task, config.train_steps) == ("mine", 3000)
    assert [o.weight for o in config.objectives] == [0.5, 0.5]
