"""Makes the model card, the `README.md` of an exported directory."""

import dataclasses
from typing import Any

from stepdistill_jax.data.objectives import Objective
from stepdistill_jax.data.vocabulary import BYTES, Vocabulary
from stepdistill_jax.formats.directory import TaskInfo
from stepdistill_jax.models.config import LoraConfig, ModelConfig
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.models.t5gemma import T5GemmaConfig

_METRICS = {
    "label_accuracy": "validation label accuracy",
    "label_loss": "validation label loss (nats per token)",
}

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{tag}, distillation, distilling-step-by-step]
---

# {task}, {title} distilled step by step

{family} of {parameters} parameters ({sizes}), trained by
`stepdistill-jax` {version} with *Distilling Step-by-Step* (Hsieh et al. 2023, arXiv:2305.02301): the
objectives below share one model, and inference uses only the first.{adapters}

| objective | input | target | weight |
|---|---|---|---|
{objectives}

## Data and result

{facts}

The licence of the weights depends on the licences of the data and of the initial model. This card does
not state it.{terms}

## Use

Inputs longer than {input_length} tokens are truncated; an answer has at most {max_decode_len} tokens.

The package `stepdistill-jax` reads a file with one `{{"input": ...}}` per line, adds the prefix to each input and
writes the answers:

```
stepdistill predict THIS_FOLDER in.jsonl out.jsonl
```

With `transformers`:

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForSeq2SeqLM.from_pretrained("THIS_FOLDER")
inputs = tokenizer({prompt!r}, truncation=True, return_tensors="pt")
ids = model.generate(**inputs, do_sample=False)[0]
print(tokenizer.decode(ids, skip_special_tokens=True))
```
{others}
{notes}
"""

_CTRANSLATE2 = """
For CTranslate2, which is faster on CPUs, `stepdistill export THIS_FOLDER NEW_FOLDER --format ctranslate2` writes a
directory. Without `stepdistill-jax`, convert the model yourself (`pip install ctranslate2 transformers torch`; only the
conversion needs `torch`):

```python
import ctranslate2
from ctranslate2.converters import TransformersConverter
from transformers import AutoTokenizer


class Converter(TransformersConverter):
    def load_model(self, *args, **kwargs):
        model = super().load_model(*args, **kwargs)
        # transformers 5 sets this to true for every T5, and the converter then scales the logits down
        model.config.tie_word_embeddings = {scaled}
        return model


Converter("THIS_FOLDER").convert("THIS_FOLDER/ctranslate2", force=True)
translator = ctranslate2.Translator("THIS_FOLDER/ctranslate2", compute_type="float32")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
tokens = tokenizer.convert_ids_to_tokens(tokenizer({prompt!r}, truncation=True)["input_ids"])
result = translator.translate_batch(
    [tokens], beam_size=1, min_decoding_length=0, max_decoding_length={max_decode_len},
    length_penalty=0, return_scores=True,
)[0]
ids = tokenizer.convert_tokens_to_ids(result.hypotheses[0])
print(tokenizer.decode(ids, skip_special_tokens=True), result.scores[0])
```
"""

_OTHER = """
To get the {name}, start the decoder with {prefix!r}:

```python
inputs = tokenizer({prompt!r}, truncation=True, return_tensors="pt")
start = inputs["input_ids"].new_tensor([{ids}])
ids = model.generate(**inputs, decoder_input_ids=start, do_sample=False, max_new_tokens={length})[0]
print(tokenizer.decode(ids[start.shape[1] :], skip_special_tokens=True))
```
"""
_SPECIAL = """\
If an input contains the spelling of a special token (`</s>`, `<pad>`, `<unk>`), `stepdistill` treats it as ordinary text,
but `transformers` turns it into the special token."""
_GEMMA_TERMS = """ Google's weights of T5Gemma are under the Gemma Terms of Use
(https://ai.google.dev/gemma/terms), which also apply to models made from them."""
_OWN_HEAD = """ The warning of `transformers` 5 about tied weights (`shared.weight`, `lm_head.weight`) is harmless: it loads both
as they are."""
_UMT5 = """ `transformers` 5 divides the logits of every UMT5 by the square root of its width, but this model
was trained without that division. In `transformers`, its scores and samples are therefore wrong, but its
greedy labels are right."""


def model_card(
    task_info: TaskInfo,
    config: ModelConfig,
    vocabulary: Vocabulary,
    *,
    num_parameters: int,
    version: str,
    step: int,
    metrics: dict[str, Any],
    lora: LoraConfig | None = None,
) -> str:
    """Returns the text of the card. The Python code in the card runs unchanged.

    Args:
        config: configuration after merging the adapters.
        metrics: the checkpoint's metrics; the card shows the validation results.
        lora: configuration of the adapters; None if none were trained.
    """
    facts = [f"- Task: `{task_info.task}`, labels compared by {task_info.metric}"]
    fingerprint = task_info.provenance.get("fingerprint")
    if isinstance(fingerprint, dict):
        facts += [f"- Fingerprint of {split}: `{value}`" for split, value in fingerprint.items()]
    trained = task_info.provenance.get("config")
    started = trained.get("init_from") if isinstance(trained, dict) else None
    facts.append(f"- Started from {f'`{started}`' if started else 'random weights'}")
    facts.append(f"- Step {step}")
    if metrics.get("validated"):
        facts += [
            f"- {words.capitalize()}: {metrics[name]:.4g}"
            for name, words in _METRICS.items()
            if name in metrics
        ]
    else:
        facts.append("- No validation was run at this step")
    prefixed = [o for o in task_info.objectives if o.decoder_prefix]
    is_t5, prompt = isinstance(config, T5Config), _prompt(task_info.objectives[0])
    card = _CARD.format(
        task=task_info.task,
        tag="t5" if is_t5 else "t5gemma",
        title="T5" if is_t5 else "T5Gemma",
        terms="" if is_t5 else _GEMMA_TERMS,
        family=family(config, vocabulary),
        adapters=_adapters(lora),
        notes=_SPECIAL
        + (_OWN_HEAD if is_t5 and not config.logits_via_embedding else "")
        + (_UMT5 if config.position_bias == "layer" else "")
        + _answers(task_info.objectives[0]),
        parameters=f"{num_parameters:,}",
        sizes=_sizes(config),
        version=version,
        objectives="\n".join(
            f"| {o.name} | `{o.input_template}` | `{o.target_template}` | {o.weight:g} |"
            for o in task_info.objectives
        ),
        others="".join(
            _OTHER.format(
                name=o.name,
                prefix=o.decoder_prefix,
                prompt=_prompt(o),
                ids=[config.start_id, *vocabulary.encode(o.decoder_prefix)],
                length=task_info.target_length,
            )
            for o in prefixed
        ),
        facts="\n".join(facts),
        input_length=task_info.input_length,
        max_decode_len=task_info.max_decode_len,
        prompt=prompt,
    )
    if isinstance(config, T5Config):  # the only family that we export to CTranslate2
        length, scaled = task_info.max_decode_len, config.scale_decoder_outputs
        card += _CTRANSLATE2.format(scaled=scaled, prompt=prompt, max_decode_len=length)
    return card


def _sizes(config: ModelConfig) -> str:
    encoder, decoder = config.encoder, config.decoder
    if encoder.emb_dim == decoder.emb_dim:
        return (
            f"{encoder.num_layers} encoder and {decoder.num_layers} decoder layers,"
            f" width {decoder.emb_dim}"
        )
    return (
        f"{encoder.num_layers} encoder layers of width {encoder.emb_dim},"
        f" {decoder.num_layers} decoder layers of width {decoder.emb_dim}"
    )


def _prompt(objective: Objective) -> str:
    return objective.input_template.format_map(dict.fromkeys(objective.fields, "..."))


def _answers(objective: Objective) -> str:
    """Returns up to two paragraphs of the card.

    The first describes answers with more than the label, and the second describes prompts with more than the input.
    """
    said = ""
    if objective.writes_more:
        said += (
            f"\n\nThe model writes each answer as `{objective.target_template}`, and `stepdistill`"
            " returns only the label."
        )
        before = objective.target_template.partition(f"{{{objective.label_field}}}")[0]
        words = before.rpartition("}")[2].strip()
        if words and objective.target_template.endswith("}"):
            said += f" The label follows the last {words!r}."
    if objective.read_beside_input:
        named = " and ".join(objective.read_beside_input)
        said += (
            f"\n\nThe prompt contains {named} in addition to the input."
            " Each row must contain every field of the prompt."
        )
    return said


def family(config: ModelConfig, vocabulary: Vocabulary) -> str:
    """Returns the architecture's usual name after an "A", such as `A UMT5`. mT5 and Flan-T5 count as T5 v1.1."""
    if isinstance(config, T5GemmaConfig):
        return "A T5Gemma"
    if vocabulary.source == BYTES:
        return "A ByT5"
    if config.position_bias == "layer":
        return "A UMT5"
    if config.mlp_activations == ("silu", "linear"):
        return "A UL2 (gated SiLU)"
    if config.mlp_activations == ("relu",):
        return (
            "A T5 v1.0 (ReLU)" if config.logits_via_embedding else "A T5 (ReLU, own output layer)"
        )
    if config.logits_via_embedding:
        return "A T5 (gated GELU, output layer tied to the embedding)"
    return "A T5 v1.1 (gated GELU)"


def _adapters(lora: LoraConfig | None) -> str:
    if lora is None:
        return ""
    ranks = {f.name: getattr(lora, f.name) for f in dataclasses.fields(lora) if f.name != "alpha"}
    shown = ", ".join(f"{name} {rank}" for name, rank in ranks.items() if rank)
    return (
        f" Low-rank adapters were trained and are merged into the weights (rank {shown};"
        f" alpha {lora.alpha:g})."
    )
