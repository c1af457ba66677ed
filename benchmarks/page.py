"""Writes docs/lab/benchmarks.md: replaces the sections between marks, and keeps all other text."""

import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

import timing

from stepdistill_jax.runtime.files import atomic_write

LIBRARIES = (
    *("stepdistill-jax", "jax", "jaxlib", "flax", "numpy", "torch", "transformers", "ctranslate2"),
    *("seqio", "tensorflow", "tensorflow-text", "sentencepiece"),
)
# keys of a result that are shown elsewhere, or are of no interest to readers
NOT_FACTS = {"ours", "peers", "ratio", "rows", "threads", "device", "rounds", "busy_cores", "load"}
NOT_FACTS |= {"settings", "environments", "pairs"}


def table(result: dict[str, Any]) -> list[str]:
    """Returns a table with a row for each contender, or for each of the result's `rows`."""
    if isinstance(result.get("rows"), dict):
        return _table(result["rows"])
    rows = {"ours": result["ours"], **result["peers"]}
    pairs = result.get("pairs", {})
    for name, ratio in result.get("ratio", {}).items():
        rows[name] = {**rows[name], "ours_is": f"{ratio:.2f}x"}
        if len(pairs.get(name, ())) > 1:
            rows[name]["in_pairs"] = f"{min(pairs[name]):.2f} to {max(pairs[name]):.2f}"
    return _table(rows)


def _table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *(column.replace("_", " ") for column in columns)], ["---"] * (len(columns) + 1)]
    lines += [[name, *(number(row.get(c)) for c in columns)] for name, row in rows.items()]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def number(value: Any) -> str:
    """Returns a number with four digits, and any other value unchanged, as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def facts(result: dict[str, Any]) -> Iterator[str]:
    """Yields the other facts of a result, one line each, tables last."""
    tables = {}
    for name, value in result.items():
        if name in NOT_FACTS or value is None or value == {}:
            continue
        title = name.replace("_", " ")
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            tables[title] = {str(i): row for i, row in enumerate(value, 1)}
        elif isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
            tables[title] = value
        elif isinstance(value, dict):
            yield f"- {title}: " + ", ".join(f"{key} {number(x)}" for key, x in value.items())
        elif isinstance(value, list):
            yield f"- {title}: " + ", ".join(map(number, value))
        else:
            yield f"- {title}: {number(value)}"
    for title, rows in tables.items():
        yield from ("", f"{title[0].upper()}{title[1:]}:", "", *_table(rows))


def conditions(result: dict[str, Any], today: str, seconds: float) -> str:
    """Returns the date, duration and conditions of a section's measurement."""
    parts = [today, result.get("device") or timing.device()]
    for name in ("threads", "rounds"):
        if name in result:
            one = f"{name[:-1]}{'' if result[name] == 1 else 's'}"
            parts.append(f"{result[name]} {one}")
    parts.append(f"{seconds:.0f} s in total")
    busy = result.get("busy_cores")
    warning = ""
    if busy is not None:
        parts.append(f"other processes kept {busy} cores busy")
        warning = " **A busy machine: not to be quoted.**" if busy > timing.BUSY else ""
    return f"{'; '.join(parts)}.{warning}"


def machine() -> str:
    """Returns a section that lists processor, memory, system and versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = {"processor": f"{timing.device()}, {cores} cores"}
    memory = pathlib.Path("/proc/meminfo")
    if memory.exists():
        kib = int(memory.read_text().split()[1])
        rows["memory"] = f"{kib / 2**20:.1f} GiB"
    huge = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists():
        rows["transparent huge pages"] = re.findall(r"\[(\w+)\]", huge.read_text())[0]
    rows |= {"system": platform.platform(), "Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            rows[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows[name] = "not installed"
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["## Machine and versions of the last run", "", "| | |", "|---|---|", *lines])


def write(path: pathlib.Path, texts: dict[str, str]) -> None:
    """Writes each text between its marks, or at the end of the file if it has none."""
    whole = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    for name, text in texts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        marked = f"{begin}\n{text}\n{end}"
        before, found, rest = whole.partition(begin)
        if found and end in rest:
            whole = before + marked + rest.partition(end)[2]
        else:
            whole = f"{whole.rstrip()}\n\n{marked}\n"
    with atomic_write(path) as f:
        f.write(whole)
