import os
import subprocess
import sys

import pytest

from stepdistill_jax.data import builder
from stepdistill_jax.errors import InputError


class FakeConfig:
    """tf.config of a machine with one GPU; `used`: TensorFlow has already made its devices."""

    def __init__(self, used=False):
        self.visible = {"GPU": ["gpu:0"], "TPU": []}
        self.used = used

    def set_visible_devices(self, devices, kind):
        if self.used:
            raise RuntimeError("Visible devices cannot be modified after being initialized")
        self.visible[kind] = devices

    def get_visible_devices(self, kind):
        return self.visible[kind]


@pytest.fixture
def fake_tensorflow(monkeypatch):
    def install(config):
        module = type(sys)("tensorflow")
        module.config = config
        monkeypatch.setitem(sys.modules, "tensorflow", module)
        return builder.tensorflow.__wrapped__  # past the cache

    return install


def test_accelerators_are_hidden_from_tensorflow(fake_tensorflow):
    config = FakeConfig()
    assert fake_tensorflow(config)().config is config
    assert config.visible == {"GPU": [], "TPU": []}


def test_a_gpu_that_tensorflow_already_holds_is_an_error(fake_tensorflow):
    with pytest.raises(InputError, match="already holds a GPU"):
        fake_tensorflow(FakeConfig(used=True))()


def test_a_missing_tensorflow_says_where_to_do_this_step(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(InputError, match="do this step on Linux"):
        builder.tensorflow.__wrapped__()


@pytest.mark.parametrize("first", ["os", "grain"], ids=["alone", "after_absl_logging_began"])
def test_importing_tensorflow_writes_nothing(first):
    code = (
        f"import {first};"
        "from stepdistill_jax.data.builder import tensorflow as t; print(t().__version__[:2])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert (found.stdout.strip(), found.stderr) == ("2.", "")
