"""Two and four processes over gloo take the steps of one device, and go on where others stopped."""

import collections
import json

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # half a minute to a minute each

SCRIPT = "synthetic_steps.py"
EXAMPLES, STEPS = 40, 10
# a process is a slice by name; of four processes, two and two make one here
LAYOUTS = {
    2: {n: n for n in ("data", "fsdp", "fsdp_tensor", "tensor", "hybrid")},
    4: {"fsdp": "fsdp", "fsdp_tensor": "fsdp_tensor", "hybrid": {"dcn_data": 2, "fsdp": 2}},
}
SHARING = {2: ("tensor",), 4: ("fsdp_tensor",)}  # two or more processes own the same rows


def finish(job):
    codes, errors = job.finish()
    assert codes == [0] * len(codes), errors[-3000:]


def read(folder, name, count):
    """What each process saw, and the final parameters."""
    saw = [json.loads((folder / f"{name}_{i}.json").read_text()) for i in range(count)]
    with np.load(folder / f"{name}.npz") as final:
        return saw, [final[key] for key in final.files]


def total(counters):
    return sum(map(collections.Counter, counters), collections.Counter())


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, start):
    """Ten steps of one process with one device."""
    folder = tmp_path_factory.mktemp("one")
    runs = [{"name": "one", "layout": "data", "stop": STEPS}]
    finish(start(SCRIPT, {"out": str(folder), "runs": runs}, count=1))
    (saw,), final = read(folder, "one", 1)
    return saw, final


def largest_gap(params, expected):
    return max(
        np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(params, expected, strict=True)
    )


@pytest.mark.parametrize("count", [2, 4])
def test_processes_take_the_steps_of_one_device(tmp_path, start, one_device, count):
    runs = [{"name": n, "layout": x, "stop": STEPS} for n, x in LAYOUTS[count].items()]
    given = {"out": str(tmp_path), "runs": runs}
    finish(start(SCRIPT, given, count=count, devices=4 // count))
    whole, expected = one_device
    for name in LAYOUTS[count]:
        saw, params = read(tmp_path, name, count)
        for process in saw:
            np.testing.assert_allclose(process["losses"], whole["losses"], rtol=2e-6, err_msg=name)
            assert process["known"] == whole["known"]
            check_held(name, process, count)
        assert largest_gap(params, expected) < 1e-5, name
        if name not in SHARING[count]:
            check_rows(saw, whole)
            # four shards, and each process packs those of its rows alone
            made = sorted(shard for process in saw for shard in process["made"][0])
            assert made == [0, 1, 2, 3]
        elif name == "tensor":
            assert all(process["fed"] == whole["fed"] for process in saw)


def check_held(name, process, count):
    """The share of parameters and moments that a process holds, from the first step on."""
    parts = {"data": 1, "hybrid": count // 2}.get(name, count)
    assert process["mesh"]["data"] == {"data": 4, "hybrid": 2}.get(name, 1)
    for kind in ("params", "opt_state"):
        part, whole = process[kind]
        # fsdp leaves the relative bias whole, tensor the norms
        assert 1 / parts <= part / whole < 1.02 / parts, (name, kind)


def check_rows(saw, whole):
    """Each row of a step is one process's, and the processes' rows differ in what they hold."""
    for step in range(STEPS):
        assert total(p["fed"][step] for p in saw) == collections.Counter(whole["fed"][step])
        tokens = np.array([p["tokens"][step] for p in saw])
        assert tokens.sum(axis=0).tolist() == whole["tokens"][step]
        for objective in (0, 1):
            assert len(set(tokens[:, objective].tolist())) > 1
    # two and a half steps are an epoch: the third one ends it and begins the next
    assert set(total(f for p in saw for f in p["fed"][:2]).values()) == {1}
    assert labels_of(f for p in saw for f in p["fed"][:5]) == dict.fromkeys(range(EXAMPLES), 2)


def labels_of(counters):
    """Example -> how often its label row was fed."""
    seen = total(counters)
    return {int(k.split()[0]): n for k, n in seen.items() if k.endswith(" 1")}


def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path, start, one_device):
    """8 -> 4 -> 1 -> 8 processes: the state is bitwise the saved one, and each example is read once."""
    lives = (
        ("eight", 8, 1, "fsdp", 1),
        ("four", 4, 2, "fsdp_tensor", 2),
        ("alone", 1, 1, "data", 4),
        ("again", 8, 1, "fsdp", 5),
    )
    position, ended, fed, losses = 0, None, [], []
    for name, count, devices, layout, stop in lives:
        run = {"name": name, "layout": layout, "stop": stop, "workdir": str(tmp_path / "run")}
        finish(start(SCRIPT, {"out": str(tmp_path), "runs": [run]}, count=count, devices=devices))
        saw, _ = read(tmp_path, name, count)
        for process in saw:
            assert process["start"] == position
            assert ended is None or process["start_digest"] == ended
        position, ended = stop, saw[0]["end_digest"]
        losses += saw[0]["losses"]
        fed += [f for process in saw for f in process["fed"]]
    assert labels_of(fed) == dict.fromkeys(range(EXAMPLES), 2)
    np.testing.assert_allclose(losses, one_device[0]["losses"][:5], rtol=2e-6)
