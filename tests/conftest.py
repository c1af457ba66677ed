"""Eight virtual CPU devices for every test, set before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA_FLAGS of a process that a test starts on one device
os.environ.setdefault("XLA_FLAGS_OF_ONE_DEVICE", os.environ.get("XLA_FLAGS", ""))
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contextlib
import fcntl
import functools
import gc
import importlib
import json
import pathlib
import resource
import stat

# the same tiny steps are compiled by many tests and by the processes that they start; entries are
# keyed by the program, so an old one is never wrong
_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# `--hypothesis-profile many`: make test-slow-properties
hypothesis.settings.register_profile("few", max_examples=20, deadline=None)
hypothesis.settings.register_profile("many", max_examples=300, deadline=None)
hypothesis.settings.load_profile("few")

# JAX and TensorFlow keep half a million objects, which the collector would traverse again and again: with the default
# thresholds, it takes 8 % of the suite's time
gc.set_threshold(20_000, 20, 50)


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
def built_once(shared_tmp):
    """`built_once(name, build)`: a folder that `build(folder)` fills, once for all workers."""

    def built(name, build):
        folder, done = shared_tmp / name, shared_tmp / f"{name}.done"
        with open(shared_tmp / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                build(folder)
                done.touch()
        return folder

    return built


@pytest.fixture(scope="session")
def delivery_data_dir(built_once) -> pathlib.Path:
    """A data dir that holds the prepared `delivery` dataset."""
    from stepdistill_jax.data.prepare import prepare

    return built_once("delivery_data", lambda folder: prepare("delivery", data_dir=folder))


@pytest.fixture(scope="session")
def paper_data() -> pathlib.Path:
    """The folder of the paper's original files; skips where the variable is unset."""
    folder = os.environ.get("STEPDISTILL_PAPER_DATA")
    if not folder:
        pytest.skip("STEPDISTILL_PAPER_DATA is unset: no original files of the paper to read")
    if not pathlib.Path(folder).is_dir():
        pytest.fail(f"STEPDISTILL_PAPER_DATA={folder} is set and is not a folder")
    return pathlib.Path(folder)


# A tiny untrained model as workdir and as model directory: enough to be asked, and quick.

SENTENCES = [
    "with rain in the forecast , the truck takes the narrow bridge .",
    "with sun in the forecast , the bike takes the wide avenue .",
    "predict: explain: slow fast pace smooth trouble (a) yes (b) no 0 1 2 3 4 5 6 7 8 9",
]


@pytest.fixture(scope="session")
def spiece(tmp_path_factory):
    """A small SentencePiece model, made by the library itself."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=100,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    return folder / "spiece.model"


@pytest.fixture(scope="session")
def gemma_model(tmp_path_factory):
    """`gemma_model(add_bos_token=..., add_eos_token=...)`: a small `tokenizer.model` of Gemma's kind.

    The arguments are next to it in a `tokenizer_config.json`; without any there is none.
    """
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=380,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<mask>", "<start_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁"],
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
        minloglevel=2,
        num_threads=1,
    )

    def written(**framing):
        folder = tmp_path_factory.mktemp("gemma")
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        if framing:
            (folder / "tokenizer_config.json").write_text(json.dumps(framing))
        return folder / "tokenizer.model"

    return written


@pytest.fixture(scope="session")
def tiny_config():
    from stepdistill_jax.models.t5 import T5Config

    return T5Config(
        vocab_size=128,
        emb_dim=32,
        num_heads=2,
        head_dim=8,
        mlp_dim=48,
        num_encoder_layers=2,
        num_decoder_layers=1,
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    """Random, but with a head that says EOS now and then: else nothing ever stops early."""
    from stepdistill_jax.models.encoder_decoder import init_params

    params = jax.jit(init_params, static_argnums=0)(tiny_config, jax.random.key(0))
    head = np.array(params["logits_dense"]["kernel"])
    head[:, 1] *= 3
    params["logits_dense"]["kernel"] = jax.numpy.asarray(head)
    return params


@pytest.fixture(scope="session")
def tiny_t5gemma():
    """(configuration, random parameters): unequal sides, fewer key/value heads, windows of a few tokens."""
    import flax.traverse_util

    from stepdistill_jax.models.encoder_decoder import init_params
    from stepdistill_jax.models.t5gemma import T5GemmaConfig, gemma_side

    config = T5GemmaConfig(
        vocab_size=384,
        encoder=gemma_side(32, 4, 2, 8, 48, 3, window=5, score_softcap=3.0),
        decoder=gemma_side(24, 6, 2, 8, 40, 2, window=4, score_softcap=3.0),
        logits_softcap=3.0,
    )
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng, flat = np.random.default_rng(0), {}
    for path, x in flax.traverse_util.flatten_dict(shapes, sep="/").items():
        flat[path] = rng.normal(size=x.shape).astype(np.float32)
        flat[path] *= {"kernel": x.shape[-2:][0] ** -0.5, "scale": 0.3}.get(
            path.split("/")[-1], 0.06
        )
    flat["decoder/decoder_norm/scale"] += 3.0  # so that logits bend
    flat["target_embedder"][1] *= 6.0  # a random head never says EOS
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return config, jax.tree.map(jax.numpy.asarray, params)


@pytest.fixture(scope="session")
def task_info():
    from stepdistill_jax.data.objectives import step_by_step
    from stepdistill_jax.formats.directory import TaskInfo

    return TaskInfo("roads", step_by_step(), 40, 24, 8, "text_match", ("smooth", "trouble"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tiny_config, tiny_params, task_info, spiece):
    """In the Hugging Face layout, with stepdistill.json."""
    from stepdistill_jax.data.vocabulary import load_vocabulary
    from stepdistill_jax.formats.directory import write_model_files
    from stepdistill_jax.formats.hf import save_params

    folder = tmp_path_factory.mktemp("model")
    write_model_files(folder, tiny_config, load_vocabulary(spiece), task_info)
    save_params(folder, tiny_params, tiny_config)
    return folder


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, tiny_config, tiny_params, task_info, spiece):
    """Steps 3 (better) and 5; step 3 holds the parameters of `model_dir`."""
    from stepdistill_jax.data.vocabulary import load_vocabulary
    from stepdistill_jax.formats.directory import write_model_files
    from stepdistill_jax.runtime.checkpoints.manager import Checkpoints

    folder = tmp_path_factory.mktemp("workdir")
    write_model_files(folder, tiny_config, load_vocabulary(spiece), task_info)
    checkpoints = Checkpoints(folder)
    for step, accuracy in ((3, 0.75), (5, 0.5)):
        params = jax.tree.map(lambda x, s=step: x * (1.0 if s == 3 else 0.7), tiny_params)
        metrics = {
            "step": step,
            "validated": True,
            "label_accuracy": accuracy,
            "label_loss": 1.5,
        }
        checkpoints.save(step, params, {"step": np.int32(step)}, metrics)
    checkpoints.close()
    return folder


@pytest.fixture(scope="session")
def questions():
    """300 rows of different lengths; every third has no id, some have labels or choices."""
    rng = np.random.default_rng(0)
    words = " ".join(SENTENCES).split()
    rows = []
    for i in range(300):
        row = {"input": " ".join(rng.choice(words, rng.integers(1, 60)))}
        if i % 3:
            row["id"] = f"q{i}"
        row["label"] = ("smooth", "trouble")[i % 2]
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def lay_out():
    """(folder, rows, name, labels) -> the folder, with a prepared dataset that has a test split."""

    def write(folder, rows, name="roads", labels=()):
        dataset = folder / name
        (dataset / "1.0.0").mkdir(parents=True)
        described = {"fingerprint": "f", "metric": "text_match", "splits": {"test": len(rows)}}
        (dataset / "dataset.json").write_text(json.dumps(described | {"labels": list(labels)}))
        (dataset / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


@pytest.fixture
def write_rows(tmp_path):
    def write(rows, name="in.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def read_rows_of():
    return lambda path: [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def small_windows(monkeypatch):
    """Makes `predict` work in windows of so many rows, and stop in the n-th of them.

    Gives the sizes of the windows that are begun, over all runs.
    """

    def cut(rows, stop_in=None):
        # `inference.predict` is the function
        module = importlib.import_module("stepdistill_jax.inference.predict")
        decode_window, windows = module.decode_window, []

        def watched(*args):
            windows.append(len(args[2]))
            if len(windows) == stop_in:
                raise KeyboardInterrupt
            return decode_window(*args)

        monkeypatch.setattr(module, "decode_window", watched)
        monkeypatch.setattr(module, "WINDOW_ROWS", rows)
        monkeypatch.setattr(module, "WINDOW_BATCHES", 0)
        return windows

    return cut


@pytest.fixture
def compiled():
    """One item for each program that JAX compiles."""
    events = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def params(request):
    """Of the module's MODEL, drawn by NumPy: `init_state` would be one more program to compile."""
    from stepdistill_jax.models.encoder_decoder import init_params

    rng = np.random.default_rng(0)
    init = functools.partial(init_params, request.module.MODEL)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
