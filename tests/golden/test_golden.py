"""What tiny models computed when golden.npz was written; no torch."""

import importlib.util
import pathlib

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
ADVICE = (
    "numerics have changed. If that is not meant, look for the cause (git bisect, versions of jax:"
    " `about` in golden.npz says which wrote it). If it is, run `python tests/golden/make_golden.py`,"
    " commit the file with the sizes it prints, and say so in CHANGELOG.md"
)
# in units of the root mean square. float32 on another CPU, or compiled in another way, was seen to
# differ by 4e-6 (docs/lab/numerics.md); five steps of Adam make more of it
TOLERANCES = {"logits": 3e-5, "greedy_scores": 3e-5, "losses": 3e-5}


@pytest.fixture(scope="module")
def golden():
    spec = importlib.util.spec_from_file_location("make_golden", HERE / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wanted(golden):
    with np.load(golden.PATH) as f:
        return dict(f)


def check(golden, made, wanted):
    for name, x in made.items():
        assert name in wanted, f"{name} is not in golden.npz: {ADVICE}"
        gap = golden.gap(x, wanted[name])
        tolerance = TOLERANCES.get(name.rpartition("/")[2], 0.0)
        assert gap <= tolerance, f"{name} differs by {gap:.1e} (allowed {tolerance:.0e}): {ADVICE}"


GOLDEN_FAMILIES = [
    *("t5_v1_0", "t5_v1_1", "mt5", "byt5", "umt5", "t5gemma"),
    pytest.param("ul2", marks=pytest.mark.slow),  # T5 v1.1 with another activation
]


@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
def test_logits_and_decodes_are_those_of_the_golden_file(golden, wanted, family):
    check(golden, golden.of_family(family), wanted)
    ids = wanted[f"{family}/greedy_ids"]
    assert (ids == 1).any() and len(np.unique(ids)) > 4


def test_batches_and_losses_of_five_steps_are_those_of_the_golden_file(golden, wanted):
    check(golden, golden.of_training(), wanted)
    losses = wanted["losses"]
    assert losses.shape == (5, 2) and (losses[-1] < losses[0]).all()


def test_a_change_of_a_thousandth_is_seen_and_the_message_says_what_to_do(golden, wanted):
    changed = {"losses": wanted["losses"] * 1.001}
    with pytest.raises(AssertionError, match="make_golden"):
        check(golden, changed, wanted)


def test_the_golden_file_is_small():
    assert sum(path.stat().st_size for path in HERE.glob("*.npz")) < 100_000
