import json

import jax
import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.commands.plan import parse_size
from stepdistill_jax.errors import InputError

# two devices: what a layout costs to compile is what these tests cost
SHORT = ("--set", "INPUT_LENGTH=32", "--set", "TARGET_LENGTH=16", "--set", "BATCH_SIZE=8")


@pytest.fixture(autouse=True)
def devices_of_the_tests():
    """`plan` makes devices where JAX has none: those of this process are the 8 of conftest.py."""
    assert jax.device_count() == 8


def run(capsys, tmp_path, *argv):
    code = main(["plan", *map(str, argv), "--data-dir", str(tmp_path)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.slow
def test_layouts_are_compared_and_the_cheapest_is_named(capsys, tmp_path):
    code, out, _ = run(capsys, tmp_path, "demo_step_by_step", *SHORT, "--devices", "2", "--json")
    assert code == 0
    for part in ("Assumed: ", "fsdp ", "Collectives of a step", "Cheapest that fits"):
        assert part in out, out
    found = json.loads(out.splitlines()[-1])
    assert found["hbm"] == 80 * 10**9
    assert found["best"]["name"] in [c["name"] for c in found["candidates"]]
    assert found["seconds_at_peak"]["NVIDIA H100"] > 0


def test_one_layout_takes_the_configs_own_policy(capsys, tmp_path):
    argv = ("--devices", "2", "--layout", "fsdp", "--gin_file", "memory/remat_minimal.gin")
    code, out, _ = run(capsys, tmp_path, "demo_step_by_step", *SHORT, *argv, "--json")
    assert code == 0
    (candidate,) = json.loads(out.splitlines()[-1])["candidates"]
    assert candidate["remat_policy"] == "minimal"
    assert candidate["layout"] == {"data": 1, "fsdp": 2, "tensor": 1}


def test_where_nothing_fits_advice_is_printed(capsys, tmp_path):
    argv = (*SHORT, "--devices", "2", "--hbm", "1MB", "--layout", "fsdp")
    code, out, _ = run(capsys, tmp_path, "demo_step_by_step", *argv)
    assert code == 0
    assert "Nothing fits." in out
    assert "adafactor.gin" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo_step_by_stp"], "did you mean 'demo_step_by_step'"),
        (["demo_step_by_step", "--hbm", "lots"], "--hbm lots: a size such as"),
        (
            ["demo_step_by_step", "--devices", "0"],
            "--devices must be a whole number of at least 1, not 0",
        ),
        (["demo_step_by_step", "--devices", "8", "--layout", "fdsp"], "did you mean 'fsdp'"),
        (["demo_step_by_step", "--devices", "8", "--topology", "v5e:4x4"], "leave one of them out"),
        (["demo_step_by_step", "--devices", "64"], "already has 8 CPU devices"),
        ([], "a config is wanted"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(capsys, tmp_path, argv, message):
    try:
        code, _, err = run(capsys, tmp_path, *argv)
    except SystemExit as stop:  # argparse's own
        code, err = stop.code, capsys.readouterr().err
    assert code == 2
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("16GiB", 16 * 2**30), ("1.5 TB", 15 * 10**11), ("100", 100)],
)
def test_sizes_have_decimal_and_binary_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "12XB", "1.2.3GB", "-4GB", "0GB", "iB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="--hbm"):
        parse_size(text)
