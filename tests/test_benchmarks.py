"""Runs the benchmarks at a tiny size. Their numbers are meaningful only on a quiet machine."""

import argparse
import asyncio
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "input": ["--seconds", "0.05", "--batch-size", "4"],
    "train": ["--size", "tiny", "--steps", "1", "--batch-size", "2", "--row-lengths", "96", "64"],
    "decode": ["--size", "tiny", "--rows", "6", "--batch-size", "4"],
    "choices": ["--size", "tiny", "--rows", "6", "--batch-size", "4"],
    "serving_cost": ["--size", "tiny", "--rows", "6", "--batch-size", "4"],
}
SMALL["train"] += ["--peers", "transformers", "transformers_bfloat16", "ours_shared_encoder"]
UNITS = dict.fromkeys(SMALL, "rows_per_second") | {"train": "examples_per_second"}
PEERS = {
    "input": {"seqio", "sentencepiece"},
    "train": {
        *("transformers", "transformers_bfloat16", "ours_shared_encoder", "ours_by_hand"),
    },
    "decode": {
        "transformers",
        *("ctranslate2", "ours_ctranslate2", "ctranslate2_int8", "ours_ctranslate2_int8"),
    },
    "choices": {"greedy"},
    "serving_cost": {"label_only", "shared_encoder", "rationale_first"},
}


def run(name, *argv, environment=None, timeout=280):
    script = BENCHMARKS / f"{name}.py"
    if not script.exists():
        script = BENCHMARKS / f"{name}_throughput.py"
    return subprocess.run(
        [sys.executable, script, "--threads", "1", *argv],
        env={
            **os.environ,
            "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"],
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def timing():
    spec = importlib.util.spec_from_file_location("timing_under_test", BENCHMARKS / "timing.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_each_benchmark_ends_with_figures_of_ours_and_of_its_peers(name, delivery_data_dir):
    done = run(name, "--data-dir", delivery_data_dir, "--rounds", "1", "--json", *SMALL[name])
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    unit = UNITS[name]
    assert result["peers"].keys() == result["ratio"].keys() == PEERS[name]
    for peer, figures in result["peers"].items():
        assert figures[unit] > 0
        assert result["ratio"][peer] == pytest.approx(result["ours"][unit] / figures[unit])
        assert any(line.startswith(peer) for line in table)
    assert result["threads"] == 1
    assert result["device"].startswith("cpu")
    if name in ("train", "decode"):  # a user's environment
        environments = result["environments"]
        assert environments["ours"] == {} != environments["transformers"]
    if name == "train":
        assert result["packed_rows"]["ours_by_hand"] == [96, 64]
        assert result["packed_rows"]["ours"] != [1024, 256], "the config's own rows"
    if name == "input":
        assert result["building"].keys() == {"as_they_stand", "through_seqio"}
        assert all(way["rows_per_second"] > 0 for way in result["building"].values())
    if name == "serving_cost":
        work = result["work"]
        assert work["ours"] == work["shared_encoder"]
        assert work["ours"] == work["label_only"] | {"compilations": 0}
        dearer = result["times_dearer"]["rationale_first"]
        assert dearer["decoded_tokens_per_row"] > 3 and dearer["gflop_per_row"] > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [("train", ["--steps", "1", "--batch-size", "2"]), ("decode", ["--rows", "6"])],
)
def test_a_t5gemma_does_the_same_work_as_that_of_transformers(name, flags, delivery_data_dir):
    flags = [*flags, "--family", "t5gemma", "--size", "tiny", "--rounds", "1", "--json"]
    done = run(name, "--data-dir", delivery_data_dir, *flags)
    assert done.returncode == 0, done.stderr  # it compares losses or answers first
    assert json.loads(done.stdout.splitlines()[-1])["peers"].keys() == {"transformers"}


@pytest.mark.slow
def test_latency_is_of_one_row_and_of_a_server_at_each_rate(delivery_data_dir):
    small = ("--size", "tiny", "--rows", "6", "--input-length", "32", "--rounds", "1")
    load = ("--rates", "20", "500", "--seconds", "1", "--batch-size", "2", "--max-queue", "2")
    done = run("latency", "--data-dir", delivery_data_dir, "--json", *small, *load)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    peers = {"transformers", "ours_ctranslate2", "ours_ctranslate2_int8"}
    assert result["peers"].keys() == peers
    assert {row["engine"] for row in result["one_row"]} == {"ours", *peers}
    assert [(row["engine"], row["rate"]) for row in result["http"]] == [
        (engine, rate) for engine in ("jax", "ctranslate2") for rate in ("alone", 20.0, 500.0)
    ]
    for row in result["one_row"] + result["http"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    for row in result["http"]:
        assert row["answered_per_second"] > 0 and row["refused"] < row["requests"]
        assert row["refused"] == 0 or row["rate"] != "alone"
        assert row["refused"] > 0 or row["rate"] != 500.0


@pytest.mark.parametrize("name", ["train", "decode", "latency"])
def test_without_torch_one_line_says_what_to_install(name, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")")
    done = run(name, environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "torch" in line
    assert "run pip install -c constraints.txt -e '.[bench]'" in line


def test_more_threads_than_cores_are_refused():
    done = run("decode", "--threads", "4096")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--threads 4096" in done.stderr


def test_contenders_take_turns_and_the_warm_up_is_not_counted(timing, monkeypatch):
    monkeypatch.setattr(timing, "REST_SECS", 0.0)
    turns = []

    def contender(name):
        def of_round(number):
            turns.append((number, name, "prepared"))

            def work():
                turns.append((number, name, "worked"))
                return 7

            return work

        return of_round

    rates = timing.alternate({name: contender(name) for name in ("ours", "peer")}, rounds=2)
    order = [(0, "ours"), (0, "peer"), (1, "peer"), (1, "ours"), (2, "ours"), (2, "peer")]
    assert turns == [(*turn, what) for turn in order for what in ("prepared", "worked")]
    assert {name: len(r) for name, r in rates.items()} == {"ours": 2, "peer": 2}
    assert all(rate > 0 for r in rates.values() for rate in r)


@pytest.fixture
def latency(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("latency")
    for name in ("latency", "timing"):
        del sys.modules[name]


def test_a_percentile_is_the_smallest_that_so_many_do_not_exceed(latency):
    seconds = [number / 1000 for number in range(200, 0, -1)]
    assert latency.percentiles(seconds) == {"p50_ms": 100.0, "p95_ms": 190.0, "p99_ms": 198.0}
    assert latency.percentiles([0.25]) == {"p50_ms": 250.0, "p95_ms": 250.0, "p99_ms": 250.0}


def test_requests_come_whether_or_not_the_server_keeps_up_and_their_wait_counts(latency):
    """A server that handles 20 requests a second gets 200 a second for 0.2 s."""

    async def answer(reader, writer):
        while await reader.readline():
            while (line := await reader.readline()) != b"\r\n":
                length = int(line.split()[1]) if line.startswith(b"Content-Length") else 0
            await reader.readexactly(length)
            async with turn:
                await asyncio.sleep(0.05)
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"label": "b"}')

    async def main():
        served = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = served.sockets[0].getsockname()[1]
        client = latency.Client(f"http://127.0.0.1:{port}", {"a": "b"})
        count = await latency.open_loop(client, ["a"], 200.0, 0.2, seed=0)
        served.close()
        return count, client

    turn = asyncio.Lock()
    count, client = asyncio.run(main())
    assert 20 < count == len(client.seconds) < 60 and client.wrong == client.refused == 0
    # the n-th answer comes after n times 50 ms, and its client arrived in the first 200 ms
    assert max(client.seconds) > count * 0.05 - 0.25
    assert sum(client.seconds) / count > count * 0.05 / 2 - 0.25


def report(timing, rates, *, others=0.0, json=False):
    """Reports a run of ten seconds, in which ours worked four and other processes `others` seconds."""
    began = timing.Clock.now()
    ended = timing.Clock(began.wall + 10, (began.machine or 0.0) + 4 + others, began.own + 4)
    began = timing.Clock(began.wall, began.machine or 0.0, began.own)
    timing.Clock = type("Stopped", (), {"now": staticmethod(lambda: ended)})
    args = argparse.Namespace(threads=2, rounds=3, json=json, began=began, load=0.0, seed=0)
    timing.report(args, rates, unit="rows_per_second")


APART = """
import os
from stepdistill_jax.errors import InputError

class Clock:
    def __init__(self, start):
        if start < 0:
            raise InputError("a start before 0")
        self.now = start

    def process(self):
        return os.getpid(), os.environ.get("OF_ONE"), os.environ["OF_ALL"]

    def contender(self, number):
        self.now += number
        return lambda: self.now

    def end(self):
        os._exit(7)
"""


@pytest.fixture
def apart(monkeypatch, tmp_path):
    (tmp_path / "clock.py").write_text(APART)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("apart")
    for name in ("apart", "clock"):
        del sys.modules[name]


def test_a_contender_apart_has_a_process_and_an_environment_of_its_own(apart, monkeypatch):
    from clock import Clock

    monkeypatch.setenv("OF_ALL", "here")
    with apart.Apart(Clock, 10, environment={"OF_ONE": "there"}) as clock:
        pid, of_one, of_all = clock.call("process")
        assert pid != os.getpid() and (of_one, of_all) == ("there", "here")
        work = clock.contender(5)
        assert work() == work() == 15
    assert "OF_ONE" not in os.environ
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_a_contender_apart_refuses_and_its_end_are_errors_here(apart):
    from clock import Clock

    with pytest.raises(apart.InputError, match="a start before 0"):
        apart.Apart(Clock, -1)
    with (
        apart.Apart(Clock, 0, environment={"OF_ALL": ""}) as clock,
        pytest.raises(RuntimeError, match="process of Clock ended with 7"),
    ):
        try:
            clock.call("end")
        except RuntimeError:  # a second call is an error, too
            clock.call("process")


def test_the_ratio_is_of_rounds_and_above_1_where_ours_is_faster(timing, capsys):
    report(timing, {"ours": [30.0, 90.0, 60.0], "peer": [1.0, 20.0, 1000.0]}, json=True)
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["ours"]["rows_per_second"] == 60.0
    assert result["peers"]["peer"]["rows_per_second"] == 20.0
    # 30, 4.5 and 0.06 in the three rounds; the ratio of medians would be 3
    assert result["ratio"] == {"peer": 4.5}
    assert "4.50x" in table[-1] and "0.06 to 30.00" in table[-1]
    assert result["busy_cores"] == 0.0
    assert not any("do not quote" in line for line in table)


def test_figures_of_a_machine_that_others_kept_busy_are_marked(timing, capsys):
    report(timing, {"ours": [1.0], "peer": [1.0]}, others=15.0)
    assert "other processes kept 1.5 cores busy" in capsys.readouterr().out


@pytest.mark.slow
def test_start_up_has_its_parts_and_is_sooner_where_an_earlier_run_left_something(
    delivery_data_dir,
):
    options = ["--data-dir", delivery_data_dir, "--size", "tiny", "--rounds", "1", "--json"]
    done = run("startup", *options, timeout=560)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    for row in rows.values():
        parts = [row[p] for p in ("imports", "data", "state", "compiling", "step")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(row["first_step"], abs=0.1)
    assert min(rows[n]["cpu"] for n in ("cold", "new_program")) > 1.5 * rows["again"]["cpu"]


@pytest.fixture
def run_all(monkeypatch, tmp_path):
    """Loads the module with three benchmarks: one works, one fails, one does not exist."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("run_all")
    result = {
        "ours": {"rows_per_second": 60.0, "lowest": 50.25, "highest": 1234.5},
        "peers": {"peer": {"rows_per_second": 20.0, "lowest": 10.0, "highest": 30.0}},
        "ratio": {"peer": 3.0},
        "pairs": {"peer": [3.0, 2.5]},
        "first_loss": {"ours": 9.25, "peer": 9.25},
        "http": [{"rate": "alone", "p50_ms": 12.345}],
        **{"threads": 1, "rounds": 3, "device": "cpu (x)", "busy_cores": 0.5, "settings": {}},
    }
    (tmp_path / "works.py").write_text(f"print('a table')\nprint({json.dumps(result)!r})")
    (tmp_path / "fails.py").write_text("import sys\nprint('{}')\nsys.exit('no room')")
    monkeypatch.setattr(module, "HERE", tmp_path)
    parts = {n: module.Part(n, n.title(), "--size 1", "--less") for n in ("works", "fails", "gone")}
    monkeypatch.setattr(module, "PARTS", parts)
    yield module
    for name in ("run_all", "page", "timing"):
        del sys.modules[name]


def test_run_all_writes_figures_into_their_places_and_says_which_are_missing(
    run_all, delivery_data_dir, tmp_path, monkeypatch
):
    page = tmp_path / "page.md"
    command = ["run_all.py", "--data-dir", str(delivery_data_dir), "--output", str(page)]
    command += ["--task", "delivery"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="without results: fails, gone"):
        run_all.main()
    text = page.read_text()
    assert text.startswith("# Benchmarks\n")
    machine, works, fails, gone = text.split("<!-- begin ")[1:]
    assert "| jax | " in machine
    assert "|  | rows per second | lowest | highest | ours is | in pairs |" in works
    assert "| ours | 60 | 50.25 | 1,234 |  |  |" in works
    assert "| peer | 20 | 10 | 30 | 3.00x | 2.50 to 3.00 |" in works
    assert "- first loss: ours 9.25, peer 9.25" in works
    assert "Http:\n\n|  | rate | p50 ms |\n| --- | --- | --- |\n| 1 | alone | 12.35 |" in works
    assert "cpu (x); 1 thread; 3 rounds;" in works
    assert "not to be quoted" in works
    said = f"python benchmarks/works.py --size 1 --task delivery --data-dir {delivery_data_dir}"
    assert f"`{said} --json`" in works
    assert "failed, exit code 1: no room" in fails
    assert "skipped: gone.py does not exist" in gone
    # running one again replaces the text between its marks, and keeps all other text
    edited = text.replace("## Gone", "## Kept").replace(
        "<!-- begin works", "Words.\n\n<!-- begin works"
    )
    page.write_text(edited.replace("1,234", "old"))
    monkeypatch.setattr(sys, "argv", [*command, "--only", "works", "--quick"])
    run_all.main()
    again = page.read_text()
    assert "--less --json`" in again
    assert again.replace(" --less", "") == edited


def test_run_all_refuses_an_unknown_benchmark_and_quick_figures_in_the_docs(run_all, monkeypatch):
    for flags, message in (
        (["--only", "work"], "no benchmark 'work'; did you mean 'works'"),
        (["--quick"], "choose a different --output"),
    ):
        monkeypatch.setattr(sys, "argv", ["run_all.py", *flags])
        with pytest.raises(run_all.InputError, match=message):
            run_all.main()


@pytest.mark.slow
def test_a_host_makes_its_share_of_a_large_batch():
    options = ["--examples", "300", "--rounds", "1", "--batch-sizes", "64", "4096", "--json"]
    done = run("host_input", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    by_cell = {(c["batch_size"], c["processes"]): c for c in found["cells"]}
    assert {cell: c["examples"] for cell, c in by_cell.items()} == {
        (64, 1): 64,
        (64, 64): 64,
        (4096, 1): 4096,
        (4096, 64): 512,
    }
    assert found["ours"]["examples_per_second"] == by_cell[4096, 1]["examples_per_second"]
    assert found["need"]["base"] > found["need"]["large"] > 0
