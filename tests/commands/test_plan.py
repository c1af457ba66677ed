import importlib.util
import itertools
import json

import jax
import pytest

from stepdistill_jax.commands import plan as command
from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.commands.main import main
from stepdistill_jax.commands.plan import parse_size
from stepdistill_jax.commands.plan_bound import share_used
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.sharding import make_mesh
from stepdistill_jax.planning.advice import MORE_WORK

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
def test_layouts_are_compared_and_one_is_recommended(capsys, tmp_path):
    code, out, _ = run(capsys, tmp_path, "demo_step_by_step", *SHORT, "--devices", "2", "--json")
    assert code == 0
    for part in (
        "Assumed: ",
        "fsdp ",
        "Collectives per step",
        "Recommended: data, remat",
        f" {MORE_WORK} times the fewest FLOPs",
    ):
        assert part in out, out
    found = json.loads(out.splitlines()[-1])
    assert found["hbm"] == 80 * 10**9
    assert found["best"]["name"] in [c["name"] for c in found["candidates"]]
    assert found["seconds_at_peak"]["NVIDIA H100"] > 0


def test_one_layout_takes_the_configs_own_policy(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "DEFAULT_DEVICES", 2)
    argv = ("--layout", "fsdp", "--gin_file", "memory/remat_minimal.gin")
    code, out, _ = run(capsys, tmp_path, "demo_step_by_step", *SHORT, *argv, "--json")
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    (candidate,) = found["candidates"]
    assert candidate["remat_policy"] == "minimal"
    assert candidate["layout"] == {"data": 1, "fsdp": 2, "tensor": 1}
    assert "55.9 GiB can be used (75% of --hbm 80GB, JAX's share of a GPU's memory)" in out
    assert "Assumed: 2 devices; --devices sets another number\n" in out
    for column in ("remat", "filled", "work"):
        assert f"\n  {column}: " in out
    assert f"the step takes {candidate['work']:.3g} times the FLOPs that one device needs" in out
    (times,) = [line for line in out.splitlines() if line.startswith("Shortest time")]
    assert times.count("A100") == 1  # its variants compute at the same rate
    for kind in ("NVIDIA A100 ", "NVIDIA H100 ", "NVIDIA H200 ", "TPU v5 lite ", "TPU v5 "):
        assert kind in times
    assert len(found["seconds_at_peak"]) > times.count(" s,") + 1


@pytest.mark.parametrize(
    ("kind", "hbm", "share", "text"),
    [
        ("virtual CPU", 16 * 2**30, 0.75, "75% of --hbm 16GiB, JAX's share of a GPU's memory"),
        (
            "NVIDIA H100 80GB HBM3",
            84_942_979_072,
            0.875,
            "87.5% of the device's 84.94GB, JAX's share",
        ),
        ("TPU v5 lite", 16 * 2**30, 1.0, "100% of the device's 16GiB"),
    ],
)
def test_the_usable_memory_is_explained(kind, hbm, share, text):
    told = share_used({"device_kind": kind, "hbm": hbm, "limit": round(hbm * share)})
    assert told.startswith(text) and ("JAX" in told) == (share < 1)


def planned(capsys, tmp_path, *argv):
    """What a command printed, and its JSON."""
    code, out, err = run(capsys, tmp_path, *argv, "--json")
    assert code == 0, err
    return out, json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_advice_is_typed_as_printed_and_gives_what_it_says(capsys, tmp_path):
    """24 rows on 8 devices: two slices would have 16 each, a third of them empty; three have 8 each."""
    parts = ("--gin_file", "memory/remat_full.gin", "--gin_file", "optimizers/adafactor.gin")
    rows = ("--set", "INPUT_LENGTH=32", "--set", "TARGET_LENGTH=64", "--set", "BATCH_SIZE=24")
    argv = ("demo_step_by_step", *rows, *parts, "--devices", "8", "--layout", "fsdp")
    _, whole = planned(capsys, tmp_path, *argv)
    hbm = f"{round((whole['best']['per_device']['total'] - 1000) / 0.75)}B"
    out, found = planned(capsys, tmp_path, *argv, "--hbm", hbm)
    by_flags = dict(zip(found["advice"], found["remedies"], strict=False))
    line = next(line for line in by_flags if "NUM_MICROBATCHES" in line)
    assert (
        "Nothing fits. Each of these changes makes the config fit" in out and f"  {line}\n" in out
    )
    flags, _, figures = line.partition(": ")
    assert flags == "--set NUM_MICROBATCHES=3"
    _, again = planned(capsys, tmp_path, *argv, "--hbm", hbm, *flags.split())
    sizes = again["best"]["per_device"]
    assert by_flags[line]["per_device"] == sizes
    assert figures.startswith(f"needs {sizes['total'] / 2**30:.2f} GiB; ")
    device = found["advice"][-1]
    assert device.startswith("--hbm ") and device.endswith("GB: the config fits unchanged")


@pytest.mark.slow
def test_the_device_that_would_be_enough_is_named_with_the_flags_that_fit_it(capsys, tmp_path):
    argv = ("demo_step_by_step", *SHORT, "--devices", "2")
    _, found = planned(capsys, tmp_path, *argv)
    while True:
        compiled = [c for c in found["candidates"] if "flops" in c]
        smallest = min(compiled, key=lambda c: c["per_device"]["total"])
        if found["best"] is None:
            break
        hbm = f"{round((smallest['per_device']['total'] - 1000) / 0.75)}B"
        _, found = planned(capsys, tmp_path, *argv, "--hbm", hbm)
    assert "memory/remat_full.gin" in smallest["flags"]
    assert found["advice"][-1] == f"--hbm 0.1GB: fits with {smallest['flags']}"


def check_typed(lines, found, parts=()):
    """What is typed gives the config of each remedy."""
    for line, remedy in zip(lines, found["remedies"], strict=True):
        words = line.split()
        files = [after for word, after in itertools.pairwise(words) if word == "--gin_file"]
        values = [after for word, after in itertools.pairwise(words) if word == "--set"]
        config, _ = load_config("demo_step_by_step", values, [*parts, *files])
        if "layout" in remedy["changes"]:
            mesh = make_mesh(config.layout, jax.devices()[: found["devices"]])
            assert dict(mesh.shape) == remedy["layout"]
        assert config.remat_policy == remedy["remat_policy"]
        assert config.num_microbatches == remedy["num_microbatches"]
        assert config.optimizer.name == remedy["changes"].get("optimizer", "adamw")
        assert config.optimizer.mu_dtype == remedy["changes"].get("mu_dtype", "float32")


@pytest.mark.slow
def test_parts_are_named_as_they_are_typed(capsys, tmp_path):
    """With them the config is that of the candidate; a twelfth of the optimizer has no room without."""
    rows = ("--set", "INPUT_LENGTH=64", "--set", "TARGET_LENGTH=32", "--set", "BATCH_SIZE=16")
    argv = ("demo_step_by_step", *rows, "--devices", "2", "--layout", "fsdp")
    _, whole = planned(capsys, tmp_path, *argv)
    sizes = whole["best"]["per_device"]
    hbm = round((sizes["total"] - sizes["optimizer"] // 12) / 0.75)
    _, found = planned(capsys, tmp_path, *argv, "--hbm", f"{hbm}B")
    lines = [line.partition(": ")[0] for line in found["advice"][:-1]]
    for part in ("optimizers/adafactor.gin", "memory/bfloat16_moment.gin", "memory/remat_full.gin"):
        assert f"--gin_file {part}" in lines
    check_typed(lines, found)
    # one row: without empty ones on a mesh of `tensor` alone
    argv = ("demo_step_by_step", *rows[:4], "--set", "BATCH_SIZE=1", "--devices", "4")
    argv = (*argv, "--layout", "fsdp", "--gin_file", "memory/remat_full.gin")
    _, whole = planned(capsys, tmp_path, *argv)
    hbm = round((whole["best"]["per_device"]["total"] - 1000) / 0.75)
    _, found = planned(capsys, tmp_path, *argv, "--hbm", f"{hbm}B")
    lines = [line.partition(": ")[0] for line in found["advice"][:-1]]
    assert "--gin_file layouts/tensor.gin" in lines
    check_typed(lines, found, ["memory/remat_full.gin"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo_step_by_stp"], "did you mean 'demo_step_by_step'"),
        (
            ["demo_step_by_step", "--hbm", "lots"],
            "--hbm lots: expected a size with its unit, such as",
        ),
        (
            ["demo_step_by_step", "--devices", "0"],
            "--devices must be a whole number of at least 1, not 0",
        ),
        (["demo_step_by_step", "--devices", "8", "--layout", "fdsp"], "did you mean 'fsdp'"),
        (
            ["demo_step_by_step", "--devices", "8", "--topology", "v5e:4x4"],
            "leave one of the two flags out",
        ),
        (["demo_step_by_step", "--devices", "64"], "already has 8 CPU devices"),
        (
            ["demo_step_by_step", "--topology", "cuda:9"],
            "--topology cuda:9: expected cuda:1 to cuda:8",
        ),
        (
            ["demo_step_by_step", "--topology", "cuda:8"],
            "run pip install -c constraints.txt -e '.[aot-cuda]'",
        ),
        (
            ["demo_step_by_step", "--topology", "v5e:2x4"],
            "run pip install -c constraints.txt -e '.[tpu]'",
        ),
        (["demo_step_by_step", "--decode"], "--decode: set --topology, such as cuda:8"),
        (["demo_step_by_step", "--quantization", "int8"], "add --decode"),
        ([], "expected a config"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, argv, message):
    compilers = ("libtpu", "jax_plugins")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name.startswith(compilers) else found(name, *more),
    )
    try:
        code, _, err = run(capsys, tmp_path, *argv)
    except SystemExit as stop:  # argparse's own
        code, err = stop.code, capsys.readouterr().err
    assert code == 2
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("16GiB", 16 * 2**30), ("1.5 TB", 15 * 10**11), ("100 B", 100)],
)
def test_sizes_have_decimal_and_binary_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "80", "GB", "12XB", "1.2.3GB", "-4GB", "0GB", "iB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="--hbm"):
        parse_size(text)
