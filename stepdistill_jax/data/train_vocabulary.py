"""Trains a SentencePiece vocabulary on a dataset's text, with T5's special ids."""

import collections
import io
import itertools
import os
import re
from collections.abc import Iterable, Sequence, Set

from stepdistill_jax.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import atomic_write

MAX_TEXTS = 200_000  # if there are more, every k-th is used, since the trainer keeps all in memory
MAX_TEXT_BYTES = 65_536  # the trainer skips longer texts; its own default is 4,192
MIN_WORD_COUNT = 5


def train_vocabulary(
    texts: Sequence[str], path: os.PathLike | str, *, vocab_size: int = 8000
) -> None:
    """Trains a unigram model on `texts` and writes it to `path` (a `spiece.model`), atomically.

    The same texts produce the same bytes. Every character becomes a piece, if they fit into `vocab_size`.

    Args:
        texts: inputs and targets as the model will read them, with prefixes.
        vocab_size: largest number of pieces.

    Raises:
        InputError: all texts are empty, or the trainer accepts none of them.
    """
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: a vocabulary is trained on text, but all texts are empty")
    texts = texts[:: -(-len(texts) // MAX_TEXTS)]
    try:
        model = _train(texts, vocab_size)
    except RuntimeError:  # more different characters than pieces
        counts = collections.Counter(c for text in texts for c in text)
        kept = {c for c, _ in counts.most_common(vocab_size // 2)}
        try:
            model = _train([_only(kept, text) for text in texts], vocab_size)
        except RuntimeError as error:
            raise InputError(
                f"{path}: no vocabulary can be trained on these texts ({error})"
            ) from None
    with atomic_write(path, "wb") as f:
        f.write(model)


def _train(texts: Sequence[str], vocab_size: int) -> bytes:
    """Trains a SentencePiece model, and returns the bytes of its file."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain(texts, _words_in_other_places(texts)),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        max_sentence_length=MAX_TEXT_BYTES,
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _only(kept: Set[str], text: str) -> str:
    return "".join(c if c in kept else " " for c in text)


def _words_in_other_places(texts: Iterable[str]) -> list[str]:
    """Returns two kinds of texts: each frequent word alone, and lists of up to 50 frequent words."""
    # the trainer splits a word into letters if it always has the same neighbour, as in labels
    counts = collections.Counter(w for text in texts for w in re.findall(r"\w+|[^\w\s]+", text))
    words = sorted(word for word, count in counts.items() if count >= MIN_WORD_COUNT)
    return words + [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)]
