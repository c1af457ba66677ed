"""The exported tokenizer gives `transformers` the ids that training saw, whatever kind of vocabulary."""

import random

import pytest

from stepdistill_jax.data.vocabulary import load_vocabulary, truncate
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats import tokenizer as exported_tokenizer
from stepdistill_jax.formats.directory import read_model_files, write_model_files
from stepdistill_jax.formats.vocabulary_files import read_vocabulary, write_vocabulary
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.t5 import T5Config

TEXTS = [
    "with rain in the forecast , the truck takes the narrow bridge .",
    "(a) yes (b) no 0 1 2 3",
]
# mT5 falls back to bytes, and UMT5 has a piece <s> before its <unk>
BYTE_FALLBACK = {"byte_fallback": True, "vocab_size": 400}
KINDS = {
    "t5": {},
    "mt5": BYTE_FALLBACK,
    "umt5": {**BYTE_FALLBACK, "bos_id": 2, "unk_id": 3},
    "other_unknown_id": {"bos_id": 2, "unk_id": 3},
    "no_normalizer": {"normalization_rule_name": "identity"},
}


@pytest.fixture(scope="module", params=[*KINDS, "byt5", "gemma"])
def opened(request, tmp_path_factory, train_spiece, gemma_model):
    """(our vocabulary, what transformers opens, the kind's name)."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "byt5":
        vocabulary = load_vocabulary("bytes")
    elif request.param == "gemma":
        vocabulary = load_vocabulary(gemma_model(add_bos_token=True))
    else:
        file = train_spiece(tmp_path_factory.mktemp("source"), TEXTS, **KINDS[request.param])
        vocabulary = load_vocabulary(file)
    config = T5Config(vocab_size=512, shared_relative_position_bias=request.param != "umt5")
    if request.param == "gemma":
        config = model_config("t5gemma", "tiny", vocab_size=512)
    write_model_files(folder, config, vocabulary, None)
    exported_tokenizer.write_tokenizer(folder, vocabulary)
    assert read_model_files(folder).vocabulary.encode("a b") == vocabulary.encode("a b")
    return vocabulary, AutoTokenizer.from_pretrained(folder), request.param


def test_every_letter_of_unicode_has_our_ids(opened):
    vocabulary, tokenizer, _ = opened
    letters = [chr(i) for i in range(0x1F6FF) if not 0xD800 <= i < 0xE000]
    for start in range(0, len(letters), 97):  # among others, so that nothing is cut away
        text = "a " + "-".join(letters[start : start + 97]) + " b"
        got, wanted = (
            tokenizer(text)["input_ids"],
            vocabulary.framing.input_ids(vocabulary.encode(text)),
        )
        assert got == wanted, hex(start)


def test_random_texts_have_our_ids_and_come_back_as_our_text(opened):
    vocabulary, tokenizer, _ = opened
    rng = random.Random(0)
    letters = [chr(i) for i in (*range(0x20, 0x7F), *range(0xC0, 0x250), 0x3000, 0x200B, 0x1F389)]
    for _ in range(300):
        text = "".join(rng.choices(letters, k=20)) + rng.choice(TEXTS)[: rng.randrange(30)]
        ids = vocabulary.framing.input_ids(vocabulary.encode(text))
        assert tokenizer(text)["input_ids"] == ids, text
        if tokenizer.unk_token_id not in ids:
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == (
                vocabulary.decode(ids).strip()
            )


def test_a_pair_of_rows_is_padded_and_the_end_of_sequence_kept(opened):
    vocabulary, tokenizer, _ = opened
    ids = tokenizer(["a b c d", "a"], padding=True, truncation=True, max_length=3)["input_ids"]
    assert [len(row) for row in ids] == [3, 3]
    assert ids[0] == truncate(vocabulary.framing.input_ids(vocabulary.encode("a b c d")), 3)
    assert ids[1][-1] in (0, 1)


def test_decomposed_letters_have_our_ids(opened):
    import unicodedata

    vocabulary, tokenizer, kind = opened
    for text in ("Tiếng Việt", "한국어", "ὕδωρ", "Ångström"):
        text = unicodedata.normalize("NFD", text)
        assert tokenizer(text)["input_ids"] == vocabulary.framing.input_ids(
            vocabulary.encode(text)
        ), kind


def test_the_sentinels_of_t5_are_ordinary_text(opened):
    vocabulary, tokenizer, _ = opened
    ids = tokenizer("<extra_id_0>")["input_ids"]
    assert ids == vocabulary.framing.input_ids(vocabulary.encode("<extra_id_0>"))
    assert max(ids) < vocabulary.size


def test_other_ids_stop_the_export_with_the_text(tmp_path, train_spiece, monkeypatch):
    (tmp_path / "source").mkdir()
    vocabulary = load_vocabulary(train_spiece(tmp_path / "source", TEXTS, **BYTE_FALLBACK))
    write_model_files(tmp_path / "model", T5Config(vocab_size=512), vocabulary, None)
    # what transformers makes of the files alone: T5Tokenizer, which knows no byte pieces
    with pytest.raises(InputError, match="its ids in transformers differ from those in training"):
        exported_tokenizer.check_tokenizer(tmp_path / "model", vocabulary)


def test_a_model_of_neither_kind_is_refused(tmp_path, train_spiece):
    (tmp_path / "source").mkdir()
    vocabulary = load_vocabulary(train_spiece(tmp_path / "source", TEXTS, model_type="bpe"))
    write_model_files(tmp_path / "model", T5Config(vocab_size=512), vocabulary, None)
    with pytest.raises(InputError, match=r"expected a unigram tokenizer, as in T5, or a BPE"):
        exported_tokenizer.write_tokenizer(tmp_path / "model", vocabulary)


FRAMINGS = [(True, False), (False, False), (False, True), (True, True)]


@pytest.mark.parametrize("bos, eos", FRAMINGS)
def test_transformers_frames_the_inputs_and_pairs_of_a_gemma_as_we_do(
    tmp_path, gemma_model, bos, eos
):
    from transformers import AutoTokenizer

    source = gemma_model(add_bos_token=bos, add_eos_token=eos)
    vocabulary = load_vocabulary(source)
    write_vocabulary(tmp_path, vocabulary)
    exported_tokenizer.write_tokenizer(tmp_path, vocabulary)
    read = read_vocabulary(tmp_path)
    assert (read.framing, read.fingerprint) == (vocabulary.framing, vocabulary.fingerprint)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    one, two = map(vocabulary.encode, TEXTS)
    assert tokenizer(TEXTS[0])["input_ids"] == [2] * bos + one + [1] * eos
    assert tokenizer(*TEXTS)["input_ids"] == [2] * bos + one + [1] + two + [1] * eos
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert special == (0, 1, 2) and tokenizer.unk_token_id == 3


def test_the_ids_of_a_gemma_are_those_of_its_class_in_transformers(gemma_model):
    from transformers import GemmaTokenizer

    path = gemma_model()
    vocabulary, theirs = load_vocabulary(path), GemmaTokenizer.from_pretrained(path.parent)
    for text in [*exported_tokenizer.PROBES, *TEXTS]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == vocabulary.encode(text), text


def test_a_bpe_model_that_changes_texts_is_refused(tmp_path, train_spiece):
    (tmp_path / "source").mkdir()
    path = train_spiece(tmp_path / "source", TEXTS, model_type="bpe", bos_id=3, **BYTE_FALLBACK)
    vocabulary = load_vocabulary(path)
    write_vocabulary(tmp_path, vocabulary)
    with pytest.raises(InputError, match="normalizes texts before it splits them"):
        exported_tokenizer.write_tokenizer(tmp_path, vocabulary)
