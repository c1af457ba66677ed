"""Writes tokenizer files with which `transformers` and `tokenizers` give the same ids as in training.

Builds `tokenizer.json` from the SentencePiece model. The `T5Tokenizer` of transformers 5 is not used: it gives
wrong ids for mT5 and UMT5, since it knows no byte pieces and no unk other than 2.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.data.vocabulary import (
    EOS_ID,
    TOKENIZER_CONFIG,
    Framing,
    SentencePieceVocabulary,
    Vocabulary,
)
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.vocabulary_files import FAST_TOKENIZER, model_name
from stepdistill_jax.runtime.files import atomic_write, read_json, write_json

# Texts that reveal a wrong normalizer, unknown id or byte piece, or a lost space. Two kinds of text are
# left out, since the `tokenizers` library cannot treat them as SentencePiece does: texts that spell a
# special piece (`</s>`, `<0x41>`), and rare orders of several combining marks on one letter.
PROBES = (
    "predict: What is it? Answer Choices: (a) a, b (b) c",
    "",
    " ",
    "  two  spaces ",
    "tab\tline\nbreak\r\nend",
    "\x00\x01a\x7fb\x1bc",
    "no-break\u00a0space, wide\u3000space, thin\u2009space",
    "zero\u200bwidth, joiner\u200d, soft\u00adhyphen, \ufeffmark",
    "É ½ ﬁ ™ ① ǅ ß \uff21\uff22 \uff11 \U0001d518 \u017f",
    "e\u0301 n\u0303 A\u030a o\u0308",
    "日本語 한국어 \u1100\u1161\u11a8 हिन्दी ไทย مرحبا שלום ελληνικά",
    "🎉 👍🏽 👨\u200d👩\u200d👧 🇩🇪",
    "<extra_id_0> a<extra_id_99>b <mask>",
    "1,000.50 + 3 = 1_003.5; ''\"\"`` {[( )]} \\ / | ~ ^ ° €",
    "\U0010ffff \ufffd \ue000",
    "x" * 300,
)
_JAMO, _SYLLABLE = "\u1100\u1161\u11a8", "\uac01"


def write_tokenizer(directory: os.PathLike | str, vocabulary: Vocabulary) -> None:
    """Writes the tokenizer files for `transformers`, and checks that its tokenizer gives the same ids as ours.

    Call `write_model_files` first. The ids are compared on `PROBES`.

    Raises:
        InputError: the ids differ, or the SentencePiece model is neither T5's nor Gemma's kind.
    """
    directory = pathlib.Path(directory)
    if isinstance(vocabulary, SentencePieceVocabulary):
        model = directory / model_name(vocabulary)
        _write_fast_tokenizer(directory / FAST_TOKENIZER, model, vocabulary)
        config = read_json(directory / TOKENIZER_CONFIG)
        config.pop("extra_ids", None)
        config |= {
            # under this name, transformers 4 and 5 both open tokenizer.json unchanged
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        write_json(directory / TOKENIZER_CONFIG, config)
    check_tokenizer(directory, vocabulary)


def check_tokenizer(directory: os.PathLike | str, vocabulary: Vocabulary) -> None:
    """Compares the ids of `transformers` with ours on `PROBES`.

    Raises:
        InputError: the ids differ. The message shows the first text with different ids.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # tokenizers need no torch
    from transformers import AutoTokenizer  # 2 to 3 s

    # a length that no input exceeds, since the tokenizer warns about inputs that exceed it
    tokenizer = AutoTokenizer.from_pretrained(directory, model_max_length=10**9)
    framing = vocabulary.framing
    for text in PROBES:
        ids = vocabulary.encode(text)
        if not (ids or framing.add_bos_token or framing.add_eos_token):
            continue  # we add an eos; a template of transformers cannot depend on a text being empty
        got, wanted = tokenizer(text)["input_ids"], framing.input_ids(ids)
        if got != wanted:
            raise InputError(
                f"{vocabulary.source}: cannot be exported, since its ids in transformers differ from those"
                f" in training: {text!r} becomes {got} instead of {wanted}"
            )


def _write_fast_tokenizer(
    path: pathlib.Path, model: pathlib.Path, vocabulary: SentencePieceVocabulary
) -> None:
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken

    generated: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    proto = generated.ModelProto.FromString(model.read_bytes())
    framing, trainer = vocabulary.framing, proto.trainer_spec
    if framing.bos_id:
        tokenizer = _bpe(proto, model)
    elif trainer.model_type == trainer.UNIGRAM:
        tokenizer = _unigram(proto, vocabulary)
    else:
        raise InputError(
            f"{model}: cannot be exported: expected a unigram tokenizer, as in T5, or a BPE tokenizer"
            " with BOS token and byte fallback, as in Gemma"
        )
    pieces = [piece.piece for piece in proto.pieces]
    tokenizer.post_processor = _template(framing, pieces)
    special = [0, EOS_ID, *([framing.bos_id] if framing.bos_id else []), trainer.unk_id]
    tokenizer.add_special_tokens([AddedToken(pieces[i], special=True) for i in special])
    with atomic_write(path) as f:
        f.write(tokenizer.to_str(pretty=True))


def _template(framing: Framing, pieces: Sequence[str]) -> Any:
    """Returns the post-processor that adds the special ids of `Framing.input_ids` to an input."""
    from tokenizers.processors import TemplateProcessing

    bos, eos = pieces[framing.bos_id], pieces[EOS_ID]
    begin, end = [bos] * framing.add_bos_token, [eos] * framing.add_eos_token
    return TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", eos, "$B", *end],
        special_tokens=[(eos, EOS_ID), *[(bos, framing.bos_id)] * framing.add_bos_token],
    )


def _unigram(proto: Any, vocabulary: SentencePieceVocabulary) -> Any:
    """Returns a `tokenizers.Tokenizer` of T5's kind, without the special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    tokenizer = Tokenizer(
        models.Unigram(
            [(piece.piece, piece.score) for piece in proto.pieces],
            unk_id=trainer.unk_id,
            byte_fallback=trainer.byte_fallback,
        )
    )
    steps = []
    if normalizer.precompiled_charsmap:
        if vocabulary.normalize(_JAMO).endswith(_SYLLABLE):
            # `Precompiled` reads letters of 6 bytes or more mark by mark, so NFC composes them first
            steps.append(normalizers.NFC())
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if normalizer.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    decoder = decoders.Metaspace(prepend_scheme=scheme)
    if trainer.byte_fallback:
        decoder = decoders.Sequence([decoders.ByteFallback(), decoder])
    tokenizer.decoder = decoder
    return tokenizer


def _bpe(proto: Any, model: pathlib.Path) -> Any:
    """Returns a `tokenizers.Tokenizer` of Gemma's kind, without the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    normalizer = proto.normalizer_spec
    if (
        normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
    ):
        raise InputError(
            f"{model}: this model normalizes texts before it splits them, which no Gemma does;"
            " it cannot be exported"
        )
    kinds = type(proto.pieces[0])  # NORMAL, USER_DEFINED, ...
    # special pieces and bytes are never the result or a part of a merge
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    # SentencePiece merges the neighbours whose joint piece has the highest score, and `tokenizers` merges pairs
    # in the order of a list: so the list has all pairs that form a piece, by descending score of the piece
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(left, right) for left, right in cuts if left in scores and right in scores]
    tokenizer = Tokenizer(
        models.BPE(
            {piece.piece: i for i, piece in enumerate(proto.pieces)},
            merges,
            unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # as in transformers' GemmaTokenizer; the pre-tokenizer never splits, since no blank is left
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # `normalized=True` matches these pieces after blanks have become "▁"; several are runs of "▁"
    whole = [p.piece for p in proto.pieces if p.type == kinds.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece in whole])
    return tokenizer
