import pytest
import sentencepiece

from stepdistill_jax.data.train_vocabulary import train_vocabulary
from stepdistill_jax.data.vocabulary import SentencePieceVocabulary
from stepdistill_jax.errors import InputError

TEXTS = [
    f"predict: the {a} {v} the {b} over there ."
    for a in ("fox", "badger", "hedgehog", "squirrel")
    for v in ("follows", "watches", "greets")
    for b in ("otter", "heron", "beaver", "marten")
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_vocabulary(TEXTS, path)
    return SentencePieceVocabulary(path)


def test_special_ids_are_those_of_t5(vocabulary):
    model = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary.path))
    assert (model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()) == (0, 1, 2, -1)


def test_every_text_comes_back(vocabulary):
    assert [vocabulary.decode(vocabulary.encode(text)) for text in TEXTS] == TEXTS


def test_a_word_that_always_has_the_same_neighbour_is_one_piece(vocabulary):
    # "over" is always followed by "there": without a word list it is cut into letters
    model = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary.path))
    pieces = model.encode("predict: the hedgehog over there", out_type=str)
    assert pieces == ["▁predict", ":", "▁the", "▁hedgehog", "▁over", "▁there"]


def test_the_same_texts_give_the_same_bytes(vocabulary, tmp_path):
    train_vocabulary(TEXTS, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == vocabulary.path.read_bytes()


def test_vocab_size_is_an_upper_bound(tmp_path):
    train_vocabulary(TEXTS, tmp_path / "small.model", vocab_size=40)
    assert SentencePieceVocabulary(tmp_path / "small.model").size <= 40


def test_a_single_short_text_is_enough(tmp_path):
    train_vocabulary(["yes"], tmp_path / "one.model")
    small = SentencePieceVocabulary(tmp_path / "one.model")
    assert small.decode(small.encode("yes")) == "yes"


def test_no_text_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="all texts are empty"):
        train_vocabulary(["", "  "], tmp_path / "none.model")
    assert not list(tmp_path.iterdir())
