"""Random T5 v1.1 models of `transformers` (torch): the oracle of parity."""

import numpy as np
import pytest

SIZES = {
    "vocab_size": 512,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 8,
}


def random_hf(directory, *, tied=False, seed=0, **sizes):
    """A model whose norm scales and biases are random, too: 1 and 0 would hide mistakes."""
    torch = pytest.importorskip("torch", reason="torch is not installed: no oracle to compare with")
    import transformers

    torch.manual_seed(seed)
    config = transformers.T5Config(
        **{**SIZES, **sizes},
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        scale_decoder_outputs=tied,
    )
    model = transformers.T5ForConditionalGeneration(config)
    if not tied:  # transformers 5 ties every head, whatever its configuration says
        shape = model.lm_head.weight.shape
        model.lm_head.weight = torch.nn.Parameter(torch.randn(shape) * 0.3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layer_norm" in name:
                p.mul_(1 + 0.3 * torch.randn_like(p))
            if "relative_attention_bias" in name:
                p.normal_(std=1.0)
    model.save_pretrained(directory)
    model = transformers.T5ForConditionalGeneration.from_pretrained(directory).eval()
    if not tied:
        assert model.lm_head.weight is not model.shared.weight
    return model


@pytest.fixture(scope="session")
def make_random_hf():
    return random_hf


@pytest.fixture(scope="session")
def torch_model(tmp_path_factory):
    """(torch model, its directory)."""
    directory = tmp_path_factory.mktemp("random_hf")
    return random_hf(directory), directory


@pytest.fixture(scope="session")
def padded_batch():
    """Ids longer than `max_distance`, with rows of several lengths; -100 where no loss counts."""
    rng = np.random.default_rng(0)
    source = rng.integers(2, 512, (4, 150)).astype(np.int32)
    source[1, 60:] = source[2, 9:] = 0
    target = rng.integers(2, 512, (4, 140)).astype(np.int32)
    target[1, 5:] = target[3, 77:] = 0
    return source, target
