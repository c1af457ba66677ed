"""Raw files in, a prepared dataset out; nothing is dropped in silence."""

import importlib
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill_jax.data import prepared, writing
from stepdistill_jax.data.bad_rows import UnusableRows, keep_list, remove_list
from stepdistill_jax.data.corpora.row_sources import Source
from stepdistill_jax.data.counts import shared_inputs
from stepdistill_jax.data.labels import label_counts, warnings
from stepdistill_jax.data.reading import Reading
from stepdistill_jax.data.vocabulary import SentencePieceVocabulary
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.runtime.checks import one_of, refused
from stepdistill_jax.runtime.files import read_json
from stepdistill_jax.runtime.folders import alone, folder_aside
from stepdistill_jax.runtime.overwriting import check_apart, check_outputs, stranger
from stepdistill_jax.runtime.stores import local_path

logger = logging.getLogger(__name__)

NAMES = (*prepared.ORIGINALS, "jsonl", "delivery", prepared.GENERATED)
ON_ERROR = ("stop", "skip")


def prepare(
    name: str,
    *,
    source: Source | None = None,
    new_name: str | None = None,
    field_map: Mapping[str, str] | None = None,
    fields: Sequence[str] = (),
    teacher: bool = True,
    paper_exact: bool = False,
    on_error: str = "stop",
    rows: int | None = None,
    seed: int | None = None,
    notes: Sequence[str] = (),
    report: os.PathLike | str | None = None,
    data_dir: os.PathLike | str | None = None,
) -> dict[str, Any]:
    """Reads a dataset's original files, checks every row, and writes it where tasks look for it.

    Writes `data_dir/NAME/` with the TFDS dataset, SPLIT.jsonl, defects.jsonl, dataset.json and a
    vocabulary trained on train. It appears whole or not at all. If it is there already with the
    same fingerprint it is left as it is; with another one it is replaced, and a note says so. Rows
    are read one by one: a large source needs no memory.

    Args:
        name: `cqa`, `svamp`, `esnli`, `anli` (the original layout, or exports), `jsonl` (anybody's
            own rows), `delivery` (embedded, without source) or `gsm_symbolic` (made by the package
            `reasoning-gym`, without source).
        source: the folder of the original files; for `jsonl` a file (JSON lines; CSV or TSV by its
            name), a folder with train.jsonl (or .csv, .tsv) and optionally validation and test, a
            list of dicts, or such lists by split, e.g. {"train": [...], "test": [...]}.
        new_name: what to call the dataset, lower_snake_case; needed for `jsonl`.
        field_map: for `jsonl`, our field to the source's, e.g. {"input": "question"}.
        fields: for `jsonl`, names of other texts of a row to keep, for objectives that name them.
        teacher: False reads no teacher texts.
        paper_exact: reads the paper's files as its published code does, without repairs, and draws its
            validation split; the dataset is NAME_paper. It knows `asdiv`, too: SVAMP's and ASDiv's
            rows together.
        on_error: for `jsonl`: after all rows have been read, `stop` if some cannot be used, or `skip`
            them.
        rows: for `gsm_symbolic`, of its train split; None for 20,000.
        seed: for `gsm_symbolic`, of what is random in its rows; None for 0.
        notes: for `jsonl`, sentences for `dataset.json`, such as the rows' source and licence.
        report: folder for NAME.html, a page about the dataset.
        data_dir: None for `$STEPDISTILL_DATA_DIR`, else the user's cache folder.

    Returns:
        {"name", "directory", "fingerprint", "metric", "reused", "notes", "warnings" (see
        `data.labels`), "skipped" (number of bad rows), "bad_rows" (the first ones: [{"file", "row",
        "reason"}]), "vocabulary_size", "report",
        "splits": {SPLIT: {"rows", "with_rationale", "teacher_accuracy", "teacher_accuracy_by_text",
        "teacher_accuracy_repaired", "labels" ({LABEL: rows}, empty where answers are free),
        "defects": {KIND: count}, "first_defects": {KIND: "file:row"},
        "vocabulary": {"unknown_pieces", "changed_rows", "changed_whitespace_rows"}}}}. Accuracies
        are shares of all rows with a gold label, None where they do not apply; a changed row does not come back the
        same from encoding and decoding, a changed-whitespace row does but for its whitespace.

    Raises:
        UnusableRows: under `stop`, an InputError of all bad rows. They are listed with the other
            defects in `data_dir/NAME.defects.jsonl`; nothing else is written.
        InputError: bad usage or a source that cannot be read as it should; nothing is written.
    """
    one_of("on_error", on_error, ON_ERROR)
    if on_error != "stop" and name != "jsonl":
        raise InputError(f"`on_error`: only `prepare jsonl` has rows to skip, not {name}")
    for option, value in (("rows", rows), ("seed", seed)):
        if value is not None and name != prepared.GENERATED:
            raise InputError(
                f"`{option}`: only `prepare {prepared.GENERATED}` makes its rows, not {name}"
            )
    if notes and name != "jsonl":
        raise InputError(f"`notes`: only `prepare jsonl` takes any, got some for {name}")
    dataset_name = _dataset_name(name, new_name, paper_exact)
    data_dir = prepared.data_folder(data_dir)
    directory = data_dir / dataset_name
    is_path = isinstance(source, str | os.PathLike)
    check_apart([directory], [source] if is_path else [])
    if report is not None:
        from stepdistill_jax.data.report import PAGE, write_report

        page = pathlib.Path(report) / f"{dataset_name}.html"
        check_outputs({page: PAGE}, [source] if is_path else [], "`report`")
    reading = _read(name, source, field_map, fields, teacher, paper_exact, rows, seed)
    reading.notes.extend(notes)
    with alone(directory, name=f"`data_dir` {data_dir}", wait=True):
        found, damage = _existing(dataset_name, data_dir)
        with folder_aside(directory) as new:
            tallies, fingerprint, bad = writing.write_rows(reading, new)
            total = bad.count + sum(tally.rows for tally in tallies.values())
            if bad.count and on_error == "stop":
                odd = [w["message"] for w in warnings(tallies)] + shared_inputs(tallies)
                raise UnusableRows(bad, total, keep_list(new, directory), odd)
            if not tallies:
                raise InputError(
                    f"prepare {name}: no row of the source can be used: {'; '.join(reading.notes)}"
                )
            reused = found is not None and found.fingerprint == fingerprint
            if not reused:
                writing.check_replaceable(directory)
                writing.write_rest(dataset_name, new, reading, tallies, fingerprint)
                writing.replace(new, directory)
            remove_list(directory)
    notes = [*reading.notes, *shared_inputs(tallies)]
    counts = label_counts(tallies)
    if damage:
        notes.append(f"what was there was damaged, and is written anew: {damage}")
    if found is not None:
        notes.append(
            "sources and rows are unchanged: nothing to do"
            if reused
            else "the sources or rows have changed: rebuilt"
        )
    result: dict[str, Any] = {
        "name": dataset_name,
        "directory": str(directory),
        "fingerprint": fingerprint,
        "metric": reading.metric,
        "reused": reused,
        "notes": notes,
        "warnings": [*bad.warnings(total), *warnings(tallies)],
        "skipped": bad.count,
        "bad_rows": bad.table(),
        "vocabulary_size": None,
        "report": None,
        "splits": {
            split: tally.figures()
            | {"labels": {label: n[split] for label, n in counts.items() if split in n}}
            for split, tally in tallies.items()
        },
    }
    if (directory / prepared.VOCABULARY).exists():
        result["vocabulary_size"] = SentencePieceVocabulary(directory / prepared.VOCABULARY).size
        for split, counts in read_json(directory / prepared.FILE)["vocabulary"].items():
            result["splits"][split]["vocabulary"] = counts
    if report is not None:
        write_report(page, result, tallies)
        result["report"] = str(page)
    return result


def ensure_prepared(
    name: str, data_dir: os.PathLike | str | None = None
) -> prepared.PreparedDataset:
    """The prepared dataset; the embedded one is prepared on first use.

    Raises:
        InputError: as `open_prepared`.
    """
    folder = prepared.data_folder(data_dir)
    if name == prepared.EMBEDDED and not prepared.is_prepared(name, folder):
        logger.info("preparing the embedded dataset %r in %s", name, folder)
        prepare(name, data_dir=folder)
    return prepared.open_prepared(name, folder)


def _dataset_name(name: str, new_name: str | None, paper_exact: bool) -> str:
    if paper_exact and name not in prepared.PUBLISHED:
        raise InputError(
            f"`paper_exact`: {name!r} is none of the paper's datasets"
            f" ({', '.join(prepared.PUBLISHED)}){nearest(name, prepared.PUBLISHED)}"
        )
    if name not in NAMES and not paper_exact:
        more = "; `paper_exact` has it" if name in prepared.PUBLISHED else nearest(name, NAMES)
        more = "; `prepare jsonl` reads CSV and TSV, too" if name in ("csv", "tsv") else more
        raise InputError(f"prepare: unknown dataset {name!r} (known: {', '.join(NAMES)}){more}")
    own = f"{name}{prepared.PAPER_SUFFIX}" if paper_exact else name
    if new_name is None:
        if name == "jsonl":
            raise InputError("prepare jsonl: say what to call the dataset with `new_name`")
        return own
    if not prepared.NAME.fullmatch(new_name):
        raise refused("new_name", "lower_snake_case, such as my_task", new_name)
    papers = {f"{one}{prepared.PAPER_SUFFIX}": one for one in prepared.PUBLISHED}
    taken = dict(zip(NAMES, NAMES, strict=True)) | papers
    if new_name in taken and new_name != own:
        raise InputError(
            f"`new_name`: {new_name!r} belongs to `prepare {taken[new_name]}`, choose another"
        )
    return new_name


def _read(
    name: str,
    source: Source | None,
    field_map: Mapping[str, str] | None,
    fields: Sequence[str],
    teacher: bool,
    paper_exact: bool,
    rows: int | None,
    seed: int | None,
) -> Reading:
    if field_map and name != "jsonl":
        raise InputError(f"`field_map`: only `prepare jsonl` has fields to map, not {name}")
    if fields and name != "jsonl":
        raise InputError(f"`fields`: only `prepare jsonl` has more fields to keep, not {name}")
    if name in (prepared.EMBEDDED, prepared.GENERATED):
        from stepdistill_jax.data.corpora import delivery, gsm_symbolic

        if source is not None:
            raise InputError(f"prepare {name}: it is generated, leave `source` out")
        own = name == prepared.EMBEDDED
        return delivery.read() if own else gsm_symbolic.read(rows=rows, seed=seed)
    if source is None:
        raise InputError(f"prepare {name}: say where its files are with `source`")
    if isinstance(source, str | os.PathLike):
        source = local_path(source, "`source`")
    elif name != "jsonl":
        raise InputError(f"prepare {name}: `source` is a folder; lists are for `prepare jsonl`")
    if name == "jsonl":
        from stepdistill_jax.data.corpora import jsonl

        return jsonl.read(source, field_map=field_map or {}, more=fields, teacher=teacher)
    if paper_exact:
        from stepdistill_jax.data.corpora import published

        if not teacher:
            raise InputError(
                "`paper_exact`: the published code needs the teacher's texts, leave `teacher` out"
            )
        return published.read(name, source)
    reader = importlib.import_module(f"stepdistill_jax.data.corpora.{name}")
    return reader.read(source, teacher=teacher)


def _existing(name: str, data_dir: pathlib.Path) -> tuple[prepared.PreparedDataset | None, str]:
    """What is prepared under that name, and what is damaged of it; damaged, it is to be replaced.

    Raises:
        InputError: the folder holds something that is not ours to replace.
    """
    folder = data_dir / name
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"{folder}: is there and is no folder; move it away, or choose another `new_name` or"
            " `data_dir`"
        )
    if not folder.exists() or not any(folder.iterdir()):
        return None, ""
    if not writing.is_ours(folder):
        raise stranger(folder, "prepare", f" (no {prepared.FILE} with its fields)")
    try:
        found = prepared.open_prepared(name, data_dir)
        found.check()
    except InputError as error:
        return None, str(error).partition("; run `")[0]
    return found, ""
