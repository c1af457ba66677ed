"""Gin files and `--set` that are broken or hostile: one line that names file and line or the flag, exit 2.

tests/bad_inputs/configs holds them: whole files (files.tsv) and values (sets.tsv). What is large is made here.
"""

import collections
import pathlib
import sys
import time
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.commands.main import main
from stepdistill_jax.errors import InputError

CORPUS = pathlib.Path(__file__).parent.parent / "bad_inputs" / "configs"
# every number of a run bound, so that each can be set
EVERYTHING = """\
include "demo_step_by_step.gin"
train.dropout_rate = 0.1
train.watchdog_medians = 20.0
train.watchdog_min_secs = 600.0
train.spike_factor = 0.0
train.grace_secs = 0.0
train.max_consecutive_nonfinite = 5
optimizer.warmup_steps = 0
optimizer.b1 = 0.9
optimizer.b2 = 0.999
optimizer.eps = 1e-8
optimizer.weight_decay = 0.0
optimizer.clip_norm = 1.0
step_by_step.label_weight = 1.0
"""
SECONDS = 20  # of one refusal, on a busy machine


def table(name: str, columns: int) -> list[list[str]]:
    """Rows of a table of the corpus, without its first line."""
    rows = [line.split("\t") for line in (CORPUS / name).read_text("utf-8").splitlines()[1:]]
    assert all(len(row) == columns for row in rows), name
    return rows


def one_of_each_kind(rows: list[list[str]]) -> list:
    """The first row of each kind of refusal, by the words of its line; the others are slow."""
    seen, params = set(), []
    for row in rows:
        kind = " ".join(filter(str.isalpha, row[-1].split())) or row[-1]
        params.append(pytest.param(*row, marks=[pytest.mark.slow] if kind in seen else []))
        seen.add(kind)
    return params


@pytest.fixture
def refused(tmp_path, capsys, printed):
    """`refused(config, wanted, *flags)`: the one line of `train`, which made no workdir."""

    def refused(config, wanted: str, *flags: str) -> str:
        workdir, start = tmp_path / "run", time.monotonic()
        with warnings.catch_warnings(record=True) as recorded:
            code = main(["train", str(config), "--workdir", str(workdir), *flags])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert err.count("\n") == 1 and err.startswith("stepdistill: error: "), err
        assert wanted in err and out == "" and not printed(recorded)
        assert len(err) < 3000 and time.monotonic() - start < SECONDS
        assert not workdir.exists()
        return err

    return refused


@pytest.fixture
def everything(tmp_path) -> pathlib.Path:
    path = tmp_path / "everything.gin"
    path.write_text(EVERYTHING)
    return path


@pytest.mark.parametrize("file, wanted", one_of_each_kind(table("files.tsv", 2)))
def test_a_bad_config_is_refused(refused, file, wanted):
    assert ".gin" in refused(CORPUS / file, wanted)


def test_every_config_of_the_corpus_is_in_the_table():
    listed = {file for file, _ in table("files.tsv", 2)}
    assert {p.name for p in CORPUS.iterdir()} == listed | {"files.tsv", "sets.tsv"}


@pytest.mark.parametrize("name, values, wanted", one_of_each_kind(table("sets.tsv", 3)))
def test_a_bad_value_is_refused_by_name_and_range(refused, everything, name, values, wanted):
    for value in values.split():
        line = refused(everything, wanted, "--set", f"{name}={value}")
        assert f"--set {name}=" in line


def test_everything_that_is_bound_is_good(everything):
    assert load_config(everything)[0].watchdog_medians == 20


@pytest.mark.parametrize(
    "value", ["[" * 5000, "(" * 5000, "%" * 5000, "@" + "a/" * 2000 + "b()", "9" * 5000]
)
def test_a_long_or_deep_value_is_refused(refused, everything, value):
    refused(everything, "--set SEED=", "--set", f"SEED={value}")


def test_large_files_and_many_includes_are_refused(refused, tmp_path):
    path = tmp_path / "large.gin"
    path.write_text("include 'train.gin'\n" + "# nothing\n" * 100_000)
    refused(path, "large.gin: the file is larger than 256 KiB")
    for i in range(300):  # one inside another
        (tmp_path / f"chain{i}.gin").write_text(f"include 'chain{i + 1}.gin'\n")
    refused(tmp_path / "chain0.gin", "expected at most 200 includes in total")
    for i in range(40):  # 2**40 in all
        (tmp_path / f"tree{i}.gin").write_text(f"include 'tree{i + 1}.gin'\n" * 2)
    (tmp_path / "tree40.gin").touch()
    refused(tmp_path / "tree0.gin", "expected at most 200 includes in total")


@pytest.mark.parametrize(
    "config, wanted",
    [
        ("x" * 5000, "no such config file"),
        ("a\0b", "no such config file"),
        ("/dev/zero", "no such config file"),
        ("..", "expected a config file, got a folder"),
        ("https://example.org/x.gin", "no such config file"),
        ("", "expected a config file"),
        ("\x1b[2J", "\\x1b[2J: no such config file"),
    ],
    ids=["long", "nul", "device", "up", "URL", "empty", "escape"],
)
def test_a_bad_path_is_refused(refused, config, wanted):
    refused(config, wanted)


BROKEN_MODULES = {
    "half_a_line": ("x = (\n", "SyntaxError"),
    "raises": ("raise RuntimeError('a\\nb')\n", "RuntimeError: a b"),
    "leaves": ("raise SystemExit(0)\n", "SystemExit"),
    "imports_nothing": ("import no_such_module\n", "No module named 'no_such_module'"),
}


@pytest.mark.parametrize("name", BROKEN_MODULES)
def test_a_module_that_cannot_be_imported_is_named_with_its_line(
    refused, everything, tmp_path, monkeypatch, name
):
    text, wanted = BROKEN_MODULES[name]
    (tmp_path / f"broken_{name}.py").write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    everything.write_text(EVERYTHING + f"import broken_{name}\n")
    line = refused("everything.gin", wanted)
    assert f"everything.gin:15: import broken_{name}: " in line


def test_a_byte_order_mark_and_windows_lines_are_read(everything):
    everything.write_bytes(b"\xef\xbb\xbf" + EVERYTHING.replace("\n", "\r\n").encode())
    assert load_config(everything)[0].grace_secs == 0


# what is changed at random is read, or refused by an InputError

TOKENS = ["@", "%", "(", ")", "[", "]", "=", "'", '"', "/", ".", ":", "\\", "\n", "\0", "include ", "import ", "from ",
          "train", "SEED", "gin.", "macro", "@train()", "None", "-1", "1e999", "{", "\ufeff", "é", "\t", "#"]  # fmt: skip


def changed_text(whole: str):
    """Copies of a config with up to three pieces put in, in place of up to five letters each."""
    pieces = st.tuples(
        st.integers(0, len(whole)),
        st.integers(0, 5),
        st.one_of(st.sampled_from(TOKENS), st.text(max_size=3)),
    )

    def change(edits):
        text = whole
        for place, letters, piece in edits:
            text = text[:place] + piece + text[place + letters :]
        return text

    return st.builds(change, st.lists(pieces, min_size=1, max_size=3))


def fuzz(read, changed, examples: int):
    """(What came of them, those that were neither read nor refused)."""
    seen, failures = collections.Counter(), []

    @settings(
        max_examples=examples,
        derandomize=True,  # a red run is the fault of what was changed
        deadline=None,
        database=None,
        suppress_health_check=HealthCheck,
    )
    @given(changed)
    def one(text):
        if "import " in text:  # which runs what it names
            text = text.replace("import ", "import no_")
        try:
            read(text)
            seen["read"] += 1
        except InputError:
            seen["refused"] += 1
        except Exception as error:
            failures.append((text, error))

    one()
    return seen, failures


@pytest.fixture
def read_file(everything):
    def read(text):
        everything.write_text(text, encoding="utf-8", errors="surrogatepass")
        load_config(everything)

    return read


@pytest.fixture
def read_set(everything):
    return lambda text: load_config(everything, [text])


SETS = "train.dropout_rate=[0.1, %SEED, @optimizer()]"


def test_a_config_that_is_changed_at_random_is_read_or_refused(read_file, read_set):
    for read, whole in ((read_file, EVERYTHING), (read_set, SETS)):
        seen, failures = fuzz(read, changed_text(whole), 15)
        assert not failures, failures[0]
        assert seen["refused"]


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["file", "--set"])
def test_thousands_of_changed_configs_are_read_or_refused(read_file, read_set, record_fault, kind):
    read, whole = (read_file, EVERYTHING) if kind == "file" else (read_set, SETS)
    seen, failures = fuzz(read, changed_text(whole), 3000)
    tried = sum(seen.values()) + len(failures)
    record_fault(
        f"config: {kind} changed at random",
        tried=tried,
        survived=tried - len(failures),
        seen=f"{seen['read']} read, {seen['refused']} refused in one line",
    )
    assert not failures, failures[0]
