"""A directory of `transformers` as the teacher; what it generates is compared with `generate` itself."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from stepdistill_jax.errors import InputError  # noqa: E402
from stepdistill_jax.teacher import annotate  # noqa: E402
from stepdistill_jax.teacher.local import LocalTeacher  # noqa: E402

WORDS = [
    "parcel",
    "late",
    "is",
    "the",
    "answer",
    "So",
    "yes",
    "no",
    ".",
    "Q:",
    "A:",
    "because",
    "(a)",
    "(b)",
    "Is",
]
PROMPTS = ["Is the parcel late", "So the answer is yes because the parcel is late"]
KINDS = ("seq2seq", "causal")


def save(folder, kind, chat_template=None):
    """A random model with a vocabulary of words; the end of sequence is made unlikely."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size, ids = len(vocabulary), {"pad_token_id": 0, "eos_token_id": 1}
    if kind == "seq2seq":
        config = transformers.T5Config(
            vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            decoder_start_token_id=0, **ids,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=512, **ids
        )
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():  # larger weights: answers that differ
        for parameter in model.parameters():
            parameter.mul_(5.0)
    model.generation_config.suppress_tokens = [0]  # no padding in the middle of an answer
    model.save_pretrained(folder)
    return model.eval(), tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_prompts_is_answered_as_each_alone(tmp_path, kind):
    """The oracle is `generate` on one prompt without padding."""
    model, tokenizer = save(tmp_path, kind)
    answers = LocalTeacher(str(tmp_path), 2).generate(
        PROMPTS, {"max_tokens": 12, "temperature": 0.0}
    )
    assert len({answer.text for answer in answers}) == 2
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
        out = out[ids.shape[1] :] if kind == "causal" else out[1:]
        ended = 1 in out
        assert answer.text == tokenizer.decode(out, skip_special_tokens=True)
        assert answer.finish_reason == ("stop" if ended else "length")
        assert answer.prompt_tokens == ids.shape[1]
        assert answer.completion_tokens == (out.index(1) + 1 if ended else 12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_teacher_leaves_rows_without_a_rationale_and_says_why(tmp_path, kind):
    save(tmp_path / "model", kind)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"input": "Is the parcel late", "label": "yes"}\n' * 5)
    result = annotate(
        source,
        output,
        task="generic",
        teacher=f"hf:{tmp_path / 'model'}",
        max_tokens=8,
        max_truncated=1.0,
        concurrency=4,
        retries=0,
    )
    assert (result["rows"], result["with_rationale"]) == (5, 0)
    assert sum(result["defects"].values()) == 5
    assert "none of the 5 rows got a usable answer" in result["stopped"]
    assert '"model": "hf:model"' in (tmp_path / "out.jsonl.partial").read_text()


def test_the_chat_template_of_a_tokenizer_is_used(tmp_path):
    template = "{% for m in messages %}Q: {{ m.content }}{% endfor %} A:"
    _, tokenizer = save(tmp_path, "causal", template)
    teacher = LocalTeacher(str(tmp_path), 1)
    ids = teacher._encode(["Is the parcel late"])["input_ids"][0]
    assert tokenizer.decode(ids) == "Q: Is the parcel late A:"


def test_samples_of_a_local_teacher_differ(tmp_path):
    save(tmp_path, "causal")
    parameters = {"max_tokens": 12, "temperature": 5.0}
    answers = LocalTeacher(str(tmp_path), 8).generate(PROMPTS[:1] * 8, parameters)
    assert len({answer.text for answer in answers}) > 1


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        LocalTeacher(str(tmp_path), 1)
