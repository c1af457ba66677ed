"""Files that a command may write over: its own, and no other file under any name."""

import errno
import json
import os
import pathlib

import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import atomic_write
from stepdistill_jax.runtime.locks import open_locked
from stepdistill_jax.runtime.overwriting import Made, check_apart, check_folder, check_outputs
from stepdistill_jax.runtime.streams import outputs_of

LINES = Made("predict", b'{"id": "', ("id", "label"))
RESULT = Made("evaluate", b'{\n  "task": "', ("task",))
PAGE = Made("report", b"<!DOCTYPE html>\n<title>Ours")
OWN = ["", '{"id": "1", "label": "a"}\n{"id": "2"', '{"id": "1", "more": 1, "label": "a"}']
THEIRS = [
    "\n",
    "a note",
    '{"id": "1"}\n',
    '{"id": "1", "label"',
    '{"label": "a", "id": "1"}\n',
    "{",
]


@pytest.mark.parametrize("text", [*OWN, *THEIRS])
def test_an_output_is_known_by_its_beginning_and_its_fields(tmp_path, text):
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    if text in OWN:
        check_outputs({path: LINES})
    else:
        said = (
            r"out\.jsonl: exists and was not written by `predict`, so it is not overwritten; move"
        )
        with pytest.raises(InputError, match=said):
            check_outputs({path: LINES})
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "made", "part"),
    [
        ("out.csv", LINES, "`predict` writes JSON lines; name the output out.jsonl"),
        ("a.b.TSV", RESULT, "`evaluate` writes JSON; name the output a.b.json"),
        ("out", LINES, ""),
        ("out.json", LINES, ""),
    ],
)
def test_json_is_not_written_under_the_name_of_a_table(tmp_path, name, made, part):
    if not part:
        return check_outputs({tmp_path / name: made})
    with pytest.raises(InputError) as error:
        check_outputs({tmp_path / name: made})
    assert str(error.value) == f"{tmp_path / name}: {part}"


@pytest.mark.parametrize(
    ("text", "ours"),
    [("", True), ('{"i', True), ('{"id": "1", "la', True), ('{"id": "1"}\n{', False), ("a", False)],
)
def test_a_partial_may_be_half_a_write(tmp_path, text, ours):
    (tmp_path / "out.jsonl.partial").write_text(text)
    if ours:
        check_outputs({tmp_path / "out.jsonl": LINES})
    else:
        with pytest.raises(InputError, match=r"out\.jsonl\.partial: exists and was not written"):
            check_outputs({tmp_path / "out.jsonl": LINES})


def test_a_page_is_known_by_its_head(tmp_path):
    page = tmp_path / "report.html"
    page.write_text("<!DOCTYPE html>\n<title>Ours: 3 runs</title>")
    check_outputs({page: PAGE})
    page.write_text("<!DOCTYPE html>\n<title>My thesis</title>")
    with pytest.raises(InputError, match="was not written by `report`"):
        check_outputs({page: PAGE})


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial"])
def test_links_pipes_and_devices_are_never_replaced(tmp_path, name):
    (tmp_path / "target").write_text("")
    for make, kind in (
        (lambda path: path.symlink_to("target"), "link"),
        (lambda path: path.symlink_to("nowhere"), "link"),
        (os.mkfifo, "pipe or device"),
    ):
        make(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: is a {kind}, which would be replaced"):
            check_outputs({tmp_path / "out.jsonl": LINES})
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match="/dev/null: is a pipe or device"):
        check_outputs({pathlib.Path("/dev/null"): LINES})


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_input_is_known_under_all_its_names(tmp_path, link):
    given = tmp_path / "in.jsonl"
    given.write_text("{}\n")
    link(given, tmp_path / "same")
    (tmp_path / "folder").mkdir()
    (tmp_path / "way").symlink_to("folder")
    for written in (given, tmp_path / "same", tmp_path / "way" / ".." / "in.jsonl"):
        with pytest.raises(
            InputError, match=r"it is the input .*in\.jsonl, which would be overwritten"
        ):
            check_apart([written], [None, given])
    check_apart([tmp_path / "other", tmp_path / "in.jsonl2"], [given])
    with pytest.raises(InputError, match="it holds the input"):
        check_apart([tmp_path / "folder"], [tmp_path / "way" / "not" / "there.jsonl"])


def test_files_beside_a_missing_index_are_somebody_elses(tmp_path):
    check_folder(tmp_path, "report.html", PAGE, ["size.csv"])
    (tmp_path / "size.csv").write_text("theirs")
    with pytest.raises(InputError, match=r"size\.csv: exists .*\(no report\.html next to it\)"):
        check_folder(tmp_path, "report.html", PAGE, ["size.csv"])
    (tmp_path / "report.html").write_text("<!DOCTYPE html>\n<title>Ours")
    check_folder(tmp_path, "report.html", PAGE, ["size.csv"])


@pytest.mark.parametrize("place", ["symlink", "hard link", "pipe"])
def test_a_partial_that_leads_elsewhere_is_not_written_through(tmp_path, place):
    target, partial = tmp_path / "notes", tmp_path / "f.json.partial"
    target.write_text("mine")
    {
        "symlink": lambda: partial.symlink_to(target),
        "hard link": lambda: os.link(target, partial),
        "pipe": lambda: os.mkfifo(partial),
    }[place]()
    said = r"f\.json\.partial: is a link, hard link, pipe or device, which is never overwritten; remove it"
    with pytest.raises(InputError, match=said), atomic_write(tmp_path / "f.json") as f:
        f.write("{}")
    with pytest.raises(InputError, match=said):
        open_locked(partial)
    assert target.read_text() == "mine" and not (tmp_path / "f.json").exists()


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, order_on_disk):
    with atomic_write(tmp_path / "f.json") as f:
        json.dump({}, f)
    assert order_on_disk == ["fsync f.json.partial", "rename f.json"]


def test_an_output_that_cannot_be_read_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    path.write_text("somebody's")

    def refuse(*args, **kwargs):  # root may read everything
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match=r"out\.jsonl: exists but cannot be read \(Permission"):
        check_outputs({path: LINES})


@pytest.mark.parametrize("empty", ["out.jsonl.partial", "out.jsonl.partial.json"])
def test_an_empty_file_does_not_make_the_other_one_ours(tmp_path, empty):
    for name in ("out.jsonl.partial", "out.jsonl.partial.json"):
        (tmp_path / name).write_text("" if name == empty else "my notes")
    outputs, known = outputs_of(tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="was not written by `predict`"):
        check_outputs(outputs, known=known)
