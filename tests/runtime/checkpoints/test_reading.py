import hypothesis.strategies as st
from hypothesis import given

from stepdistill_jax.runtime.checkpoints.reading import dealt_out


def test_dealt_out_docstring():
    assert dealt_out({"a": 3, "b": 5, "c": 2, "d": 4}, 2) == [["b", "c"], ["d", "a"]]


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 1000)), st.integers(1, 5), st.randoms())
def test_each_file_is_one_processs_and_parts_are_as_large_as_files_allow(sizes, count, random):
    parts = dealt_out(sizes, count)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    names = list(sizes)
    random.shuffle(names)  # a listing's order
    assert dealt_out({name: sizes[name] for name in names}, count) == parts
