"""`DecodeOptions`: the keywords of `predict`, `evaluate` and `serve`, and the flags of their commands."""

import argparse
import dataclasses
import importlib

import pytest

from stepdistill_jax.commands.arguments import decode_options_of
from stepdistill_jax.inference import DecodeOptions, evaluate, predict
from stepdistill_jax.serving import serve

FIELDS = [field.name for field in dataclasses.fields(DecodeOptions)]
FLAGS = {
    "step": "last",
    "batch_size": 3,
    "layout": "fsdp",
    "max_decode_len": 7,
    "num_beams": 2,
    "length_penalty": 0.5,
    "choices": "row",
    "choices_temperature": 2.0,
    "prefix": "ask: ",
    "engine": "jax",
    "quantization": "int8",
}
OPERANDS = {
    "predict": ["model", "in.jsonl", "out.jsonl"],
    "evaluate": ["model", "--task", "t"],
    "serve": ["model"],
}


def parsed(command, *flags):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"stepdistill_jax.commands.{command}").add_arguments(parser)
    return decode_options_of(parser.parse_args([*OPERANDS[command], *flags]))


@pytest.mark.parametrize("command", OPERANDS)
def test_each_field_has_a_flag_and_its_default_is_the_fields_own(command):
    assert list(FLAGS) == FIELDS
    taken = dict(FLAGS)
    if command == "evaluate":
        del taken["max_decode_len"], taken["prefix"]
    flags = [x for name, x in taken.items() for x in (f"--{name.replace('_', '-')}", str(x))]
    assert parsed(command, *flags) == taken
    assert parsed(command) == {}


@pytest.mark.parametrize(
    "call, nearest",
    [
        (lambda: predict("m", "in", "out", num_beam=3), "num_beams"),
        (lambda: predict("m", "in", "out", on_eror="skip"), "on_error"),
        (lambda: evaluate("m", task="t", choices_temprature=2.0), "choices_temperature"),
        (lambda: serve("m", max_que=3), "max_queue"),
    ],
    ids=["predict", "an option of its own", "evaluate", "serve"],
)
def test_a_mistyped_option_names_the_nearest(call, nearest):
    with pytest.raises(TypeError, match=f"unexpected keyword argument .* did you mean '{nearest}'"):
        call()


@pytest.mark.parametrize("option", [{"prefix": "ask: "}, {"max_decode_len": 3}], ids=str)
def test_evaluate_asks_as_the_model_was_trained(option):
    with pytest.raises(TypeError, match=f"evaluate.. got an unexpected .*'{min(option)}'"):
        evaluate("m", task="t", **option)
