"""The published method: its rule, its training loop, and the first rows of the paper's files."""

import importlib.util
import json
import pathlib
import sys

import pytest

ROWS = 200


def _module(name: str):
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rule():
    return _module("published_rule")


@pytest.fixture(scope="session")
def loop():
    return _module("reference_loop")


def _first_rows(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the first rows of each split of `source` and the teacher's texts on them."""
    (folder / "llm").mkdir(parents=True)
    for split in ("train", "test"):
        name = f"{source.name}_{split}.json"
        lines = (source / name).read_text("utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:ROWS]), "utf-8")
        text = f"llm/{split}_CoT_0.json"
        texts = json.loads((source / text).read_text("utf-8"))
        (folder / text).write_text(json.dumps(texts[:ROWS]), "utf-8")


@pytest.fixture(scope="session")
def paper_sample(paper_data, built_once):
    """`paper_sample(name)`: a folder of that name with the first rows of a dataset's files."""

    def sample(name):
        root = built_once(f"sample_{name}", lambda f: _first_rows(paper_data / name, f / name))
        return root / name

    return sample


@pytest.fixture(scope="session")
def exact_sample(paper_sample, built_once):
    """A data dir with `prepare --paper-exact` of both samples."""
    from stepdistill_jax.data.prepare import prepare

    def build(folder):
        for name in ("cqa", "svamp"):
            prepare(name, source=paper_sample(name), paper_exact=True, data_dir=folder)

    return built_once("exact_sample", build)
