"""Links of README, docs and the other pages lead somewhere, and the site shows every page."""

import pathlib
import re
import unicodedata

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
OTHERS += [ROOT / "launch" / "README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w/])docs/[\w/-]+\.md")
TEXTS = {".py", ".gin", ".sh", ".md", ".ipynb", ".jinja", ".html", ".sbatch"}
WRITTEN = {"docs/lab/experiments_gsm.md"}  # by `make experiments-gsm`
FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


def prose_of(page: pathlib.Path) -> str:
    """Text of a page without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text("utf-8")))


def anchors_of(page: pathlib.Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and `toc` of Python-Markdown both write them."""
    text = FENCE.sub("", page.read_text("utf-8"))
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE):
        plain = unicodedata.normalize("NFKD", re.sub(r"[`*]|\]\([^)]*\)", "", heading))
        letters = re.sub(r"[^\w\s-]", "", plain.encode("ascii", "ignore").decode()).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", letters))
    return found


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda p: str(p.relative_to(ROOT)))
def test_each_internal_link_leads_to_a_file_and_a_heading(page):
    for url in LINK.findall(prose_of(page)):
        if "://" in url:
            continue
        path, _, anchor = url.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {url}"
        assert page not in PAGES or target.is_relative_to(DOCS), f"{url} is not part of the site"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name}: {url}"


def test_each_page_that_code_names_exists():
    rooms = ("stepdistill_jax", "gin", "configs", "benchmarks", "tests", "launch", "examples")
    files = [f for room in rooms for f in sorted((ROOT / room).rglob("*")) if f.suffix in TEXTS]
    named = {}
    for file in [*files, ROOT / "Makefile", ROOT / "pyproject.toml"]:
        for page in NAMED.findall(file.read_text("utf-8", errors="ignore")):
            named.setdefault(page, file)
    assert len(named) > 20
    missing = {page: file.name for page, file in named.items() if not (ROOT / page).exists()}
    assert missing.keys() <= WRITTEN, missing


def test_the_navigation_of_the_site_has_each_page_once():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    assert sorted(pages(nav)) == [page.relative_to(DOCS).as_posix() for page in PAGES]
