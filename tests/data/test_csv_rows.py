"""CSV and TSV as rows: values, lines of the file, and the reasons for bad rows."""

import csv

import pytest

from stepdistill_jax.data.csv_rows import each_csv_row
from stepdistill_jax.data.rows import BadRow
from stepdistill_jax.errors import InputError

OPEN = "a quote is opened and never closed"


def _read(tmp_path, text, name="rows.csv", **options):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(each_csv_row(path, **options))


def test_cells_are_those_of_pythons_csv_and_lines_those_of_the_file(tmp_path):
    rows = [
        ["a, b", 'say "wet"', "plain"],
        ["two\nlines\r\nand more", " kept ", "x"],
        ["1", "2", "3"],
    ]
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["one", "two", "three"], *rows[:1], [], *rows[1:]])
    found = list(each_csv_row(path))
    assert [list(row.fields.values()) for row in found] == rows
    assert {tuple(row.fields) for row in found} == {("one", "two", "three")}
    # the empty line is no row; the second row has three lines
    assert [(row.number, row.line) for row in found] == [(1, 2), (2, 4), (3, 7)]
    assert [row.where for row in found] == [f"{path}:{line}" for line in (2, 4, 7)]


def test_a_byte_order_mark_blank_cells_and_numbers(tmp_path):
    text = "\ufeff input ,weight,n\nq,0.5,0.5\nr, ,\n , ,\n"
    first, second = _read(tmp_path, text, numbers=["weight"])
    assert first.fields == {"input": "q", "weight": 0.5, "n": "0.5"}
    assert second.fields == {"input": "r", "weight": None, "n": None}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "x\ty\n1,2\t3\n"),
        ("a.csv", "x;y\n1,2;3\n"),
        ("a.CSV", 'x,y\n"1,2",3\n'),
        ("a.csv", "\n \r\nx;y\n1,2;3\n"),
        ("a.csv", "\ufeffsep=;\r\nx;y\r\n1,2;3\r\n"),
        ("a.csv", "SEP=\t\n\nx\ty\n1,2\t3\n"),
    ],
)
def test_what_separates_cells_follows_the_name_and_the_header(tmp_path, name, text):
    (row,) = _read(tmp_path, text, name)
    assert row.fields == {"x": "1,2", "y": "3"}


def test_a_bad_row_is_named_by_its_first_line_and_costs_no_other_row(tmp_path):
    text = 'x,y\n1,2\n3\n4,"open\n5,6\n7,"in"side\n8,9,10\n"two\nlines",11\n12,"open'
    found = _read(tmp_path, text)
    assert [
        (row.line, list(row.fields.values())) for row in found if not isinstance(row, BadRow)
    ] == [
        (2, ["1", "2"]),
        (5, ["5", "6"]),
        (8, ["two\nlines", "11"]),
    ]
    assert [(row.line, row.reason) for row in found if isinstance(row, BadRow)] == [
        (3, "the row has 1 cell, but the header has 2 columns"),
        (4, f"{OPEN} (line 5 is read as a separate row)"),
        (
            6,
            'a quoted cell continues after its closing quote; write a quote inside a cell twice ("")',
        ),
        (7, "the row has 3 cells, but the header has 2 columns"),
        (10, OPEN),
    ]


def test_a_line_that_is_no_text_costs_its_own_row_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill_jax.runtime.files.MAX_LINE_BYTES", 40)
    long = b"5," + b"z" * 60 + b"\n"
    text = (
        b'x,y\n1,2\nna\xefve,1\n3,a\0b\n"two\nl\xffnes",4\n'
        + long
        + b'6,7\n"8\xff,9\n10,\xef\xbf\xbd\n'
    )
    found = _read(tmp_path, text)
    good = [row for row in found if not isinstance(row, BadRow)]
    # the last one holds a replacement character of its own
    assert [(r.line, r.number, r.fields["x"], r.fields["y"]) for r in good] == [
        (2, 1, "1", "2"),
        (8, 6, "6", "7"),
        (10, 8, "10", "\ufffd"),
    ]
    bad = {row.line: row.reason for row in found if isinstance(row, BadRow)}
    assert list(bad) == [3, 4, 5, 7, 9]
    assert bad[3].startswith("not UTF-8 (byte 0xef at column 3); save the file as UTF-8")
    assert f"iconv -f WINDOWS-1252 -t UTF-8 {tmp_path / 'rows.csv'}" in bad[3]
    assert bad[4] == "contains NUL bytes, so it is not text"
    assert bad[5].startswith("line 6: not UTF-8 (byte 0xff at column 2)")
    assert bad[7].startswith("a line of more than ")
    assert bad[9].startswith("not UTF-8 (byte 0xff at column 3)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("na\u00efve,y\n".encode("latin-1"), r"rows\.csv:1: not UTF-8 \(byte 0xef at column 3\); save the file as UTF-8 .*iconv -f WINDOWS-1252"),
        ("x,y\n1,2\n".encode("utf-16"), r"rows\.csv:1: not UTF-8 .*; it looks like UTF-16, so save it as UTF-8"),
        ("x,y\n1,2\n".encode("utf-16-le"), r"rows\.csv:1: contains NUL bytes, so it is not text"),
        (b"PK\x03\x04\xff\n", r"rows\.csv:1: not UTF-8 .*it is a zip archive"),
        (b"x,y,x\n1,2,3\n", r"rows\.csv:1: the header has the column 'x' twice"),
        (b'x,"y\n1,2\n', r"rows\.csv:1: a quote is opened"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused_with_line_and_what_to_do(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        _read(tmp_path, content)
