import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.data.vocabulary import ByteVocabulary, Framing, load_vocabulary, truncate
from stepdistill_jax.errors import InputError

TEXTS = [
    "with rain in the forecast , the truck takes the bridge .",
    "predict: x\ny",
    "",
    " é 漢字 ",
    "two  blanks,\n\n\nlines   <mask> and \t",
]


def test_ids_equal_those_of_seqio(delivery_data_dir, gemma_model):
    from stepdistill_jax.data.builder import tensorflow

    tensorflow()
    import seqio

    path = delivery_data_dir / "delivery" / "spiece.model"
    gemma = gemma_model()
    for ours, theirs in [
        (load_vocabulary(gemma), seqio.SentencePieceVocabulary(str(gemma), extra_ids=0)),
        (load_vocabulary(path), seqio.SentencePieceVocabulary(str(path), extra_ids=0)),
        (load_vocabulary("bytes"), seqio.ByteVocabulary(extra_ids=0)),
    ]:
        assert ours.size == theirs.vocab_size
        for text in TEXTS:
            assert ours.encode(text) == list(theirs.encode(text))


@given(st.text())
def test_bytes_give_back_any_text(text):
    text = text.encode(errors="ignore").decode()
    assert ByteVocabulary().decode(ByteVocabulary().encode(text)) == text


def test_decoding_stops_at_the_end_and_leaves_out_what_is_no_piece(delivery_data_dir):
    vocabulary = load_vocabulary(delivery_data_dir / "delivery" / "spiece.model")
    ids = vocabulary.encode("smooth")
    assert vocabulary.decode([0, *ids, vocabulary.size + 7, 1, *ids]) == "smooth"


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such vocabulary"):
        load_vocabulary(tmp_path / "absent.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(InputError, match=r"text\.model: not a SentencePiece model"):
        load_vocabulary(tmp_path / "text.model")


def test_a_vocabulary_says_where_it_can_be_loaded_again(delivery_data_dir):
    for source in ("bytes", str(delivery_data_dir / "delivery" / "spiece.model")):
        vocabulary = load_vocabulary(source)
        assert vocabulary.source == source
        assert load_vocabulary(vocabulary.source).fingerprint == vocabulary.fingerprint


# what tokenizer_config.json says -> an input [5, 6], a pair of it with [7], an empty input
FRAMED = {
    "defaults": ({}, [2, 5, 6], [2, 5, 6, 1, 7], [2]),
    "other_fields": ({"bos_token": "<bos>"}, [2, 5, 6], [2, 5, 6, 1, 7], [2]),
    "bos": ({"add_bos_token": True}, [2, 5, 6], [2, 5, 6, 1, 7], [2]),
    "none": ({"add_bos_token": False}, [5, 6], [5, 6, 1, 7], [1]),
    "both": ({"add_eos_token": True}, [2, 5, 6, 1], [2, 5, 6, 1, 7, 1], [2, 1]),
    "eos": ({"add_bos_token": False, "add_eos_token": True}, [5, 6, 1], [5, 6, 1, 7, 1], [1]),
}


@pytest.mark.parametrize("config, one, pair, empty", FRAMED.values(), ids=FRAMED)
def test_a_gemma_frames_inputs_as_its_tokenizer_config_says(gemma_model, config, one, pair, empty):
    framing = load_vocabulary(gemma_model(**config)).framing
    assert framing.bos_id == 2
    assert framing.input_ids([5, 6]) == one
    assert framing.input_ids([5, 6], [7]) == pair
    assert framing.input_ids([]) == empty


def test_a_t5_ends_inputs_with_eos_whatever_is_next_to_its_vocabulary(tmp_path, train_umt5):
    path = train_umt5(tmp_path)  # it has bos and bytes, too
    (tmp_path / "tokenizer_config.json").write_text(
        '{"add_bos_token": true, "add_eos_token": false}'
    )
    for vocabulary in (load_vocabulary(path), load_vocabulary("bytes")):
        assert vocabulary.framing == Framing(add_bos_token=False, add_eos_token=True, bos_id=0)
        assert vocabulary.framing.input_ids([5, 6], [7]) == [5, 6, 1, 7, 1]
        assert vocabulary.framing.input_ids([]) == [1]


@pytest.fixture
def train_umt5():
    import sentencepiece

    def train(folder):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS[:1] * 20),
            model_prefix=str(folder / "spiece"),
            vocab_size=400,
            hard_vocab_limit=False,
            byte_fallback=True,
            **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
            minloglevel=2,
            num_threads=1,
        )
        return folder / "spiece.model"

    return train


def test_a_truncated_input_keeps_the_eos_that_it_ends_with():
    assert truncate([2, 5, 6, 7, 1], 3) == [2, 5, 1]
    assert truncate([2, 5, 6, 7], 3) == [2, 5, 6]
    assert truncate([5, 1, 7], 2) == [5, 1]
    assert truncate([5, 6, 1], 3) == [5, 6, 1]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"add_bos_token": "yes"}', "add_bos_token must be true or false, got 'yes'"),
        ('{"add_eos_token": null}', "add_eos_token must be true or false, got None"),
        ("[1]", "expected a JSON object, got list"),
        ("{", "broken JSON"),
    ],
)
def test_a_damaged_tokenizer_config_is_named(gemma_model, text, message):
    path = gemma_model()
    path.with_name("tokenizer_config.json").write_text(text)
    with pytest.raises(InputError, match=rf"tokenizer_config\.json.*{message}"):
        load_vocabulary(path)


def test_tokens_of_one_framing_are_not_taken_for_those_of_another(gemma_model):
    framings = [{}, {"add_bos_token": False}, {"add_eos_token": True}]
    found = [load_vocabulary(gemma_model(**framing)).fingerprint for framing in framings]
    assert len(set(found)) == 3
    assert load_vocabulary(gemma_model(add_bos_token=True)).fingerprint == found[0]
