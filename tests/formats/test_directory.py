"""What a model directory says, and how it is refused when it says something else."""

import dataclasses
import json

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.data.objectives import Objective, step_by_step
from stepdistill_jax.data.vocabulary import Framing, load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import TaskInfo, read_model_files, write_model_files
from stepdistill_jax.formats.hf import save_params
from stepdistill_jax.formats.vocabulary_files import read_vocabulary
from stepdistill_jax.models.encoder_decoder import init_params
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime import stores

CONFIG = T5Config(
    vocab_size=256,
    emb_dim=24,
    num_heads=3,
    head_dim=5,
    mlp_dim=40,
    num_encoder_layers=4,
    num_decoder_layers=2,
    dropout_rate=0.05,
    num_buckets=16,
    max_distance=64,
    layer_norm_epsilon=1e-5,
)
INFO = TaskInfo(
    "roads",
    (Objective("label", "label: {input}", "{label}", 2.0), step_by_step()[1]),
    300,
    60,
    16,
    "value_match",
    ("a", "b c"),
    {"versions": {"jax": "1"}, "note": "é"},
    input_pair=True,
)
TEXTS = [
    "with rain , the truck takes the bridge .",
    "É überall naïve café 日本語 ½ ﬁ",
    "12 + 3.5 * ( 4 - 1 )",
]
# left out, since they are known to differ: texts that spell `</s>`, `<pad>` or `<unk>`, which
# transformers takes for the special token
HARD_TEXTS = [
    "",
    " ",
    "a  b",
    "  both ends  ",
    "new\nline",
    "tab\tbed",
    "carriage\r\nreturn",
    "É überall",
    "e\u0301 decomposed",
    "日本語 ½ ﬁ ſ ﷺ ①",  # noqa: RUF001
    "🎉 👨‍👩‍👧",
    "\u200b zero width \ufeff",
    "\u00a0no-break\u3000ideographic",
    "▁ lower ▁one eighth",
    "<extra_id_0> and <extra_id_99>",
    "<s> <0x41>",
    "nul \x00 byte",
    "bell \x07 escape \x1b delete \x7f",
    "a\u0308 n\u0303 o\u0302 c\u0327",
    "\U0001f1e9\U0001f1ea 👍🏽 ❤\ufe0f",
    "</s",
    "x" * 2000,
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory, train_spiece):
    file = train_spiece(tmp_path_factory.mktemp("vocabulary"), TEXTS, vocab_size=120)
    # any name will do
    return load_vocabulary(file.rename(file.with_name("own_name.model")))


@pytest.fixture
def directory(vocabulary, tmp_path):
    write_model_files(tmp_path, CONFIG, vocabulary, INFO)
    return tmp_path


def edit(directory, file, **changes):
    path = directory / file
    raw = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "REMOVED"}))


def test_all_is_read_back_as_written(directory, vocabulary):
    files = read_model_files(directory)
    assert files.config == CONFIG
    assert files.task_info == INFO
    assert files.vocabulary.fingerprint == vocabulary.fingerprint
    assert {p.name for p in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "spiece.model",
        "stepdistill.json",
        "tokenizer_config.json",
    }


def test_writing_into_the_vocabulary_s_own_folder_keeps_it(directory):
    files = read_model_files(directory)
    write_model_files(directory, CONFIG, files.vocabulary, INFO)
    assert read_model_files(directory).vocabulary.fingerprint == files.vocabulary.fingerprint


def test_a_bare_directory_has_no_task(directory):
    (directory / "stepdistill.json").unlink()
    assert read_model_files(directory).task_info is None


def test_bytes_need_no_vocabulary_file(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=384)
    write_model_files(tmp_path, config, load_vocabulary("bytes"), INFO)
    assert not (tmp_path / "spiece.model").exists()
    assert read_model_files(tmp_path).vocabulary.encode("aé") == [100, 198, 172]


@pytest.mark.parametrize("reader", ["AutoTokenizer", "T5Tokenizer"])
def test_transformers_gives_the_ids_of_our_vocabulary(directory, vocabulary, reader):
    transformers = pytest.importorskip("transformers")
    tokenizer = getattr(transformers, reader).from_pretrained(directory)
    assert len(tokenizer) == vocabulary.size, "no sentinels beyond the embedding"
    for text in HARD_TEXTS + TEXTS:
        assert tokenizer(text)["input_ids"] == [*vocabulary.encode(text), 1], repr(text)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.model_max_length == INFO.input_length


def test_transformers_gives_the_ids_of_bytes(tmp_path):
    transformers = pytest.importorskip("transformers")
    config, vocabulary = dataclasses.replace(CONFIG, vocab_size=384), load_vocabulary("bytes")
    write_model_files(tmp_path, config, vocabulary, INFO)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD_TEXTS:
        assert tokenizer(text)["input_ids"] == [*vocabulary.encode(text), 1], repr(text)


def test_transformers_reads_our_configuration(directory):
    transformers = pytest.importorskip("transformers")
    raw = transformers.AutoConfig.from_pretrained(directory)
    assert (raw.d_model, raw.d_kv, raw.d_ff, raw.num_heads) == (24, 5, 40, 3)
    assert (raw.num_layers, raw.num_decoder_layers, raw.vocab_size) == (4, 2, 256)
    assert (raw.dense_act_fn, raw.is_gated_act) == ("gelu_new", True)
    assert (raw.decoder_start_token_id, raw.eos_token_id, raw.pad_token_id) == (0, 1, 0)
    assert not raw.scale_decoder_outputs


def test_generate_of_transformers_works_where_the_decoder_is_deeper(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: no generate to call")
    from transformers import T5ForConditionalGeneration

    config = dataclasses.replace(CONFIG, vocab_size=384, num_encoder_layers=1, num_decoder_layers=2)
    write_model_files(tmp_path, config, load_vocabulary("bytes"), INFO)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    save_params(tmp_path, params, config)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert model.generate(torch.tensor([[5, 6, 1]])).shape[1] > 2


CONFIG_DEFECTS = {
    "model type": (
        {"model_type": "llama"},
        "model_type must be one of t5, mt5, umt5, t5gemma, got 'llama'",
    ),
    "activation": ({"feed_forward_proj": "tanh"}, "feed_forward_proj must be one of relu, gated-"),
    "scale": ({"scale_decoder_outputs": 1}, "scale_decoder_outputs must be true or false, got 1"),
    "missing": ({"d_kv": "REMOVED"}, "d_kv must be a whole number above 0, but it is missing"),
    "text": ({"d_ff": "big"}, "d_ff must be a whole number above 0, got 'big'"),
    "zero": ({"num_layers": 0}, "num_layers must be a whole number above 0, got 0"),
    "rate": (
        {"dropout_rate": 1.5},
        "dropout_rate must be a number of at least 0 and below 1, got 1.5",
    ),
    "vocabulary": ({"vocab_size": 10}, "vocab_size 10 is below the"),
}


@pytest.mark.parametrize("changes, message", CONFIG_DEFECTS.values(), ids=CONFIG_DEFECTS)
def test_a_wrong_configuration_is_refused_by_file_and_field(directory, changes, message):
    edit(directory, "config.json", **changes)
    with pytest.raises(InputError) as error:
        read_model_files(directory)
    assert str(directory / "config.json") in str(error.value) and message in str(error.value)


TASK_DEFECTS = {
    "no task": ({"task": "REMOVED"}, "task must be a string, but it is missing"),
    "length": ({"input_length": "long"}, "input_length must be a whole number above 0"),
    "objectives": ({"objectives": []}, "objectives must contain at least one objective"),
    "objective": ({"objectives": [{"name": "label"}]}, "objectives must have name, input_template"),
    "template": (
        {
            "objectives": [
                {"name": "a", "input_template": "{X}", "target_template": "", "weight": 1}
            ]
        },
        "unknown field {X}",
    ),
    "labels": ({"labels": [1]}, "labels must be a list of strings"),
    "not ours": ({"format": "REMOVED"}, "'format' is missing"),
    "newer": ({"format": 2}, "format 2 is too new for this version, which reads format 1"),
}


@pytest.mark.parametrize("changes, message", TASK_DEFECTS.values(), ids=TASK_DEFECTS)
def test_a_wrong_task_is_refused_by_file_and_field(directory, changes, message):
    edit(directory, "stepdistill.json", **changes)
    with pytest.raises(InputError) as error:
        read_model_files(directory)
    assert str(directory / "stepdistill.json") in str(error.value)
    assert message in str(error.value)


def test_what_is_no_model_directory_is_refused(directory, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match=r"it has no config\.json"):
        read_model_files(empty)
    with pytest.raises(InputError, match="no such folder"):
        read_model_files(empty / "none")
    (directory / "spiece.model").unlink()
    with pytest.raises(InputError, match="no vocabulary"):
        read_model_files(directory)


def test_a_vocabulary_that_transformers_saved_as_json_alone_is_refused_with_what_to_copy(directory):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.T5Tokenizer.from_pretrained(directory)
    (directory / "spiece.model").unlink()
    tokenizer.save_pretrained(directory)
    assert (directory / "tokenizer.json").exists()
    assert not (directory / "spiece.model").exists(), "transformers writes it again: say so"
    with pytest.raises(
        InputError, match=r"no vocabulary .*copy spiece\.model from the directory of"
    ):
        read_model_files(directory)


@given(
    labels=st.lists(st.text(max_size=5), max_size=3),
    lengths=st.tuples(*[st.integers(1, 5000)] * 3),
    weight=st.floats(0, 1e6),
)
def test_any_task_is_read_back_as_written(tmp_path_factory, labels, lengths, weight):
    folder = tmp_path_factory.mktemp("any")
    info = TaskInfo("t", (Objective("o", "{input}", "{label}", weight),), *lengths)
    info = dataclasses.replace(info, labels=tuple(labels))
    config = dataclasses.replace(CONFIG, vocab_size=384)
    write_model_files(folder, config, load_vocabulary("bytes"), info)
    assert read_model_files(folder).task_info == info


def gemma(vocabulary, **settings):
    return model_config("t5gemma", "tiny", vocab_size=vocabulary.size, **settings)


def test_a_gemma_vocabulary_is_read_back_with_its_framing(tmp_path, gemma_model):
    for number, framing in enumerate([{}, {"add_bos_token": False}, {"add_eos_token": True}]):
        vocabulary = load_vocabulary(gemma_model(**framing))
        config = gemma(vocabulary, bos_id=vocabulary.framing.bos_id)
        folder = tmp_path / str(number)
        write_model_files(folder, config, vocabulary, INFO)
        assert (folder / "tokenizer.model").exists() and not (folder / "spiece.model").exists()
        files = read_model_files(folder)
        assert files.config == config
        assert files.vocabulary.framing == vocabulary.framing
        assert files.vocabulary.fingerprint == vocabulary.fingerprint
        raw = json.loads((folder / "tokenizer_config.json").read_text())
        assert (raw["tokenizer_class"], raw["bos_token"]) == ("GemmaTokenizer", "<bos>")
        assert raw["model_max_length"] == INFO.input_length
        write_model_files(folder, config, files.vocabulary, INFO)  # its own file in place
        assert read_model_files(folder).vocabulary.fingerprint == vocabulary.fingerprint


def test_a_gemma_vocabulary_is_copied_from_a_store_with_its_framing(gemma_model, monkeypatch):
    path = gemma_model(add_bos_token=False)
    monkeypatch.setattr(stores, "is_remote", lambda path: True)
    copied = read_vocabulary(path.parent)
    assert copied.source != str(path)
    assert copied.framing == Framing(False, False, 2)


def test_a_t5gemma_of_a_vocabulary_without_bos_is_read_back(tmp_path, spiece):
    vocabulary = load_vocabulary(spiece)
    config = gemma(vocabulary, bos_id=vocabulary.framing.bos_id)
    assert config.start_id == 1  # the end of sequence
    write_model_files(tmp_path, config, vocabulary, INFO)
    assert read_model_files(tmp_path).config == config


def test_a_vocabulary_of_another_family_is_refused(tmp_path, spiece, gemma_model):
    unigram, bpe = load_vocabulary(spiece), load_vocabulary(gemma_model())
    t5 = T5Config(vocab_size=512)
    cases = {
        "t5gemma": (gemma(bpe), unigram, "starts with id 2, but .* has no bos, like T5"),
        "t5": (t5, bpe, "starts with id 0, but .* has bos 2, like Gemma"),
        "other_bos": (gemma(bpe, bos_id=5), bpe, "starts with id 5, but .* has bos 2"),
    }
    for name, (config, vocabulary, message) in cases.items():
        write_model_files(tmp_path / name, config, vocabulary, None)
        with pytest.raises(
            InputError, match=f"the vocabulary belongs to another model: .*{message}"
        ):
            read_model_files(tmp_path / name)
    with pytest.raises(InputError, match=r"vocabulary.s bos 2; choose t5gemma"):
        model_config("t5_v1_1", "tiny", vocab_size=bpe.size, bos_id=bpe.framing.bos_id)


def test_a_gemma_of_which_json_alone_was_saved_is_refused_with_what_to_copy(tmp_path, gemma_model):
    vocabulary = load_vocabulary(gemma_model())
    write_model_files(tmp_path, gemma(vocabulary), vocabulary, None)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"no vocabulary .*copy tokenizer\.model from the directory of"
    ):
        read_model_files(tmp_path)
