"""Reading JSON lines, and knowing early what cannot be written."""

import os

import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import check_writable, json_lines, read_jsonl


def test_json_lines_goes_on_after_a_bad_line_and_read_jsonl_stops_there(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n[2]\n{"a": 3}')
    (one, first), (three, bad), (four, last) = json_lines(path)
    assert (one, three, four) == (1, 3, 4)
    assert (first, last) == ({"a": 1}, {"a": 3})
    assert str(bad) == f"{path}:3: expected a JSON object, got list"
    rows = read_jsonl(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(InputError, match=r"a\.jsonl:3: expected a JSON object"):
        next(rows)


def test_what_cannot_be_read_twice_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        (tmp_path / "pipe", "pipe: is a pipe or device; save it to a file first"),
        ("/dev/null", "/dev/null: is a pipe or device"),
        (tmp_path, "expected a JSON-lines file, got a folder"),
        (tmp_path / "absent", "absent: no such file"),
    ):
        with pytest.raises(InputError, match=message):
            list(read_jsonl(name))
    (tmp_path / "file").write_text("{}\n")
    (tmp_path / "link").symlink_to("file")
    assert list(read_jsonl(tmp_path / "link")) == [(1, {})]


def test_a_path_that_cannot_be_written_is_refused_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "folder" / "f.json")
    with pytest.raises(InputError, match=r"^--output .*: expected a file to write, got a folder"):
        check_writable(tmp_path, "--output")
    with pytest.raises(InputError, match=r"f\.json: cannot be written \(.*file is not a folder\)"):
        check_writable(tmp_path / "file" / "f.json")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(InputError, match=r"f\.json: cannot be written \(no permission in "):
        check_writable(tmp_path / "new" / "f.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
