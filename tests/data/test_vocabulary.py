import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.data.vocabulary import ByteVocabulary, load_vocabulary
from stepdistill_jax.errors import InputError

TEXTS = [
    "with rain in the forecast , the truck takes the bridge .",
    "predict: x\ny",
    "",
    " é 漢字 ",
]


def test_ids_equal_those_of_seqio(delivery_data_dir):
    from stepdistill_jax.data.builder import tensorflow

    tensorflow()
    import seqio

    path = delivery_data_dir / "delivery" / "spiece.model"
    for ours, theirs in [
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
