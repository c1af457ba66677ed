"""Text to ids and back, without TensorFlow: a SentencePiece model or ByT5's bytes."""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import check_file
from stepdistill_jax.runtime.fingerprints import digest, sha256

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
BYTES = "bytes"
MAX_BYTES = 128 << 20  # of a model's file; that of a quarter of a million pieces has 5


def with_eos(*texts: Sequence[int]) -> list[int]:
    """Returns the ids of an input's texts with an end of sequence after each.

    Example: `with_eos([5, 6], [7])` is [5, 6, 1, 7, 1].
    """
    return [i for ids in texts for i in (*ids, EOS_ID)]


class Vocabulary(Protocol):
    """Ids as T5 uses them: 0 padding, 1 end of sequence."""

    @property
    def size(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def unk_id(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    def pieces(self) -> list[str]: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_many(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...


class SentencePieceVocabulary:
    """`spiece.model`, read by the sentencepiece library; the ids equal SeqIO's (tested)."""

    def __init__(self, path: os.PathLike | str):
        """Opens the model.

        Raises:
            InputError: no such file, or not a SentencePiece model with T5's special ids.
        """
        import sentencepiece

        self.path = pathlib.Path(path)
        if not os.path.exists(self.path):
            raise InputError(f"{path}: no such vocabulary")
        check_file(self.path, "a SentencePiece model")
        if self.path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: not a SentencePiece model (more than {MAX_BYTES >> 20} MiB)")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: not a SentencePiece model ({error})") from None
        special = (self._processor.pad_id(), self._processor.eos_id())  # UMT5's unk is not 2
        if special != (PAD_ID, EOS_ID):
            raise InputError(f"{path}: pad and eos ids must be 0 and 1, got {special}")

    @property
    def size(self) -> int:
        """Number of pieces; a model's `vocab_size` may be larger (sentinels, padding)."""
        return self._processor.get_piece_size()

    @property
    def source(self) -> str:
        """What `load_vocabulary` takes for it: the file's path."""
        return os.fspath(self.path)

    @property
    def fingerprint(self) -> str:
        """Digest of the file."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return sha256(self.path)

    @property
    def unk_id(self) -> int:
        """The id of what no piece covers."""
        return self._processor.unk_id()

    @property
    def bos_id(self) -> int:
        """The id that begins a text; 0 where the vocabulary has none, as T5's."""
        return max(self._processor.bos_id(), 0)

    def pieces(self) -> list[str]:
        """The piece of each id."""
        return self._processor.id_to_piece(list(range(self.size)))

    def encode(self, text: str) -> list[int]:
        """Ids without the end of sequence."""
        return self._processor.encode(text)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each, on all cores."""
        return self._processor.encode(texts)

    def decode(self, ids: list[int]) -> str:
        """Text up to the first end of sequence; ids that are not pieces are left out."""
        ids = [int(i) for i in ids]
        if EOS_ID in ids:
            ids = ids[: ids.index(EOS_ID)]
        return self._processor.decode([i for i in ids if PAD_ID < i < self.size])


class ByteVocabulary:
    """ByT5 (arXiv 2105.13626): id = byte + 3."""

    size = 256 + 3
    fingerprint = digest(BYTES)
    source = BYTES  # what `load_vocabulary` takes for it
    unk_id = UNK_ID
    bos_id = 0  # it has none

    def pieces(self) -> list[str]:
        """A name for each id, as `transformers` has them: a byte is the character of its number."""
        return ["<pad>", "</s>", "<unk>", *map(chr, range(256))]

    def encode(self, text: str) -> list[int]:
        """Ids without the end of sequence."""
        return [b + 3 for b in text.encode()]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each."""
        return list(map(self.encode, texts))

    def decode(self, ids: list[int]) -> str:
        """Text up to the first end of sequence; broken UTF-8 is dropped."""
        ids = [int(i) for i in ids]
        if EOS_ID in ids:
            ids = ids[: ids.index(EOS_ID)]
        return bytes(i - 3 for i in ids if 3 <= i < self.size).decode(errors="ignore")


def load_vocabulary(path: os.PathLike | str) -> Vocabulary:
    """The vocabulary of a `spiece.model`, or of the word `bytes`."""
    return ByteVocabulary() if str(path) == BYTES else SentencePieceVocabulary(path)
