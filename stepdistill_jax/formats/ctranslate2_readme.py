"""Makes the `README.md` of a CTranslate2 directory."""

import stepdistill_jax
from stepdistill_jax.data.vocabulary import BYTES, Vocabulary

_README = """\
# {task} for CTranslate2

A T5 of {parameters} parameters in {quantization}, for CTranslate2 on the cores of a CPU (`pip install ctranslate2`).
`stepdistill-jax` {version} wrote this folder. The command below reads a file with one `{{"input": ...}}` per line,
adds the prefix to each input and writes the answers:

```
stepdistill predict THIS_FOLDER in.jsonl out.jsonl
```

With CTranslate2 alone, add the prefix yourself. An input has at most {input_length} tokens, and an answer at most {max_decode_len}:

```python
import ctranslate2
{load}
translator = ctranslate2.Translator("THIS_FOLDER", device="cpu")
tokens = [{encode}, "</s>"]
result = translator.translate_batch(
    [tokens], beam_size=1, max_input_length=0, min_decoding_length=0,
    max_decoding_length={max_decode_len}, length_penalty=0, return_scores=True,
)[0]
print({decode}, result.scores[0])
```

The score is the natural logarithm of the probability of the answer, including its end of sequence.
{note}"""
_INT8 = """
Compared with float32, int8 may change labels that are nearly tied, so evaluate both versions. The int8 answers are the
same on every processor: the weights are small enough for the 16-bit sums of processors without VNNI (AMD before Zen 4,
Intel before Cascade Lake).
"""
_SPIECE = {
    "load": """import sentencepiece

vocabulary = sentencepiece.SentencePieceProcessor(model_file="THIS_FOLDER/spiece.model")""",
    "encode": "*vocabulary.encode({prompt!r}, out_type=str)",
    "decode": "vocabulary.decode(result.hypotheses[0])",
}
_BYTES = {
    "load": "",
    "encode": "*map(chr, {prompt!r}.encode())",
    "decode": "bytes(ord(t) for t in result.hypotheses[0] if len(t) == 1).decode(errors='ignore')",
}


def ctranslate2_readme(
    vocabulary: Vocabulary,
    *,
    task: str,
    quantization: str | None,
    prompt: str,
    num_parameters: int,
    input_length: int,
    max_decode_len: int,
) -> str:
    """Returns the text of `README.md`. The Python code in the text runs unchanged.

    Args:
        quantization: type of the weights; None means float32.
        prompt: example of an input, prefix included.
        input_length, max_decode_len: see `TaskInfo`.
    """
    how = _BYTES if vocabulary.source == BYTES else _SPIECE
    return _README.format(
        task=task,
        parameters=f"{num_parameters:,}",
        quantization=quantization or "float32",
        version=stepdistill_jax.__version__,
        input_length=input_length,
        max_decode_len=max_decode_len,
        load=how["load"],
        encode=how["encode"].format(prompt=prompt),
        decode=how["decode"],
        note=_INT8 if quantization == "int8" else "",
    )
