import sys

from stepdistill_jax.tasks.lookup import search_current_folder


def test_the_current_folder_is_searched_last_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", ["first"])
    monkeypatch.chdir(tmp_path)
    search_current_folder()
    search_current_folder()
    assert sys.path == ["first", str(tmp_path)]
