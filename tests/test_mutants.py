"""The mutants of `make mutants`: each can be planted in today's code, and each has tests that exist."""

import importlib.util
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).with_name("mutants.py")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mutant_is_found_once_and_has_tests(script):
    assert len(script.MUTANTS) >= 78
    assert [line for mutant in script.MUTANTS for line in script.problems(mutant)] == []
    ids = [mutant.id for mutant in script.MUTANTS]
    assert len(set(ids)) == len(ids)
    assert all(mutant.old != mutant.new for mutant in script.MUTANTS)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"old": "no such text"}, "X: `old` is in code.py 0 times, expected once"),
        ({"old": "twice"}, "X: `old` is in code.py 2 times, expected once"),
        ({"file": "moved.py"}, "X: `old` is in moved.py 0 times, expected once"),
        ({"tests": []}, "X: no tests are listed"),
        ({"tests": ["test_gone.py"]}, "X: no such test file: test_gone.py"),
        ({"tests": ["test_code.py::test_gone[1]"]}, "X: no such test: test_code.py::test_gone[1]"),
    ],
)
def test_a_mutant_that_cannot_be_tried_is_named(script, tmp_path, changes, line):
    (tmp_path / "code.py").write_text("once, twice, twice")
    (tmp_path / "test_code.py").write_text("def test_it(): pass")
    good = script.Mutant("X", "", "code.py", "once", "", ["test_code.py::test_it"])
    assert script.problems(good, tmp_path) == []
    (found,) = script.problems(good._replace(**changes), tmp_path)
    assert found.startswith(line)


def test_parts_hold_each_mutant_once(script):
    parts = [script.chosen(None, f"{k}/4") for k in (1, 2, 3, 4)]
    assert sorted(m.id for part in parts for m in part) == sorted(m.id for m in script.MUTANTS)
    assert [m.id for m in script.chosen("S1,D3", "1/1")] == ["D3", "S1"]
    for only, part, says in (("D3,Z9", "1/1", "Z9"), (None, "5/4", "5/4"), (None, "half", "half")):
        with pytest.raises(SystemExit, match=says):
            script.chosen(only, part)
