"""Connects the processes of a job. A process that has to stop ends within seconds, without waiting for the others."""

import atexit
import contextlib
import dataclasses
import importlib.util
import os
import sys
import threading
from typing import NoReturn

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.rendezvous import own_address, rendezvous

ADDRESS, NUM_PROCESSES, PROCESS_ID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"
EXPECT_DEVICES = "EXPECT_DEVICES"
JOIN_TIMEOUT = "STEPDISTILL_JOIN_TIMEOUT"
KNOWN_TO_JOB = "STEPDISTILL_JOB_TOKEN"  # the same secret in all processes of a job

JOIN_SECS = 300  # hosts of a pod start minutes apart
CONNECT_SECS = 120  # for JAX to connect, once all processes have started
HEARTBEAT_SECS = 30  # a peer silent for so long ends the job; JAX's 100 s would waste paid time
SHUTDOWN_SECS = 15
GRACE_SECS = (
    5  # a process that exits waits for this long, so that the others exit with their own status
)

_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)


@dataclasses.dataclass(frozen=True)
class Job:
    """The processes that compute together, and the index of this process.

    Attributes:
        address: `HOST:PORT` of the coordinator in process 0.
        local_device_ids: ids of this host's devices that this process uses; None means all.
    """

    address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


_joined: Job | None = None


def join() -> None:
    """Joins the other processes of the job, if there are any. A second call does not join again.

    Call this function before anything starts a JAX backend. These processes belong to a job:

    - those with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    - the tasks of `srun`, if there are several
    - those on a slice of several Cloud TPU hosts

    Raises:
        InputError: an environment variable has a bad value, or EXPECT_DEVICES is not the count of devices.
        ProcessesMissing: some processes did not start in time. The message lists them.
    """
    global _joined
    job = find_job() if _joined is None else None
    if job is not None:
        timeout_secs = _whole(JOIN_TIMEOUT, 1) or JOIN_SECS
        host, port = _host_and_port(ADDRESS, job.address)
        bind = None
        if job.process_id == 0:
            given = os.environ.get(BIND_ADDRESS)
            bind = (
                _host_and_port(BIND_ADDRESS, given)
                if given
                else own_address(host, port, timeout_secs)
            )
        rendezvous(
            host,
            port,
            num_processes=job.num_processes,
            process_id=job.process_id,
            timeout_secs=timeout_secs,
            bind=bind,
            secret=os.environ.get(KNOWN_TO_JOB),
        )
        import jax

        jax.distributed.initialize(
            job.address,
            job.num_processes,
            job.process_id,
            local_device_ids=job.local_device_ids,
            # JAX's default is all addresses
            coordinator_bind_address=_address(*bind) if bind and bind[0] else None,
            cluster_detection_method="deactivate",  # `find_job` has detected it
            initialization_timeout=CONNECT_SECS,
            heartbeat_timeout_seconds=HEARTBEAT_SECS,
            shutdown_timeout_seconds=SHUTDOWN_SECS,
        )
        _joined = job
        if jax.default_backend() == "cpu":
            # A program that one process compiles and another one loads may order its collectives
            # differently: gloo then gets messages of unexpected sizes (jaxlib 0.10.2)
            jax.config.update("jax_enable_compilation_cache", False)
        log(
            f"process {job.process_id} of {job.num_processes},"
            f" {jax.local_device_count()} of {jax.device_count()} devices"
        )
    if (expected := _whole(EXPECT_DEVICES, 1)) is not None:
        _check_devices(expected)


def is_process_0() -> bool:
    """Returns whether this is process 0 of the job, or the only process.

    Unlike `jax.process_index`, this function starts no JAX backend.
    """
    if _joined is not None:
        return _joined.process_id == 0
    jax = sys.modules.get("jax")  # the caller may have joined a job without us
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def leave(code: int) -> None:
    """Ends this process within seconds with exit status `code`, if it has joined a job. Otherwise, returns.

    Each process keeps its own exit status. Without this function, a process that ends alone would wait
    minutes for the others.
    """
    if _joined is None:
        return
    _flush()
    end_soon(code)
    import jax

    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
    os._exit(code)


def end(code: int) -> NoReturn:
    """Ends this process with exit status `code`, after the functions that were registered with `atexit`.

    Unlike `sys.exit`, this function does not run the destructors of native libraries. They crash the process
    while XLA still compiles in a thread, as after a signal.
    """
    end_soon(code)
    atexit._run_exitfuncs()
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            stream.flush()


def end_soon(code: int) -> None:
    """Ends this process with exit status `code` in `GRACE_SECS` seconds, unless it has ended by then.

    Without this limit, Orbax's threads or an interrupted compilation can delay the exit for minutes.
    """
    timer = threading.Timer(GRACE_SECS, os._exit, (code,))
    timer.daemon = True
    timer.start()


def find_job() -> Job | None:
    """Returns the job that the environment describes, or None for a single process.

    Raises:
        InputError: environment variables contradict each other, or are not numbers.
    """
    address = os.environ.get(ADDRESS)
    num_processes, process_id = _whole(NUM_PROCESSES, 1), _whole(PROCESS_ID, 0)
    under_srun = _under_srun()
    if not address and not under_srun and not _on_cloud_tpu():
        if (num_processes or 1) > 1:
            raise InputError(
                f"{NUM_PROCESSES}={num_processes} without {ADDRESS}: set {ADDRESS} to HOST:PORT of"
                f" process 0, or unset {NUM_PROCESSES} for a single process"
            )
        return None
    if None in (address, num_processes, process_id):
        from jax._src.clusters import ClusterEnv  # jax.distributed.initialize uses it

        address, num_processes, process_id, _ = ClusterEnv.auto_detect_unset_distributed_params(
            address, num_processes, process_id, None, None, JOIN_SECS
        )
    if address is None:  # a TPU VM that is configured to run alone
        return None
    for name, value in ((NUM_PROCESSES, num_processes), (PROCESS_ID, process_id)):
        if value is None:
            raise InputError(f"{ADDRESS} is set, but {name} is not; set it, too")
    assert num_processes is not None and process_id is not None
    if process_id >= num_processes:
        raise InputError(
            f"{PROCESS_ID}={process_id}: expected a number below {NUM_PROCESSES}={num_processes}"
        )
    if num_processes == 1:
        return None
    return Job(address, num_processes, process_id, _devices_of_task() if under_srun else None)


def _under_srun() -> bool:
    """Returns whether Slurm started this process as one of several tasks. For a batch script, returns False."""
    if not all(name in os.environ for name in _SLURM):
        return False
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ["SLURM_NTASKS"]
    return tasks.isdecimal() and int(tasks) > 1


def _devices_of_task() -> list[int] | None:
    """Returns [id of this Slurm task's GPU] if several tasks see the same GPUs. None means all visible GPUs."""
    alone = os.environ.get("SLURM_STEP_NUM_NODES") == os.environ["SLURM_NTASKS"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    bound = bool(visible) and "," not in visible
    given = "JAX_LOCAL_DEVICE_IDS" in os.environ  # read by JAX
    return None if alone or bound or given else [int(os.environ["SLURM_LOCALID"])]


def _on_cloud_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms) or importlib.util.find_spec("libtpu") is None:
        return False
    import jax  # noqa: F401  (its import detects a Cloud TPU VM)
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    return running_in_cloud_tpu_vm


def _check_devices(expected: int) -> None:
    import jax

    if jax.device_count() != expected:
        raise InputError(
            f"{EXPECT_DEVICES}={expected}, but {jax.process_count()} process(es) see"
            f" {jax.device_count()} devices ({jax.local_device_count()} here,"
            f" {jax.devices()[0].device_kind}); has every host started, and is every device visible?"
        )


def _whole(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name}={text}: expected a whole number of at least {least}")
    return int(text)


def _host_and_port(name: str, address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"{name}={address}: expected HOST:PORT")
    return host.strip("[]"), int(port)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
