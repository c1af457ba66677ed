import pathlib

import pytest

from stepdistill_jax.data.prepared import default_data_dir, open_prepared
from stepdistill_jax.errors import InputError


def test_an_unprepared_dataset_names_those_that_are_and_the_nearest(delivery_data_dir):
    with pytest.raises(InputError) as caught:
        open_prepared("delivry", delivery_data_dir)
    assert "(prepared: delivery); did you mean 'delivery'?" in str(caught.value)
    assert "run `stepdistill prepare jsonl --source FILE --name delivry`" in str(caught.value)


def test_an_unknown_split_names_those_there_are(delivery_data_dir):
    dataset = open_prepared("delivery", delivery_data_dir)
    with pytest.raises(
        InputError, match=r"no split 'tset' \(the splits are train, validation, test\); did"
    ):
        dataset.examples("tset")


@pytest.mark.parametrize("text", ["{", '{"name": "mine"}', "[]", '{"fingerprint": 1}'])
def test_a_damaged_description_is_named(tmp_path, text):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=r"dataset\.json"):
        open_prepared("mine", tmp_path)


def test_the_default_folder_is_the_variables_else_the_users_cache(monkeypatch):
    monkeypatch.setenv("STEPDISTILL_DATA_DIR", "~/mine")
    assert default_data_dir() == pathlib.Path.home() / "mine"
    monkeypatch.delenv("STEPDISTILL_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/somewhere")
    assert default_data_dir().name == "stepdistill"
