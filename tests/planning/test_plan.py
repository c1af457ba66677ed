"""`plan` against arithmetic and against each other; against real memory in test_truth."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import optax
import pytest

from stepdistill_jax.batches.packing import empty_group
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.flops import recomputed_flops, train_flops
from stepdistill_jax.models.sharding import Layout, make_mesh
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.models.t5gemma import T5GemmaConfig, gemma_side
from stepdistill_jax.planning import candidates, plan
from stepdistill_jax.planning.candidates import Target, layouts_for, row_multiple
from stepdistill_jax.planning.compiling import lower_step
from stepdistill_jax.planning.devices import memory_of, usable_share
from stepdistill_jax.planning.workload import workload
from stepdistill_jax.runtime.chips import CHIPS, Chip
from stepdistill_jax.training.config import OptimizerConfig, TrainConfig
from stepdistill_jax.training.mutual_information import MutualInformation
from stepdistill_jax.training.optimizer_function import OptimizerFunction
from stepdistill_jax.training.run import assemble

GIB = 2**30
CONFIG = TrainConfig(
    task="not_prepared", batch_size=16, input_length=64, target_length=32, dropout_rate=0.0
)
# T5 v1.1 tiny with T5's vocabulary: embedding, head, 2 + 1 layers, norms, two tables of 4 x 32
ENCODER_LAYER = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
DECODER_LAYER = 8 * 64 * 64 + 3 * 64 * 128 + 3 * 64
TINY = 2 * 32128 * 64 + 2 * ENCODER_LAYER + DECODER_LAYER + 2 * 64 + 2 * 4 * 32
BATCH = 16 * (2 * 64 + 5 * 32) * 4


@pytest.fixture(autouse=True, scope="module")
def no_data_and_8_devices(tmp_path_factory):
    assert jax.device_count() == 8  # `plan` would make its own where JAX has none
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPDISTILL_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


def only(config=CONFIG, devices=8, **arguments):
    (candidate,) = plan(config, devices=devices, **arguments)["candidates"]
    return candidate


@pytest.fixture(scope="module")
def fsdp():
    return only(layout="fsdp")


@pytest.fixture(scope="module")
def one_device():
    """With rates for the CPU, too, so that its compiled step has a bound."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHIPS, "cpu", Chip(1e12, 1, 1e11, 1e10, 1e11, 1e11, 1e9))
        return only(devices=1, layout="data")


def test_arguments_are_parameters_optimizer_and_batch_by_arithmetic(one_device):
    sizes = one_device["per_device"]
    assert sizes["params"] == sizes["gradients"] == 4 * TINY
    # two moments, and the counts of AdamW and its schedule
    assert sizes["optimizer"] == 2 * 4 * TINY + 2 * 4
    # the step and the key of dropout (unused here, so not an argument) beside it
    rest = sizes["arguments"] - sizes["params"] - sizes["optimizer"] - BATCH
    assert 0 <= rest <= 64


@pytest.mark.parametrize(("momentum", "moments"), [(0.9, 1), (None, 0)])
def test_the_state_of_a_function_is_that_of_its_transformation(momentum, moments):
    """Nothing is taken from a name: one moment with momentum, none without."""
    rate = {"learning_rate": 0.1, "momentum": momentum}
    given = dataclasses.replace(CONFIG, optimizer=OptimizerFunction(optax.sgd, rate))
    assert only(given, 1, layout="data")["per_device"]["optimizer"] == moments * 4 * TINY


def test_fsdp_cuts_state_by_the_devices(fsdp):
    replicated = 4 * 2 * 4 * 32  # the two tables of the relative bias are cut by heads alone
    sizes = fsdp["per_device"]
    assert sizes["params"] == (4 * TINY - replicated) // 8 + replicated
    assert sizes["arguments"] == pytest.approx(sizes["params"] + sizes["optimizer"], abs=BATCH)


def test_fsdp_sends_each_weight_a_fixed_number_of_times(fsdp):
    """Gathered forward and backward, its gradient summed: at most 4 times, here without remat."""
    # the CPU's compiler sums whole gradients; the output layer's is cut by us
    assert fsdp["collectives"].keys() == {"all-gather", "all-reduce", "reduce-scatter"}
    assert 3 * 4 * TINY < fsdp["wire_bytes"] < 4 * 4 * TINY
    assert fsdp["unknown_loops"] == 0


def test_flops_are_those_of_the_formula(fsdp):
    model = model_config("t5_v1_1", "tiny", vocab_size=32128)
    shape = {"rows": 16, "input_length": 64, "target_length": 32}
    assert fsdp["flops"]["step"] == train_flops(model, **shape)
    assert fsdp["flops"]["per_device"] == train_flops(model, **shape) / 8


def test_flops_of_the_compiled_step_are_those_of_the_formula(one_device):
    """Loops counted: 0.1% more, since the tokens of the loss are cut into chunks of one size."""
    model = model_config("t5_v1_1", "tiny", vocab_size=32128)
    flops = train_flops(model, rows=16, input_length=64, target_length=32)
    bound = one_device["bound"]
    assert bound["flops"] == pytest.approx(flops, rel=0.005)
    # float32 is multiplied at the highest precision, a sixth of the rate
    assert bound["products_ms"] == pytest.approx(6 * 1e3 * bound["flops"] / 1e12)
    assert bound["unknown_loops"] == 0
    # each of the parts has its share of products, and of no other part's
    by_part = {part["part"]: part["flops"] for part in bound["parts"]}
    head = 3 * 2 * 16 * 32 * 64 * 32128
    assert by_part["output layer and loss"] == pytest.approx(head, rel=0.005)
    mlp = 3 * 2 * 16 * (2 * 64 + 32) * 3 * 64 * 128
    assert by_part["MLP"] == pytest.approx(mlp, rel=0.005)
    scores = 3 * 2 * 2 * 16 * 64 * (2 * 64 * 64 + 32 * 32 + 32 * 64)
    assert by_part["attention: matmuls"] == pytest.approx(scores, rel=0.005)


def test_rates_are_rows_and_needed_flops_in_the_time_of_the_bound(one_device):
    bound = one_device["bound"]
    seconds = bound["bound_ms"] / 1e3
    assert seconds >= max(bound[f"{of}_ms"] for of in ("products", "memory", "elements")) / 1e3
    assert bound["rows_per_second"] * seconds == pytest.approx(16)
    assert bound["mfu"] * seconds * 1e12 == pytest.approx(one_device["flops"]["step"])


@pytest.mark.parametrize(
    ("name", "value", "share"),
    [(None, "", 0.75), ("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9", 0.9), ("XLA_CLIENT_MEM_FRACTION", "0.5", 0.5)],
)  # fmt: skip
def test_a_gpus_memory_is_what_jax_takes_of_it(name, value, share, monkeypatch):
    if name:
        monkeypatch.setenv(name, value)
    assert usable_share(jax.devices()[0]) == share
    assert memory_of("NVIDIA H100 80GB HBM3", None) == pytest.approx(79.1 * GIB, rel=1e-3)


@pytest.mark.parametrize("value", ["0", "1.5", "most"])
def test_a_share_of_memory_that_is_none_is_refused(value, monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", value)
    with pytest.raises(InputError, match=f"XLA_CLIENT_MEM_FRACTION={value}: expected a share"):
        usable_share(jax.devices()[0])


def test_recomputation_by_hand():
    """One layer each, 3 inputs, 2 targets, width 4, 1 head of 2, feed-forward 5, one gate, 8 ids."""
    model = T5Config(
        vocab_size=8,
        emb_dim=4,
        num_heads=1,
        head_dim=2,
        mlp_dim=5,
        num_encoder_layers=1,
        num_decoder_layers=1,
        mlp_activations=("relu",),
        remat_policy="full",
    )
    shape = {"rows": 1, "input_length": 3, "target_length": 2}
    products = 2 * 4 * 2  # a token through one projection of attention
    encoder = 3 * (4 * products + 2 * 2 * 4 * 5)
    decoder = 2 * (6 * products + 2 * 2 * 4 * 5) + 3 * 2 * products
    scores = 2 * 2 * 2 * (3 * 3 + 2 * 2 + 2 * 3)
    assert recomputed_flops(model, **shape) == encoder + decoder + scores
    head = 2 * 2 * 4 * 8
    assert train_flops(model, **shape) == 3 * (encoder + decoder + scores + head)
    minimal = dataclasses.replace(model, remat_policy="minimal")
    assert recomputed_flops(minimal, **shape) == scores
    assert recomputed_flops(dataclasses.replace(model, remat_policy="elementwise"), **shape) == 0


def test_sides_of_two_sizes_and_shared_heads_by_hand():
    """One layer each, 3 inputs, 2 targets; widths 4 and 6, two heads of 2 that read one of keys."""
    encoder, decoder = gemma_side(4, 2, 1, 2, 5, 1), gemma_side(6, 2, 1, 2, 7, 1)
    model = T5GemmaConfig(vocab_size=8, encoder=encoder, decoder=decoder)
    shape = {"rows": 1, "input_length": 3, "target_length": 2}
    # query and out, key and value, three projections of the gated block
    of_encoder = 3 * 2 * (2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 5)
    of_decoder = 2 * 2 * (2 * 6 * 4 + 2 * 6 * 2 + 3 * 6 * 7)
    cross = 2 * 2 * (2 * 6 * 4) + 3 * 2 * (2 * 4 * 2)
    scores = 2 * 2 * (3 * 3 + 2 * 2 + 2 * 3) * 4
    head = 2 * 2 * 6 * 8
    assert train_flops(model, **shape) == 3 * (of_encoder + of_decoder + cross + scores + head)


@pytest.mark.slow
def test_the_step_of_a_t5gemma_has_the_flops_and_bytes_of_the_formula(monkeypatch):
    """XLA's own count, loops included, and each part's; its vocabulary is cut to that of T5."""
    monkeypatch.setitem(CHIPS, "cpu", Chip(1e12, 1, 1e11, 1e10, 1e11, 1e11, 1e9))
    model = model_config("t5gemma", "tiny", vocab_size=32128, dropout_rate=0.0)
    monkeypatch.setattr(
        sys.modules[plan.__module__],
        "workload",
        lambda *args, **options: dataclasses.replace(workload(*args, **options), model=model),
    )
    found = only(devices=1, layout="data")
    flops = train_flops(model, rows=16, input_length=64, target_length=32)
    by_part = {part["part"]: part["flops"] for part in found["bound"]["parts"]}
    assert found["bound"]["flops"] == pytest.approx(flops, rel=0.005), by_part
    scores = 3 * 2 * 2 * 16 * 64 * 2 * (64 * 64 + 32 * 32 + 32 * 64)
    assert by_part["attention: matmuls"] == pytest.approx(scores, rel=0.005)
    head = 3 * 2 * 16 * 32 * 64 * 32128
    assert by_part["output layer and loss"] == pytest.approx(head, rel=0.005)
    attention, mlp = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 128
    encoder, decoder = 2 * (attention + mlp + 4 * 64), 2 * (2 * attention + mlp + 6 * 64)
    params = 2 * 32128 * 64 + encoder + decoder + 2 * 64
    assert found["per_device"]["params"] == 4 * params
    assert found["per_device"]["optimizer"] == 2 * 4 * params + 2 * 4


@pytest.mark.slow
def test_each_way_to_save_memory_saves_it(one_device):
    base = one_device["per_device"]

    def other(**changes):
        return only(dataclasses.replace(CONFIG, **changes), 1, layout="data")["per_device"]

    minimal, full = other(remat_policy="minimal"), other(remat_policy="full")
    assert base["activations"] > minimal["activations"] > full["activations"]
    assert other(num_microbatches=2)["activations"] < base["activations"]
    moment = other(optimizer=OptimizerConfig(mu_dtype="bfloat16"))
    assert base["optimizer"] - moment["optimizer"] == 2 * TINY
    adafactor = other(optimizer=OptimizerConfig(name="adafactor"))
    # only the vocabulary's two tables have two sides of 128 or more: 32128 + 64 does not
    assert adafactor["optimizer"] < 0.55 * base["optimizer"]
    lora = other(lora=LoraConfig(query=2))
    assert lora["gradients"] * 100 < base["gradients"]
    assert lora["params"] > base["params"]


@pytest.mark.slow
def test_data_is_best_where_it_fits_though_another_sends_less():
    found = plan(CONFIG, devices=8, hbm=10**9)
    names = [c["name"] for c in found["candidates"]]
    assert set(names) == {"data", "fsdp", "fsdp_tensor 4x2", "fsdp_tensor 2x4"}
    assert all(c["fits"] for c in found["candidates"])
    assert found["best"]["name"] == "data"
    assert found["best"]["cost"] > min(c["cost"] for c in found["candidates"])
    assert any("published vocabulary of 32128" in text for text in found["assumptions"])
    assert any("one packed row for each example" in text for text in found["assumptions"])


@pytest.mark.slow
def test_what_does_not_fit_is_recomputed_or_left_out():
    state = 3 * 4 * TINY
    found = plan(CONFIG, devices=8, hbm=state)  # JAX takes three quarters: `data` has no room
    data, *others = found["candidates"]
    assert data["fits"] is False
    assert "alone do not fit" in data["error"]
    assert found["best"] in others
    assert found["best"]["per_device"]["total"] <= 0.75 * state


@pytest.mark.slow
def test_layouts_that_leave_rows_empty_come_last():
    """One row: on 4 devices a layout of `tensor` alone has no other, `data` and `fsdp` three more."""
    found = plan(dataclasses.replace(CONFIG, batch_size=1), devices=4)
    seen = [
        (c["name"], c["groups"][0][0], c["filled_rows"], c["work"]) for c in found["candidates"]
    ]
    assert seen == [
        ("tensor", 1, 1, 1.0), ("fsdp_tensor 2x2", 2, 1, 2.0), ("data", 4, 1, 4.0), ("fsdp", 4, 1, 4.0)
    ]  # fmt: skip
    assert [c["fits"] for c in found["candidates"]] == [True, True, None, None]
    assert "4.0 times the FLOPs" in found["candidates"][-1]["error"]
    assert found["best"]["name"] in ("tensor", "fsdp_tensor 2x2")


def applied(changes, config=CONFIG):
    """The config with what `plan` says to change, by hand."""
    optimizers = {"optimizer": "name", "mu_dtype": "mu_dtype"}
    of_optimizer = {optimizers[name]: v for name, v in changes.items() if name in optimizers}
    others = {
        name: v for name, v in changes.items() if name not in (*optimizers, "devices", "layout")
    }
    optimizer = dataclasses.replace(config.optimizer, **of_optimizer)
    return dataclasses.replace(config, optimizer=optimizer, **others)


def check_remedies(found, devices):
    """Each piece of advice is what a plan with that setting finds, and fits."""
    assert found["best"] is None
    for remedy in found["remedies"]:
        changes = remedy["changes"]
        config = dataclasses.replace(applied(changes), remat_policy=remedy["remat_policy"])
        layout = Layout(**remedy["layout"])
        again = only(config, changes.get("devices", devices), layout=layout)
        for name in ("groups", "filled_rows", "per_device", "collectives", "flops", "cost"):
            assert remedy[name] == again[name], (changes, name)
        assert again["per_device"]["total"] <= found["limit"]


@pytest.mark.slow
def test_each_advice_is_compiled_and_fits():
    """With the room of a sixth of the first moment less than the config takes."""
    config = dataclasses.replace(CONFIG, remat_policy="full")
    now = only(config, 2, layout="fsdp")["per_device"]
    room = now["total"] - now["optimizer"] // 12
    found = plan(config, devices=2, layout="fsdp", hbm=round(room / 0.75))
    check_remedies(found, 2)
    changes = [remedy["changes"] for remedy in found["remedies"]]
    assert {"optimizer": "adafactor"} in changes and {"mu_dtype": "bfloat16"} in changes
    assert {"num_microbatches": 2} in changes
    assert changes[-1] == {"devices": 4}
    costs = [remedy["cost"] for remedy in found["remedies"][:-1]]
    assert costs == sorted(costs)
    assert found["hbm_needed"] == pytest.approx(now["total"] / 0.75, abs=1)
    # less than any of these: then all that save memory are changed together
    others = ("devices", "layout")
    single = [r for r in found["remedies"] if not r["changes"].keys() & others]
    smallest = min(r["per_device"]["total"] for r in single)
    found = plan(config, devices=2, layout="fsdp", hbm=round((smallest - 1000) / 0.75))
    check_remedies(found, 2)
    together = [r["changes"] for r in found["remedies"] if not r["changes"].keys() & others]
    assert len(together) == 1 and together[0].keys() >= {"optimizer", "num_microbatches"}


@pytest.mark.slow
def test_what_the_tpu_compiler_refuses_is_changed_in_all_that_saves_memory(monkeypatch):
    """It gives no sizes: the policy that leaves the most room is where advice begins."""
    compile_step = candidates.compile_step

    def refusing(config, work, mesh, policy):
        if config.optimizer.name == "adafactor" and config.num_microbatches > 1:
            return compile_step(config, work, mesh, policy)
        raise MemoryError("no room")

    monkeypatch.setattr(candidates, "compile_step", refusing)
    monkeypatch.setattr(
        sys.modules[plan.__module__], "topology_devices", lambda topology: jax.devices()[:2]
    )
    found = plan(CONFIG, topology="v5e:2")
    (remedy,) = found["remedies"]
    assert remedy["changes"].keys() == {"optimizer", "num_microbatches"}
    assert remedy["remat_policy"] == "full"
    # a second way to write the optimizer would be refused next to it
    exact = OptimizerConfig(eps_before_correction=True)
    found = plan(dataclasses.replace(CONFIG, optimizer=exact), topology="v5e:2")
    assert not found["remedies"]


@pytest.mark.slow
def test_where_nothing_fits_the_table_has_the_least_that_each_layout_takes():
    """Layouts with empty rows, too: of the one row a layout of 2x4 has two, of fsdp eight."""
    found = plan(dataclasses.replace(CONFIG, batch_size=1), devices=8, hbm=10**7)
    assert found["best"] is None
    by_name = {(c["name"], c.get("remat_policy")) for c in found["candidates"] if "cost" in c}
    assert {("fsdp", "elementwise"), ("fsdp", "full"), ("fsdp_tensor 2x4", "full")} <= by_name


@pytest.mark.parametrize(
    ("size", "devices", "expected"),
    [
        ("small", 1, ["data"]),
        ("small", 8, ["data", "fsdp", "fsdp_tensor 4x2"]),  # 6 heads
        ("base", 5, ["data"]),
        (
            "xxl",
            64,
            ["data", "fsdp", *(f"fsdp_tensor {32 >> t}x{2 << t}" for t in range(5)), "tensor"],
        ),
    ],
)
def test_only_layouts_that_divide_the_model_are_tried(size, devices, expected):
    model = model_config("t5_v1_1", size, vocab_size=32128)
    assert list(layouts_for(model, devices)) == expected


@pytest.mark.parametrize(
    ("layout", "rows"), [(Layout(fsdp=8), 16), (Layout(fsdp=4, tensor=2), 8)], ids=["8", "4x2"]
)
def test_rows_are_rounded_up_to_the_devices_and_slices(layout, rows):
    sliced = dataclasses.replace(CONFIG, num_microbatches=2)
    target = Target(workload(CONFIG, rows=3), jax.devices(), 0)
    found = target.work.rows_of(row_multiple(sliced, target, layout))
    assert (found.groups, found.filled) == (((rows, 64, 32),), 3)


@pytest.mark.parametrize(
    ("pack", "extra_loss"), [(True, None), (True, MutualInformation()), (False, None)]
)
def test_the_arrays_of_targets_that_share_an_encoding_are_those_of_training(pack, extra_loss):
    changes = {"objectives": "shared_encoder", "extra_loss": extra_loss}
    config = dataclasses.replace(CONFIG, **changes, pack=pack)
    work, mesh = workload(config, rows=3), make_mesh(Layout(), jax.devices()[:1])
    lowered, _ = lower_step(config, work.model, work.rows_of(1).groups, mesh)
    (planned,) = lowered.args_info[0][1]
    targets = 32 if extra_loss is None else 64  # a row holds both targets of an example
    real = empty_group(3, 64, targets, shared=pack, pairs=extra_loss is not None)
    assert {n: (a.shape, a.dtype) for n, a in planned.items()} == {
        n: (a.shape, a.dtype) for n, a in real.items()
    }


@pytest.mark.parametrize("pack", [True, False])
def test_a_row_of_pairs_holds_all_that_an_example_reads_and_writes(pack):
    config = dataclasses.replace(
        CONFIG, objectives="step_by_step", extra_loss=MutualInformation(), pack=pack
    )
    assert workload(config).rows_of(1).groups == ((config.batch_size, 128, 64),)


def test_a_prepared_dataset_decides_rows_and_vocabulary(delivery_data_dir, tmp_path):
    config = TrainConfig(task="delivery", batch_size=4, input_length=64, target_length=32)
    found = workload(config, data_dir=delivery_data_dir)
    assert found.assumptions == ()
    assert found.counted.startswith(
        "the most in the first 32 steps of 'delivery', tokenised with /"
    )
    assert found.counted.endswith("/spiece.model")
    assert found.model.vocab_size < 10_000
    ((rows, *lengths),) = found.rows_of(1).groups
    assert 0 < rows < 2 * 4  # several of the short rows in one
    on_eight = dataclasses.replace(config, layout="fsdp")
    ((rows, *shorter),) = found.rows_of(8).groups
    assert rows == 8 and shorter < lengths
    assert assemble(on_eight, tmp_path, delivery_data_dir).batches.lengths == (tuple(shorter),)
    bound = dataclasses.replace(config, row_input_length=64, row_target_length=32)
    ((rows, *given),) = workload(bound, data_dir=delivery_data_dir).rows_of(1).groups
    assert given == [64, 32] and 0 < rows < 4


@pytest.mark.parametrize(
    ("layout", "slices", "seed"), [(Layout(data=8), 1, 0), (Layout(fsdp=2, tensor=4), 3, 5)],
    ids=["8", "2x4 of 3"],
)  # fmt: skip
def test_rows_are_those_that_a_run_packs(layout, slices, seed, delivery_data_dir, tmp_path):
    """Counted in the run's own batches: rows, rows with a token, and their lengths."""
    config = TrainConfig(
        task="delivery", batch_size=12, input_length=64, target_length=32,
        num_microbatches=slices, layout=layout, seed=seed,
    )  # fmt: skip
    work = workload(config, data_dir=delivery_data_dir)
    target = Target(work, jax.devices(), 0)
    found = work.rows_of(row_multiple(config, target, config.layout))
    batches = assemble(config, tmp_path, delivery_data_dir).batches
    filled = rows = 0
    for step in range(32):
        (group,) = batches(step)
        tokens = group["encoder_input_tokens"]
        rows, filled = max(rows, len(tokens)), max(filled, sum(row.any() for row in tokens))
        lengths = tokens.shape[1], group["decoder_input_tokens"].shape[1]
    assert found.groups == ((rows, *lengths),)
    assert found.filled == filled <= rows


def test_a_model_that_is_elsewhere_is_assumed_whatever_its_rules(delivery_data_dir):
    given = {"init_from": "/not/here", "init_rules": [("decoder/.*", None)], "model_size": "small"}
    config = TrainConfig(task="delivery", batch_size=64, input_length=64, target_length=32, **given)
    found = workload(config, data_dir=delivery_data_dir)
    assert found.model.vocab_size == 32128
    (assumption,) = found.assumptions
    assert "`init_from` /not/here does not exist here" in assumption
    assert "/spiece.model, since the vocabulary of `init_from` is not here" in found.counted


@pytest.mark.parametrize(
    ("name", "emb_dim", "vocab_size"),
    [
        ("google/t5-v1_1-base", 768, 32128),
        ("google-t5/t5-3b", 1024, 32128),
        ("google/umt5-small", 512, 256384),
        ("google/t5gemma-b-b-prefixlm", 768, 256000),
        ("google/flan-ul2", 4096, 32128),
        ("/elsewhere/models/t5-v1_1-base", 768, 32128),
    ],
)
def test_a_name_of_the_hub_gives_family_and_size(name, emb_dim, vocab_size):
    found = workload(TrainConfig(task="absent", init_from=name, model_size="tiny")).model
    assert (found.decoder.emb_dim, found.vocab_size) == (emb_dim, vocab_size)


def test_a_mistyped_name_of_the_hub_is_no_model():
    with pytest.raises(InputError, match=r"`init_from` .*; did you mean 'google/t5-v1_1-base'"):
        workload(TrainConfig(task="absent", init_from="google/t5-v1_1-bse"))


def test_more_devices_than_the_process_has_are_refused():
    with pytest.raises(InputError, match="already has 8 CPU devices"):
        plan(CONFIG, devices=16)


def test_a_layout_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="does not fit 8 devices"):
        plan(CONFIG, devices=8, layout=Layout(fsdp=3))
    with pytest.raises(
        InputError, match=r"`layout` fsdp_tensor 32x8: .* on 8 devices .* fsdp_tensor 4x2"
    ):
        plan(CONFIG, devices=8, layout="fsdp_tensor 32x8")


def test_a_topology_without_the_tpu_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(
        InputError, match=r"run pip install -c constraints\.txt -e '\.\[tpu\]' in the source folder"
    ):
        plan(CONFIG, topology="v5e:4x4")


GROWTH = """
import json, re, sys
import jax
from stepdistill_jax.planning.compiling import compile_step, lower_step
from stepdistill_jax.planning.devices import virtual_devices
from stepdistill_jax.planning.devices import memory_of, usable_share
from stepdistill_jax.planning.workload import workload
from stepdistill_jax.runtime.chips import CHIPS, Chip
from stepdistill_jax.models.sharding import make_mesh
from stepdistill_jax.training.config import TrainConfig

config = TrainConfig(
    task="none", batch_size=64, input_length=64, target_length=32, model_size="small"
)
work, result = workload(config, data_dir=sys.argv[1]), {}
everything = virtual_devices(64)
for count in (8, 64):
    mesh = make_mesh("fsdp", everything[:count])
    result[count] = compile_step(config, work, mesh, "full").to_json()
    lowered, _ = lower_step(config, work.model, work.rows_of(1).groups, mesh)
    shapes = re.findall(r"\\w\\[([\\d,]+)\\]", lowered.compile({"xla_backend_optimization_level": 0}).as_text())
    sizes = [[int(d) for d in shape.split(",")] for shape in shapes]
    # [tokens, vocabulary]: the largest logits on one device; [512, vocabulary] is the kernel
    result[count]["logits_tokens"] = max(
        s[0] for s in sizes if s[-1:] == [32128] and len(s) == 2 and s[0] != 512
    )
    assert [512, 32128] in sizes and not any(s[-1] == 32128 for s in sizes if len(s) > 2)
print(json.dumps(result))
"""


@pytest.mark.slow
def test_from_8_to_64_devices_no_term_grows(tmp_path):
    """fsdp, 64 rows: state as 1/N, traffic bounded by the parameters, logits cut by rows."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True, check=True,
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]},
    )  # fmt: skip
    few, many = (json.loads(done.stdout.splitlines()[-1])[n] for n in ("8", "64"))
    parameters = 4 * 76_961_152  # T5 v1.1 small, float32
    assert few["per_device"]["arguments"] / many["per_device"]["arguments"] == pytest.approx(
        8, rel=0.02
    )
    for name in ("gradients", "params", "optimizer"):
        assert many["per_device"][name] < parameters * 2 / 64 * 1.02
    for found in (few, many):
        # gathered forward and backward, and the gradient summed over a ring, which sends it twice
        assert found["wire_bytes"] < 4.1 * parameters
        assert found["unknown_loops"] == 0
    # all of it but the (N - 1) / N of a ring
    assert many["wire_bytes"] / few["wire_bytes"] == pytest.approx((63 / 64) / (7 / 8), rel=0.02)
    assert few["flops"]["per_device"] == 8 * many["flops"]["per_device"]
    assert (few["logits_tokens"], many["logits_tokens"]) == (8 * 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "layout", "tensor"), [(64, "fsdp", 1), (256, "fsdp_tensor", 2)]
)
def test_xxl_is_planned(devices, layout, tensor, tmp_path):
    """T5 v1.1 XXL: 11.1e9 parameters, inputs 1024, targets 256; about 10 s and under 1 GiB."""
    config = tmp_path / "xxl.gin"
    parts = ("train", "models/t5_v1_1", "objectives/step_by_step", "optimizers/adamw")
    config.write_text(
        "".join(f'include "{part}.gin"\n' for part in (*parts, "memory/remat_full"))
        + 'TASK = "cqa"\nMODEL_SIZE = "xxl"\nINPUT_LENGTH = 1024\nTARGET_LENGTH = 256\nTRAIN_STEPS = 9\n'
    )
    command = ["plan", config, "--devices", str(devices), "--layout", layout, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill_jax", *command, "--data-dir", tmp_path],
        capture_output=True, text=True, check=True, env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    (candidate,) = found["candidates"]
    assert candidate["fits"]
    assert candidate["layout"]["tensor"] == tensor
    # weights and two moments in float32, cut over all devices
    state = candidate["per_device"]["params"] + candidate["per_device"]["optimizer"]
    assert state == pytest.approx(12 * 11_135_332_352 / devices, rel=0.001)
