"""Models by name, from a hub that is made up: what is downloaded, and what is said where there is no network."""

import pathlib
import shutil
import types

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from stepdistill_jax.commands.main import main
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats import hub
from stepdistill_jax.formats.directory import read_model_files

NAME = "google/t5-v1_1-small"


class Hub:
    """What a hub holds, and what was asked of it."""

    def __init__(self, folder: pathlib.Path):
        self.files, self.error, self.calls = {}, None, []
        self._cache = folder

    def model_info(self, name, *, timeout):
        self.calls.append(("info", name))
        if self.error:
            raise self.error
        return types.SimpleNamespace(
            siblings=[types.SimpleNamespace(rfilename=file) for file in self.files]
        )

    def snapshot_download(self, name, *, allow_patterns=None, local_files_only=False):
        self.calls.append(("local" if local_files_only else "download", name))
        folder = self._cache / name
        if local_files_only:
            if not folder.exists():
                raise LocalEntryNotFoundError("it is not in the cache")
            return str(folder)
        folder.mkdir(parents=True)
        for file in allow_patterns:
            shutil.copy(self.files[file], folder / file)
        return str(folder)


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    found = Hub(tmp_path / "cache")
    for name in ("model_info", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(found, name))
    monkeypatch.chdir(tmp_path)
    hub._of_hub.cache_clear()
    yield found
    hub._of_hub.cache_clear()


def test_a_name_is_downloaded_once_and_only_what_is_read(made_up, model_dir, tmp_path):
    for file in ("config.json", "spiece.model", "tokenizer_config.json", "model.safetensors"):
        made_up.files[file] = model_dir / file
    for file in ("README.md", "tf_model.h5", "pytorch_model.bin", "onnx/model.onnx"):
        made_up.files[file] = None  # would be an error to copy
    folder = hub.local_model(NAME)
    assert {p.name for p in pathlib.Path(folder).iterdir()} == {
        *("config.json", "spiece.model", "tokenizer_config.json", "model.safetensors")
    }
    assert read_model_files(folder).vocab_size == read_model_files(model_dir).vocab_size
    assert hub.local_model(NAME) == folder
    assert made_up.calls == [("info", NAME), ("download", NAME)]


def test_without_network_the_cache_will_do(made_up, model_dir, capsys):
    made_up.error = ConnectionError("Name or service not known")
    shutil.copytree(model_dir, made_up._cache / NAME)
    assert hub.local_model(NAME) == str(made_up._cache / NAME)
    assert (
        "huggingface.co does not answer, so the model is taken from the local cache"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("cached", ["nothing", "half a model"])
def test_without_network_or_cache_the_command_for_elsewhere_is_said(
    made_up, model_dir, capsys, cached
):
    made_up.error = ConnectionError("Name or\nservice not known")
    if cached == "half a model":
        (made_up._cache / NAME).mkdir(parents=True)
        shutil.copy(model_dir / "config.json", made_up._cache / NAME)
    sets = ["--set", "TASK=delivery", "--set", f"INIT_FROM={NAME}"]
    assert main(["train", "finetune", "--workdir", "run", *sets]) == 2
    assert capsys.readouterr().err == (
        f"stepdistill: error: INIT_FROM {NAME}: no such folder here, and huggingface.co cannot be"
        " reached (Name or service not known); on a machine with internet access run"
        f" `hf download {NAME} --local-dir models/t5-v1_1-small`, copy that folder here, and set"
        " INIT_FROM=models/t5-v1_1-small\n"
    )
    assert not pathlib.Path("run").exists()


@pytest.mark.parametrize("reached", [True, False])
def test_a_mistyped_folder_names_its_neighbour(made_up, capsys, reached):
    """The owner is a folder here, so the name is a path: it gives no command to download it."""
    response = types.SimpleNamespace(headers={}, request=None, status_code=404)
    missing = RepositoryNotFoundError("404", response=response)
    made_up.error = missing if reached else ConnectionError("Name or service not known")
    pathlib.Path("runs/mine").mkdir(parents=True)
    for name in ("runs/mien", "./runs/mien"):
        sets = ["--set", "TASK=delivery", "--set", f"INIT_FROM={name}"]
        assert main(["train", "finetune", "--workdir", "run", *sets]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("; did you mean 'mine'?") and "hf download" not in line
    assert made_up.calls == [("info", "runs/mien"), *(() if reached else [("local", "runs/mien")])]


def test_a_name_that_is_none_or_has_no_weights_is_one_line(made_up):
    made_up.files = {"config.json": None, "tf_model.h5": None}
    with pytest.raises(InputError, match=r"has none of the files model\.safetensors"):
        hub.local_model("google/only-tensorflow")
    response = types.SimpleNamespace(headers={}, request=None, status_code=404)
    made_up.error = RepositoryNotFoundError("404", response=response)
    with pytest.raises(InputError, match="no such folder here, and no public model of this name"):
        hub.local_model("google/t5-v1_1-smal")


@pytest.mark.parametrize(
    "given",
    ["here/model", "models/t5-v1_1-base", "/a/b", "a/b/c", "model", "gs://a/b", "../a", "a/"],
)
def test_what_is_a_path_is_left_alone(made_up, given):
    pathlib.Path("here/model").mkdir(parents=True)
    assert hub.local_model(given) == given
    assert made_up.calls == []


def test_shards_come_with_their_index():
    listed = ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    listed += ["model-00002-of-00002.safetensors", "model-large.safetensors", "spiece.model"]
    assert hub.needed_files(listed, NAME) == [
        *("config.json", "spiece.model", *listed[1:4]),
    ]
