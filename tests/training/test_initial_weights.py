"""INIT_FROM under INIT_RULES, and INIT_FROM another run's workdir."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats import hub
from stepdistill_jax.formats.directory import write_model_files
from stepdistill_jax.formats.hf import save_params, to_hf
from stepdistill_jax.inference import export
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.encoder_decoder import init_params
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime.checkpoints.manager import resolve_step
from stepdistill_jax.training import TrainConfig, inspect, train
from stepdistill_jax.training.provenance import describe
from stepdistill_jax.training.run import assemble
from stepdistill_jax.training.state import init_state

SETTINGS = {
    "task": "delivery",
    "batch_size": 16,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 2,
    "eval_every": 1,
    "checkpoint_every": 1,
    "layout": "fsdp_tensor",
    "seed": 5,
}
RULES = (
    (r"decoder/layers/self_attention/(.*)", r"encoder/layers/attention/\1"),
    (r"decoder/layers/mlp/wi_\d/kernel", None),
    (r"decoder/.*norm/scale", None),
    (r"decoder/(layers/mlp/.*)", r"encoder/\1"),  # of what the rules above leave: wo
)


# for a decoder of another depth than the encoder; the parameters of one are taken by two
SHARED = (
    (r"decoder/layers/self_attention/(.*)", r"decoder/layers/encoder_decoder_attention/\1"),
    (r"decoder/layers/mlp/.*", None),
)


@pytest.fixture(scope="module")
def vocabulary(delivery_data_dir):
    return load_vocabulary(delivery_data_dir / "delivery" / "spiece.model")


@pytest.fixture(scope="module")
def given(vocabulary):
    """(config, parameters) of a tiny model, random everywhere."""
    config = T5Config(
        vocab_size=vocabulary.size // 16 * 16 + 16,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=24,
        num_encoder_layers=2,
        num_decoder_layers=2,
    )
    initial = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), initial)


@pytest.fixture
def model_dir(given, vocabulary, tmp_path):
    config, params = given
    write_model_files(tmp_path / "base", config, vocabulary, None)
    save_params(tmp_path / "base", params, config)
    return tmp_path / "base"


def flat(params):
    return {n: np.asarray(x) for n, x in flatten_dict(params, sep="/").items()}


def run_of(tmp_path, data_dir, **changes):
    return assemble(TrainConfig(**SETTINGS | changes), tmp_path / "run", data_dir)


def by_hand(source, scratch):
    """What `RULES` make of the parameters of a source and of random ones."""
    expected = {}
    for name, x in source.items():
        if name.startswith("decoder/layers/self_attention/"):
            expected[name] = source[name.replace("decoder/layers/self_", "encoder/layers/")]
        elif name == "decoder/layers/mlp/wo/kernel":
            expected[name] = source["encoder/layers/mlp/wo/kernel"]
        elif name.startswith("decoder/") and ("wi_" in name or "norm" in name):
            expected[name] = scratch[name]
        else:
            expected[name] = x
    return expected


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_rules_load_rename_and_leave_out(given, model_dir, tmp_path, delivery_data_dir, capfd):
    run = run_of(tmp_path, delivery_data_dir, init_from=str(model_dir), init_rules=RULES)
    said = capfd.readouterr().err
    state = run.initial_state()
    scratch = init_state(run.model, run.tx, run.abstract, seed=5)
    expected = by_hand(flat(given[1]), flat(scratch.params))
    assert_equal(flat(state.params), expected)
    for x, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(run.abstract), strict=True):
        assert x.sharding == abstract.sharding

    found = describe(run)["initialised"]
    assert found["step"] is None
    new = {n for n in expected if n.startswith("decoder/") and ("wi_" in n or "norm" in n)}
    assert set(found["from_scratch"]) == new
    renamed = {
        f"decoder/layers/self_attention/{n}/kernel" for n in ("query", "key", "value", "out")
    }
    assert found["renamed"].keys() == renamed | {"decoder/layers/mlp/wo/kernel"}
    for target, source in found["renamed"].items():
        assert f"{target} from {source}" in said
    assert all(name in said.split("from scratch: ")[1].splitlines()[0] for name in new)
    assert set(found["unused"]) == new | renamed | {"decoder/layers/mlp/wo/kernel"}


def test_without_rules_all_is_loaded_as_by_the_rule_that_changes_nothing(
    given, model_dir, tmp_path, delivery_data_dir
):
    for rules in (None, [(".*", r"\g<0>")], [("encoder/.*", r"\g<0>")]):
        run = run_of(tmp_path, delivery_data_dir, init_from=str(model_dir), init_rules=rules)
        assert_equal(flat(run.initial_state().params), flat(given[1]))
        kept = describe(run)["initialised"]
        assert kept == {"step": None} | (
            {} if rules is None else {"from_scratch": [], "renamed": {}, "unused": []}
        )


def test_rules_read_a_t5x_checkpoint(given, vocabulary, tmp_path, delivery_data_dir):
    import flax.serialization
    from flax.traverse_util import unflatten_dict

    config, params = given
    stored = {}
    for name, x in flat(params).items():
        side, layered, rest = name.partition("/layers/")
        if layered:
            stored |= {f"{side}/layers_{i}/{rest}": layer for i, layer in enumerate(x)}
        else:
            outside = {"token_embedder": "token_embedder/embedding"}
            outside["logits_dense/kernel"] = "decoder/logits_dense/kernel"
            stored[outside.get(name, name)] = x
    del stored["decoder/decoder_norm/scale"]  # one that a rule leaves out
    stored["decoder/adapter/kernel"] = np.zeros((3, 3), np.float32)  # and one that T5 has not
    target = unflatten_dict(stored, sep="/")
    folder = tmp_path / "checkpoint_10"
    write_model_files(folder, config, vocabulary, None)
    tree = {"version": 3, "optimizer": {"target": target, "state": {}}}
    (folder / "checkpoint").write_bytes(flax.serialization.to_bytes(tree))
    run = run_of(tmp_path, delivery_data_dir, init_from=str(folder), init_rules=RULES)
    scratch = init_state(run.model, run.tx, run.abstract, seed=5)
    expected = by_hand(flat(params), flat(scratch.params))
    assert_equal(flat(run.initial_state().params), expected)


@pytest.mark.slow
def test_a_name_of_the_hub_is_the_model_that_is_downloaded_and_a_resume_needs_it_no_more(
    given, vocabulary, model_dir, tmp_path, delivery_data_dir, monkeypatch
):
    config, params = given
    monkeypatch.setattr(hub, "_of_hub", lambda _: str(model_dir))
    run = run_of(tmp_path, delivery_data_dir, init_from="own/er")
    assert (run.config.init_from, run.model.emb_dim) == ("own/er", config.emb_dim)
    assert_equal(flat(run.initial_state().params), flat(params))
    shown = inspect(run.config, data_dir=delivery_data_dir)
    assert shown["vocabulary_size"] == vocabulary.size
    settings = SETTINGS | {"init_from": "own/er", "layout": "data"}
    first = TrainConfig(**settings)
    done = train(first, workdir=tmp_path / "run", data_dir=delivery_data_dir)
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert kept["config"]["init_from"] == "own/er" and "init_from" in kept["fingerprint"]
    monkeypatch.setattr(hub, "_of_hub", lambda _: pytest.fail("a resume asked the hub"))
    again = train(first, workdir=tmp_path / "run", data_dir=delivery_data_dir)
    assert again["step"] == done["step"] == 2


@pytest.mark.slow
def test_a_new_vocabulary_starts_from_scratch_under_the_old_body(
    given, model_dir, tmp_path, delivery_data_dir
):
    config, params = given
    described = json.loads((model_dir / "config.json").read_text())
    described["vocab_size"] += 16
    (model_dir / "config.json").write_text(json.dumps(described))
    settings = {"init_from": str(model_dir), "init_rules": [("logits_dense/kernel", None)]}
    size, emb_dim = config.vocab_size, config.emb_dim
    shapes = (
        f"token_embedder in {model_dir} has the shape [{size}, {emb_dim}], but the model's token_embedder has"
        f" [{size + 16}, {emb_dim}]; add the rule ('token_embedder', None) to start it from scratch"
    )
    with pytest.raises(InputError, match=re.escape(shapes)):
        run_of(tmp_path, delivery_data_dir, **settings)
    settings["init_rules"] += [("token_embedder", None)]
    run = run_of(tmp_path, delivery_data_dir, **settings)
    scratch = flat(init_state(run.model, run.tx, run.abstract, seed=5).params)
    new = {name: scratch[name] for name in ("token_embedder", "logits_dense/kernel")}
    assert_equal(flat(run.initial_state().params), flat(params) | new)


def test_what_a_directory_lacks_is_named_with_the_rule_that_leaves_it_out(
    given, model_dir, tmp_path, delivery_data_dir
):
    file = model_dir / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    safetensors.numpy.save_file(tensors, file)
    name = "decoder/relpos_bias/rel_embedding"
    rules = [("decoder/decoder_norm/scale", None)]
    wanted = (
        f"{model_dir} has no parameter {name}; did you mean 'encoder/relpos_bias/rel_embedding'?;"
        f" add the rule ({name!r}, None) to start it from scratch"
    )
    with pytest.raises(InputError, match=re.escape(wanted)):
        run_of(tmp_path, delivery_data_dir, init_from=str(model_dir), init_rules=rules)
    assert not (tmp_path / "run").exists()
    rules += [(name, None)]
    run = run_of(tmp_path, delivery_data_dir, init_from=str(model_dir), init_rules=rules)
    scratch = flat(init_state(run.model, run.tx, run.abstract, seed=5).params)
    new = {n: scratch[n] for n in (name, "decoder/decoder_norm/scale")}
    assert_equal(flat(run.initial_state().params), flat(given[1]) | new)


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        (
            [("decoder/layers/self_atention/query/kernel", None)],
            "'decoder/layers/self_atention/query/kernel' applies to no parameter of the model;"
            " .* did you mean 'decoder/layers/self_attention/query/kernel'",
        ),
        (
            [("decoder/.*", None), ("decoder/layers/.*", None)],
            "'decoder/layers/.\\*' applies to no",
        ),
        ([("decoder/layers/mlp/wo", None)], "'decoder/layers/mlp/wo' applies to no"),
        (
            [("token_embedder", "token_embeder")],
            "has no parameter token_embeder for token_embedder;",
        ),
        ([("(.*)_embedder", r"\2")], r"'\\\\2' cannot replace '\(\.\*\)_embedder'"),
    ],
    ids=["no name", "decided before", "not the whole name", "no source", "no group"],
)
def test_a_rule_that_does_not_apply_is_refused(
    model_dir, tmp_path, delivery_data_dir, rules, wanted
):
    with pytest.raises(InputError, match=wanted) as caught:
        run_of(tmp_path, delivery_data_dir, init_from=str(model_dir), init_rules=rules)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"init_rules": [("a", None)]}, "also set `init_from`"),
        ({"init_from": "x", "init_rules": "decoder/.*"}, "`init_rules` must be"),
        ({"init_from": "x", "init_rules": []}, "`init_rules` must be"),
        ({"init_from": "x", "init_rules": [("a", None, 3)]}, "`init_rules` must be"),
        ({"init_from": "x", "init_rules": [("a", 3)]}, "`init_rules` must be"),
        ({"init_from": "x", "init_rules": [("a(", None)]}, "'a\\(' is not a regular expression"),
    ],
)
def test_rules_are_checked_before_anything_is_read(settings, wanted):
    with pytest.raises(InputError, match=wanted):
        TrainConfig(**SETTINGS | settings)


def test_the_macro_takes_pairs_and_reads_back(tmp_path):
    config = tmp_path / "mine.gin"
    config.write_text(
        'include "demo_step_by_step.gin"\n'
        'INIT_FROM = "models/base"\n'
        r'INIT_RULES = [("decoder/(.*)", r"encoder/\1"), ("logits_dense/.*", None)]' + "\n"
    )
    rules = (("decoder/(.*)", r"encoder/\1"), ("logits_dense/.*", None))
    found, text = load_config(config)
    assert found.init_rules == rules
    (tmp_path / "operative.gin").write_text(text)
    assert load_config(tmp_path / "operative.gin")[0] == found
    overrides = ["INIT_FROM=models/base", 'INIT_RULES=[("decoder/.*", None)]']
    assert load_config("demo_step_by_step", overrides)[0].init_rules == (("decoder/.*", None),)
    with pytest.raises(InputError, match="INIT_RULES: also set `init_from`"):
        load_config("demo_step_by_step", overrides[1:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, delivery_data_dir):
    """A workdir with adapters, and what it exports."""
    folder = tmp_path_factory.mktemp("trained")
    lora = LoraConfig(query=2, wo=2, alpha=8.0)
    config = TrainConfig(**SETTINGS | {"lora": lora, "learning_rate": 1e-2, "seed": 1})
    train(config, workdir=folder / "run", data_dir=delivery_data_dir)
    export(folder / "run", folder / "exported")
    return folder / "run", safetensors.numpy.load_file(folder / "exported" / "model.safetensors")


@pytest.mark.slow
def test_a_workdir_gives_what_export_writes_of_it(trained, tmp_path, delivery_data_dir, capfd):
    workdir, exported = trained
    run = run_of(tmp_path, delivery_data_dir, init_from=str(workdir))
    best = resolve_step(workdir, "best")
    assert f"{workdir}: uses step {best} of this training run" in capfd.readouterr().err
    state = run.initial_state()
    found = to_hf(state.params, run.model)
    assert found.keys() == exported.keys()
    for name, x in exported.items():  # adapters are merged on 8 devices here, on one in `export`
        merged = name.endswith((".q.weight", ".wo.weight"))
        np.testing.assert_allclose(found[name], x, rtol=0, atol=2e-7 if merged else 0, err_msg=name)
    assert int(state.step) == 0
    assert describe(run)["initialised"] == {"step": best}
    for x, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(run.abstract), strict=True):
        assert x.sharding == abstract.sharding

    with_rules = run_of(tmp_path, delivery_data_dir, init_from=str(workdir), init_rules=SHARED)
    source, scratch = flat(state.params), init_state(run.model, run.tx, run.abstract, seed=5)
    expected = dict(source)
    for name in source:
        if name.startswith("decoder/layers/self_attention/"):
            expected[name] = source[name.replace("/self_attention/", "/encoder_decoder_attention/")]
        elif name.startswith("decoder/layers/mlp/"):
            expected[name] = flat(scratch.params)[name]
    assert_equal(flat(with_rules.initial_state().params), expected)


@pytest.mark.slow
def test_a_run_from_a_workdir_resumes_and_compares_its_step(trained, tmp_path, delivery_data_dir):
    source, workdir = tmp_path / "source", tmp_path / "second"
    shutil.copytree(trained[0], source)
    best = resolve_step(source, "best")
    config = TrainConfig(**SETTINGS, init_from=str(source), init_rules=SHARED)

    def started(**changes):
        return train(
            dataclasses.replace(config, **changes), workdir=workdir, data_dir=delivery_data_dir
        )

    assert started()["step"] == 2  # whose first step gave up the buffers of all parameters
    kept = json.loads((workdir / "run.json").read_text())
    assert kept["initialised"]["step"] == best
    query = "decoder/layers/{}attention/query/kernel".format
    assert kept["initialised"]["renamed"][query("self_")] == query("encoder_decoder_")
    assert kept["config"]["init_rules"] == [list(rule) for rule in SHARED]
    with pytest.raises(InputError, match="`init_rules` was"):
        started(init_rules=SHARED[:1])
    source.rename(tmp_path / "moved")
    started(init_from=str(tmp_path / "moved"))
    started()  # it is gone
    # another run's step of that number
    shutil.copytree(trained[0], source)
    shutil.rmtree(source / "checkpoints" / str(best))
    shutil.copytree(workdir / "checkpoints" / str(best), source / "checkpoints" / str(best))
    with pytest.raises(InputError, match="the weights of `init_from`: fingerprint was"):
        started()
    shutil.rmtree(source / "checkpoints" / str(best))
    started()
    assert json.loads((workdir / "run.json").read_text())["initialised"] == kept["initialised"]


@pytest.mark.slow
def test_a_workdir_without_a_step_is_refused(trained, tmp_path, delivery_data_dir):
    shutil.copytree(trained[0], tmp_path / "source")
    for step in (tmp_path / "source" / "checkpoints").iterdir():
        shutil.rmtree(step)
    with pytest.raises(InputError, match="has no checkpoint"):
        run_of(tmp_path, delivery_data_dir, init_from=str(tmp_path / "source"))
