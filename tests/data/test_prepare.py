"""`prepare`, from a source to the folder that tasks read, also if the folder exists already."""

import concurrent.futures
import json
import shutil
import subprocess
import sys

import pytest

import stepdistill_jax.data
from stepdistill_jax.data import writing
from stepdistill_jax.data.bad_rows import UnusableRows
from stepdistill_jax.data.example import Rationale
from stepdistill_jax.data.prepare import ensure_prepared, prepare
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import read_jsonl

KEYS = {
    "rows",
    "with_rationale",
    "teacher_accuracy",
    "teacher_accuracy_by_text",
    "teacher_accuracy_repaired",
    "defects",
}


def _rows(count, answer="yes"):
    return [
        {"id": f"r{i}", "input": f"question {i} of\n{count}", "label": answer if i % 3 else "no"}
        | ({"rationale": f"reason {i}", "rationales": [{"text": f"reason {i}"}]} if i % 2 else {})
        | {"llm_label": answer, "weight": 1 + i % 2}
        for i in range(count)
    ]


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Prepares 60 rows as `mine`; returns (source file, data dir, result)."""
    folder = tmp_path_factory.mktemp("own")
    source = _write(folder / "rows.jsonl", _rows(60))
    return source, folder / "data", prepare(
        "jsonl", source=source, new_name="mine", data_dir=folder / "data"
    )  # fmt: skip


def _tfds_rows(name, data_dir, split):
    from stepdistill_jax.data.builder import tensorflow

    tensorflow()
    import tensorflow_datasets as tfds

    return list(tfds.as_numpy(tfds.load(name, data_dir=str(data_dir), split=split)))


def test_the_tfds_dataset_holds_the_rows_of_split_jsonl_in_their_order(own):
    _, data_dir, result = own
    dataset = open_prepared("mine", data_dir)
    assert set(result["splits"]) == {"train", "validation", "test"}
    for split, figures in result["splits"].items():
        ours, theirs = list(dataset.examples(split)), _tfds_rows("mine", data_dir, split)
        assert len(ours) == len(theirs) == figures["rows"] == dataset.splits[split]
        for example, row in zip(ours, theirs, strict=True):
            for name in ("id", "input", "label", "rationale", "llm_label"):
                assert row[name].decode() == getattr(example, name)
            assert row["weight"] == example.weight
            assert [t.decode() for t in row["rationales"]["text"]] == [
                r.text for r in example.rationales
            ]


def test_no_row_is_lost_between_source_and_splits(own):
    source, data_dir, _ = own
    dataset = open_prepared("mine", data_dir)
    found = {e.id: e for split in dataset.splits for e in dataset.examples(split)}
    assert len(found) == sum(dataset.splits.values()) == 60
    for row in map(json.loads, source.read_text().splitlines()):
        example = found[row["id"]]
        assert (example.input, example.label) == (row["input"], row["label"])
        assert example.rationale == row.get("rationale", "")
        assert example.rationales == tuple(Rationale(**r) for r in row.get("rationales", []))


def test_the_result_has_the_promised_figures(own):
    _, data_dir, result = own
    assert all(figures.keys() >= KEYS for figures in result["splits"].values())
    dataset = open_prepared("mine", data_dir)
    for split, figures in result["splits"].items():
        rows = list(dataset.examples(split))
        assert figures["with_rationale"] == sum(bool(e.rationale) for e in rows)
        assert figures["teacher_accuracy"] == pytest.approx(
            sum(e.llm_label == e.label for e in rows) / len(rows)
        )
        assert figures["teacher_accuracy_by_text"] is None
        # the newline of every input comes back as a space, and nothing else changes
        assert figures["vocabulary"]["changed_whitespace_rows"] == len(rows)
        assert figures["vocabulary"]["changed_rows"] == 0


def test_the_labels_of_train_are_kept_where_they_are_few(own):
    assert open_prepared("mine", own[1]).labels == ("no", "yes")


def test_an_unchanged_source_leaves_everything_as_it_is(own):
    source, data_dir, first = own
    before = {p: p.stat().st_mtime_ns for p in (data_dir / "mine").rglob("*")}
    again = prepare("jsonl", source=source, new_name="mine", data_dir=data_dir)
    assert again["reused"] and again["fingerprint"] == first["fingerprint"]
    assert {p: p.stat().st_mtime_ns for p in (data_dir / "mine").rglob("*")} == before
    assert again["splits"] == first["splits"]


def test_a_changed_source_is_rebuilt_and_told(tmp_path):
    source = _write(tmp_path / "rows.jsonl", _rows(40))
    first = prepare("jsonl", source=source, new_name="mine", data_dir=tmp_path / "data")
    _write(source, _rows(40, answer="indeed"))
    second = prepare("jsonl", source=source, new_name="mine", data_dir=tmp_path / "data")
    assert second["fingerprint"] != first["fingerprint"]
    assert not second["reused"] and any("rebuilt" in note for note in second["notes"])
    dataset = open_prepared("mine", tmp_path / "data")
    assert dataset.labels == ("indeed", "no")
    assert {r["label"].decode() for r in _tfds_rows("mine", tmp_path / "data", "train")} == {
        "indeed",
        "no",
    }
    # nothing else is left in the folder
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [".mine.lock", "mine"]

    # the same rows without their teacher are another dataset
    third = prepare(
        "jsonl", source=source, new_name="mine", data_dir=tmp_path / "data", teacher=False
    )
    assert third["fingerprint"] != second["fingerprint"]
    assert third["splits"]["train"]["with_rationale"] == 0


def test_a_source_that_turns_bad_leaves_the_old_dataset(tmp_path, own):
    source, data_dir, first = own
    broken = tmp_path / "rows.jsonl"
    broken.write_text(source.read_text() + '{"input": "q", "label": ""}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:61"):
        prepare("jsonl", source=broken, new_name="mine", data_dir=data_dir)
    assert open_prepared("mine", data_dir).fingerprint == first["fingerprint"]


def test_a_failure_while_writing_leaves_the_old_dataset_and_no_rubbish(own, monkeypatch, tmp_path):
    from stepdistill_jax.data import train_vocabulary

    _, data_dir, first = own

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_vocabulary, "train_vocabulary", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(
            "jsonl",
            source=_write(tmp_path / "rows.jsonl", _rows(20)),
            new_name="mine",
            data_dir=data_dir,
        )
    assert open_prepared("mine", data_dir).fingerprint == first["fingerprint"]
    assert not list(data_dir.glob(".mine.partial*"))


def test_a_damaged_dataset_is_named_and_then_rebuilt(tmp_path):
    source = _write(tmp_path / "rows.jsonl", _rows(20))
    options = {"source": source, "new_name": "mine", "data_dir": tmp_path / "data"}
    first = prepare("jsonl", **options)
    (tmp_path / "data" / "mine" / "train.jsonl").unlink()
    with pytest.raises(InputError, match=r"train\.jsonl: missing; run `stepdistill prepare jsonl"):
        open_prepared("mine", tmp_path / "data")
    # also removes the leftovers of a killed run
    (tmp_path / "data" / ".mine.partial-killed").mkdir()
    assert not prepare("jsonl", **options)["reused"]
    assert open_prepared("mine", tmp_path / "data").fingerprint == first["fingerprint"]
    assert not (tmp_path / "data" / ".mine.partial-killed").exists()


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path):
    folder = tmp_path / "data" / "delivery"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="was not written by `prepare`"):
        prepare("delivery", data_dir=tmp_path / "data")
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]


def test_two_at_once_prepare_it_once(tmp_path):
    # a lock belongs to the opened file, so threads stand for processes here
    source = _write(tmp_path / "rows.jsonl", _rows(20))
    options = {"source": source, "new_name": "mine", "data_dir": tmp_path / "data"}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(prepare, "jsonl", **options) for _ in range(2)]
    assert sorted(run.result()["reused"] for run in runs) == [False, True]


def test_without_train_there_is_no_vocabulary(tmp_path):
    _write(tmp_path / "test.jsonl", _rows(5))
    result = prepare("jsonl", source=tmp_path, new_name="mine", data_dir=tmp_path / "data")
    assert list(result["splits"]) == ["test"] and result["vocabulary_size"] is None
    with pytest.raises(InputError, match="prepared without a train split"):
        open_prepared("mine", tmp_path / "data").spiece_model  # noqa: B018


def test_notes_on_source_and_licence_are_kept_with_the_dataset(tmp_path):
    note = "of a page of sums, licence: CC0"
    result = prepare(
        "jsonl", source={"test": _rows(3)}, new_name="mine", notes=[note], data_dir=tmp_path
    )
    assert note in result["notes"]
    assert note in json.loads((tmp_path / "mine" / "dataset.json").read_text())["notes"]
    with pytest.raises(InputError, match="`notes`: only `prepare jsonl` takes notes, not"):
        prepare("delivery", notes=[note], data_dir=tmp_path)


def test_inputs_of_train_that_are_asked_again_are_told(tmp_path):
    _write(tmp_path / "train.jsonl", _rows(30))
    asked = [*_rows(30)[:4], {"input": "another", "label": "no"}]
    _write(tmp_path / "test.jsonl", asked)
    result = prepare("jsonl", source=tmp_path, new_name="mine", data_dir=tmp_path / "data")
    train = {e.input for e in open_prepared("mine", tmp_path / "data").examples("train")}
    shared = sum(row["input"] in train for row in asked)
    first = next(i for i, row in enumerate(asked, 1) if row["input"] in train)
    assert shared > 1
    note = f"{shared} inputs of test are also in train, the first at test.jsonl:{first}"
    assert note in result["notes"]
    assert not any("inputs of validation" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cqaa", "source": "x"}, r"unknown dataset 'cqaa' .*did you mean 'cqa'"),
        ({"name": "jsonl", "source": "x"}, r"`new_name`"),
        ({"name": "jsonl", "source": "x", "new_name": "My Task"}, r"lower_snake_case"),
        ({"name": "jsonl", "source": "x", "new_name": "../up"}, r"lower_snake_case"),
        ({"name": "jsonl", "source": "x", "new_name": "cqa"}, r"'cqa' is reserved for"),
        ({"name": "cqa"}, r"`source`"),
        ({"name": "delivery", "source": "x"}, r"leave `source` out"),
        ({"name": "svamp", "source": "x", "field_map": {"input": "q"}}, r"`field_map`"),
        ({"name": "jsonl", "source": "absent.jsonl", "new_name": "mine"}, r"absent\.jsonl: no such"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_and_writes_nothing(tmp_path, arguments, message):
    name = arguments.pop("name")
    with pytest.raises(InputError, match=message) as caught:
        prepare(name, data_dir=tmp_path / "data", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_the_embedded_dataset_is_prepared_as_its_documents_say(delivery_data_dir):
    dataset = ensure_prepared("delivery", delivery_data_dir)
    assert dataset.splits == {"train": 1500, "validation": 500, "test": 500}
    assert (dataset.metric, dataset.labels) == ("text_match", ("smooth", "trouble"))
    rows = _tfds_rows("delivery", delivery_data_dir, "test")
    assert [r["input"].decode() for r in rows] == [e.input for e in dataset.examples("test")]


def test_each_word_of_the_embedded_dataset_is_one_piece(delivery_data_dir):
    import sentencepiece

    dataset = open_prepared("delivery", delivery_data_dir)
    model = sentencepiece.SentencePieceProcessor(model_file=str(dataset.spiece_model))
    assert dataset.splits["test"] == 500
    for example in dataset.examples("test"):
        for text in (example.input, example.label, example.rationale):
            assert len(model.encode(text)) == len(text.split())


def test_preparing_on_first_use_is_for_the_embedded_dataset_only(tmp_path):
    with pytest.raises(InputError, match="run `stepdistill prepare cqa --source DIR`"):
        ensure_prepared("cqa", tmp_path)


def test_the_package_function_is_callable_whatever_was_imported_first():
    # the module of the same name must not hide it
    assert stepdistill_jax.data.prepare is prepare


def test_importing_the_package_loads_no_tensorflow():
    code = (
        "import sys, stepdistill_jax.data, stepdistill_jax.data.corpora.jsonl;"
        "print({'tensorflow', 'seqio', 'tensorflow_datasets'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("name", [pytest.param("cqa", marks=pytest.mark.slow), "svamp"])
def test_the_original_files_are_prepared_whole(name, paper_data, tmp_path):
    result = prepare(name, source=paper_data / name, data_dir=tmp_path)
    dataset = open_prepared(name, tmp_path)
    rows = {"cqa": (9741, 1221), "svamp": (800, 200)}[name]
    assert dataset.splits["train"] + dataset.splits["validation"] == rows[0]
    assert dataset.splits["test"] == rows[1]
    assert 0.08 < dataset.splits["validation"] / rows[0] < 0.12
    assert dataset.metric == {"cqa": "text_match", "svamp": "value_match"}[name]
    assert dataset.labels == ()
    assert result["vocabulary_size"] <= 8000
    assert all(f["vocabulary"]["changed_rows"] == 0 for f in result["splits"].values())
    defects = [defect for _, defect in read_jsonl(tmp_path / name / "defects.jsonl")]
    for split, figures in result["splits"].items():
        kinds = [d["kind"] for d in defects if d["split"] == split]
        assert {kind: kinds.count(kind) for kind in set(kinds)} == figures["defects"]
    first = next(d for d in defects if d["kind"] in ("label_not_a_choice", "equation_goes_on"))
    assert (
        f"{first['file']}:{first['line']}"
        == (result["splits"]["train"]["first_defects"][first["kind"]])
    )


def _texts(folder):
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("described", ['{"title": "mine"}', "", "[]", None])
def test_a_source_in_the_folder_of_the_dataset_is_never_replaced(tmp_path, described):
    folder = tmp_path / "mine"
    folder.mkdir()
    _write(folder / "train.jsonl", _rows(20))
    (folder / "notes.txt").write_text("years of work")
    if described is not None:
        (folder / "dataset.json").write_text(described)
    before = _texts(folder)
    with pytest.raises(
        InputError, match=r"mine: it holds the input .*mine, which would be overwritten"
    ):
        prepare("jsonl", source=folder, new_name="mine", data_dir=tmp_path)
    source = _write(tmp_path / "rows.jsonl", _rows(20))
    with pytest.raises(InputError, match=r"mine: exists and was not written by `prepare`"):
        prepare("jsonl", source=source, new_name="mine", data_dir=tmp_path)
    assert _texts(folder) == before


def test_a_file_in_a_prepared_folder_stops_its_rebuild(tmp_path):
    source = _write(tmp_path / "rows.jsonl", _rows(20))
    options = {"source": source, "new_name": "mine", "data_dir": tmp_path / "data"}
    first = prepare("jsonl", **options)
    notes = tmp_path / "data" / "mine" / "notes.txt"
    notes.write_text("years of work")
    assert prepare("jsonl", **options)["reused"]
    _write(source, _rows(21))
    with pytest.raises(InputError, match=r"notes\.txt: exists and was not written by `prepare`"):
        prepare("jsonl", **options)
    assert notes.read_text() == "years of work"
    assert open_prepared("mine", tmp_path / "data").fingerprint == first["fingerprint"]

    # a run that is killed between its two renames leaves neither dataset under its name
    notes.unlink()
    new = tmp_path / "data" / ".mine.partial-killed" / "mine"
    shutil.copytree(tmp_path / "data" / "mine", new)
    done = subprocess.run([sys.executable, "-c", KILLED, new, tmp_path / "data" / "mine"])
    assert done.returncode == 9 and not (tmp_path / "data" / "mine").exists()
    source.write_text("broken")
    with pytest.raises(InputError, match="broken JSON"):
        prepare("jsonl", **options)
    assert open_prepared("mine", tmp_path / "data").fingerprint == first["fingerprint"]
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [".mine.lock", "mine"]


def test_a_file_that_comes_while_a_dataset_is_rebuilt_is_kept(tmp_path, monkeypatch):
    source = _write(tmp_path / "rows.jsonl", _rows(20))
    options = {"source": source, "new_name": "mine", "data_dir": tmp_path / "data"}
    first = prepare("jsonl", **options)
    notes = tmp_path / "data" / "mine" / "notes.txt"
    write_rest = writing.write_rest

    def slow(*args):
        notes.write_text("years of work")
        write_rest(*args)

    monkeypatch.setattr(writing, "write_rest", slow)
    _write(source, _rows(21))
    with pytest.raises(InputError, match=rf"{notes}: exists and was not written by `prepare`"):
        prepare("jsonl", **options)
    assert notes.read_text() == "years of work"
    assert open_prepared("mine", tmp_path / "data").fingerprint == first["fingerprint"]


KILLED = """
import os, pathlib, sys
from stepdistill_jax.data import writing
rename = os.replace
os.replace = lambda *paths: (rename(*paths), os._exit(9))
writing.replace(*map(pathlib.Path, sys.argv[1:]))
"""


def test_a_report_replaces_its_own_page_alone(tmp_path, own):
    source, data_dir, _ = own
    page = tmp_path / "mine.html"
    page.write_text("<!DOCTYPE html><title>My page</title>")
    options = {"source": source, "new_name": "mine", "data_dir": data_dir, "report": tmp_path}
    with pytest.raises(InputError, match=r"mine\.html: exists and was not written by `prepare"):
        prepare("jsonl", **options)
    assert "My page" in page.read_text()
    page.unlink()
    for _ in range(2):
        assert prepare("jsonl", **options)["report"] == str(page)


def _bad_source(tmp_path):
    """Writes 40 rows as CSV, of which 37 can be used."""
    lines = [f'{i},"question {i}",{"no" if i % 3 else "yes"}' for i in range(40)]
    lines[5], lines[17], lines[30] = "5,question 5,", "17,question 17", "4,question 30,no"
    path = tmp_path / "rows.csv"
    path.write_text("id,question,label\n" + "".join(f"{line}\n" for line in lines))
    return path


def test_every_bad_row_is_listed_before_prepare_stops(tmp_path):
    options = {"source": _bad_source(tmp_path), "new_name": "mine", "data_dir": tmp_path / "data"}
    options["field_map"] = {"input": "question"}
    with pytest.raises(UnusableRows) as caught:
        prepare("jsonl", **options)
    listed = tmp_path / "data" / "mine.defects.jsonl"
    assert (caught.value.rows.count, caught.value.path) == (3, listed)
    assert "3 of 40 rows cannot be used, the first at " in str(caught.value)
    assert "rows.csv:7: the field 'label' is empty; all are listed in" in str(caught.value)
    rows = [row for _, row in read_jsonl(listed)]
    assert [(row["file"], row["line"], row["kind"]) for row in rows] == [
        ("rows.csv", line, "bad_row") for line in (7, 19, 32)
    ]
    assert "the id '4' is also at" in rows[2]["text"]
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [".mine.lock", listed.name]

    # skipping them prepares the dataset, with the list in its folder
    result = prepare("jsonl", **options, on_error="skip")
    dataset = open_prepared("mine", tmp_path / "data")
    ids = {e.id for split in dataset.splits for e in dataset.examples(split)}
    assert ids == {str(i) for i in range(40)} - {"5", "17", "30"}
    assert (result["skipped"], [row["line"] for row in result["bad_rows"]]) == (3, [7, 19, 32])
    assert result["warnings"][0]["kind"] == "bad_row"
    assert "3 of 40 rows cannot be used" in result["warnings"][0]["message"]
    assert [row for _, row in read_jsonl(tmp_path / "data" / "mine" / "defects.jsonl")] == rows
    assert not listed.exists()


def test_the_message_of_a_single_bad_row_says_where_it_is_listed(tmp_path):
    source = _write(tmp_path / "mine.jsonl", [*_rows(20), {"input": "q"}])
    with pytest.raises(
        UnusableRows,
        match=r"mine\.jsonl:21: no field 'label'.*; the row is listed in (.*)\. Correct it",
    ) as caught:
        prepare("jsonl", source=source, new_name="mine", data_dir=tmp_path)
    listed = tmp_path / "mine.defects.jsonl"
    assert caught.value.path == listed and str(listed) in str(caught.value)
    assert [row["line"] for _, row in read_jsonl(listed)] == [21]


def test_a_list_of_bad_rows_replaces_no_file_of_the_users(tmp_path):
    theirs = tmp_path / "data" / "mine.defects.jsonl"
    theirs.parent.mkdir()
    theirs.write_text("my own notes")
    options = {"source": _bad_source(tmp_path), "new_name": "mine", "data_dir": tmp_path / "data"}
    options["field_map"] = {"input": "question"}
    with pytest.raises(InputError, match=r"mine\.defects\.jsonl: exists and was not written by"):
        prepare("jsonl", **options)
    prepare("jsonl", **options, on_error="skip")
    assert theirs.read_text() == "my own notes"


def test_a_list_of_dicts_is_prepared_as_its_file_is(tmp_path, own):
    source, data_dir, _ = own
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    first = prepare("jsonl", source=rows, new_name="listed", data_dir=tmp_path)
    ours, theirs = open_prepared("listed", tmp_path), open_prepared("mine", data_dir)
    assert {split: list(ours.examples(split)) for split in ours.splits} == {
        split: list(theirs.examples(split)) for split in theirs.splits
    }
    # the fingerprint is that of the contents
    again = prepare(
        "jsonl", source=[dict(row) for row in rows], new_name="listed", data_dir=tmp_path
    )
    assert again["reused"] and again["fingerprint"] == first["fingerprint"]
    rows[3]["unread"] = "more"
    assert not prepare("jsonl", source=rows, new_name="listed", data_dir=tmp_path)["reused"]

    rows[2]["label"], rows[7] = 1.5, "no dict"
    with pytest.raises(
        UnusableRows, match=r"2 of 60 .* row 3: the field 'label' must be text"
    ) as caught:
        prepare("jsonl", source=rows, new_name="listed", data_dir=tmp_path)
    assert str(caught.value.rows.first[1]) == "row 8: expected a dict, got text"
    assert caught.value.rows.table()[1] == {
        "file": "",
        "line": 8,
        "reason": "expected a dict, got text",
    }


def test_lists_by_split_are_prepared_as_a_folder_is(tmp_path):
    rows = _rows(40)
    split = {"train": rows[:30], "test": rows[30:]}
    prepare("jsonl", source=split, new_name="mine", data_dir=tmp_path)
    dataset = open_prepared("mine", tmp_path)
    assert [e.id for e in dataset.examples("test")] == [row["id"] for row in rows[30:]]
    assert dataset.splits["train"] + dataset.splits["validation"] == 30
    for source, message in (
        ({"train": rows, "tset": rows}, r"unknown split 'tset' .*did you mean 'test'"),
        ({"test": rows[:3] + [{"input": "q"}]}, r"test:4: no field 'label' \(found: input\)"),
        ({"test": "rows.jsonl"}, r"`source` 'test': expected a list of dicts, got str"),
        (iter(rows), "`source`: expected a list of dicts, got list_iterator"),
        ([], "the list: no rows in it"),
    ):
        with pytest.raises(InputError, match=message):
            prepare("jsonl", source=source, new_name="mine", data_dir=tmp_path)
    with pytest.raises(InputError, match="only `prepare jsonl` reads lists"):
        prepare("cqa", source=rows, data_dir=tmp_path)
