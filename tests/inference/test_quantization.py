"""`--quantization int8`: the same commands, a quarter of the bytes, and never one answer file for both."""

import json

import jax
import numpy as np
import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import DecodeOptions, export
from stepdistill_jax.inference.engines import open_engine


def test_memory_identity_and_answers(model_dir):
    int8 = DecodeOptions(quantization="int8")
    whole, small = open_engine(model_dir), open_engine(model_dir, int8)
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(e._params["decoder"]["layers"]["mlp"]))
        for e in (whole, small)
    ]
    assert sizes[0] / sizes[1] > 3.5
    assert whole.identity != small.identity
    assert small.identity == open_engine(model_dir, int8).identity
    rows, answers = [[5, 7, 9, 1], [11, 1]], [[[4, 1], [6, 8, 1]]] * 2
    of_whole, of_small = (np.stack(e.score(rows, answers)) for e in (whole, small))
    assert 0 < np.abs(of_whole - of_small).max() < 0.3


def test_the_command_decodes_with_it(model_dir, questions, write_rows, tmp_path, capsys):
    questions_file = write_rows(questions[:20])
    out = [tmp_path / name for name in ("float32.jsonl", "int8.jsonl")]
    assert main(["predict", str(model_dir), str(questions_file), str(out[0])]) == 0
    command = ["predict", str(model_dir), str(questions_file), str(out[1])]
    assert main([*command, "--quantization", "int8"]) == 0
    scores = [[json.loads(line)["score"] for line in f.read_text().splitlines()] for f in out]
    assert len(scores[0]) == len(scores[1]) and scores[0] != scores[1]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--quantization", "int4"])
    assert "int8" in capsys.readouterr().err


def test_what_is_no_quantization_of_this_engine_is_said(model_dir, tmp_path):
    with pytest.raises(InputError, match="`quantization` must be one of int8, not 'int4'"):
        DecodeOptions(quantization="int4")
    pytest.importorskip("ctranslate2")
    export(model_dir, tmp_path / "converted", format="ctranslate2")
    with pytest.raises(InputError, match="its quantization was chosen when it was exported"):
        open_engine(tmp_path / "converted", DecodeOptions(quantization="int8"))
