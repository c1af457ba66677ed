"""Converts text to ids and back, with a SentencePiece model or as ByT5's bytes, without TensorFlow."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import check_file, read_json
from stepdistill_jax.runtime.fingerprints import digest, sha256

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
BYTES = "bytes"
MAX_BYTES = 128 << 20  # of a model's file; one with a quarter of a million pieces has 5 MiB
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class Framing:
    """The special ids around an input. Targets always end with eos and have no bos.

    Attributes:
        bos_id: id of bos; 0 if the vocabulary has none.
    """

    add_bos_token: bool = False
    add_eos_token: bool = True
    bos_id: int = 0

    def input_ids(self, *texts: Sequence[int]) -> list[int]:
        """Joins the ids of an input's texts, with eos between them.

        Example: `input_ids([5, 6], [7])` is [5, 6, 1, 7, 1] with T5's framing, and [2, 5, 6, 1, 7] with bos 2
        and no final eos.
        """
        first, *others = texts
        ids = [self.bos_id] if self.add_bos_token else []
        ids += first
        for other in others:
            ids += [EOS_ID, *other]
        # an empty text without bos or eos gets an eos, too: in a batch, a row of zeros counts as padding
        return [*ids, EOS_ID] if self.add_eos_token or not ids else ids


T5_FRAMING = Framing()


def truncate(ids: Sequence[int], length: int) -> list[int]:
    """Returns at most `length` ids. If `ids` ends with eos, so does the result.

    Example: `truncate([5, 6, 7, 1], 3)` is [5, 6, 1], and `truncate([5, 6, 7], 2)` is [5, 6].
    """
    if len(ids) <= length:
        return list(ids)
    return [*ids[: length - 1], EOS_ID if ids[-1] == EOS_ID else ids[length - 1]]


class Vocabulary(Protocol):
    """Converts text to the ids of T5 and Gemma: 0 is padding, and 1 is the end of sequence (eos)."""

    @property
    def framing(self) -> Framing: ...

    @property
    def size(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def unk_id(self) -> int: ...

    def pieces(self) -> list[str]: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_many(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...


class SentencePieceVocabulary:
    """A `spiece.model` or `tokenizer.model`, with the same ids as in SeqIO.

    Attributes:
        framing: special ids to add to a text. For a vocabulary of Gemma's kind, `tokenizer_config.json` in its
            folder selects them; if that file is missing, only a bos is added. Any other vocabulary adds only an
            eos, as in T5.
    """

    def __init__(self, path: os.PathLike | str):
        """Opens the model.

        Raises:
            InputError: the file is missing, is not a SentencePiece model, or has pad and eos ids other than 0 and
                1; or `tokenizer_config.json` next to it is damaged.
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
        self.framing = self._read_framing() if self._is_gemma() else T5_FRAMING

    def _is_gemma(self) -> bool:
        """Returns whether the model is BPE with bos and byte fallback. UMT5's model has bos, but is unigram."""
        if self._processor.bos_id() <= PAD_ID:
            return False
        from sentencepiece import sentencepiece_model_pb2

        generated: Any = sentencepiece_model_pb2  # its classes are made when it is imported
        trainer = generated.ModelProto.FromString(self.path.read_bytes()).trainer_spec
        return trainer.model_type == trainer.BPE and trainer.byte_fallback

    def _read_framing(self) -> Framing:
        path = self.path.with_name(TOKENIZER_CONFIG)
        given = read_json(path) if path.exists() else {}
        if not isinstance(given, dict):
            raise InputError(f"{path}: expected a JSON object, got {type(given).__name__}")
        if given.get("tokenizer_class") == "T5Tokenizer":  # a T5 trained on such a vocabulary
            return T5_FRAMING
        flags = {"add_bos_token": True, "add_eos_token": False}  # defaults of GemmaTokenizer
        for name, default in flags.items():
            flags[name] = given.get(name, default)
            if not isinstance(flags[name], bool):
                raise InputError(f"{path}: {name} must be true or false, got {flags[name]!r}")
        return Framing(**flags, bos_id=self._processor.bos_id())

    @property
    def size(self) -> int:
        """Number of pieces. A model's `vocab_size` may be larger: it may count sentinels and padding."""
        return self._processor.get_piece_size()

    @property
    def source(self) -> str:
        """Argument with which `load_vocabulary` opens the vocabulary again."""
        return os.fspath(self.path)

    @property
    def fingerprint(self) -> str:
        """Digest of the file, combined with `framing` if that differs from T5's."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        found = sha256(self.path)
        if self.framing == T5_FRAMING:
            return found
        return digest([found, dataclasses.asdict(self.framing)])

    @property
    def unk_id(self) -> int:
        """Id for characters that no piece covers."""
        return self._processor.unk_id()

    def normalize(self, text: str) -> str:
        """Returns the normalized text, which the model splits into pieces."""
        return self._processor.normalize(text)

    def pieces(self) -> list[str]:
        """Returns the piece of each id."""
        return self._processor.id_to_piece(list(range(self.size)))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without eos."""
        return self._processor.encode(text)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, computed on all cores."""
        return self._processor.encode(texts)

    def decode(self, ids: list[int]) -> str:
        """Returns the text up to the first eos, without ids that are not pieces."""
        ids = [int(i) for i in ids]
        if EOS_ID in ids:
            ids = ids[: ids.index(EOS_ID)]
        return self._processor.decode([i for i in ids if PAD_ID < i < self.size])


class ByteVocabulary:
    """Implements ByT5's vocabulary (arXiv 2105.13626): id = byte + 3."""

    framing = T5_FRAMING
    size = 256 + 3
    fingerprint = digest(BYTES)
    source = BYTES  # with this argument, `load_vocabulary` opens it
    unk_id = UNK_ID

    def pieces(self) -> list[str]:
        """Returns the piece of each id, named as in `transformers`: `chr(byte)` for a byte."""
        return ["<pad>", "</s>", "<unk>", *map(chr, range(256))]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without eos."""
        return [b + 3 for b in text.encode()]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        return list(map(self.encode, texts))

    def decode(self, ids: list[int]) -> str:
        """Returns the text up to the first eos, without broken UTF-8."""
        ids = [int(i) for i in ids]
        if EOS_ID in ids:
            ids = ids[: ids.index(EOS_ID)]
        return bytes(i - 3 for i in ids if 3 <= i < self.size).decode(errors="ignore")


def load_vocabulary(path: os.PathLike | str) -> Vocabulary:
    """Opens a `spiece.model` or `tokenizer.model`; for the path `bytes`, returns ByT5's vocabulary."""
    return ByteVocabulary() if str(path) == BYTES else SentencePieceVocabulary(path)
