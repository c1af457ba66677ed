"""What the tests of faults share: one small run, and the table of figures in docs/lab/reliability.md.

`pytest tests/faults --faults-table FILE` (`make faults`) writes the table between the two marks of FILE.
"""

import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import time

import pytest

START_MARK, END_MARK = "<!-- faults: written by `make faults` -->", "<!-- end of faults -->"
FOLDER = "tests/faults"
ORDER = (  # of the modules in the table
    *("kills", "stops", "checkpoints", "lock", "numbers", "cluster", "remote"),
    *("predict_at_length", "soak"),
)
SETTINGS = {
    "task": "delivery",
    "batch_size": 16,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 12,
    "eval_every": 12,
    "checkpoint_every": 5,
    "learning_rate": 1e-3,
    "layout": "fsdp",
}


def pytest_collection_modifyitems(items):
    """Begins with the soaks, a third of the time, so that no worker waits for them at the end."""
    items.sort(key=lambda item: item.path.name != "test_soak.py")


@pytest.fixture(scope="session")
def settings() -> dict:
    """Keyword arguments of `TrainConfig` for a run of 12 steps on `delivery`."""
    return dict(SETTINGS)


@pytest.fixture
def record_fault(record_property):
    """`record_fault(fault, tried=, survived=, seen="")`: one row of the table; call it before asserting.

    Survived means: nothing was lost and nothing wrong went by in silence.
    """

    def record(fault: str, *, tried: int, survived: int, seen: str = "") -> None:
        row = {"fault": fault, "tried": tried, "survived": survived, "seen": seen}
        record_property("fault", row)

    return record


@pytest.fixture
def survives(record_fault):
    """`with survives(FAULT) as seen:` is one row; it survived where nothing in the block fails."""

    @contextlib.contextmanager
    def block(fault):
        seen, survived = [], 0
        try:
            yield seen
            survived = 1
        finally:
            record_fault(fault, tried=1, survived=survived, seen=", ".join(seen))

    return block


@pytest.fixture(scope="session")
def printed():
    """`printed(recorded)`: those of the recorded warnings that Python would print."""
    quiet = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
    return lambda recorded: [str(w.message) for w in recorded if not issubclass(w.category, quiet)]


def pytest_addoption(parser):
    parser.addoption("--faults-table", metavar="FILE", help="write the table of faults into FILE")


def pytest_configure(config):
    config.faults_started = time.monotonic()


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    # absent where these tests are collected as a part of all tests
    path = config.getoption("--faults-table", default=None)
    if path is None or hasattr(config, "workerinput"):
        return
    stats = terminalreporter.stats
    reports = [r for kind in ("passed", "failed") for r in stats.get(kind, ()) if r.when == "call"]
    notes = [f"**Failed: {r.nodeid}**" for r in reports if r.outcome == "failed"]
    notes += sorted(f"Not tried: {r.nodeid}: {r.longrepr[2]}" for r in stats.get("skipped", ()))
    rows = _rows(sorted(reports, key=_place))
    minutes = (time.monotonic() - config.faults_started) / 60
    notes.insert(0, f"{_machine()}; {minutes:.0f} minutes.")
    page = pathlib.Path(path)
    before, rest = page.read_text(encoding="utf-8").split(START_MARK)
    table, after = rest.split(END_MARK)
    if config.option.keyword or config.args != [FOLDER]:  # renews these rows, keeps the others
        earlier, newer = _rows_of(table), {row["fault"]: row for row in rows}
        known = {row["fault"] for row in earlier}
        rows = [newer.get(row["fault"], row) for row in earlier]
        rows += [row for fault, row in newer.items() if fault not in known]
        notes.append(f"{len(rows) - len(newer)} of {len(rows)} rows are of an earlier run of all.")
    text = _table(rows, notes)
    page.write_text(f"{before}{START_MARK}\n\n{text}\n{END_MARK}{after}", encoding="utf-8")
    terminalreporter.write_line(f"{path}: {len(rows)} kinds of faults")


def _place(report):
    module = pathlib.PurePath(report.nodeid.partition("::")[0]).stem.removeprefix("test_")
    return ORDER.index(module) if module in ORDER else len(ORDER), report.nodeid


def _rows(reports) -> list[dict]:
    """One row for each fault; what its tests tried is added up."""
    rows: dict[str, dict] = {}
    for report in reports:
        for _, row in (p for p in report.user_properties if p[0] == "fault"):
            one = rows.setdefault(row["fault"], row | {"tried": 0, "survived": 0})
            one["tried"] += row["tried"]
            one["survived"] += row["survived"]
            # of the longer test, where a short one tries the same
            one["seen"] = row["seen"] if 2 * row["tried"] >= one["tried"] else one["seen"]
    return list(rows.values())


def _rows_of(table: str) -> list[dict]:
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [
        {"fault": c[0], "tried": int(c[1]), "survived": int(c[2]), "seen": c[4] if c[4:] else ""}
        for c in cells[1:]
    ]


def _machine() -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "orbax-checkpoint")
    )
    python = f"Python {platform.python_version()}"
    cores = f"{os.cpu_count()} CPU cores"
    return f"{datetime.date.today()}, {cores}, {platform.system()}, {python}, {versions}"


def _table(rows: list[dict], notes: list[str]) -> str:
    tried, survived = (sum(row[name] for row in rows) for name in ("tried", "survived"))
    lost = tried - survived
    lines = [f"**{tried:,} faults tried, {survived:,} survived, {lost:,} lost.** {notes[0]}"]
    lines += [f"\n{note}" for note in notes[1:]]
    lines += ["", "| fault | tried | survived | lost | seen |", "|---|---:|---:|---:|---|"]
    for row in rows:
        tried, survived = row["tried"], row["survived"]
        lines.append(
            f"| {row['fault']} | {tried} | {survived} | {tried - survived} | {row['seen']} |"
        )
    return "\n".join(lines) + "\n"
