import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.data.corpora import json_list
from stepdistill_jax.errors import InputError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("lists") / "texts.json"


@given(st.lists(st.text()), st.sampled_from([None, 0, 2]), st.integers(1, 9))
def test_a_list_is_read_as_json_reads_it(path, texts, indent, piece):
    path.write_text(json.dumps(texts, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "PIECE", piece)  # splits escapes and numbers anywhere
        assert list(json_list.read_texts(path)) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "b"}', "expected a JSON list of texts"),
        (b'"a"', "expected a JSON list of texts"),
        (b'["a",\n"b"', r"texts\.json:2: broken JSON"),
        (b'["a",\n"b" "c"]', r"texts\.json:2: broken JSON"),
        (b'["a",]', r"texts\.json:1: broken JSON"),
        (b'["a"] 1', r"texts\.json:1: broken JSON"),
        (b"", r"texts\.json:1: broken JSON"),
        (b'["a", 1]', "item 2 must be text, got int"),
        (b'["a", ["b"]]', "item 2 must be text, got list"),
        (b'["a", null]', "item 2 must be text, got NoneType"),
        (b'["\xff"]', "not UTF-8"),
    ],
)
def test_what_is_no_list_of_texts_is_named(path, content, message):
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(json_list.read_texts(path))


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.json: no such file"):
        list(json_list.read_texts(tmp_path / "absent.json"))


def test_a_large_file_takes_the_memory_of_a_piece(path):
    path.write_text(json.dumps(["x" * 1000] * 20_000))
    tracemalloc.start()
    assert sum(1 for _ in json_list.read_texts(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6  # the file is 20 MB; measured 5.3 MB


def test_half_a_surrogate_pair_is_named_by_its_item(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text('["fine", "\\ud83d"]')
    with pytest.raises(InputError, match=r"texts\.json: item 2 is not valid text"):
        list(json_list.read_texts(path))
