"""The page about a dataset: its numbers, and that it escapes every text of the dataset."""

import base64
import html.parser
import json
import re

import pytest
import scipy.stats

from stepdistill_jax.data.counts import SplitCounts
from stepdistill_jax.data.defects import Defect
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.reading import CheckedExample
from stepdistill_jax.data.report import page, wilson
from stepdistill_jax.errors import InputError

VOID = {"meta", "img"}
HOSTILE = "<script>alert(1)</script> & \"'</pre></table>"
RESULT = {
    "name": "mine",
    "fingerprint": "0" * 64,
    "metric": "text_match",
    "notes": [f"a note on {HOSTILE}"],
    "warnings": [{"message": f"a warning of {HOSTILE}"}],
}


class Balance(html.parser.HTMLParser):
    """Raises if a tag is closed that is not open; collects text and tags."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _parsed(text):
    parser = Balance()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def _count(rows):
    counts = SplitCounts()
    for row in rows:
        counts.add(row)
    return counts


@pytest.fixture
def splits():
    right = {"teacher_accuracy": True, "teacher_accuracy_repaired": True}
    wrong = {"teacher_accuracy": False, "teacher_accuracy_repaired": False}
    rows = [
        CheckedExample(Example(f"r{i}", "one two", "yes", "why"), right=right) for i in range(6)
    ]
    rows += [
        CheckedExample(Example(HOSTILE, HOSTILE, "yes"), (Defect("no_answer", f"{HOSTILE}.json", 7, HOSTILE),), wrong),
        CheckedExample(Example("b", "one two three", "no", "why not"), (Defect("runs_on", "f", 2, "t"),), right),
    ]  # fmt: skip
    return {"train": _count(rows), "test": _count(rows[:1])}


def test_texts_of_the_dataset_are_escaped_and_nothing_is_loaded(splits):
    text = page(RESULT, splits)
    parsed = _parsed(text)
    assert "script" not in parsed.tags
    assert parsed.links and all(link.startswith("data:image/svg+xml;") for link in parsed.links)
    assert "url(" not in text and "@import" not in text
    # shown as written: a note, a warning, an id, a file, the text
    assert sum(HOSTILE in data for data in parsed.text) == 5


def test_figures_are_those_of_the_rows(splits):
    text = page(RESULT, splits)
    cells = [
        re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text, re.S)
    ]
    assert ["train", "8", "7", "0", "2"] in cells
    # scipy's interval
    assert next(c for c in cells if c[:2] == ["train", "teacher_accuracy"])[2:5] == [
        "87.50%",
        "52.91% to 97.76%",
        "7 of 8",
    ]
    shares = {c[0]: c[1:] for c in cells if len(c) == 3 and c[1].endswith("%")}
    assert shares["with a rationale"] == ["87.5%", "100.0%"]
    assert shares["no defect other than runs_on"] == ["87.5%", "100.0%"]
    assert shares["without no_answer"] == ["87.5%", "100.0%"]
    assert shares["without runs_on"] == ["87.5%", "100.0%"]
    assert "train: words of an input" in text and "test: words of a rationale" in text


def test_a_dataset_without_teacher_or_defects_has_a_page():
    text = page(
        RESULT | {"notes": []}, {"train": _count([CheckedExample(Example("1", "q", "yes"))])}
    )
    _parsed(text)
    assert "There are none." in text and "None found." in text


@pytest.mark.parametrize(("right", "rows"), [(0, 10), (10, 10), (74, 100), (7, 8), (1, 1)])
def test_wilsons_interval_is_scipys(right, rows):
    interval = scipy.stats.binomtest(right, rows).proportion_ci(0.95, method="wilson")
    assert wilson(right, rows) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_histograms_hold_every_row_with_its_quantiles_and_the_same_bytes():
    counts = {1: 50, 2: 44, 9: 6}
    rows = [
        CheckedExample(Example(f"{n}.{i}", "word " * n, "yes"))
        for n in counts
        for i in range(counts[n])
    ]
    text = page(RESULT, {"train": _count(rows)})
    assert "train: words of an input (median 1, at most 9 in 95 % of rows, greatest 9)" in text
    picture = base64.b64decode(_parsed(text).links[0].partition(",")[2]).decode()
    corner = r"[\d.]+ ([\d.]+) \n"
    bars = re.findall(f'M {corner}L {corner}L {corner}L {corner}z\n" clip-path', picture)
    heights = [float(base) - float(top) for base, _, top, _ in bars]
    assert [h / heights[0] for h in heights] == pytest.approx(
        [1, 0.88, 0, 0, 0, 0, 0, 0, 0.12], abs=1e-4
    )
    assert page(RESULT, {"train": _count(rows)}) == text


def test_prepare_writes_the_page_also_of_an_unchanged_dataset(tmp_path):
    source = tmp_path / "test.jsonl"
    source.write_text(json.dumps({"input": "q", "label": "a"}) + "\n")
    options = {"source": tmp_path, "new_name": "mine", "data_dir": tmp_path / "data"}
    prepare("jsonl", **options)
    result = prepare("jsonl", **options, report=tmp_path / "pages")
    assert result["reused"]
    assert result["report"] == str(tmp_path / "pages" / "mine.html")
    _parsed((tmp_path / "pages" / "mine.html").read_text())


def test_a_report_that_cannot_be_written_stops_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"`report` .*cannot be written"):
        prepare("delivery", data_dir=tmp_path / "data", report=tmp_path / "file")
    assert not (tmp_path / "data").exists()
