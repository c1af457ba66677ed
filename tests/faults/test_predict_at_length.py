"""`predict` over many rows: kills, stops, half files, rows of all kinds, and memory that stays flat."""

import contextlib
import importlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.data.rows import BadRow
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.decoding.greedy import Decoded
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import TaskInfo, read_model_files, write_model_files
from stepdistill_jax.formats.hf import save_params
from stepdistill_jax.inference.accuracy import AccuracyCounts
from stepdistill_jax.inference.skipped_rows import SkippedRows
from stepdistill_jax.models.encoder_decoder import init_params
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime.files import partial_of
from stepdistill_jax.runtime.streams import ResumableFile, outputs_of, sidecar_of

predict_module = importlib.import_module("stepdistill_jax.inference.predict")
INPUT_LENGTH = 24
SENTENCES = [
    "with rain in the forecast , the truck takes the narrow bridge .",
    "with sun in the forecast , the bike takes the wide avenue .",
    "predict: explain: slow fast pace smooth trouble (a) yes (b) no 0 1 2 3 4 5 6 7 8 9",
]
WORDS = " ".join(SENTENCES).split()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, spiece):
    """Random, one layer; hundreds of different answers of at most two tokens."""
    folder = tmp_path_factory.mktemp("model")
    config = T5Config(
        vocab_size=128,
        emb_dim=32,
        num_heads=2,
        head_dim=8,
        mlp_dim=16,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 3 * x, params)
    info = TaskInfo("roads", step_by_step(), INPUT_LENGTH, 24, 2, labels=("smooth", "trouble"))
    write_model_files(folder / "hf", config, load_vocabulary(spiece), info)
    save_params(folder / "hf", params, config)
    return folder / "hf"


def write_questions(path, count, *, bad_every=None):
    """Rows of 1 to 11 words, a few of them cut; every `bad_every`-th line is no row."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as f:
        for i in range(count):
            text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 12)))
            row = {"id": i, "input": f"{text} \U0001f6b2", "label": ("smooth", "trouble")[i % 2]}
            bad = bad_every and i % bad_every == bad_every - 1
            f.write('{"input": "half\n' if bad else f"{json.dumps(row, ensure_ascii=False)}\n")
    return path


# ---- an engine whose answers can be said beforehand, in this process
class Echo:
    """Answers with two pieces that depend on the input's ids alone."""

    def __init__(self, model_dir):
        files = read_model_files(model_dir)
        self.path, self.vocabulary, self.task_info = model_dir, files.vocabulary, files.task_info
        self.step, self.batch_size, self.identity, self.device = None, 4, "echo", "none"
        self.stop_in = None

    def decode(self, rows, max_decode_len, on_progress=None):
        if self.stop_in is not None:
            self.stop_in -= 1
            if self.stop_in == 0:
                raise KeyboardInterrupt
        if on_progress:
            on_progress(len(rows))
        scores = np.array([-sum(row) / 7 for row in rows], np.float32)
        return Decoded(list(map(answer, rows)), scores, np.array([len(r) % 2 > 0 for r in rows]))


def answer(ids):
    return [3 + sum(ids) % 50, 3 + len(ids) % 50]


@pytest.fixture(scope="module")
def echo(model_dir):
    return Echo(model_dir)


@contextlib.contextmanager
def asked(echo, *, window=4, stop_in=None):
    """`predict` asks `echo`, by windows of so many rows; the n-th one is interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_module, "open_engine", lambda *_, **__: echo)
        patch.setattr(predict_module, "WINDOW_ROWS", window)
        patch.setattr(predict_module, "WINDOW_BATCHES", 0)
        patch.setattr(echo, "stop_in", stop_in)
        yield


def predict(echo, source, out, **options):
    with asked(echo, **options):
        return predict_module.predict("model", source, out, on_error="skip")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "\0",
        "\x1b[31m red",
        "\u2028",
        "\U0001f6b2" * 9,
        "e\u0301",
        "\u202eabc",
        "rain " * 40,
    ]
)
RIGHT = "the label that is answered"
ROWS = st.fixed_dictionaries(
    {"input": TEXTS | st.integers()},
    optional={
        "id": TEXTS | st.integers() | st.none() | st.just("twice"),
        "label": st.sampled_from(["smooth", "trouble", RIGHT]),
        "choices": st.lists(st.sampled_from(["smooth", "x"]), max_size=2),
    },
)
BAD = [
    b'{"input": "half',
    b"[1]",
    b'{"input": "\xff"}',
    b"{}",
    rb'{"input": "\ud800"}',
    b'{"input": 1.5}',
]
LINES = st.lists(
    st.tuples(ROWS, st.booleans()) | st.sampled_from(BAD) | st.sampled_from([b"", b" \t"]),
    max_size=30,
)
DAMAGE = st.fixed_dictionaries(
    {
        "windows": st.integers(1, 4),
        "cut": st.none() | st.floats(0, 1),
        "flip": st.none() | st.floats(0, 1, exclude_max=True),
        "sidecar": st.sampled_from(["kept", "missing", "old", "flipped", "cut", "nonsense"]),
        "place": st.floats(0, 1, exclude_max=True),
    }
)


def flipped(data, place):
    data = bytearray(data)
    if data:
        data[int(place * len(data))] ^= 1
    return bytes(data)


def hurt(out, damage, old_sidecar):
    """What may be left of a run that was stopped, and of its sidecar."""
    partial, sidecar = out.with_name("out.jsonl.partial"), out.with_name("out.jsonl.partial.json")
    data, told = partial.read_bytes(), sidecar.read_bytes()
    if damage["cut"] is not None:
        data = data[: int(damage["cut"] * len(data))]
    if damage["flip"] is not None:
        data = flipped(data, damage["flip"])
    partial.write_bytes(data)
    changed = {
        "kept": told,
        "old": old_sidecar,
        "flipped": flipped(told, damage["place"]),
        "cut": told[: int(damage["place"] * len(told))],
        "nonsense": [b"[]", b'{"bytes": "x"}', b'{"digest": 1, "bytes": 9}'][
            int(3 * damage["place"])
        ],
        "missing": None,
    }[damage["sidecar"]]
    sidecar.unlink()
    if changed is not None:
        sidecar.write_bytes(changed)


def expected(lines, vocabulary):
    """(answers, line numbers of bad rows), worked out from the lines."""
    answers, bad, number = [], [], 0
    for at, line in enumerate(lines, 1):
        number += isinstance(line, tuple) or bool(line.strip())
        if isinstance(line, tuple):
            row = line[0]
            ids = [*vocabulary.encode(f"predict: {row['input']}"), 1]
            ids = ids if len(ids) <= INPUT_LENGTH else [*ids[: INPUT_LENGTH - 1], 1]
            given = row.get("id")
            known = given is not None and str(given).strip() != ""
            answers.append((given if known else str(number), vocabulary.decode(answer(ids))))
            if row.get("label") == RIGHT:
                row["label"] = answers[-1][1]
        elif line.strip():
            bad.append(at)
    return answers, bad


def check_damage(echo, lines, newline, last_newline, damage):
    """A run that is stopped, hurt and started again ends as one left alone."""
    lines = [*lines, *[({"input": f"rain {i}"}, True) for i in range(4 * damage["windows"] + 1)]]
    answers, bad = expected(lines, echo.vocabulary)
    raw = [
        json.dumps(line[0], ensure_ascii=line[1]).encode() if isinstance(line, tuple) else line
        for line in lines
    ]
    sidecars = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        source, out, whole = (folder / n for n in ("in.jsonl", "out.jsonl", "whole.jsonl"))
        source.write_bytes(newline.join(raw) + (newline if last_newline else b""))
        want = predict(echo, source, whole)
        got = [json.loads(line) for line in whole.read_bytes().splitlines()]
        assert [(row["id"], row["label"]) for row in got] == answers
        assert (want["rows"], want["skipped"]) == (len(answers), len(bad))
        listed = folder / "whole.jsonl.skipped.jsonl"
        assert listed.exists() == bool(bad)
        if bad:
            assert [json.loads(x)["line"] for x in listed.read_bytes().splitlines()] == bad
        for stop_in in (2, damage["windows"]):
            with pytest.raises(KeyboardInterrupt):
                predict(echo, source, out, stop_in=stop_in)
            sidecars.append((folder / "out.jsonl.partial.json").read_bytes())
        hurt(out, damage, sidecars[0])
        pair = partial_of(out), sidecar_of(out)
        filled = any(path.exists() and path.stat().st_size for path in pair)
        if filled and not outputs_of(out)[1]:  # neither rows nor sidecar is known as ours any more
            with pytest.raises(InputError, match="was not written by `predict`"):
                predict(echo, source, out)
            return
        summary = predict(echo, source, out)
        assert timeless(summary) == timeless(want)
        assert out.read_bytes() == whole.read_bytes()
        left = {p.name for p in folder.iterdir()} - {"in.jsonl", "out.jsonl", "whole.jsonl"}
        assert left == ({"out.jsonl.skipped.jsonl", listed.name} if bad else set())


CASE = (LINES, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), DAMAGE)


@hypothesis.given(*CASE)
@hypothesis.settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # on a busy machine
)
def test_rows_of_any_kind_and_a_run_that_was_stopped_and_hurt(echo, lines, newline, last, damage):
    check_damage(echo, lines, newline, last, damage)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_four_hundred_stopped_and_hurt_runs(echo, record_fault):
    tried = []

    @hypothesis.given(*CASE)
    @hypothesis.settings(
        max_examples=400,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(lines, newline, last, damage):
        tried.append(False)
        check_damage(echo, lines, newline, last, damage)
        tried[-1] = True

    failure = None
    try:
        check()
    except Exception as error:
        failure = error
    record_fault(
        "`.partial` of `predict` cut or changed at any byte; its sidecar lost, old, cut or changed",
        tried=len(tried),
        survived=sum(tried),
        seen="random rows of all kinds; the next start ends with the same bytes and counts",
    )
    if failure is not None:
        raise failure
    assert sum(tried) == len(tried) >= 400


def test_a_row_of_ten_megabytes_and_windows_of_long_rows(echo, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = ["short", "with rain " * 1_000_000, *["sun " * 1_500_000] * 3, "short"]
    source.write_text("".join(json.dumps({"input": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        windows = []
        decode_window = predict_module.decode_window

        def counted(*args):
            windows.append(len(args[2]))
            return decode_window(*args)

        patch.setattr(predict_module, "decode_window", counted)
        assert predict(echo, source, out, window=4096)["cut_inputs"] == 4
    assert windows == [4, 2], "16 million characters end a window"
    labels = [json.loads(line)["label"] for line in out.open()]
    assert labels[2] == labels[3] == labels[4] and labels[0] == labels[5]


def test_a_million_bad_rows_would_not_drown_the_log(echo, tmp_path, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"input": "a"}\n' + "[]\n" * 2000)
    assert predict(echo, source, out)["skipped"] == 2000
    err = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("skipped: ") for line in err) == 21 and len(err) < 25
    assert err[0] == f"skipped: {source}:2: expected a JSON object, got list"
    listed = tmp_path / "out.jsonl.skipped.jsonl"
    assert err[-1] == f"2000 bad rows were skipped; all are listed in {listed}"
    rows = [json.loads(line) for line in listed.open()]
    assert rows[1999] == {"line": 2001, "error": "expected a JSON object, got list"}
    # an input that is good now has no such list
    source.write_text('{"input": "a"}\n')
    predict(echo, source, out)
    assert not listed.exists()


def test_a_finished_list_leaves_that_of_the_next_run_alone(tmp_path):
    """The output's lock is gone then, so another run may have begun its own."""
    one, other = (SkippedRows(tmp_path / "out.jsonl") for _ in range(2))
    one.add(BadRow("in.jsonl", 1, "bad"))
    one.finish()
    other.add(BadRow("in.jsonl", 2, "bad"))
    one.close()
    other.finish()
    assert json.loads((tmp_path / "out.jsonl.skipped.jsonl").read_text())["line"] == 2


@pytest.mark.parametrize("finished", [True, False])
def test_a_list_on_a_full_disk_is_named_and_removed(tmp_path, finished, full_disk):
    skipped = SkippedRows(tmp_path / "out.jsonl")
    skipped.add(BadRow("in.jsonl", 1, "bad"))
    with full_disk(0):
        if finished:
            with pytest.raises(OSError, match=r"out\.jsonl\.skipped\.jsonl\.partial"):
                skipped.finish()
        skipped.close()  # raises nothing in the place of what was told
    assert list(tmp_path.iterdir()) == []


def test_memory_of_counts_lists_and_earlier_rows_does_not_grow_with_rows(tmp_path):
    key, rows = {"input": "x"}, 20_000
    counted, skipped = AccuracyCounts("text_match"), SkippedRows(tmp_path / "out.jsonl")
    output = ResumableFile(tmp_path / "out.jsonl", key)
    output.append([{"id": i, "label": "a label"} for i in range(rows)])
    with contextlib.redirect_stderr(None):
        tracemalloc.start()
        try:
            for i, row in enumerate(output.rows()):
                counted.add(row["label"], f"l{i % 2}" * 8)
                skipped.add(BadRow("in.jsonl", i, "bad"))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    skipped.close()
    output.close()
    assert (counted.rows, skipped.count) == (rows, rows)
    assert peak < 10 * rows, "bytes: not even a pointer for each row"


def test_rows_of_other_options_are_set_aside_and_can_be_gone_on_from(echo, tmp_path, capsys):
    source, out = write_questions(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    question = source.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        predict(echo, source, out, stop_in=3)
    source.write_bytes(question * 2)
    predict(echo, source, out)
    assert (
        "holds 8 rows from a different input; renamed it to out.jsonl.partial.old"
        in capsys.readouterr().err
    )
    source.write_bytes(question)
    for name in ("out.jsonl.partial", "out.jsonl.partial.json"):
        os.rename(tmp_path / f"{name}.old", tmp_path / name)
    predict(echo, source, out)
    assert "continuing after the 8 rows that are done" in capsys.readouterr().err
    assert len(out.read_bytes().splitlines()) == 20


@pytest.mark.parametrize(
    "name",
    [
        f"out.jsonl{name}{partial}"
        for name in ("", ".partial.json", ".skipped.jsonl", ".partial.old", ".partial.json.old")
        for partial in ("", ".partial")
    ],
)
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_an_input_that_would_be_written_to_is_refused(echo, tmp_path, name, link):
    source = tmp_path / (name if link is None else "in.jsonl")
    write_questions(source, 3)
    before = source.read_bytes()
    if link:
        link(source, tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: it is the input"):
        predict(echo, source, tmp_path / "out.jsonl")
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    "name",
    [
        f"out.jsonl{name}{partial}"
        for name in ("", ".partial.json", ".skipped.jsonl", ".partial.old", ".partial.json.old")
        for partial in ("", ".partial")
    ],
)
@pytest.mark.parametrize("text", ["my notes\n", '{"id": 1, "label": "mine"}\n'])
def test_a_file_that_predict_did_not_write_is_left_alone(echo, tmp_path, name, text):
    source = write_questions(tmp_path / "in.jsonl", 3)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}: exists and was not written by `predict`"):
        predict(echo, source, tmp_path / "out.jsonl")
    assert (tmp_path / name).read_text() == text
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", name}


def test_a_changed_input_is_noticed_at_the_next_window_and_a_touched_one_is_none(echo, tmp_path):
    source, out = write_questions(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    decode, calls = echo.decode, []

    def changes(rows, *rest):
        calls.append(len(rows))
        if len(calls) == 2:
            os.utime(source, (1, 1))
        if len(calls) == 4:
            source.write_bytes(source.read_bytes().replace(b"rain", b"hail"))
        return decode(rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(echo, "decode", changes)
        with pytest.raises(InputError, match=r"in\.jsonl: the file changed while it was read"):
            predict(echo, source, out)
    assert calls == [4] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


# ---- one process that has imported all and no device, and forks; so a start takes two seconds
SERVER = """
import importlib, json, os, signal, sys
from stepdistill_jax.commands.main import main
import stepdistill_jax.commands.predict, stepdistill_jax.inference
for line in sys.stdin:
    job = json.loads(line)
    if (pid := os.fork()) == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{job['folder']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        # ignored where these tests were started in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exec(job["hook"], {"job": job})
        sys.argv[1:] = job["argv"]
        sys.exit(main())
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
# kills itself at the n-th time that it comes to a place
KILLED_AT = """
import os, pathlib, signal
import stepdistill_jax.runtime.streams as output
place, left, out = job["place"], [job["nth"]], job["argv"][3]
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
def here():
    left[0] -= 1
    if left[0] == 0:
        kill()
def around(owner, name, when=lambda *args: True):
    function = getattr(owner, name)
    def wrapped(*args, **kwargs):
        if place.startswith("before") and when(*args):
            here()
        result = function(*args, **kwargs)
        if place.startswith("after") and when(*args):
            here()
        return result
    setattr(owner, name, wrapped)
if place == "half a write":
    append = output.ResumableFile.append
    def half(self, rows, **counts):
        left[0] -= 1
        if left[0] == 0:
            self._file.write(b'{"id": 1, "label": "hal')
            self._file.flush()
            kill()
        append(self, rows, **counts)
    output.ResumableFile.append = half
elif place.endswith("an fsync"):
    around(os, "fsync")
elif place.endswith("the sidecar's rename"):
    around(os, "replace", lambda old, new: str(new).endswith(".partial.json"))
elif place.endswith("the last rename"):
    around(os, "replace", lambda old, new: str(new) == out)
elif place.endswith("a removal"):
    around(pathlib.Path, "unlink")
elif place.endswith("the opening"):
    around(output.ResumableFile, "__init__")
else:
    raise ValueError(place)
"""
# (place, n-th time): the last ones come only where a run ends
PLACES = [
    ("half a write", 2),
    ("before an fsync", 4),
    ("after an fsync", 5),
    ("before the sidecar's rename", 2),
    ("after the sidecar's rename", 2),
    ("after the opening", 1),
    ("before the last rename", 1),
    ("after the last rename", 1),
    ("before a removal", 1),
    ("after a removal", 1),
]
BY_THE_CLOCK = 10


class Server:
    """Starts `stepdistill` in processes of its own."""

    def __init__(self, folder):
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]},
        )

    def start(self, *argv, hook="", **told):
        """The process's id; it has begun."""
        job = {"folder": str(self.folder), "argv": [*map(str, argv)], "hook": hook, **told}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def code(self):
        """The exit code of what was started, once it has ended."""
        return int(self._process.stdout.readline())

    def summary(self):
        """The last line of standard output, of what was started with `--json`."""
        return json.loads((self.folder / "stdout").read_text("utf-8").splitlines()[-1])

    def errors(self):
        """Standard error of what was started."""
        return (self.folder / "stderr").read_text("utf-8")

    def close(self):
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def timeless(summary):
    return {name: x for name, x in summary.items() if name != "rows_per_second"}


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_a_run_that_is_killed_twenty_times_ends_as_one_that_was_left_alone(
    server, model_dir, tmp_path, record_fault
):
    rows, bad_every = 100_000, 1000
    source = write_questions(tmp_path / "in.jsonl", rows, bad_every=bad_every)
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    flags = ("--batch-size", "256", "--on-error", "skip", "--json")
    server.start("predict", model_dir, source, whole, *flags)
    assert server.code() == 0, server.errors()
    want, want_skipped = (
        whole.read_bytes(),
        whole.with_name("whole.jsonl.skipped.jsonl").read_bytes(),
    )
    want_summary = server.summary()

    def is_whole():
        skipped = out.with_name("out.jsonl.skipped.jsonl")
        same = (out.read_bytes(), skipped.read_bytes()) == (want, want_skipped)
        for path in (out, skipped):
            path.unlink()
        return same

    def state():
        with contextlib.suppress(FileNotFoundError):
            return out.with_name("out.jsonl.partial.json").read_bytes()
        return b""

    rng = random.Random(1)
    plan = [*PLACES, *[None] * BY_THE_CLOCK]
    rng.shuffle(plan)
    kills, went_on, ends, seen = 0, 0, [], {}
    while plan:
        place = plan[0]
        if place is None:
            pid = server.start("predict", model_dir, source, out, *flags)
            # in half of the cases wherever a start is, else once there is a new window
            before = state() if rng.random() < 0.5 else None
            limit = time.monotonic() + 60
            while before and state() in (before, b"") and time.monotonic() < limit:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 4.0))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        else:
            hook = {"hook": KILLED_AT, "place": place[0], "nth": place[1]}
            server.start("predict", model_dir, source, out, *flags, **hook)
        code = server.code()
        went_on += "rows that are done" in server.errors()
        assert code in (0, -signal.SIGKILL), server.errors()
        if code:
            kills += 1
            plan.pop(0)
            seen[place[0] if place else "clock"] = seen.get(place[0] if place else "clock", 0) + 1
        elif place and place[0] != "after the opening":
            plan.append(plan.pop(0))  # it did not come by there; another time
        if out.exists():
            ends.append(is_whole())
    server.start("predict", model_dir, source, out, *flags)
    assert server.code() == 0, server.errors()
    summary = server.summary()
    ends.append(is_whole())
    left = sorted(p.name for p in tmp_path.iterdir())
    good = all(ends) and timeless(summary) == timeless(want_summary)
    good = good and left == ["in.jsonl", "whole.jsonl", "whole.jsonl.skipped.jsonl"]
    record_fault(
        "`kill -9` of `predict`: 10 by the clock, 10 in a write, an fsync, a rename, at the end",
        tried=kills,
        survived=kills if good else 0,
        seen=f"{rows:,} rows; {went_on} starts went on where the one before was; {len(ends)} whole"
        " outputs, all bytes, counts and skipped rows as of a run that was left alone",
    )
    ids = [json.loads(line)["id"] for line in want.splitlines()]
    assert ids == [i for i in range(rows) if i % bad_every != bad_every - 1]
    assert want_summary["skipped"] == rows // bad_every == len(want_skipped.splitlines())
    assert want_summary["cut_inputs"] > 0 and not want_summary["collapsed"]
    assert all(ends) and timeless(summary) == timeless(want_summary)
    assert left == ["in.jsonl", "whole.jsonl", "whole.jsonl.skipped.jsonl"]
    assert kills == len(PLACES) + BY_THE_CLOCK and went_on >= 5, seen


# ---- a stop signal
HELD_IN = """
import hashlib, importlib, pathlib, threading, time
predict = importlib.import_module("stepdistill_jax.inference.predict")
rows = importlib.import_module("stepdistill_jax.inference.input_rows")
decode = importlib.import_module("stepdistill_jax.decoding.greedy")
held = pathlib.Path(job["folder"]) / "held"
def hold():
    held.touch()
    time.sleep(30)
def hold_in_c():
    threading.Timer(0.3, held.touch).start()  # by then no handler runs
    hashlib.pbkdf2_hmac("sha256", b"a minute", b"of C", 100_000_000)
def before(owner, name, hold, nth=1):
    function, calls = getattr(owner, name), []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            hold()
        return function(*args, **kwargs)
    setattr(owner, name, wrapped)
phase = job["phase"]
if phase == "counting":
    before(rows, "question", hold, 50)
elif phase == "loading":
    before(predict, "open_engine", hold)
elif phase == "compiling":
    before(decode, "bucketed", hold_in_c)
elif phase == "decoding":
    before(decode, "bucketed", hold, 2)
elif phase == "a batch":
    before(decode, "bucketed", hold_in_c, 2)
"""
PHASES = ("counting", "loading", "compiling", "decoding", "a batch")


@pytest.mark.faults
def test_a_stop_signal_ends_predict_soon_in_every_phase(server, model_dir, tmp_path, record_fault):
    source, out = write_questions(tmp_path / "in.jsonl", 6000), tmp_path / "out.jsonl"
    held, seen, longest, stopped = server.folder / "held", [], 0.0, 0
    for phase in PHASES:
        for number, want, again in (
            (signal.SIGTERM, 75, 0),
            (signal.SIGINT, 130, 0),
            (signal.SIGTERM, 143, 1),
        ):
            if again and phase != "a batch":  # elsewhere the first one is enough
                continue
            for path in (held, *tmp_path.glob("out.jsonl*")):
                path.unlink(missing_ok=True)
            pid = server.start("predict", model_dir, source, out, hook=HELD_IN, phase=phase)
            deadline = time.monotonic() + 120
            while not held.exists():
                assert time.monotonic() < deadline, (phase, server.errors())
                time.sleep(0.01)
            told = time.monotonic()
            os.kill(pid, number)
            if again:
                time.sleep(0.3)
                os.kill(pid, number)
            code, seconds = server.code(), time.monotonic() - told
            longest = max(longest, seconds)
            clean = "Traceback" not in server.errors() and not out.exists()
            stopped += code == want and clean and seconds < 8
            seen.append((phase, number.name, code, round(seconds, 1), server.errors()[-500:]))
    kept = sorted(p.name for p in tmp_path.iterdir())
    server.start("predict", model_dir, source, out)
    code, errors = server.code(), server.errors()
    record_fault(
        "SIGTERM, Ctrl-C, two signals in `predict`: counting, loading, compiling, decoding, a batch",
        tried=len(seen),
        survived=stopped,
        seen=f"at most {longest:.1f} s to the end; 75, 130, 143; the last start went on",
    )
    assert stopped == len(seen), seen
    assert kept == ["in.jsonl", "out.jsonl.partial", "out.jsonl.partial.json"]
    assert code == 0 and "continuing after the 4096 rows that are done" in errors


# ---- a million rows
@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_a_million_rows_take_the_memory_of_a_hundred_thousand(model_dir, tmp_path, record_fault):
    rows, most_growth = 1_000_000, 32
    source, out = write_questions(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    sidecar = tmp_path / "out.jsonl.partial.json"
    command = ["-m", "stepdistill_jax", "predict", model_dir, source, out, "--json"]
    begun, first, peaks, now = time.monotonic(), None, {}, 0
    with open(tmp_path / "stdout", "w") as stdout, open(tmp_path / "stderr", "w") as stderr:
        child = subprocess.Popen(
            [sys.executable, *map(str, command), "--batch-size", "1024"],
            stdout=stdout,
            stderr=stderr,
            env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]},
        )
        while child.poll() is None:
            time.sleep(0.05)
            # absent before the first window, and after the last
            with contextlib.suppress(OSError):
                now = json.loads(sidecar.read_text())["rows"]
            with open(f"/proc/{child.pid}/status") as f:
                found = re.search(r"VmRSS:\s+(\d+) kB", f.read())
            if now and found:
                first = first or time.monotonic() - begun
                tenth = now * 10 // (rows + 1)
                peaks[tenth] = max(peaks.get(tenth, 0), int(found[1]) // 1024)
    assert child.returncode == 0, (tmp_path / "stderr").read_text()
    summary = json.loads((tmp_path / "stdout").read_text().splitlines()[-1])
    with open(out, "rb") as f:
        in_order = sum(json.loads(line)["id"] == i for i, line in enumerate(f))
    # the second tenth: what is filled once (compiled programs, pools) is filled then
    growth = max(peaks[5], peaks[9]) - peaks[1]
    record_fault(
        "1,000,000 rows through `predict`",
        tried=1,
        survived=int(in_order == summary["rows"] == rows and growth <= most_growth),
        seen=f"resident {peaks[1]}, {peaks[5]}, {peaks[9]} MiB in the second, sixth, last tenth;"
        f" first {first:.0f} s (start, both readings, a window), then"
        f" {summary['rows_per_second']:,.0f} rows/s",
    )
    assert in_order == summary["rows"] == rows
    assert growth <= most_growth, peaks
