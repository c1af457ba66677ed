"""`kill -9` at random moments of `stepdistill train`; what is started again ends as if nothing had been."""

import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from stepdistill_jax.runtime.checkpoints.manager import saved_steps
from stepdistill_jax.runtime.metrics import read_metrics

KILLS = 50
LIVES = pathlib.Path(__file__).with_name("lives.py")
# what a life was doing at its end: the first of these that it was in
PLACES = {
    "rename": "a rename",
    "renamed": "a rename",
    "evaluation": "an evaluation",
    "save": "a save",
    "start-up": "start-up",
    "step": "a step",
}


class Lives:
    """Starts lives of `stepdistill` commands, one after the other, and kills them."""

    def __init__(self, folder, *flags, config=None, **env):
        folder.mkdir()
        self._config = config
        self._trace, self.stderr = folder / "trace", folder / "stderr"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._server = subprocess.Popen(
            [sys.executable, str(LIVES), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(self.temporary)} | env,
        )

    def __call__(self, *argv, die=None, kill_after=None):
        """The exit code of a life that kills itself at a place, or is killed after some seconds."""
        self._trace.unlink(missing_ok=True)
        order = {"argv": list(map(str, argv)), "stderr": str(self.stderr), "die": die}
        order |= {"trace": str(self._trace), "config": self._config}
        self._say(json.dumps(order))
        pid, began = int(self._server.stdout.readline()), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        code = int(self._server.stdout.readline())
        self.seconds = time.monotonic() - began
        self._say("")
        text = self._trace.read_text() if self._trace.exists() else ""
        self.trace = json.loads(text) if text else {"active": ["start-up"], "calls": {}}
        return code

    def _say(self, line):
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()

    @property
    def place(self):
        """What the last life was doing at its end."""
        return next(name for place, name in PLACES.items() if place in self.trace["active"])

    def close(self):
        self._server.kill()
        self._server.communicate()


@pytest.fixture
def lives(tmp_path):
    """`lives(*flags, config=None, **env)`: the server of lives, ended with the test."""
    started = []

    def start(*flags, **given):
        started.append(Lives(tmp_path / "lives", *flags, **given))
        return started[-1]

    yield start
    for one in started:
        one.close()


def command(workdir, data_dir, **settings):
    pairs = (f"{name}={value}" for name, value in settings.items())
    sets = [x for pair in pairs for x in ("--set", pair)]
    return ["train", "demo_step_by_step", "--workdir", workdir, "--data-dir", data_dir, *sets]


def outcome(workdir):
    """Everything of a finished run that must not depend on its lives."""
    steps = saved_steps(workdir)
    found = {"steps": steps}
    found["metrics"] = [
        {k: v for k, v in x.items() if not k.startswith("timing/")} for x in read_metrics(workdir)
    ]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for step in steps:
            for item in ("params", "state"):
                tree = checkpointer.restore(workdir / "checkpoints" / str(step) / item)
                for path, x in jax.tree.leaves_with_path(tree):
                    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
                    data = np.asarray(jax.random.key_data(x) if is_key else x)
                    found[f"{step} {item} {jax.tree_util.keystr(path)}"] = data.tobytes()
    return found


def names(folder):
    """Files below it, but for those of other names in each life: events, arrays, steps quarantined."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {n for n in found if not re.search(r"events\.out|/d/|\.unfinished-", n)}


def contents(folder):
    return {name: (folder / name).read_bytes() for name in names(folder)}


def differing(one, other):
    """The first thing in which two dicts are not the same; None where there is none."""
    keys = sorted(one.keys() | other.keys(), key=str)
    return next((k for k in keys if one.get(k) != other.get(k)), None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_that_is_killed_in_a_rename_and_in_a_save_ends_as_nobody_had_killed_it(
    lives, settings, tmp_path, delivery_data_dir, record_fault
):
    """The fast part: without a validation, since tracing one takes half of a life's time."""
    start = lives(config=settings)
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(undisturbed, delivery_data_dir) == 0, start.stderr.read_text()
    deaths = [("rename", 1), ("renamed", 2), ("seal", 1)]
    codes, places = [], []
    for at, call in deaths:
        die = {"at": at, "call": call, "after_secs": 0}
        codes.append(start(run, delivery_data_dir, die=die))
        places.append(start.place)
    finished = start(run, delivery_data_dir)
    same = not finished and differing(outcome(run), outcome(undisturbed)) is None
    record_fault(
        "`kill -9` at chosen places of `train`",
        tried=len(deaths),
        survived=len(deaths) * same,
        seen="two in renames at the start, one between a save and its manifest",
    )
    assert codes == [-signal.SIGKILL] * len(deaths), start.stderr.read_text()
    assert places == ["a rename", "a rename", "a save"]
    assert finished == 0, start.stderr.read_text()
    assert same, differing(outcome(run), outcome(undisturbed))
    assert names(run) == names(undisturbed)


class Fate:
    """Draws how the next life dies, from the calls and seconds of a whole one."""

    def __init__(self, calls, seconds):
        self._draw, self._calls, self._seconds = random.Random(0), calls, seconds

    def __call__(self):
        draw = self._draw
        at = draw.choices(
            ["clock", "rename", "renamed", "sync", "save", "seal", "evaluation"],
            [10, 2, 1, 1, 2, 1, 3],
        )[0]
        if at == "clock":
            return {"kill_after": draw.uniform(0, self._seconds)}
        # a third, so that a life that begins late comes there, too
        call = draw.randint(1, max(1, self._calls[at] // 3))
        slow = {"save": 0.02, "evaluation": 0.1}.get(at, 0) * self._seconds
        return {"die": {"at": at, "call": call, "after_secs": draw.uniform(0, slow)}}


@pytest.mark.faults
@pytest.mark.timeout(2400)
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_kills_at_random_moments_lose_nothing(lives, tmp_path, record_fault):
    """Runs that are killed over and over; two of them prepare and tokenise their data, too."""
    # as a user has it: compiled programs beside the workdir
    start = lives(
        "--data", JAX_COMPILATION_CACHE_DIR="", XLA_FLAGS=os.environ["XLA_FLAGS_OF_ONE_DEVICE"]
    )
    settings = {"TRAIN_STEPS": 12, "EVAL_EVERY": 4, "CHECKPOINT_EVERY": 3, "BATCH_SIZE": 16}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"input": f"{i} red boxes to Oslo"}) + "\n" for i in range(9))
    )

    def products(workdir):
        """Files of an export and of predictions."""
        model, answers = workdir.parent / "model", workdir.parent / "answers.jsonl"
        assert start("export", workdir, model) == 0, start.stderr.read_text()
        assert start("predict", model, rows, answers) == 0, start.stderr.read_text()
        return contents(model) | {"answers": answers.read_bytes()}

    undisturbed, data = tmp_path / "undisturbed" / "run", tmp_path / "data"
    for workdir in (undisturbed.with_name("first"), undisturbed):  # the second one compiles nothing
        assert start(*command(workdir, data, **settings)) == 0, start.stderr.read_text()
    fate = Fate(start.trace["calls"], start.seconds)
    wanted, made = outcome(undisturbed), products(undisturbed)
    places, lost, runs, kills, quarantined = collections.Counter(), {}, 0, 0, 0
    while kills < KILLS:
        run, runs, died = tmp_path / f"killed-{runs}" / "run", runs + 1, 0
        mine = run.parent / "data"
        if runs > 2:
            shutil.copytree(data, mine)
        while True:
            end = fate() if kills + died < KILLS else {}
            code = start(*command(run, mine, **settings), **end)
            if code != -signal.SIGKILL:
                break
            died += 1
            places[start.place] += 1
        kills += died
        if code:
            lost[run] = died, start.stderr.read_text()[-1000:]
            continue
        quarantined += len(list((run / "checkpoints").glob("*.unfinished-*")))
        wrong = differing(outcome(run), wanted) or differing(products(run), made)
        rubbish = names(run) ^ names(undisturbed) | names(mine) ^ names(data)
        if wrong or rubbish:
            lost[run] = died, wrong, rubbish
    record_fault(
        "`kill -9` at random moments of `train`",
        tried=kills,
        survived=kills - sum(died for died, *_ in lost.values()),
        seen=", ".join(f"in {place} {n}" for place, n in places.most_common())
        + f"; {runs} runs, in the end bitwise the undisturbed one (parameters, optimizer, metrics,"
        f" export, predictions); {quarantined} unsealed steps quarantined",
    )
    assert not lost
    left = {p.name for p in start.temporary.iterdir()}
    # TensorFlow's, of lives that tokenise: they go at an exit, not at a kill
    assert not [name for name in left if not name.startswith("__autograph_generated_file")]
