"""docs/reference says what the code says."""

import importlib.util
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "reference"


@pytest.fixture(scope="module")
def pages():
    """What `make reference` would write, by file name."""
    spec = importlib.util.spec_from_file_location("write_reference", FOLDER / "write.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: page() for name, page in module.PAGES.items()}


@pytest.mark.parametrize("name", ["settings.md", "commands.md"])
def test_the_page_is_the_one_that_the_code_gives(pages, name):
    written = (FOLDER / name).read_text(encoding="utf-8")
    assert written == pages[name], f"docs/reference/{name} is out of date: run `make reference`"


def test_tables_are_whole(pages):
    """A bar in a text does not end its cell: each row has as many cells as the table's head."""
    for page in pages.values():
        for block in page.split("\n\n"):
            rows = [x.replace("\\|", "") for x in block.strip().splitlines() if x.startswith("|")]
            assert len({row.count("|") for row in rows}) <= 1, block
