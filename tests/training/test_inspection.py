import pathlib
import random

import numpy as np
import pytest

from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.errors import InputError
from stepdistill_jax.training import inspect
from stepdistill_jax.training.config import TrainConfig

# two names for the function, one for its module: the second import must not hide the first
from stepdistill_jax.training.inspection import inspect as inspect_of_module


@pytest.fixture(scope="module")
def lengths_data_dir(tmp_path_factory):
    """A dataset `lengths`: bytes, so that every length is known by hand."""
    from stepdistill_jax.data.prepare import prepare

    folder = tmp_path_factory.mktemp("lengths")
    rng = random.Random(0)
    lines = []
    for i in range(60):
        words = "ab" * rng.randint(1, 15)
        why = f', "rationale": "{"r" * rng.randint(5, 40)}"' if i % 3 else ""
        lines.append(f'{{"input": "{i} {words}", "label": "{"yes" if i % 2 else "no"}"{why}}}\n')
    (folder / "rows.jsonl").write_text("".join(lines))
    prepare("jsonl", source=folder / "rows.jsonl", new_name="lengths", data_dir=folder)
    return folder


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory):
    """A model directory whose vocabulary is bytes."""
    from stepdistill_jax.data.vocabulary import ByteVocabulary
    from stepdistill_jax.formats.directory import write_model_files
    from stepdistill_jax.models.families import model_config

    folder = tmp_path_factory.mktemp("bytes") / "model"
    write_model_files(
        folder, model_config("t5_v1_1", "tiny", vocab_size=259), ByteVocabulary(), None
    )
    return folder


def rows_of(data_dir):
    from stepdistill_jax.data.prepared import open_prepared

    return list(open_prepared("lengths", data_dir).examples("train"))


def test_the_function_is_the_same_by_either_name():
    assert inspect is inspect_of_module
    assert callable(inspect)


@pytest.mark.parametrize("brings_bytes", ["init_from", "model_family"])
def test_lengths_cuts_and_fill_are_those_counted_by_hand(
    lengths_data_dir, bytes_model, brings_bytes
):
    given = {"init_from": str(bytes_model), "model_family": "byt5"}[brings_bytes]
    sizes = {"batch_size": 15, "input_length": 30, "target_length": 24}
    config = TrainConfig("lengths", **sizes, **{brings_bytes: given})
    found = inspect(config, data_dir=lengths_data_dir)
    examples = rows_of(lengths_data_dir)
    for objective in step_by_step():
        rendered = [objective.render(vars(e)) for e in examples]
        present = [(len(i) + 1, len(t) + 1) for i, t in rendered if t]  # ASCII: a byte a letter
        figures = found["objectives"][objective.name]
        assert figures["rows"] == len(present)
        assert figures["absent"] == len(examples) - len(present)
        for side, limit in (("inputs", 30), ("targets", 24)):
            lengths = [row[side == "targets"] for row in present]
            assert figures[side]["min"] == min(lengths)
            assert figures[side]["max"] == max(lengths)
            assert figures[side]["mean"] == pytest.approx(np.mean(lengths), abs=0.01)
            for part in figures[side]["histogram"]:
                assert part["rows"] == sum(part["from"] <= n <= part["to"] for n in lengths)
            assert sum(part["rows"] for part in figures[side]["histogram"]) == len(lengths)
            assert found["cut"][objective.name][side] == sum(n > limit for n in lengths)
    assert 0 < found["fill"]["inputs"] <= 1
    assert found["vocabulary_size"] == 259


def test_rows_are_shown_as_text_with_their_objective(lengths_data_dir):
    config = TrainConfig("lengths", batch_size=15, row_input_length=128, row_target_length=128)
    found = inspect(config, data_dir=lengths_data_dir, rows=1)
    examples = rows_of(lengths_data_dir)
    texts = {
        (o.name, *o.render(vars(e)))
        for e in examples
        for o in step_by_step()
        if o.render(vars(e))[1]
    }
    (row,) = found["shown"]
    assert len(row) > 1
    for segment in row:
        assert (segment["objective"], segment["input"], segment["target"]) in texts
        assert segment["weight"] == 1.0
    assert sum(s["input_tokens"] for s in row) <= 128


def test_unpacked_rows_are_shown_for_each_objective(lengths_data_dir):
    config = TrainConfig("lengths", batch_size=15, pack=False)
    found = inspect(config, data_dir=lengths_data_dir, rows=2)
    assert all(len(row) == 1 for row in found["shown"])
    assert {row[0]["objective"] for row in found["shown"]} == {"label", "rationale"}
    assert found["row_counts"] == []
    assert found["rows_per_step"] == 30


@pytest.mark.slow
def test_the_rows_shown_are_the_least_work(delivery_data_dir):
    """And looking at them leaves nothing but the token store."""
    before = {p.name for p in pathlib.Path(delivery_data_dir).iterdir()} | {"token_store"}
    found = inspect("delivery", data_dir=delivery_data_dir)
    assert {p.name for p in pathlib.Path(delivery_data_dir).iterdir()} == before
    chosen = found["chosen"]
    assert chosen in found["candidates"]
    work = {
        (c["row_input_length"], c["row_target_length"]): c["flops_per_step"]
        for c in found["candidates"]
    }
    # (120, 72) has no padding at all, but attention between examples
    assert chosen["flops_per_step"] <= 1.01 * min(work.values())
    assert chosen["row_input_length"] < 120 and work[120, 72] > 1.05 * min(work.values())
    assert found["row_lengths"] == [chosen["row_input_length"], chosen["row_target_length"]]
    assert (found["input_length"], found["target_length"]) == (512, 256)
    assert found["fill"] == chosen["fill"]
    longer = TrainConfig("delivery", row_input_length=512, row_target_length=256)
    given = inspect(longer, data_dir=delivery_data_dir)
    assert given["row_lengths"] == [512, 256] and given["candidates"] == [given["chosen"]]
    assert given["chosen"]["flops_per_step"] > 1.05 * chosen["flops_per_step"]
    assert given["rows_per_step"] < found["rows_per_step"]


def test_an_unknown_split_is_named(delivery_data_dir):
    with pytest.raises(InputError, match=r"no split 'trian'.*did you mean 'train'"):
        inspect("delivery", split="trian", data_dir=delivery_data_dir)
