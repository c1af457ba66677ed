"""Scores of given answers: exact, whatever lies beside them, on one device or on eight."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.decoding import choices
from stepdistill_jax.decoding.choices import ChoiceScorer
from stepdistill_jax.decoding.greedy import LabelDecoder, bucket_length
from stepdistill_jax.formats.config_json import config_json
from stepdistill_jax.formats.hf import save_params
from stepdistill_jax.models import sharding
from stepdistill_jax.models.encoder_decoder import abstract_params, init_params
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime.files import write_json

# eight heads: `tensor` cuts them over all devices; other depths: encoder and decoder are not mixed up
CONFIG = T5Config(
    vocab_size=128,
    emb_dim=32,
    num_heads=8,
    head_dim=8,
    mlp_dim=48,
    num_encoder_layers=2,
    num_decoder_layers=1,
)
TIED = T5Config(
    vocab_size=128,
    emb_dim=32,
    num_heads=2,
    head_dim=8,
    mlp_dim=48,
    num_encoder_layers=1,
    num_decoder_layers=2,
    logits_via_embedding=True,
    scale_decoder_outputs=True,
)


@pytest.fixture(scope="module")
def params():
    params = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(2))
    head = np.array(params["logits_dense"]["kernel"])
    head[:, 1] *= 3  # answers end after 2 to 6 tokens
    params["logits_dense"]["kernel"] = jax.numpy.asarray(head)
    return params


def some_ids(rng, lengths):
    return [[*rng.integers(3, 128, n).tolist(), 1] for n in lengths]


@pytest.fixture(scope="module")
def asked():
    """13 rows of up to 31 ids, with up to 30 answers each, one of which is longer than 64 ids."""
    rng = np.random.default_rng(1)
    rows = some_ids(rng, rng.integers(1, 31, 13))
    answers = [some_ids(rng, rng.integers(1, 7, n)) for n in rng.integers(1, 31, 13)]
    answers[4] = some_ids(rng, (70, 2, 1))
    return rows, answers


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        pytest.param(TIED, marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
    ids=["v1.1", "tied", "t5gemma"],
)
def test_scores_are_those_of_teacher_forcing_in_transformers(config, asked, tiny_t5gemma, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if config is None:
        config, params = tiny_t5gemma
    else:
        params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(4))
    write_json(tmp_path / "config.json", config_json(config))
    save_params(tmp_path, params, config)
    auto = transformers.AutoModelForSeq2SeqLM
    peer = auto.from_pretrained(tmp_path, attn_implementation="eager").eval()
    rows, answers = asked
    scores = ChoiceScorer(config, batch_size=13)(params, rows, answers)
    for row, of_row, got in zip(rows, answers, scores, strict=True):
        assert got.shape == (len(of_row),) and got.dtype == np.float32
        labels = torch.zeros(len(of_row), max(map(len, of_row)), dtype=torch.long)
        for i, ids in enumerate(of_row):
            labels[i, : len(ids)] = torch.tensor(ids)
        with torch.inference_mode():
            out = peer(input_ids=torch.tensor([row] * len(of_row)), labels=labels)
        of_ids = out.logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        want = (of_ids * (labels != 0)).sum(-1).numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)  # measured 2e-5 of 300 nats


@functools.cache
def scorer_of(batch_size):
    return ChoiceScorer(CONFIG, batch_size=batch_size)


@given(st.data())
def test_a_score_depends_on_its_own_row_and_answer_alone(params, data):
    ids = st.lists(st.integers(3, 127), min_size=1, max_size=4).map(lambda x: [*x, 1])
    row = st.tuples(st.lists(ids, min_size=1, max_size=8), ids)
    asked = data.draw(st.lists(row, min_size=1, max_size=5))
    with pytest.MonkeyPatch.context() as patch:
        # one shape, and several decoder rows for an input; further ones are padding
        patch.setattr(choices, "WIDTHS", (8,))
        patch.setattr(choices, "_rounded", lambda count: 8)
        done = []
        whole = scorer_of(2)(params, [r for _, r in asked], [a for a, _ in asked], done.append)
        assert sum(done) == len(asked)
        order = data.draw(st.permutations(range(len(asked))))
        kept = [data.draw(st.permutations(range(len(asked[i][0])))) for i in order]
        kept = [places[: data.draw(st.integers(1, len(places)))] for places in kept]
        again = scorer_of(3)(
            params,
            [asked[i][1] for i in order],
            [[asked[i][0][j] for j in places] for i, places in zip(order, kept, strict=True)],
        )
    for i, places, got in zip(order, kept, again, strict=True):
        np.testing.assert_allclose(got, whole[i][list(places)], rtol=0, atol=2e-5)


def test_what_greedy_decoding_answers_has_its_score_and_wins_where_it_is_likeliest(params):
    rng = np.random.default_rng(5)
    rows = some_ids(rng, rng.integers(1, 30, 40))
    greedy = LabelDecoder(CONFIG, max_decode_len=8, batch_size=40)(params, rows)
    places = [i for i in range(40) if greedy.finished[i] and len(greedy.ids[i]) > 1]
    assert len(places) > 10
    answers = [[*some_ids(rng, (2, 4)), greedy.ids[i], *some_ids(rng, (3,))] for i in places]
    scores = ChoiceScorer(CONFIG, batch_size=40)(params, [rows[i] for i in places], answers)
    wins = 0
    for i, of_row in zip(places, scores, strict=True):
        assert of_row[2] == pytest.approx(float(greedy.scores[i]), abs=1e-5)
        if greedy.scores[i] > np.delete(of_row, 2).max():
            wins += 1
            assert of_row.argmax() == 2
    assert wins > len(places) / 2


@pytest.mark.parametrize(
    "layout", ["data", "tensor", pytest.param("fsdp_tensor", marks=pytest.mark.slow)]
)
def test_a_layout_gives_the_scores_of_one_device(params, asked, layout):
    mesh = sharding.make_mesh(layout)
    placed = jax.device_put(params, sharding.param_shardings(mesh, abstract_params(CONFIG), CONFIG))
    rows, answers = [x[:11] for x in asked]
    scorer = ChoiceScorer(CONFIG, batch_size=11, mesh=mesh)
    assert scorer.batch_size % sharding.batch_shards(mesh) == 0
    want = ChoiceScorer(CONFIG, batch_size=13)(params, *asked)
    for of_row, wanted in zip(scorer(placed, rows, answers), want[:11], strict=True):
        np.testing.assert_allclose(of_row, wanted, rtol=0, atol=2e-5)


def test_shapes_are_few_and_many_answers_follow_each_other(params, monkeypatch):
    shapes = set()

    def watched(*args, **_):
        def score(_, arrays):
            shapes.add(tuple(x.shape for x in arrays))
            return np.zeros(arrays[1].shape, np.float32)

        return score

    monkeypatch.setattr(choices, "_jit_score", watched)
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 7, 20, 150, 1000):
        labels = some_ids(rng, rng.integers(1, 5, size))
        rows = some_ids(rng, rng.integers(1, 500, 30))
        scores = ChoiceScorer(CONFIG, batch_size=8)(params, rows, [labels] * 30)
        assert [len(s) for s in scores] == [size] * 30
    assert {inputs[0] for inputs, *_ in shapes} == {8}
    assert {inputs[1] for inputs, *_ in shapes} <= set(map(bucket_length, range(1, 513)))
    decoder = {targets[1:] for _, targets, _ in shapes}
    assert {width for _, width in decoder} <= set(choices.WIDTHS)
    assert {count for count, width in decoder if width < 64} == {1}
    assert max(count for count, _ in decoder) in (64, 96), "1,000 labels of 3.5 ids on average"


@pytest.mark.parametrize(
    "rows, answers",
    [([[]], [[[1]]]), ([[5, 1]], [[]]), ([[5, 1]], [[[7, 1], []]]), ([[5, 1]], [])],
    ids=["no ids", "no answers", "an empty answer", "fewer answers"],
)
def test_what_has_no_score_is_refused(params, rows, answers):
    with pytest.raises(ValueError):
        ChoiceScorer(CONFIG)(params, rows, answers)


def test_nothing_asked_is_nothing_answered(params):
    assert ChoiceScorer(CONFIG)(params, [], []) == []
