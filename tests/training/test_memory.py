import jax
import jax.numpy as jnp
import pytest

from stepdistill_jax.commands import main
from stepdistill_jax.training import loop
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.memory import out_of_memory_explained

CONFIG = TrainConfig(task="any", batch_size=48, remat_policy="minimal", layout="fsdp")


def test_an_allocation_that_is_too_big_names_the_settings():
    with pytest.raises(MemoryError) as caught, out_of_memory_explained(CONFIG):
        jnp.zeros((1 << 44,), jnp.float32).block_until_ready()  # 64 TiB
    message = str(caught.value)
    assert "\n" not in message and "Out of memory allocating 70368744177664 bytes" in message
    for setting in (
        "`batch_size=48`",
        "`num_microbatches=1`",
        "`remat_policy=minimal`",
        "`dtype=float32`",
        "`layout=fsdp`",
    ):
        assert setting in message


def test_other_errors_of_jax_stay_what_they_are():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        out_of_memory_explained(CONFIG),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")


def test_a_run_without_memory_ends_in_one_line(tmp_path, delivery_data_dir, monkeypatch, capsys):
    def no_room(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nx")

    monkeypatch.setattr(loop, "jit_train_step", lambda *_, **__: no_room)
    argv = ["train", "demo_step_by_step", "--workdir", str(tmp_path / "w")]
    argv += ["--data-dir", str(delivery_data_dir), "--set", "BATCH_SIZE=8"]
    capsys.readouterr()
    assert main.main(argv) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("stepdistill:")]
    assert "out of memory" in line and "BATCH_SIZE=8" in line and "Traceback" not in line
