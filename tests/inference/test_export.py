"""An exported directory: the same answers, opened by `transformers`, whole or not there at all."""

import importlib
import json

import numpy as np
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import export, load_model, predict
from stepdistill_jax.inference import export as export_function


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """(result, directory) of the best step."""
    folder = tmp_path_factory.mktemp("export") / "new" / "model"
    return export(workdir, folder), folder


def test_predict_gives_the_same_bytes_as_on_the_workdir(
    exported, workdir, questions, write_rows, tmp_path
):
    source = write_rows(questions[:100])
    predict(workdir, source, tmp_path / "a.jsonl", step="best", with_rationale=True)
    predict(exported[1], source, tmp_path / "b.jsonl", with_rationale=True)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_the_directory_holds_what_its_readers_want(exported, task_info):
    result, folder = exported
    assert result["step"] == 3
    assert (
        result["files"]
        == sorted(p.name for p in folder.iterdir())
        == [
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "spiece.model",
            "stepdistill.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    model = load_model(folder)
    assert model.task_info.objectives == task_info.objectives
    assert model.task_info.provenance["step"] == 3
    assert model.task_info.provenance["metrics"]["label_accuracy"] == 0.75
    card = (folder / "README.md").read_text()
    for part in ("`predict: {input}`", "Step 3", "label accuracy: 0.75", "roads", "2305.02301"):
        assert part in card
    assert folder.parent.stat().st_mode == folder.stat().st_mode, "readable as any new folder"
    assert [p.name for p in folder.parent.iterdir()] == ["model"], "nothing is left beside it"


def test_transformers_opens_it_and_gives_our_labels(exported, questions, write_rows, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    _, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    assert model.lm_head.weight is not model.shared.weight
    short = [q for q in questions if len(q["input"].split()) < 10][:25]
    assert model.generation_config.max_new_tokens == 8
    predict(folder, write_rows(short), tmp_path / "out.jsonl")
    ours = [json.loads(line)["label"] for line in (tmp_path / "out.jsonl").open()]
    for question, label in zip(short, ours, strict=True):
        inputs = tokenizer("predict: " + question["input"], return_tensors="pt")
        # no cache: it breaks in transformers 5 where encoder and decoder differ in depth
        with torch.no_grad():
            ids = model.generate(**inputs, use_cache=False, do_sample=False)[0]
        known = [i for i in ids.tolist() if i < len(tokenizer)]
        assert tokenizer.decode(known, skip_special_tokens=True) == label
    assert len(set(ours)) > 5


def test_tokenizer_json_gives_the_same_ids(exported):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = load_model(exported[1]).vocabulary
    tokenizer = tokenizers.Tokenizer.from_file(str(exported[1] / "tokenizer.json"))
    for text in ("with rain , the truck", "", "a  b\nÉ 🎉", "<extra_id_0>"):
        assert tokenizer.encode(text).ids == [*vocabulary.encode(text), 1]


def test_weights_are_those_of_the_step(exported, workdir):
    want, got = load_model(workdir, 3).params, load_model(exported[1]).params
    np.testing.assert_array_equal(got["token_embedder"], want["token_embedder"])
    other = load_model(workdir, "last").params
    assert np.abs(np.asarray(got["token_embedder"] - other["token_embedder"])).max() > 0.1


def test_nothing_is_overwritten(workdir, tmp_path, model_dir):
    (tmp_path / "notes.txt").write_text("mine")
    for target, message in (
        (tmp_path, "is not empty"),
        (tmp_path / "notes.txt", "is a file"),
        (tmp_path / "notes.txt" / "model", "cannot be written"),
    ):
        with pytest.raises(InputError, match=message):
            export_function(workdir, target)
    for source, message in (
        (model_dir, "not a workdir"),
        (tmp_path / "none", "none: no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            export_function(source, tmp_path / "new")
    with pytest.raises(InputError, match="9"):
        export_function(workdir, tmp_path / "new", step=9)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(workdir, tmp_path, monkeypatch):
    module = importlib.import_module("stepdistill_jax.inference.export")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_params", fails)
    with pytest.raises(OSError, match="disk full"):
        export(workdir, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_the_target(workdir, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    export(workdir, target, step="last")
    assert load_model(target).task_info.provenance["step"] == 5


def test_what_a_killed_export_left_is_removed_and_other_folders_are_kept(workdir, tmp_path):
    for name in (".model.partial-123/model", ".model.partial-notes", ".model2.partial-123/model2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    export(workdir, tmp_path / "model")
    left = {".model.partial-notes", ".model2.partial-123", "model"}
    assert {p.name for p in tmp_path.iterdir()} == left


def test_a_second_export_to_a_target_is_refused_and_the_first_one_ends_well(
    workdir, tmp_path, monkeypatch
):
    module = importlib.import_module("stepdistill_jax.inference.export")
    save_params, refused = module.save_params, []

    def meets_another(*args):
        with pytest.raises(InputError, match=r"model: another run is writing it"):
            export(workdir, tmp_path / "model")
        refused.append(True)
        return save_params(*args)

    monkeypatch.setattr(module, "save_params", meets_another)
    export(workdir, tmp_path / "model")
    assert refused and [p.name for p in tmp_path.iterdir()] == ["model"]
