"""The model card: `README.md` of an exported directory."""

from typing import Any

from stepdistill_jax.formats.directory import TaskInfo
from stepdistill_jax.models.config import T5Config

_METRICS = {
    "label_accuracy": "validation label accuracy",
    "label_loss": "validation label loss (nats per token)",
}

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [t5, distillation, distilling-step-by-step]
---

# {task}, T5 distilled step by step

A T5 v1.1 of {parameters} parameters ({encoder} encoder and {decoder} decoder layers, width {width}), trained by
`stepdistill-jax` {version} with *Distilling Step-by-Step* (Hsieh et al. 2023, arXiv:2305.02301): the
objectives below share one model, and only the first is asked when it serves.

| objective | input | target | weight |
|---|---|---|---|
{objectives}

## Data and result

{facts}

The licence of the weights follows from that of the data and of the model they started from; it is
not stated here.

## Use

Inputs longer than {input_length} tokens are cut; an answer has at most {max_decode_len}.

```
stepdistill predict THIS_FOLDER in.jsonl out.jsonl
```

```python
from transformers import AutoTokenizer, T5ForConditionalGeneration

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = T5ForConditionalGeneration.from_pretrained("THIS_FOLDER")
inputs = tokenizer({prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```
"""


def model_card(
    task_info: TaskInfo,
    config: T5Config,
    *,
    num_parameters: int,
    version: str,
    step: int,
    metrics: dict[str, Any],
) -> str:
    """The card's text.

    Args:
        task_info: how the model was trained and is asked.
        config: its sizes.
        num_parameters: of all tensors.
        version: of this package.
        step: of the checkpoint.
        metrics: kept with it; those of validation are shown.
    """
    facts = [f"- Task: `{task_info.task}`, labels compared by {task_info.metric}"]
    fingerprint = task_info.provenance.get("fingerprint")
    if isinstance(fingerprint, dict):
        facts += [f"- Fingerprint of {split}: `{value}`" for split, value in fingerprint.items()]
    facts.append(f"- Step {step}")
    if metrics.get("validated"):
        facts += [
            f"- {words.capitalize()}: {metrics[name]:.4g}"
            for name, words in _METRICS.items()
            if name in metrics
        ]
    else:
        facts.append("- No validation was run at this step")
    return _CARD.format(
        task=task_info.task,
        parameters=f"{num_parameters:,}",
        encoder=config.num_encoder_layers,
        decoder=config.num_decoder_layers,
        width=config.emb_dim,
        version=version,
        objectives="\n".join(
            f"| {o.name} | `{o.input_template}` | `{o.target_template}` | {o.weight:g} |"
            for o in task_info.objectives
        ),
        facts="\n".join(facts),
        input_length=task_info.input_length,
        max_decode_len=task_info.max_decode_len,
        prompt=task_info.objectives[0].input_template.replace("{input}", "..."),
    )
