"""Eight virtual CPU devices for every test, set before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contextlib
import fcntl
import pathlib
import resource
import stat

# the same tiny steps are compiled by many tests and by the processes that they start; entries are
# keyed by the program, so an old one is never wrong
_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory, worker_id) -> pathlib.Path:
    """One folder for all xdist workers of this run."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture
def order_on_disk(monkeypatch) -> list[str]:
    """`fsync NAME` of each file (folders are left out) and `rename NAME`, in their order."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode):
            calls.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    def recorded_replace(old, new):
        calls.append(f"rename {os.path.basename(new)}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    return calls


@pytest.fixture
def full_disk():
    """`with full_disk(n):` no file grows beyond n bytes, as on a disk that is full."""

    @contextlib.contextmanager
    def full(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


@pytest.fixture(scope="session")
def delivery_data_dir(shared_tmp) -> pathlib.Path:
    """A data dir that holds the prepared `delivery` dataset; built once for all workers."""
    data_dir = shared_tmp / "delivery_data"
    with open(shared_tmp / "delivery.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (data_dir / "delivery" / "dataset.json").exists():
            from stepdistill_jax.data.prepare import prepare

            prepare("delivery", data_dir=data_dir)
    return data_dir


@pytest.fixture(scope="session")
def paper_data() -> pathlib.Path:
    """The folder of the paper's original files; skips where the variable is unset."""
    folder = os.environ.get("STEPDISTILL_PAPER_DATA")
    if not folder:
        pytest.skip("STEPDISTILL_PAPER_DATA is unset: no original files of the paper to read")
    if not pathlib.Path(folder).is_dir():
        pytest.fail(f"STEPDISTILL_PAPER_DATA={folder} is set and is not a folder")
    return pathlib.Path(folder)
