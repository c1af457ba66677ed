"""A real HTTP server in a thread, and a short way to annotate rows with it as the teacher."""

import json

import pytest

from stepdistill_jax.teacher import annotate
from stepdistill_jax.teacher.stub_server import StubServer, by_rule

KEY = "sk-test-4f1d9c77a2"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    """A key in the environment, and no server that a developer's own shell names."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return KEY


def questions(count, **fields):
    return [{"input": f"Is parcel {i} late?", "label": "yes"} | fields for i in range(count)]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Annotating:
    """Annotates in a folder with a server's replies.

    Attributes:
        server: of the latest call.
    """

    def __init__(self, folder):
        self.folder, self.output = folder, folder / "out.jsonl"
        self.server = None

    def write(self, rows, name="in.jsonl"):
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def __call__(self, rows, reply=by_rule, **settings):
        """(result, rows of the output or None)."""
        source = self.write(rows)
        settings = {
            "task": "generic",
            "choices": ("yes", "no"),
            "model": "stub",
            "backoff": 0.01,
            "retries": 0,
            **settings,
        }
        with StubServer(reply).serve() as self.server:
            result = annotate(source, self.output, base_url=self.server.url, **settings)
        return result, read(self.output) if self.output.exists() else None

    @property
    def defects(self):
        return read(self.folder / "out.defects.jsonl")

    @property
    def defects_so_far(self):
        """Those of a run that stopped."""
        return read(self.folder / "out.defects.jsonl.partial")


@pytest.fixture
def annotating(tmp_path):
    return Annotating(tmp_path)
