"""A second start compiles nothing, and a cache that cannot be used stops nothing."""

import json
import os
import subprocess
import sys

import pytest

from stepdistill_jax.runtime.compile_cache import FOLDER, folder_for, prune

COUNTING = """
import json, sys
import jax
from jax._src import compiler
from stepdistill_jax.commands.main import main

compile, compiled = compiler.backend_compile_and_load, []
def counted(backend, module, *rest, **named):
    compiled.append(str(module.operation.attributes["sym_name"]))
    return compile(backend, module, *rest, **named)
compiler.backend_compile_and_load = counted
code = main(sys.argv[1:])
print(json.dumps(compiled))
sys.exit(code)
"""


CACHE_VARIABLES = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JAX_ENABLE_COMPILATION")


def compiled_by(argv, **variables):
    """(names of the programs that the backend compiled, standard error) of a `stepdistill` command."""
    # without the cache of the tests themselves
    environment = {k: v for k, v in os.environ.items() if not k.startswith(CACHE_VARIABLES)}
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, *map(str, argv)],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def argv(tmp_path, delivery_data_dir):
    """A command that trains and validates."""
    settings = ("TRAIN_STEPS=2", "EVAL_EVERY=1", "BATCH_SIZE=8", "DATA_FRACTION=0.1")
    flags = [x for s in settings for x in ("--set", s)]
    return lambda name: [
        "train",
        "demo_step_by_step",
        "--workdir",
        tmp_path / name,
        "--data-dir",
        delivery_data_dir,
        *flags,
    ]


@pytest.mark.slow
def test_a_second_start_compiles_nothing(argv, tmp_path):
    first, _ = compiled_by(argv("one"))
    assert any("train_step" in name for name in first)
    again, _ = compiled_by(argv("two"))
    assert again == []
    assert list((tmp_path / FOLDER).glob("*-cache"))


ENABLING = """
import sys, jax
from stepdistill_jax.runtime.compile_cache import enable
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))
enable(sys.argv[1])
print(jax.jit(lambda x: x + 1)(1.0), jax.config.jax_compilation_cache_dir, seen.count("/jax/compilation_cache/cache_hits"))
"""


def enabled(folder, *, mounted=None, **variables):
    """(what ENABLING printed, standard error); `mounted`: a mount that only this process sees."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(CACHE_VARIABLES)}
    command = [sys.executable, "-c", ENABLING, str(folder)]
    if mounted:
        command = ["unshare", "--mount", "sh", "-c", f'{mounted} && exec "$@"', "sh", *command]
        if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
            pytest.skip("no right to mount")
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_the_users_own_folder_and_switch_go_first(tmp_path):
    own, ours = str(tmp_path / "own"), str(tmp_path / "ours")
    assert enabled(ours, JAX_COMPILATION_CACHE_DIR=own)[0] == ["2.0", own, "0"]
    assert enabled(ours, JAX_COMPILATION_CACHE_DIR=own)[0] == ["2.0", own, "1"]
    assert enabled(ours, JAX_ENABLE_COMPILATION_CACHE="0")[0] == ["2.0", "None", "0"]
    assert not os.path.exists(ours)


def test_a_read_only_folder_is_read_and_warned_of_once(tmp_path):
    cache = tmp_path / "cache"
    enabled(cache)
    out, err = enabled(cache, mounted=f"mount --bind -o ro {cache} {cache}")
    assert out == ["2.0", str(cache), "1"]
    (line,) = err.splitlines()
    assert f"warning: cannot write to the compile cache {cache};" in line


def test_a_file_in_its_place_is_warned_of_once(tmp_path):
    (tmp_path / "cache").write_text("")
    out, err = enabled(tmp_path / "cache")
    assert out[0] == "2.0"
    (line,) = err.splitlines()
    assert "cannot write to the compile cache" in line


def test_a_full_disk_stops_nothing(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    full = f"mount -t tmpfs -o size=4k none {cache} && head -c 4096 /dev/zero > {cache}/full"
    out, err = enabled(cache, mounted=full)
    assert out[0] == "2.0"
    assert "No space left" in err


def test_the_programs_used_last_are_kept(tmp_path):
    for age, name in enumerate(("new", "old", "older")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "another").write_bytes(bytes(1000))
    prune(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["another", "new-cache", "old-cache"]
    prune(tmp_path, 250)
    assert len(list(tmp_path.iterdir())) == 3
    prune(tmp_path / "nowhere", 250)


@pytest.mark.parametrize(
    ("workdir", "cache"),
    [
        ("gs://bucket/runs/cqa", "gs://bucket/runs/.jax_cache"),
        ("gs://bucket/cqa", "gs://bucket/.jax_cache"),
        ("gs://bucket", "gs://bucket/.jax_cache"),
    ],
)
def test_the_cache_of_a_bucket_stays_in_the_bucket(workdir, cache):
    pytest.importorskip("gcsfs", reason="gcsfs is not installed: no gs:// to name")
    assert folder_for(workdir) == cache
