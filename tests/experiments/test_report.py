"""Reports on runs that are made up, so that every figure is known beforehand."""

import base64
import csv
import dataclasses
import html.parser
import io
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from stepdistill_jax.data.example import Example
from stepdistill_jax.errors import InputError
from stepdistill_jax.experiments.comparison import compare
from stepdistill_jax.experiments.report import headline, report
from stepdistill_jax.experiments.results import Gold, arm_of, read_runs
from stepdistill_jax.experiments.tables import Table, rationale_table

HOSTILE = "since <script>alert(1)</script> & <img src=http://x.test/a.png>"
CURVES = {
    ("label_only", 0.25): [0.5, 0.6, 0.64],
    ("label_only", 1.0): [0.7, 0.72, 0.74],
    ("step_by_step", 0.25): [0.7, 0.71, 0.78],
    ("step_by_step", 1.0): [0.9, 0.9, 0.96],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_sweep):
    """A sweep of CURVES, one run collapsed."""
    folder = tmp_path_factory.mktemp("sweep")
    return make_sweep(folder, CURVES, collapsed=[("label_only", 0.25, 0)], rationale=HOSTILE)


@pytest.fixture(scope="module")
def made(tmp_path_factory, folder, delivery_data_dir):
    """The report on it, and where that is."""
    output = tmp_path_factory.mktemp("report")
    return report([folder], output=output, data_dir=delivery_data_dir), output


def test_the_curve_has_what_the_answers_say(made):
    (comparison,), output = made[0].comparisons, made[1]
    points = {(p.arm, p.fraction): p for p in comparison.points}
    assert list(points) == list(CURVES)  # the baseline first, small fractions first
    for key, accuracies in CURVES.items():
        assert points[key].accuracy == pytest.approx(sum(accuracies) / 3)
        assert len(points[key].runs) == 3 and points[key].labels == 1500 * key[1]
    best = points["step_by_step", 1.0]
    # 0.02 is the standard error of 0.9, 0.9, 0.96; 4.303 Student's quantile for 2 degrees
    assert (best.low, best.high) == pytest.approx((0.92 - 0.0861, 0.92 + 0.0861), abs=1e-4)
    assert comparison.majority == 0.5 and comparison.teacher is None
    rows = list(csv.DictReader((output / "accuracy.csv").read_text().splitlines()))
    assert [float(r["accuracy"]) for r in rows] == [
        pytest.approx(p.accuracy, abs=5e-5) for p in comparison.points
    ]


def test_a_collapsed_run_is_counted_named_and_set_apart(made):
    (comparison,), output = made[0].comparisons, made[1]
    first = comparison.points[0]
    assert first.collapsed == 1 and first.accuracy_of_others == pytest.approx(0.62)
    assert sum(p.collapsed for p in comparison.points) == 1
    page = (output / "report.html").read_text()
    assert "label_only 0.25 seed 0: accuracy 0.5000, every answer is &#39;smooth&#39;" in page


def test_the_smallest_fraction_that_is_enough(made):
    (comparison,) = made[0].comparisons
    (enough,) = comparison.enough
    assert (enough.arm, enough.fraction, enough.labels) == ("step_by_step", 0.25, 375)
    assert enough.target == pytest.approx(0.72) and enough.baseline_labels == 1500
    assert enough.tested and enough.surely == 1.0  # 0.73 against 0.72 is not beyond chance
    assert enough.reverse is None
    (sentence,) = headline(comparison)
    assert (
        "With 25% of the data (375 labels, 4 times fewer), step_by_step reaches the accuracy that label_only"
        " has with all of the data (0.7200, with 1500 labels). With all of the data, step_by_step is"
        " significantly better than label_only (95%)." in sentence
    )


def test_a_baseline_at_chance_is_no_mark_to_reach(made):
    (comparison,) = made[0].comparisons
    low = comparison.of_arm("label_only")[-1].low
    chance = dataclasses.replace(comparison, majority=low)
    sentence, better = headline(chance)
    assert "times fewer" not in sentence and sentence.endswith(
        "so an arm that reaches this accuracy proves nothing."
    )
    assert (
        better
        == "With all of the data, step_by_step is significantly better than label_only (95%)."
    )
    (enough,) = comparison.enough
    others = [dataclasses.replace(enough, arm=arm, surely=None) for arm in ("a", "b")]
    same = dataclasses.replace(enough, arm="c")
    assert headline(dataclasses.replace(chance, enough=[*others, enough, same]))[1:] == [
        "With all of the data, step_by_step and c are significantly better than label_only (95%).",
        "a and b are not significantly better than label_only at any share of the data (95%).",
    ]
    (sentence,) = headline(dataclasses.replace(comparison, majority=low - 1e-6))
    assert "4 times fewer" in sentence


def test_arms_are_tested_on_the_same_rows(made):
    (comparison,) = made[0].comparisons
    full = comparison.tests[-1]
    assert (full.fraction, full.first, full.second) == (1.0, "label_only", "step_by_step")
    assert full.difference == pytest.approx(0.2)
    assert full.low < 0.2 < full.high and full.low > 0.1 and full.p_holm < 0.01
    assert full.seeds == [0, 1, 2]
    first, second = (
        [r.right for r in comparison.of_arm(a)[-1].runs] for a in ("label_only", "step_by_step")
    )
    alone = [int((a & ~b).sum()) for a, b in zip(first, second, strict=True)]
    assert full.only_first == sum(alone)


def test_the_settings_of_the_runs_are_named(made):
    rows = dict(csv.reader((made[1] / "settings.csv").read_text().splitlines()))
    assert rows["TASK"] == "delivery" and rows["TRAIN_STEPS"] == "40" and rows["BATCH_SIZE"] == "8"
    assert rows["SEED"] == "0, 1, 2" and rows["DATA_FRACTION"] == "0.25, 1"
    assert rows["label.weight"] == "label_only: 1.0; step_by_step: 0.5"
    assert rows["rationale.weight"] == "0.5"  # of the one arm that has it
    assert rows["parameters"] == "172864" and "train.dropout_rate" in rows
    assert "PACK" not in rows  # at its default, and not among the usual ones
    page = (made[1] / "report.html").read_text()
    assert "<td>TRAIN_STEPS</td><td>40</td>" in page


def test_ticks_and_legends_say_what_they_are(made):
    """Text in an SVG is drawn as paths, with the words in a comment before each line."""
    said = re.findall("<!-- (.*?) -->", (made[1] / "accuracy.svg").read_text())
    for words in ("25%", "375 labels", "100%", "1500 labels", "step_by_step, mean of 3 runs"):
        assert words in said
    assert "95% interval of a mean" in said
    assert "label_only, a run with one answer for all rows" in said
    learned = re.findall("<!-- (.*?) -->", (made[1] / "learning.svg").read_text())
    assert "step_by_step, all of the data, mean of 3 runs" in learned and "a single run" in learned


def test_cost_is_added_up_over_the_steps(made):
    (row, _) = csv.DictReader((made[1] / "cost.csv").read_text().splitlines())
    assert row["parameters"] == "172864"
    assert '<td class="n">172,864</td>' in (made[1] / "report.html").read_text()
    assert (row["steps"], row["seconds of steps"], row["TFLOP of steps"]) == ("40", "20.0", "40")


class Seen(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.scripts, self.addresses, self._in_script = [], [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._in_script = tag == "script"
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data")]

    def handle_data(self, data):
        if self._in_script:
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self._in_script = False


def test_the_page_is_whole_by_itself_and_shows_hostile_text_as_text(made):
    text = (made[1] / "report.html").read_text()
    page = Seen()
    page.feed(text)
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    assert {a.split(":")[0] for a in page.addresses} == {"data", "#how"}
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("article") == 500
    assert (
        text.count("since &lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;img") == 1000
    )  # of two arms
    for uri in (a for a in page.addresses if a.startswith("data:")):
        assert base64.b64decode(uri.partition(",")[2]).startswith(b"<?xml")


def test_pictures_and_tables_are_files_too(made):
    written, output = made
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in written.files)
    names = ("accuracy", "tests", "cost", "settings", "runs")
    assert {f"{n}.csv" for n in names} == {p.name for p in written.files if p.suffix == ".csv"}
    assert {p.suffix for p in written.files} == {".html", ".csv", ".svg", ".png"}
    assert (output / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    head, *rows = csv.reader((output / "accuracy.csv").read_text().splitlines())
    assert len(rows) == 4 and head[:5] == ["arm", "fraction", "labels", "runs", "accuracy"]
    assert ["step_by_step", "0.25", "375", "3", "0.7300"] in [row[:5] for row in rows]


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("\t=1", "'\t=1"),
        ("a\r=1", r"a\r=1"),
        ("-0.5", "-0.5"),
        ("+0.0312", "+0.0312"),
        ("-1e-05", "-1e-05"),
        ("<0.0001", "<0.0001"),
        ("", ""),
        ("step-by-step", "step-by-step"),
    ],
    ids=repr,
)
def test_no_cell_is_a_formula_to_a_spreadsheet_and_numbers_stay_numbers(cell, written):
    text = Table("t", ("arm", "=head"), [(cell, "x")], ()).csv()
    assert list(csv.reader(io.StringIO(text, newline=""))) == [["arm", "'=head"], [written, "x"]]


def test_the_same_runs_give_the_same_bytes(made, folder, tmp_path, delivery_data_dir):
    again = tmp_path / "again"
    report([folder], output=again, data_dir=delivery_data_dir)
    first, second = (
        {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".png"}
        for folder in (made[1], again)
    )
    assert "report.html" in first and second == first


TEACHER = {"consistent": 30, "inconsistent": 10, "names_no_label": 0}
EXPLAINED = {"rows": 500, "references": 500, "rouge_l": 0.5, "chrf": 40.0, "mean_words": 4.0}
EXPLAINED |= {"empty": 50, "unfinished": 5, "consistent": 240, "inconsistent": 260}
EXPLAINED |= {"names_no_label": 0, "teacher": TEACHER, "disagreements": []}


@pytest.fixture(scope="module")
def explained(tmp_path_factory, make_run, delivery_data_dir):
    """The report on two seeds that say `smooth` whatever the label, beside one run without rationales."""
    folder = tmp_path_factory.mktemp("explained")
    right = [True] * 400 + [False] * 100
    make_run(folder / "runs/a", "label_only", 1.0, 0, right)
    for seed, change in enumerate(({}, {"rouge_l": 0.7, "chrf": 42.0, "empty": 0})):
        told = {"rationale": "So it is smooth.", "figures": EXPLAINED | change}
        answers = make_run(folder / f"runs/{seed}", "step_by_step", 1.0, seed, right, **told)
    done = report([folder / "runs"], output=folder / "out", data_dir=delivery_data_dir)
    return done, folder / "out", answers


def test_rationales_are_a_table_of_means_with_the_teachers_below(explained):
    done, output, _ = explained
    assert output / "rationales.csv" in done.files
    head, first, teacher = csv.reader((output / "rationales.csv").read_text().splitlines())
    assert dict(zip(head, first, strict=True)) == {
        "arm": "step_by_step",
        "fraction": "1",
        "runs": "2",
        "ROUGE-L": "0.6000",
        "chrF": "41.0",
        "token accuracy": "0.7500",
        "words": "4.0",
        "empty": "0.0500",
        "unfinished": "0.0100",
        "consistent": "0.4800",
        "inconsistent": "0.5200",
        "names no label": "0.0000",
    }
    assert teacher == ["teacher", *[""] * 8, "0.7500", "0.2500", "0.0000"]
    assert "<h3>Rationales</h3>" in (output / "report.html").read_text()


def test_without_figures_there_is_no_such_table(made):
    assert not (made[1] / "rationales.csv").exists()
    assert "<h3>Rationales</h3>" not in (made[1] / "report.html").read_text()


def test_what_was_not_measured_is_left_empty(tmp_path, make_run, delivery_data_dir):
    unknown = ("rouge_l", "chrf", "consistent", "inconsistent", "names_no_label", "teacher")
    told = {"rationale": "So.", "figures": EXPLAINED | dict.fromkeys(unknown)}
    make_run(tmp_path / "run", "step_by_step", 1.0, 0, [True] * 500, **told)
    runs, _ = read_runs([tmp_path / "run"], split="test", data_dir=delivery_data_dir)
    (row,) = rationale_table(compare(runs)[0][0], "name").rows
    assert (row[3], row[4], row[5], *row[-3:]) == ("", "", "0.7500", "", "", "")


def test_rows_whose_label_and_reason_disagree_are_marked(explained):
    _, output, answers = explained
    page = (output / "report.html").read_text()
    disagree = answers.count("trouble")
    assert 0 < disagree < 500
    assert page.count("label and reason disagree: the reason names smooth") == disagree
    assert page.count('data-verdict="-1"') == disagree
    assert page.count('data-verdict="-0"') == 500 - disagree
    assert page.count('<select name="verdict"') == 1  # label_only gives no reasons
    assert "step_by_step: label and reason" in page


def test_labels_are_read_from_the_answers_with_rationales_where_these_alone_are_there(
    tmp_path, make_run, delivery_data_dir
):
    right = [True] * 400 + [False] * 100
    make_run(tmp_path / "run", "step_by_step", 1.0, 0, right, rationale="So.")
    (tmp_path / "run/predictions/delivery-test-40.jsonl").unlink()
    ((run,), _) = read_runs([tmp_path / "run"], split="test", data_dir=delivery_data_dir)
    assert run.accuracy == 0.8 and run.verdict(0) == (None, "names_no_label")


def test_runs_of_other_settings_are_compared_apart(tmp_path, make_run, delivery_data_dir):
    right = [True] * 400 + [False] * 100
    for rate in (0.001, 0.002):
        for arm in ("label_only", "step_by_step"):
            make_run(tmp_path / f"runs/{arm}/{rate}", arm, 1.0, 0, right, learning_rate=rate)
    done = report([tmp_path / "runs"], output=tmp_path / "out", data_dir=delivery_data_dir)
    names = [f"delivery, LEARNING_RATE={rate}" for rate in (0.001, 0.002)]
    assert [c.name for c in done.comparisons] == names
    assert all(c.arms == ["label_only", "step_by_step"] for c in done.comparisons)
    assert (tmp_path / "out/accuracy-delivery-LEARNING-RATE-0.001.csv").is_file()


def test_a_setting_that_an_older_version_did_not_have_is_no_difference(
    tmp_path, make_run, delivery_data_dir
):
    for seed in (0, 1):
        make_run(tmp_path / f"runs/{seed}", "label_only", 1.0, seed, [True] * 500)
    path = tmp_path / "runs/0/run.json"
    described = json.loads(path.read_text())
    for name in (
        "init_rules",
        "best_metric",
        "loss_mean",
    ):  # whose defaults are None, None, "token"
        del described["config"][name]
    path.write_text(json.dumps(described))
    done = report([tmp_path / "runs"], output=tmp_path / "out", data_dir=delivery_data_dir)
    assert [(c.name, len(c.runs)) for c in done.comparisons] == [("delivery", 2)]


def test_the_baseline_is_an_arm_of_labels_alone(tmp_path, make_sweep, delivery_data_dir):
    folder = make_sweep(tmp_path / "s", {("step_by_step", 1.0): [0.9], ("label_only", 1.0): [0.7]})
    cells = json.loads((folder / "sweep.json").read_text())
    for entry in cells["cells"].values():
        entry["arm"] = f"my_{entry['arm']}"
    (folder / "sweep.json").write_text(json.dumps(cells))
    done = report([folder], output=tmp_path / "a", data_dir=delivery_data_dir)
    assert done.comparisons[0].arms == ["my_label_only", "my_step_by_step"]
    asked = {"output": tmp_path / "b", "baseline": "my_step_by_step"}
    done = report([folder], data_dir=delivery_data_dir, **asked)
    assert done.comparisons[0].arms == ["my_step_by_step", "my_label_only"]


def test_what_an_arm_alone_sets_is_the_arms(tmp_path, make_run, delivery_data_dir):
    right = [True] * 400 + [False] * 100
    make_run(tmp_path / "a", "label_only", 1.0, 0, right, learning_rate=0.001)
    make_run(tmp_path / "b", "step_by_step", 1.0, 0, right, learning_rate=0.002)
    done = report(
        [tmp_path / "a", tmp_path / "b"], output=tmp_path / "out", data_dir=delivery_data_dir
    )
    assert [c.arms for c in done.comparisons] == [["label_only", "step_by_step"]]


def test_runs_that_cannot_be_compared_are_left_out_and_named(tmp_path, make_run, delivery_data_dir):
    right = [True] * 400 + [False] * 100
    runs = {name: tmp_path / "runs" / name for name in ("a", "b", "c", "d", "e", "f")}
    for workdir in runs.values():
        make_run(workdir, "label_only", 1.0, 0, right)
    (runs["c"] / "predictions/delivery-test-40.jsonl").unlink()
    file = runs["d"] / "predictions/delivery-test-40.jsonl"
    file.write_text(file.read_text().partition("\n")[2])
    (runs["e"] / "evaluation/test.json").write_text('{"step": 40, "dataset": "older"}')
    described = json.loads((runs["f"] / "run.json").read_text())
    described["config"]["task"] = "a_mixture"
    (runs["f"] / "run.json").write_text(json.dumps(described))
    mixture = runs["f"] / "evaluation/test.json"
    mixture.write_text('{"rows": 9, "tasks": {"a": {"accuracy": 1.0}}}')
    done = report([tmp_path / "runs"], output=tmp_path / "out", data_dir=delivery_data_dir)
    why = {pathlib.Path(e["run"]).name: e["why"] for e in done.left_out}
    assert list(why) == ["c", "d", "e", "f", "b"]
    assert "several tasks" in why["f"] and str(mixture) in why["f"]
    assert "stepdistill evaluate" in why["c"] and "does not have the rows of" in why["d"]
    assert "prepared again" in why["e"] and f"settings as {runs['a']}" in why["b"]
    assert all(text in (tmp_path / "out/report.html").read_text() for text in why)


@pytest.mark.parametrize("content", ["[]", "null", '{"cells": [1]}', '{"cells": {"run": null}}'])
def test_a_damaged_file_of_a_sweep_is_one_line(tmp_path, make_run, delivery_data_dir, content):
    make_run(tmp_path / "run", "label_only", 1.0, 0, [True] * 500)
    path = tmp_path / "sweep.json"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(f"{path}: ")):
        read_runs([tmp_path], split="test", data_dir=delivery_data_dir)


@pytest.mark.parametrize("content", ["[]", "null"])
def test_a_damaged_evaluation_is_one_line(tmp_path, make_run, delivery_data_dir, content):
    make_run(tmp_path / "run", "label_only", 1.0, 0, [True] * 500)
    path = tmp_path / "run" / "evaluation" / "test.json"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(f"{path}: ")):
        read_runs([tmp_path / "run"], split="test", data_dir=delivery_data_dir)


def test_metrics_after_an_unreadable_line_count_and_the_line_is_named(
    tmp_path, make_run, delivery_data_dir, capsys
):
    make_run(tmp_path / "run", "label_only", 1.0, 0, [True] * 500)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"\xff\n", *lines[3:]]))
    (run,), _ = read_runs([tmp_path / "run"], split="test", data_dir=delivery_data_dir)
    assert list(run.lines) == [json.loads(line) for line in lines]
    assert f"warning: {path}:4: not UTF-8" in capsys.readouterr().err


def test_without_the_dataset_there_is_the_accuracy_that_was_kept(tmp_path, make_run):
    make_run(tmp_path / "run", "label_only", 1.0, 0, [True] * 500)
    kept = {"step": 40, "accuracy": 0.625, "rows": 500, "collapsed": False}
    (tmp_path / "run/evaluation/test.json").write_text(json.dumps(kept))
    done = report([tmp_path / "run"], output=tmp_path / "out", data_dir=tmp_path / "nothing")
    (point,) = done.comparisons[0].points
    assert point.accuracy == 0.625 and point.low is None
    assert not done.comparisons[0].tests
    assert "there is only one arm" in done.page.read_text()


def test_the_teacher_is_right_in_a_share_of_all_rows():
    labels = [("yes", "yes"), ("no", "yes"), ("yes", ""), ("no", "no")]
    rows = [Example(str(i), "q", gold, llm_label=llm) for i, (gold, llm) in enumerate(labels)]
    assert Gold("k", rows, "text_match", "f").teacher == 0.5
    assert Gold("k", [Example("1", "q", "yes")], "text_match", "f").teacher is None


def test_an_arm_is_known_by_its_objectives_whatever_they_weigh():
    label = {"name": "label", "input_template": "predict: {input}", "target_template": "{label}"}
    assert arm_of([label | {"weight": 7.0}]) == "label_only"
    assert arm_of([label, {"name": "hint", "input_template": "", "target_template": ""}]) == (
        "label+hint"
    )


@pytest.mark.parametrize(
    ("paths", "options", "part"),
    [
        (["nowhere"], {}, "nowhere: no such folder"),
        (["empty"], {}, "the folder is neither a run nor a sweep"),
        (["run"], {"baseline": "label_olny"}, "did you mean"),
        (["run"], {"split": "validation"}, "no other run has answers on validation"),
        (["run"], {"examples": -1}, "`examples`"),
        (["gs://bucket/run"], {}, "must be a path on this machine"),
    ],
)
def test_what_cannot_be_reported_is_said(
    tmp_path, make_run, delivery_data_dir, monkeypatch, paths, options, part
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "run", "label_only", 1.0, 0, [True] * 500)
    with pytest.raises(InputError, match=part):
        report(paths, output="out", data_dir=delivery_data_dir, **options)
    assert not (tmp_path / "out").exists()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
ASKS = """<script>
const form = document.querySelector("form"), [first, second] = form.querySelectorAll("select");
[first.value, second.value] = ["0", "1"];
form.dispatchEvent(new Event("input", {bubbles: true}));
</script>"""


ASKS_VERDICT = """<script>
const form = document.querySelector("form");
form.elements.verdict.value = "1";
form.dispatchEvent(new Event("input", {bubbles: true}));
</script>"""


@pytest.fixture
def browse(tmp_path):
    """What chromium makes of a page, with a script of ours at its end."""

    def browse(page, *flags, asks=""):
        if asks:
            text = re.sub("<meta http-equiv=.*?>", "", page.read_text())  # it forbids our script
            page = tmp_path / "asking.html"
            page.write_text(text.replace("</body>", f"{asks}</body>"))
        command = [CHROMIUM, "--headless", *QUIET.split(), "--disable-sync"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    return browse


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH")
def test_a_browser_shows_where_label_and_reason_disagree(explained, browse):
    shown = browse(explained[0].page, "--dump-dom", asks=ASKS_VERDICT)
    disagree = explained[2].count("trouble")
    assert f"<output>{disagree} shown</output>" in shown
    assert len(re.findall(r"<article[^>]* hidden", shown)) == 500 - disagree


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH")
def test_a_browser_filters_the_examples(made, browse, tmp_path):
    (comparison,), page = made[0].comparisons, made[0].page
    # the page's own script runs under the page's own policy
    assert "<output>500 shown</output>" in browse(page, "--dump-dom")
    shown = browse(page, "--dump-dom", asks=ASKS)
    first, second = (comparison.of_arm(a)[-1].runs[0].right for a in comparison.arms)
    wanted = int((~first & second).sum())
    assert f"<output>{wanted} shown</output>" in shown
    assert len(re.findall(r"<article[^>]* hidden", shown)) == 500 - wanted
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", "--window-size=1100,1600")
    assert picture.stat().st_size > 50_000


def test_a_report_replaces_an_earlier_one_and_no_other_file(
    made, folder, delivery_data_dir, tmp_path
):
    again = {"output": tmp_path / "again", "data_dir": delivery_data_dir}
    shutil.copytree(made[1], again["output"])
    (again["output"] / "notes.txt").write_text("mine")
    report([folder], **again)
    names = {p.name for p in made[1].iterdir()} | {"notes.txt"}
    assert {p.name for p in again["output"].iterdir()} == names
    for name in ("report.html", "accuracy.csv"):
        output = tmp_path / name
        output.mkdir()
        (output / name).write_text("mine")
        with pytest.raises(InputError, match=f"{name}: exists and was not written by `report`"):
            report([folder], output=output, data_dir=delivery_data_dir)
        assert [p.read_text() for p in output.iterdir()] == ["mine"]
