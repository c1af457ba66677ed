"""Random models of every family in `transformers` (torch), and how far ours are from them.

Run: python tests/models/oracle.py      prints the tables of docs/lab/numerics.md
"""

import dataclasses
import functools
import json
import pathlib
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stepdistill_jax.decoding.greedy import LabelDecoder
from stepdistill_jax.formats import hf
from stepdistill_jax.formats.directory import read_config
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.families import FAMILIES

SIZES = {
    "vocab_size": 512,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 8,
}
# ByT5 is a T5 v1.1 whose encoder is three times as deep as its decoder; it has 384 ids
OF_FAMILY = {
    "t5_v1_0": {"feed_forward_proj": "relu"},
    "byt5": {"num_layers": 3, "num_decoder_layers": 1, "vocab_size": 384},
    "ul2": {"feed_forward_proj": "gated-silu"},
}
CLASSES = {"mt5": "MT5", "umt5": "UMT5"}
# T5Gemma: what its sides share, and what each has. Windows are shorter than the rows, and caps so small
# that scores and logits bend; the scale of scores is not that of the heads' width.
GEMMA = {
    "vocab_size": 512,
    "head_dim": 32,  # wide for 16 tokens: their queries read the encoder's states, and no keys of them
    "query_pre_attn_scalar": 9,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 3.0,
}
GEMMA_SIDES = {
    "encoder": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 9,
    },
    "decoder": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "sliding_window": 6,
    },
}
# a random head never says EOS: its row is made longer, so that answers end at different places
EOS_STRENGTH = {"t5_v1_0": 4.0, "mt5": 1.6, "t5gemma": 3.0}


def random_hf(directory, *, family="t5_v1_1", tied=None, seed=0, **sizes):
    """A model of `transformers` whose norm scales and biases are random, too, and its directory.

    Initial scales of 1 and biases near 0 would hide mistakes. `config.json` is what the official
    directories have: it says how the head is tied, and nothing about scaling.
    """
    import torch
    import transformers

    if family == "t5gemma":
        return random_t5gemma(directory, tied=tied in (None, True), seed=seed, **sizes)
    tied = family == "t5_v1_0" if tied is None else tied
    kind = CLASSES.get(family, "T5")
    torch.manual_seed(seed + list(FAMILIES).index(family))
    given = {"feed_forward_proj": "gated-gelu", **SIZES, **OF_FAMILY.get(family, {}), **sizes}
    if kind == "T5":  # decides whether logits are scaled, and nothing else
        given["tie_word_embeddings"] = tied
    config = getattr(transformers, f"{kind}Config")(**given, decoder_start_token_id=0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    # UMT5 scales its logits by this flag, and building the model has set it
    model.config.tie_word_embeddings = tied
    with torch.no_grad():
        if not tied:  # building the model has tied the head, whatever the configuration says
            shape = model.lm_head.weight.shape
            model.lm_head.weight = torch.nn.Parameter(torch.randn(shape) * 0.3)
        else:  # at its initial size a tied table makes a decoder say its last token again
            model.shared.weight *= 0.2
        for name, p in model.named_parameters():
            if "layer_norm" in name:
                p.mul_(1 + 0.3 * torch.randn_like(p))
            if "relative_attention_bias" in name:
                p.normal_(std=1.0)
        model.lm_head.weight[1] *= EOS_STRENGTH.get(family, 2.2)
    model.save_pretrained(directory)
    path = pathlib.Path(directory) / "config.json"
    raw = json.loads(path.read_text()) | {"tie_word_embeddings": tied}
    raw.pop("scale_decoder_outputs", None)
    path.write_text(json.dumps(raw))
    assert (model.lm_head.weight is model.shared.weight) == tied
    return model


def random_t5gemma(directory, *, tied=True, seed=0, encoder=None, decoder=None, **shared):
    """`random_hf` of a T5Gemma; `encoder` and `decoder` hold fields of one side, `shared` those of both."""
    import torch
    import transformers

    torch.manual_seed(seed)
    given = {"encoder": encoder, "decoder": decoder}
    sides = {
        name: transformers.T5GemmaModuleConfig(
            **{**GEMMA, **fields, **shared, **(given[name] or {})}
        )
        for name, fields in GEMMA_SIDES.items()
    }
    config = transformers.T5GemmaConfig(
        **sides,
        vocab_size=sides["decoder"].vocab_size,
        tie_word_embeddings=tied,
        attn_implementation="eager",  # of which alone the caps of scores are promised
    )
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:  # a distance from 1; the last is larger, so that logits bend
                p.normal_(mean=2.0 if name.endswith("decoder.norm.weight") else 0.0, std=0.3)
            elif "embed_tokens" in name:  # small: a tied decoder would say its last token again
                p.normal_(std=0.06)
            else:
                p.normal_(std=p.shape[1] ** -0.5)
        model.lm_head.out_proj.weight[1] *= EOS_STRENGTH["t5gemma"]
    assert (model.lm_head.out_proj.weight is model.model.decoder.embed_tokens.weight) == tied
    model.save_pretrained(directory)
    return model


def padded_batch():
    """(source, target) ids, longer than `max_distance` 128, rows of several lengths; 0 is padding."""
    rng = np.random.default_rng(0)
    source = rng.integers(2, 384, (4, 150)).astype(np.int32)
    source[1, 60:] = source[2, 9:] = 0
    target = rng.integers(2, 384, (4, 140)).astype(np.int32)
    target[1, 5:] = target[3, 77:] = 0
    return source, target


def teacher_forced(source, target):
    """The batch that predicts `target` from `source`; 0 is padding."""
    shifted = np.zeros_like(target)
    shifted[:, 1:] = target[:, :-1]
    return {
        "encoder_input_tokens": source,
        "encoder_segment_ids": (source > 0).astype(np.int32),
        "decoder_input_tokens": shifted,
        "decoder_segment_ids": (target > 0).astype(np.int32),
    }


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Of one padded batch; `states` and `logits` only where there is no padding.

    `gradients` by Hugging Face name, of the mean loss over target tokens.
    """

    states: np.ndarray
    logits: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]


def torch_outputs(model, source, target) -> Outputs:
    """What `transformers` computes."""
    import torch

    labels = torch.tensor(np.where(target > 0, target, -100), dtype=torch.long)
    model.zero_grad()
    out = model(
        input_ids=torch.tensor(source), attention_mask=torch.tensor(source > 0), labels=labels
    )
    out.loss.backward()
    return Outputs(
        out.encoder_last_hidden_state.detach().numpy()[source > 0],
        out.logits.detach().numpy()[target > 0],
        out.loss.item(),
        {name: p.grad.numpy().copy() for name, p in model.named_parameters()},
    )


# nearly all of a comparison's time is compilation, so XLA optimises little
QUICK = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _ours(config, params, batch, target):
    def loss_and_outputs(params):
        logits, seen = EncoderDecoder(config).apply(
            {"params": params}, batch, capture_intermediates=lambda _, method: method == "encode"
        )
        picked = jnp.take_along_axis(nn.log_softmax(logits), target[..., None], -1)[..., 0]
        loss = -jnp.sum(jnp.where(target > 0, picked, 0.0)) / jnp.sum(target > 0)
        return loss, (seen["intermediates"]["encode"][0], logits)

    return jax.value_and_grad(loss_and_outputs, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def our_logits(config, params, batch):
    """[batch, target length, vocab] float32 alone, which compiles faster."""
    return EncoderDecoder(config).apply({"params": params}, batch)


def our_outputs(config, params, source, target) -> Outputs:
    """What our model computes."""
    batch = teacher_forced(source, target)
    (loss, (states, logits)), gradients = _ours(config, params, batch, target)
    return Outputs(
        np.asarray(states, np.float32)[source > 0],
        np.asarray(logits)[target > 0],
        float(loss),
        hf.to_hf(gradients, config),
    )


def gaps(got: Outputs, want: Outputs) -> dict[str, float]:
    """Largest differences.

    `states` and `logits`: of an element, in units of the root mean square of the reference; `loss`:
    relative; `gradients`: norm of the difference over the norm, of the parameter where it is
    largest. `logits_rms` and `argmax_equal` are for bfloat16.
    """
    assert got.gradients.keys() == want.gradients.keys()
    logits = (got.logits - want.logits) / rms(want.logits)
    return {
        "states": float(np.abs(got.states - want.states).max() / rms(want.states)),
        "logits": float(np.abs(logits).max()),
        "logits_rms": float(rms(logits)),
        "argmax_equal": float(np.mean(got.logits.argmax(-1) == want.logits.argmax(-1))),
        "loss": abs(got.loss / want.loss - 1),
        "gradients": max(
            float(np.linalg.norm(got.gradients[name] - g) / np.linalg.norm(g))
            for name, g in want.gradients.items()
        ),
    }


def rms(x):
    """Root mean square."""
    return np.sqrt(np.mean(np.square(x, dtype=np.float64)))


def random_rows(count, *, seed=0, vocab_size=384):
    """Inputs of 4 to 30 random ids and the end of sequence."""
    rng = np.random.default_rng(seed)
    return [[*rng.integers(2, vocab_size, rng.integers(4, 31)).tolist(), 1] for _ in range(count)]


def torch_greedy(model, rows, max_decode_len):
    """[rows, most ids] of `generate`."""
    import torch

    source = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for i, row in enumerate(rows):
        source[i, : len(row)] = row
    # use_cache: transformers 5 raises where encoder and decoder differ in depth
    return model.generate(
        torch.tensor(source),
        attention_mask=torch.tensor(source > 0),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_decode_len,
        use_cache=False,
    ).numpy()[:, 1:]


def load(directory, dtype="float32"):
    """(config, params) of ours from a Hugging Face directory."""
    config = read_config(directory)
    return dataclasses.replace(config, dtype=dtype), hf.load_params(directory, config)


def alone_gap(config, params, source, target, row=1):
    """Largest difference of a row's logits alone and in its batch, in units of their rms."""
    batched = np.asarray(our_logits(config, params, teacher_forced(source, target)))
    n_in, n_out = (int((x[row] > 0).sum()) for x in (source, target))
    assert n_in < source.shape[1] and n_out < target.shape[1]
    one = teacher_forced(source[[row], :n_in], target[[row], :n_out])
    alone = np.asarray(our_logits(config, params, one))[0]
    return float(np.abs(alone - batched[row, :n_out]).max() / rms(alone))


def main():
    """Prints the tables of docs/lab/numerics.md."""
    rows, batch = random_rows(40), padded_batch()
    tables = {"float32": [], "bfloat16": []}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            model = random_hf(directory, family=family)
            want, answers = torch_outputs(model, *batch), torch_greedy(model, rows, 16)
            for dtype, lines in tables.items():
                config, params = load(directory, dtype)
                ours = our_outputs(config, params, *batch)
                g = gaps(ours, want)
                cells = [f"{g[name]:.1e}" for name in ("states", "logits", "loss", "gradients")]
                if dtype == "bfloat16":
                    cells += [f"{g['logits_rms']:.3f}", f"{g['argmax_equal']:.1%}"]
                    cells += [f"{abs(ours.loss - want.loss):.1e}"]
                else:
                    cells += [f"{alone_gap(config, params, *batch):.1e}"]
                got = LabelDecoder(config, max_decode_len=16, batch_size=20)(params, rows)
                pairs = zip(got.ids, answers, strict=True)
                same = sum(ids == row[: len(ids)].tolist() for ids, row in pairs)
                cells += [f"{same} of {len(rows)} ({got.finished.sum()} ended)"]
                lines.append(" | ".join([family, *cells]))
    names = "| family | states | logits | loss | gradients"
    print(f"{names} | a row alone | greedy answers equal |\n|---|---|---|---|---|---|---|")
    print(*(f"| {line} |" for line in tables["float32"]), sep="\n")
    print(f"\n{names} | logits rms | same argmax | loss, nats | greedy answers equal |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(*(f"| {line} |" for line in tables["bfloat16"]), sep="\n")


if __name__ == "__main__":
    main()
