"""The floors below `commands/` know parameters; flags are named there alone."""

import ast
import pathlib
import re

import pytest

import stepdistill_jax

PACKAGE = pathlib.Path(stepdistill_jax.__file__).parent
FLAG = re.compile(r"(?<![\w-])--(?!xla_)[a-z][a-z_-]+")
WHOLE_COMMAND = re.compile(r"`(stepdistill|tensorboard|tfds|hf) [^`]*`")  # that a reader is to run
# arguments of git, and of the program that a stub server is
OF_OTHERS = {"--error-unmatch", "--always", "--dirty", "--port"}


def flags(source: str) -> list[str]:
    """Flags in the strings of some code, docstrings among them."""
    tree = ast.parse(source)
    texts, inner = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [n for n in node.values if isinstance(n, ast.Constant)]
            inner.update(map(id, parts))
            texts.append("{}".join(part.value for part in parts))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            texts.append(node.value)
    return [
        found
        for text in texts
        if text not in OF_OTHERS
        for found in FLAG.findall(WHOLE_COMMAND.sub("", text))
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise E(f'--step {n}: none', x)", ["--step"]),
        ("raise E(f'no step {n}' f' (give --step)')", ["--step"]),
        ("'''A doc of `--step`.'''", ["--step"]),
        ("f'run `stepdistill predict {x} --step 3`'", []),
        ("f'run `stepdistill predict {x} --step 3`, or --last'", ["--last"]),
        ("'XLA_FLAGS=--xla_dump_to=/tmp'", []),
        ("a--b  # --step", []),
        ("'x--y'", []),
    ],
)
def test_the_rule_finds_flags_in_strings(source, found):
    assert flags(source) == found


def test_no_floor_below_commands_names_a_flag():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith("commands/") and (named := flags(path.read_text())):
            found[name] = named
    assert found == {}
