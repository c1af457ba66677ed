"""Bad input of the data side: one line with file and place, exit 2, and nothing is changed.

tests/bad_inputs/data holds the readable kinds: files, and tables of what is said of each. What is
binary, huge or no file at all is made here.
"""

import gzip
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import stat
import subprocess
import sys
import time
import zipfile

import pytest

from stepdistill_jax.commands.main import main

DATA = pathlib.Path(__file__).parents[1] / "bad_inputs" / "data"
GOOD = '{"id": "one", "input": "is it wet ?", "label": "yes"}\n'
MOST_SECONDS = 20.0  # of one refusal; milliseconds on an idle machine
# what a refused command may leave; the last is the list of a source's bad rows
LEFT = (".lock", ".sqlite", ".sqlite-wal", ".sqlite-shm", "mine.defects.jsonl")

pytestmark = pytest.mark.timeout(120)


def table(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def snapshot(folder):
    """Kind and contents of all that lies in a folder, but for locks and caches."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if not p.name.endswith(LEFT)):
        mode = path.lstat().st_mode
        found[path] = (
            stat.S_IFMT(mode),
            path.read_bytes() if stat.S_ISREG(mode) and path.stat().st_size < 1e6 else b"",
        )
    return found


class Refusals:
    """Runs commands that must be refused in a folder that must stay as it is.

    Attributes:
        tried: number of commands.
        wrong: what was not as it should be, one line each.
    """

    def __init__(self, folder, capfd):
        self.folder, self._capfd = folder, capfd
        self.tried, self.wrong = 0, []
        earlier = folder / "data" / "mine"
        earlier.mkdir(parents=True)
        for name in ("train.jsonl", "spiece.model"):
            (earlier / name).write_text("{}")
        fields = ("name", "fingerprint", "splits", "metric", "reader", "sources")
        (earlier / "dataset.json").write_text(json.dumps({name: {} for name in fields}))
        row = {"id": "1", "input": "q", "label": "a", "score": -0.5, "provenance": {}}
        (folder / "out.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "in.jsonl").write_text(GOOD)
        (folder / "no_model").mkdir()

    def __call__(self, kind, says, *argv):
        """The command must end with 2 and one line that has `says` in it.

        Several bad rows of one source may be shown in a table before it.
        """
        before = snapshot(self.folder)
        self.tried += 1
        start = time.monotonic()
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
        seconds = time.monotonic() - start
        out, err = self._capfd.readouterr()
        *table, line = err.splitlines() or [""]
        fine = code == 2 and says in line and err.endswith("\n") and not out
        fine = fine and (not table or (table[0].startswith("bad rows: ") and len(table) < 50))
        fine = fine and line.startswith("stepdistill: error: ") and len(err) < 6000
        if not fine or seconds > MOST_SECONDS:
            self.wrong.append(f"{kind}: {code}, {seconds:.1f} s, {err[-300:]!r}, not {says!r}")
        if snapshot(self.folder) != before:
            self.wrong.append(f"{kind}: files were changed")

    def prepare(self, kind, says, source, name="jsonl", *argv):
        new = ("--name", "mine") if name == "jsonl" else ()
        data = ("--data-dir", self.folder / "data")
        self(kind, says, "prepare", name, "--source", source, *new, *data, *argv)

    def predict(self, kind, says, source):
        self(kind, says, "predict", self.folder / "no_model", source, self.folder / "out.jsonl")

    def annotate(self, kind, says, source, *argv):
        model = ("--task", "generic", "--model", "m", "--base-url", "http://localhost:9")
        out = self.folder / "out.jsonl"
        self(kind, says, "annotate", source, out, *model, *(argv or ("--dry-run",)))

    def every_reader(self, kind, says, source):
        for name in ("prepare", "predict", "annotate"):
            getattr(self, name)(f"{name}, {kind}", says, source)


@pytest.fixture
def refused(tmp_path, capfd, record_fault):
    refusals = Refusals(tmp_path, capfd)

    def told(family):
        bad = {line.partition(":")[0] for line in refusals.wrong}
        record_fault(family, tried=refusals.tried, survived=refusals.tried - len(bad))
        assert refusals.tried and not refusals.wrong, "\n".join(refusals.wrong)

    refusals.told = told
    return refusals


def test_json_lines_of_the_corpus(refused):
    cases = table("jsonl.jsonl")
    assert {case["file"] for case in cases} == {
        f"jsonl/{path.name}" for path in (DATA / "jsonl").iterdir()
    }
    for case in cases:
        path = DATA / case["file"]
        for command in ("prepare", "predict", "annotate"):
            if says := case.get(command):
                getattr(refused, command)(f"{command} {path.name}", says, path)
    refused.told("JSON lines: broken, wrong types and values, by three commands")


def test_folders_of_the_papers_layout(refused):
    for case in table("folders.jsonl"):
        source = refused.folder / "source"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(DATA / "good" / case["base"], source)
        for name, text in case["files"].items():
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text, encoding="utf-8")
        name = "cqa" if case["base"] == "export" else case["base"]
        refused.prepare(case["name"], case["says"], source, name, *case["args"])
    refused.told("teacher texts, and rows of CQA, SVAMP, e-SNLI, ANLI and of an export")


def archive():
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as z:
        z.writestr("rows.jsonl", GOOD)
    return made.getvalue()


BINARY = {  # what a file holds, and what is said of it
    "gzip": (gzip.compress(GOOD.encode()), ":1: not UTF-8; it is a gzip file, so unpack it first"),
    "zip": (archive(), ":1: "),
    "parquet": (b"PAR1\x15\x04\x15\x10" + bytes(30) + b"PAR1", "it is a Parquet file"),
    "sqlite": (b"SQLite format 3\0" + bytes(100), "it is an SQLite file"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(40), ":1: not UTF-8"),
    "elf": (b"\x7fELF" + bytes(40), ":1: broken JSON"),
    "pickle": (pickle.dumps([{"input": "a"}]), ":1: not UTF-8"),
    "utf-16": (GOOD.encode("utf-16"), "it looks like UTF-16, so save it as UTF-8"),
    "utf-16-be, marked": (b"\xfe\xff" + GOOD.encode("utf-16-be"), "it looks like UTF-16"),
    "utf-16-le": (GOOD.encode("utf-16-le"), ":1: broken JSON"),
    "utf-16-be": (GOOD.encode("utf-16-be"), ":1: broken JSON"),
    "utf-32": (GOOD.encode("utf-32"), ":1: not UTF-8"),
    "latin-1": (GOOD.replace("wet", "na\u00efve").encode("latin-1"), ":1: not UTF-8"),
    "cp1252": (GOOD.replace("wet", "\u201cwet\u201d").encode("cp1252"), ":1: not UTF-8"),
    "cut in a character": ((GOOD * 2)[:-9].encode() + b"\xe2\x82", ":2: not UTF-8"),
    "overlong UTF-8": (GOOD.replace("wet", "\0").encode().replace(b"\0", b"\xc0\xaf"), "not UTF-8"),
    "surrogate as UTF-8": (
        GOOD.replace("wet", "\ud800").encode("utf-8", "surrogatepass"),
        ":1: not UTF-8",
    ),
    "NUL bytes": (bytes(5000), ":1: broken JSON"),
    "NUL after the rows": (GOOD.encode() + bytes(512), ":2: broken JSON"),
    "NUL in a text": (GOOD.encode().replace(b"wet", b"w\0t"), ":1: broken JSON"),
    "escape sequence in a text": (GOOD.encode().replace(b"wet", b"\x1b[2J"), ":1: broken JSON"),
    "CR alone": (GOOD.replace("\n", "\r").encode() * 3, ":1: broken JSON"),
    "record separators": (b"\x1e" + GOOD.encode(), ":1: broken JSON"),
    "100,000 brackets": (GOOD.encode() + b"[" * 100_000, ":2: unreadable JSON"),
    "100,000 objects": (GOOD.encode() + b'{"a":' * 100_000, ":2: unreadable JSON"),
    "nested in a field": (
        b'{"input": "a", "label": "b", "x": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        ":1: unreadable JSON",
    ),
    "random bytes": (random.Random(0).randbytes(5000), ":1: "),
    "a line of 17 MiB": (GOOD.encode() + b" " * (17 << 20), ":2: a line of more than 16 MiB"),
}


def test_files_that_are_no_text(refused):
    for kind, (content, says) in BINARY.items():
        path = refused.folder / "bad.jsonl"
        path.write_bytes(content)
        refused.every_reader(kind, says, path)
    refused.told("binary files, other encodings, deep nesting, by three commands")


@pytest.fixture
def places(tmp_path):
    """Paths where no file can be read, and what is said of each."""
    folder = tmp_path / "places"
    (folder / "folder").mkdir(parents=True)
    os.mkfifo(folder / "fifo")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nothing")
    return {
        "fifo": (folder / "fifo", "is a pipe or device"),
        "device": (folder / "device", "is a pipe or device"),
        "folder": (folder / "folder", "got a folder"),
        "loop": (folder / "loop", ""),
        "dangling": (folder / "dangling", "no such file"),
        "missing": (folder / "none" / "a.jsonl", "no such file"),
        "long": (folder / ("x" * 5000), ""),
        "NUL": (folder / "a\0b", "no such file"),
    }


def test_what_is_no_regular_file(refused, places):
    (refused.folder / "cqa" / "llm").mkdir(parents=True)
    for kind, (path, says) in places.items():
        if kind != "NUL":  # which no shell can pass
            refused.predict(f"predict, {kind}", says, path)
        refused.annotate(f"annotate, {kind}", says, path)
        source = refused.folder / "in.jsonl"
        refused.annotate(f"exemplars, {kind}", says, source, "--exemplars", path, "--dry-run")
        text = ("--instructions", f"@{path}", "--dry-run")
        refused.annotate(f"instructions, {kind}", says, source, *text)
        refused.annotate(f"results, {kind}", says, source, "--batch-file", "read", path)
        if kind != "folder":
            refused.prepare(f"source, {kind}", says if "pipe" in says else "no such", path)
        if kind not in ("fifo", "device", "folder"):
            continue
        inside = refused.folder / "split"
        for name, file in (("jsonl", "train.jsonl"), ("cqa", "cqa_train.json")):
            shutil.rmtree(inside, ignore_errors=True)
            inside.mkdir()
            (inside / file).symlink_to(path)
            refused.prepare(f"split of {name}, {kind}", says, inside, name, "--no-teacher")
        shutil.rmtree(inside)
        shutil.copytree(DATA / "good" / "cqa", inside)
        (inside / "llm" / "train_CoT_0.json").unlink()
        (inside / "llm" / "train_CoT_0.json").symlink_to(path)
        refused.prepare(f"teacher texts, {kind}", says, inside, "cqa")
    refused.told("folders, pipes, devices and broken links where a file should be")


def test_a_file_without_permission(refused, monkeypatch):
    access = os.access  # root may read all, so the answer is made up
    monkeypatch.setattr(os, "access", lambda p, mode: mode != os.R_OK and access(p, mode))
    refused.every_reader("unreadable", "cannot be read", refused.folder / "in.jsonl")
    refused.told("files without permission to read")


FLAGS = (
    ("prepare", ("--map", "input=question"), "--map input=question: "),
    ("prepare", ("--map", "inptu=input"), "did you mean 'input'"),
    ("prepare", ("--map", "input"), "--map: expected input=question,label=answer"),
    ("prepare", ("--map", "input=a,input=b"), "mapped twice"),
    ("prepare", ("--name", "../mine"), "--name must be lower_snake_case"),
    ("prepare", ("--name", "/tmp/mine"), "--name must be lower_snake_case"),
    ("prepare", ("--name", "Mine"), "--name must be lower_snake_case"),
    ("prepare", ("--name", "mine\n"), "--name must be lower_snake_case"),
    ("prepare", ("--name", ""), "--name must be lower_snake_case"),
    ("prepare", ("--name", "cqa"), "is reserved for `prepare cqa`"),
    ("prepare", ("--name", "x" * 300), "cannot be written"),
    ("prepare", ("--name", "taken"), "exists and is not a folder"),
    ("prepare", ("--name", "theirs"), "was not written by `prepare`"),
    ("prepare", ("--data-dir", "in.jsonl"), "--data-dir in.jsonl: cannot be written"),
    ("prepare", ("--data-dir", "x" * 5000), "cannot be written"),
    ("prepare", ("--report", "in.jsonl"), "--report in.jsonl/mine.html: cannot be written"),
    ("annotate", ("--choices", "[" * 100_000), "--choices: broken JSON"),
    ("annotate", ("--choices", '["a", 1]'), "--choices: expected a list of strings"),
    (
        "annotate",
        ("--choices", '["a", "\\ud800"]'),
        "--choices: the text is not valid UTF-8 or Unicode",
    ),
    ("annotate", ("--choices", "a,\udcff"), "--choices: the text is not valid UTF-8 or Unicode"),
    (
        "annotate",
        ("--parameter", "x=" + "[" * 100_000),
        "--parameter x: the value has too many nested",
    ),
    (
        "annotate",
        ("--instructions", "\udcff"),
        "--instructions: the text is not valid UTF-8 or Unicode",
    ),
    ("annotate", ("--instructions", "@latin1"), "--instructions @latin1: the file cannot be read"),
    ("annotate", ("--base-url", "http://[::1"), "--base-url http://[::1: Invalid IPv6 URL"),
    ("annotate", ("--temperature", "nan"), "--temperature must be a number of at least 0"),
    ("annotate", ("--max-truncated", "inf"), "--max-truncated must be a number of at least 0"),
    ("annotate", ("--exemplars", "forty.jsonl", "--task", "cqa"), "expected at most 26 choices"),
    ("annotate", ("--exemplars", "in.jsonl"), "no field 'rationale'"),
    ("annotate", ("--exemplars", "empty"), "no rows in it"),
    (
        "annotate",
        ("--cache", "places"),
        "--cache places: the file cannot be used as an SQLite file",
    ),
)


def test_flags_that_lead_astray(refused, places, monkeypatch):
    monkeypatch.chdir(refused.folder)
    pathlib.Path("data", "taken").touch()
    pathlib.Path("data", "theirs").mkdir()
    pathlib.Path("data", "theirs", "thesis.tex").touch()
    pathlib.Path("latin1").write_bytes(b"\xef")
    pathlib.Path("empty").touch()
    row = {"input": "a", "label": "c1", "rationale": "r", "choices": [f"c{i}" for i in range(40)]}
    pathlib.Path("forty.jsonl").write_text(json.dumps(row) + "\n")
    for command, argv, says in FLAGS:
        kind = f"{command} {argv[0]} {argv[1][:20]}"
        if command == "prepare":
            refused.prepare(kind, says, "in.jsonl", "jsonl", *argv)
        else:
            refused.annotate(kind, says, "in.jsonl", *argv, "--dry-run")
    refused.told("flags: maps, names, paths, choices, exemplars")


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_line_of_a_gigabyte_in_a_process_of_its_own(tmp_path, record_fault):
    """Peak memory and time of the whole command, by the system's account."""
    path = tmp_path / "huge.jsonl"
    with open(path, "wb") as f:
        f.write(GOOD.encode() + b'{"input": "')
        f.truncate(2**30)  # a hole: zeros without a line's end
    code = (
        "import re, sys; from stepdistill_jax.commands.main import main;"
        f"code = main(['prepare', 'jsonl', '--source', {str(path)!r}, '--name', 'mine',"
        f" '--data-dir', {str(tmp_path / 'data')!r}]);"
        # not ru_maxrss: in a child it begins at its parent's
        r"peak = re.search(r'VmHWM:\s+(\d+) kB', open('/proc/self/status').read())[1];"
        "print(int(peak) // 1024); sys.exit(code)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    seconds, peak = time.monotonic() - start, int(done.stdout)
    fine = done.returncode == 2 and done.stderr.count("\n") == 1 and peak < 400
    fine = fine and f"{path}:2: a line of more than 16 MiB" in done.stderr
    seen = f"peak {peak} MiB, {seconds:.1f} s with Python's start"
    record_fault("a line of 1 GiB, by `prepare`", tried=1, survived=int(fine), seen=seen)
    assert fine, (seen, done.stderr)
