"""`annotate` against a real HTTP server that answers well, badly, late or not at all."""

import asyncio
import hashlib
import json
import os
import signal
import tracemalloc

import pytest

from stepdistill_jax.data.corpora import jsonl
from stepdistill_jax.data.example import Example
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.progress import progress
from stepdistill_jax.teacher import annotate
from stepdistill_jax.teacher.answers import Answer
from stepdistill_jax.teacher.budget import Budget
from stepdistill_jax.teacher.cache import AnswerCache
from stepdistill_jax.teacher.prompting import Estimate, load_prompting, unanswered
from stepdistill_jax.teacher.questions import check_questions
from stepdistill_jax.teacher.run import Run
from stepdistill_jax.teacher.settings import Settings
from stepdistill_jax.teacher.stub_server import Reply, StubServer, by_rule

GOOD = Reply("Because. So the answer is yes.")


def questions(count, **fields):
    return [{"input": f"Is parcel {i} late?", "label": "yes"} | fields for i in range(count)]


def test_rows_come_out_in_order_whatever_the_order_of_the_answers(annotating):
    def reply(request):
        number = int(request["messages"][0]["content"].split("parcel ")[-1].split()[0])
        return Reply("Hm. So the answer is no.", delay=0.05 if number % 3 == 0 else 0.0)

    rows = questions(30)
    rows[4] |= {"id": "mine", "weight": 2.0}
    result, out = annotating(rows, reply)
    assert [row["input"] for row in out] == [row["input"] for row in rows]
    assert [row["id"] for row in out[:6]] == ["1", "2", "3", "4", "mine", "6"]
    assert out[4]["weight"] == 2.0
    assert {(r["label"], r["llm_label"], r["rationale"]) for r in out} == {("yes", "no", "Hm.")}
    assert (result["rows"], result["with_rationale"], result["requests"]) == (30, 30, 30)
    assert result["teacher_accuracy"] == 0.0
    assert result["stopped"] is None
    assert annotating.defects == []


def test_the_output_says_where_each_rationale_is_from(annotating):
    _, out = annotating(questions(1), lambda _: Reply(GOOD.text, tokens=(90, 12)), temperature=0.5)
    provenance = out[0]["provenance"]
    (answer,) = provenance["answers"]
    assert provenance["model"] == out[0]["rationales"][0]["source"] == "stub"
    assert answer["text"] == GOOD.text
    assert (answer["finish_reason"], answer["time"][:2]) == ("stop", "20")
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (90, 12)
    assert answer["parameters"] == {"temperature": 0.5, "max_tokens": 1024}


def test_the_prompt_of_a_dry_run_is_the_one_that_is_sent(annotating):
    sent = []

    def reply(request):
        sent.append(request)
        return GOOD

    shown, _ = annotating(questions(2), reply, dry_run=True)
    assert sent == []
    assert not list(annotating.folder.glob("*.sqlite*"))
    _, out = annotating(questions(2), reply, concurrency=1)
    assert sent[0]["messages"] == [{"role": "user", "content": shown["prompt"]}]
    assert {k: v for k, v in sent[0].items() if k not in ("messages", "model")} == shown[
        "parameters"
    ]
    digest = hashlib.sha256(shown["prompt"].encode()).hexdigest()
    assert out[0]["provenance"]["prompt_sha256"] == digest


def test_a_dry_run_prices_what_is_not_in_the_cache(annotating):
    annotating(questions(3))
    prices = {"price_input": 1.0, "price_output": 10.0, "max_tokens": 100}
    shown, _ = annotating(questions(5), dry_run=True, **prices)
    assert (shown["rows"], shown["answers"]) == (5, 2)
    assert shown["most_completion_tokens"] == 200
    tokens = 2 * len(shown["prompt"]) / 4
    assert shown["prompt_tokens"] == pytest.approx(tokens, abs=2)
    assert shown["most_cost"] == pytest.approx(shown["prompt_tokens"] / 1e6 + 200 * 10 / 1e6)


def test_a_second_run_asks_nothing_and_writes_the_same_bytes(annotating):
    annotating(questions(20))
    first = annotating.output.read_bytes()
    result, _ = annotating(questions(20))
    assert annotating.server.requests == 0
    assert result["to_ask"] == 0
    assert annotating.output.read_bytes() == first


def test_a_file_that_is_all_in_the_cache_needs_no_key(annotating, monkeypatch):
    annotating(questions(2))
    first = annotating.output.read_bytes()
    annotating.output.unlink()
    monkeypatch.delenv("OPENAI_API_KEY")
    source = annotating.write(questions(2))
    choices = ("yes", "no")
    result = annotate(source, annotating.output, task="generic", choices=choices, model="stub")
    assert (result["to_ask"], result["requests"]) == (0, 0)
    assert annotating.output.read_bytes() == first


@pytest.mark.parametrize(
    ("changed", "asks"),
    [
        ({"temperature": 0.3}, True),
        ({"model": "other"}, True),
        ({"instructions": "Think."}, True),
        ({"parameters": {"top_p": 0.5}}, True),
        ({"max_tokens": 2048}, False),  # a whole answer is whole under a higher limit, too
        ({"concurrency": 1}, False),
    ],
    ids=str,
)
def test_answers_are_kept_by_prompt_model_and_parameters(annotating, changed, asks):
    annotating(questions(2))
    annotating(questions(2), **changed)
    assert annotating.server.requests == (2 if asks else 0)


def test_rows_of_one_prompt_are_asked_once(annotating):
    rows = [{"input": "Is it late?", "label": "yes"}] * 9
    _, out = annotating(rows, lambda _: Reply(GOOD.text, delay=0.05))
    assert annotating.server.requests == 1
    assert [row["rationale"] for row in out] == ["Because."] * 9


def test_an_answer_that_comes_after_the_first_look_is_not_paid_for_again(tmp_path):
    """There is no teacher: to ask would be an error."""

    async def go():
        prompting = load_prompting(Settings(task="generic", model="m"))
        cache = AnswerCache(tmp_path / "cache.sqlite")
        with progress(1, "test") as bar:
            run = Run(prompting, None, cache, Budget(), None, None, bar)
            prompt, task = run._begin(Example("1", "Is it late?"))
            cache.put(prompting.key(prompt, 0), "m", Answer(GOOD.text))
            return await task

    ((answer, reading),) = asyncio.run(go())
    assert (answer.text, reading.label) == (GOOD.text, "yes")


def test_a_label_that_the_row_had_is_kept_and_is_no_answer_of_this_teacher(annotating):
    rows = [*questions(1, llm_label="yes"), {"input": "Is it late?"}]
    vague = lambda request: Reply("Hm.") if "parcel" in str(request) else GOOD  # noqa: E731
    result, out = annotating(rows, vague)
    assert (out[0]["llm_label"], result["teacher_accuracy"]) == ("yes", 0.0)


def test_teacher_accuracy_is_of_the_rows_with_a_gold_label_read_or_not(annotating):
    """Four of ten rows have a label: two answers are right, one is wrong, one cannot be read."""
    rows = [{"input": f"Is parcel {i} late?"} for i in range(6)]
    rows += [{"input": f"Is letter {i} late?", "label": "yes"} for i in range(4)]

    def reply(request):
        prompt = request["messages"][0]["content"]
        if "letter 2 " in prompt:
            return Reply("Hm. So the answer is no.")
        return Reply("Hm.") if "letter 3 " in prompt else GOOD

    result, _ = annotating(rows, reply)
    assert (result["with_label"], result["teacher_accuracy"]) == (4, 0.5)


def test_failures_are_never_answers_of_a_later_run(annotating):
    """First run all but one malformed: the second asks again (a cache of failures would not)."""
    vague = Reply("I do not know.")
    reply = lambda request: GOOD if "parcel 6 " in str(request) else vague  # noqa: E731
    result, out = annotating(questions(7), reply)
    assert (result["with_rationale"], result["defects"]) == (1, {"no_answer": 6})
    assert all("rationale" not in row and "llm_label" not in row for row in out[:6])
    assert [d["row"] for d in annotating.defects] == [1, 2, 3, 4, 5, 6]
    assert annotating.defects[0]["text"] == "I do not know."
    result, out = annotating(questions(7))
    assert annotating.server.requests == 6
    assert result["with_rationale"] == 7


def test_an_answer_that_cannot_be_read_is_asked_for_again(annotating):
    seen = set()

    def reply(request):
        prompt = request["messages"][0]["content"]
        first = prompt not in seen
        seen.add(prompt)
        return Reply("**Reason** It is old.\n\n**Answer:** yes") if first else GOOD

    result, _ = annotating(questions(5), reply, retries=1)
    assert (result["with_rationale"], result["asked_again"], result["requests"]) == (5, 5, 10)
    assert result["defects"] == {}


@pytest.mark.parametrize(
    ("number", "error", "saved"),
    [
        (signal.SIGINT, KeyboardInterrupt, "the answers are saved; run the same command again"),
        (signal.SIGTERM, SystemExit, "SIGTERM: stopped; the answers are saved; start again"),
    ],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_stop_says_that_answers_are_saved_only_if_there_are_any(
    annotating, capsys, number, error, saved
):
    def reply(_):
        if annotating.server.requests == stop_at:
            os.kill(os.getpid(), number)
            return Reply(GOOD.text, delay=0.2)
        return GOOD

    for stop_at in (1, 3):
        with pytest.raises(error) as stopped:
            annotating(questions(6), reply, concurrency=1)
        told = f"{stopped.value} {capsys.readouterr().err}"
        assert ("saved" in told, saved in told) == (stop_at > 1, stop_at > 1)


def test_concurrency_is_used_and_never_exceeded(annotating):
    annotating(questions(60), lambda _: Reply(GOOD.text, delay=0.02), concurrency=7)
    assert annotating.server.most_at_once == 7


# ---- votes and given labels


def test_samples_are_voted_on(annotating):
    texts = iter(
        ["A. So the answer is no.", "B. So the answer is yes.", "C. So the answer is yes."]
    )
    _, out = annotating(questions(1), lambda _: Reply(next(texts)), samples=3, concurrency=1)
    (row,) = out
    assert (row["llm_label"], row["rationale"], row["weight"]) == ("yes", "B.", 0.666667)
    assert [r["text"] for r in row["rationales"]] == ["A.", "B.", "C."]
    assert [a["parameters"]["temperature"] for a in row["provenance"]["answers"]] == [0.7] * 3


def test_more_samples_of_an_old_run_are_only_those_that_are_missing(annotating):
    annotating(questions(4), samples=2)
    annotating(questions(4), samples=5)
    assert annotating.server.requests == 12


def test_the_rationale_of_a_given_label_is_marked(annotating):
    prompts = []

    def reply(request):
        prompts.append(request["messages"][0]["content"])
        return Reply("Hm. So the answer is yes.")

    rows = [*questions(1), {"input": "Is it early?", "label": "no"}]
    result, out = annotating(rows, reply, label_given=True, concurrency=1)
    assert prompts[0].endswith("Right answer: yes\nA:")
    assert out[0]["rationales"] == [{"text": "Hm.", "source": "stub (label given)", "label": "yes"}]
    assert out[0]["provenance"]["label_given"] is True
    assert "llm_label" not in out[0] and "teacher_accuracy" not in result
    assert result["defects"] == {"label_not_the_given_one": 1}
    assert "rationale" not in out[1]


# ---- caps and truncation


def test_a_cap_in_tokens_is_not_crossed_and_the_next_run_goes_on(annotating):
    def reply(_):
        return Reply(GOOD.text, delay=0.002, tokens=(60, 10))

    caps = {"max_tokens": 50, "max_tokens_total": 1500, "concurrency": 8}
    result, out = annotating(questions(40), reply, **caps)
    assert "`max_tokens_total=1500`" in result["stopped"]
    assert out is None  # the output has its name only when it is whole
    used = result["prompt_tokens"] + result["completion_tokens"]
    assert 1500 - 2 * 150 < used <= 1500
    first = annotating.server.requests
    assert used == 70 * first
    result, out = annotating(questions(40), reply)
    assert annotating.server.requests == 40 - first
    assert len(out) == 40
    assert not list(annotating.folder.glob("*.partial"))


def test_a_cap_in_money_is_not_crossed(annotating):
    prices = {"price_input": 1000.0, "price_output": 5000.0, "max_tokens": 20}
    reply = lambda _: Reply(GOOD.text, tokens=(60, 10))  # noqa: E731
    result, _ = annotating(questions(40), reply, max_cost=2.0, concurrency=4, **prices)
    assert "`max_cost=2`" in result["stopped"]
    assert 1.7 < result["cost"] <= 2.0
    assert result["cost"] == pytest.approx(result["requests"] * 0.11)


def test_too_many_truncated_answers_stop_the_run_early(annotating):
    def reply(request):
        cut = annotating.server.requests % 4 == 0
        return Reply("Well, first", "length") if cut else GOOD

    with pytest.raises(InputError, match=r"`max_tokens=64` .*`reasoning_effort`"):
        annotating(questions(400), reply, max_tokens=64, concurrency=4)
    assert 20 <= annotating.server.requests <= 32
    assert not annotating.output.exists()


def message(content, **fields):
    choice = {"message": {"content": content, **fields}, "finish_reason": "stop"}
    return Reply(body=json.dumps({"choices": [choice]}).encode())


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
UNUSABLE = {
    "null": message(None),
    "empty": message(""),
    "tool calls": message(None, tool_calls=[CALL]),
    "no answer found": message("I do not know."),
    "filtered": Reply("", "content_filter"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_answers_of_any_kind_stop_the_run_as_truncated_ones_do(annotating, name):
    """And are not paid for twice: only the first question is asked again."""
    with pytest.raises(InputError, match=r"20 of 20 .*`max_truncated=0.05`"):
        annotating(questions(400), lambda _: UNUSABLE[name], retries=1, concurrency=4)
    assert annotating.server.requests <= 1 + 20 + 4
    assert not annotating.output.exists()


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_small_file_without_any_usable_answer_is_no_success(annotating, name):
    result, out = annotating(questions(5), lambda _: UNUSABLE[name], retries=1)
    assert "none of the 5 rows got a usable answer" in result["stopped"]
    assert result["requests"] == annotating.server.requests <= 6
    assert out is None
    assert [d["row"] for d in annotating.defects_so_far] == [1, 2, 3, 4, 5]


def test_rows_that_stay_unusable_do_not_stop_a_run_whose_file_is_within_the_share(annotating):
    """The second run asks for 25 of 600 answers, and none of them can be used."""
    rows = questions(600)
    for row in rows[-25:]:
        row["input"] = row["input"].replace("parcel", "crate")
    vague = lambda request: Reply("Hm.") if "crate" in str(request) else GOOD  # noqa: E731
    annotating(rows, vague)
    result, out = annotating(rows, vague)
    assert (annotating.server.requests, result["defects"]) == (25, {"no_answer": 25})
    assert len(out) == 600


def test_one_request_is_sent_before_many(annotating):
    """A refusal, or a server that is no teacher, meets one request and not sixteen."""
    at_first = []

    def reply(_):
        at_first.append(annotating.server.most_at_once)
        return Reply(GOOD.text, delay=0.05)

    annotating(questions(40), reply)
    assert at_first[0] == 1
    assert annotating.server.most_at_once == 16
    with pytest.raises(InputError, match="HTTP 404"):
        annotating(questions(40), lambda _: Reply(status=404, body=b"{}"), temperature=0.5)
    assert annotating.server.requests == 1


def test_where_an_answer_cannot_be_kept_no_more_are_paid_for(annotating, monkeypatch):
    def full(*_):
        raise InputError("`cache`: database or disk is full")

    monkeypatch.setattr(AnswerCache, "put", full)
    with pytest.raises(InputError, match="disk is full"):
        annotating(questions(400), lambda _: GOOD, concurrency=4)
    assert annotating.server.requests <= 8  # of a window of 64 rows
    assert not annotating.output.exists()


def test_few_truncated_answers_are_defects_and_not_asked_for_again(annotating):
    def reply(request):
        return Reply("Well", "length") if "parcel 7 " in request["messages"][0]["content"] else GOOD

    result, out = annotating(questions(40), reply, retries=3)
    assert (result["truncated"], result["defects"]) == (1, {"truncated": 1})
    assert annotating.server.requests == 40
    assert "rationale" not in out[7]


# ---- rows


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        ([{"question": "x"}], {}, r"in.jsonl:1: no field 'input'"),
        ([{"input": "a"}], {"label_given": True}, r"in.jsonl:1: no field .label. .*`label_given`"),
        ([], {}, "no rows"),
        (questions(1), {"samples": 2, "temperature": 0.0}, "every sample would be the same"),
        (questions(1), {"max_cost": 1.0}, "`price_input`"),
        (questions(1), {"parameters": {"temperature": 1}}, "`temperature`"),
        (questions(1), {"teacher": "hf:x"}, "pass either"),
        (questions(1), {"concurrency": 0}, "`concurrency`"),
    ],
)
def test_bad_input_is_named_before_anything_is_paid_for(annotating, rows, settings, says):
    with pytest.raises(InputError, match=says):
        annotating(rows, **settings)
    assert annotating.server is None or annotating.server.requests == 0


def test_an_output_that_another_run_writes_is_refused(annotating):
    import fcntl

    with open(annotating.folder / "out.jsonl.partial", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing it"):
            annotating(questions(1))


def test_the_output_is_read_by_prepare_jsonl(annotating):
    annotating(questions(40), samples=3)
    reading = jsonl.read(annotating.output)
    rows = [row for split in reading.splits.values() for row in split]
    assert len(rows) == 40
    example = rows[0].example
    assert example.rationale and example.llm_label in ("yes", "no")
    assert len(example.rationales) == 3 and example.rationales[0].source == "stub"
    assert example.choices == ("yes", "no")
    assert {row.example.weight for row in rows} <= {1.0, 0.666667}


def test_counting_a_file_streams_it(annotating):
    """8 MB of rows are read, rendered and looked up in less than 2 MB."""
    source = annotating.write({"input": f"{i} " + "x" * 2000} for i in range(4000))
    assert source.stat().st_size > 8e6
    prompting = load_prompting(Settings(task="generic", model="m"))
    estimate = Estimate()
    tracemalloc.start()
    for _ in unanswered(prompting, check_questions(source, (), label_given=False), None, estimate):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert estimate.rows == estimate.answers == 4000
    assert peak < 2e6


@pytest.mark.parametrize(("concurrency", "window"), [(4, 64), (20, 80)])
def test_only_a_window_of_rows_is_under_way(annotating, concurrency, window):
    """However long the second row takes, no more than the window's others are asked before it."""
    others, refused = set(), []

    def reply(request):
        prompt = request["messages"][0]["content"]
        if "parcel 1 " not in prompt:
            others.add(prompt)
            return GOOD
        # once all of them are there, three times more: might one come that should not?
        if sum(count >= window for count in refused) < 3:
            refused.append(len(others))
            return Reply(status=503, body=b"{}", headers={"retry-after-ms": "40"})
        held.append(len(others))
        return GOOD

    held = []
    annotating(questions(200), reply, concurrency=concurrency, attempts=10_000)
    assert held == [window]  # the first row's, and those of the window but its head
    assert len(others) == 199


def test_tasks_of_the_paper_are_answered_by_their_own_rules(annotating):
    rows = [{"input": "Premise: A dog.\nHypothesis: An animal.", "label": "entailment"}]
    for task in ("esnli", "anli"):
        _, out = annotating(rows, by_rule, task=task, choices=())
        assert out[0]["llm_label"] in ("entailment", "neutral", "contradiction")
    rows = [{"input": "Where is salt?", "label": "sea", "choices": ["sky", "sea"]}]
    _, out = annotating(rows, by_rule, task="cqa", choices=())
    assert out[0]["llm_label"] in ("sky", "sea")
    rows = [{"input": "There are 3 cats and 4 dogs. How many?", "label": "( 3 + 4 )"}]
    result, out = annotating(rows, by_rule, task="svamp", choices=())
    assert out[0]["llm_label"] == "(3 + 4)"
    assert result["teacher_accuracy"] == 1.0


OUTPUTS = [
    f"{name}{partial}"
    for name in ("out.jsonl", "out.defects.jsonl")
    for partial in ("", ".partial")
]


@pytest.mark.parametrize("role", ["input", "exemplars", "read"])
@pytest.mark.parametrize("name", [*OUTPUTS, "teacher_cache.sqlite"])
def test_an_input_that_would_be_written_to_is_refused(annotating, role, name):
    path = annotating.write(questions(2, rationale="Late."), name)
    before = path.read_bytes()
    source = annotating.folder / "in.jsonl"
    if role == "input":
        source.symlink_to(name)
    settings = {} if role == "input" else {role: path if role == "exemplars" else [path]}
    source = source if role == "input" else annotating.write(questions(2))
    with pytest.raises(InputError, match=f"{name}: it is the input .*, which would be overwritten"):
        annotate(source, annotating.output, task="generic", model="m", **settings)
    assert path.read_bytes() == before
    assert {p.name for p in annotating.folder.iterdir()} == {"in.jsonl", name}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_file_that_annotate_did_not_write_is_left_alone(annotating, name):
    path = annotating.folder / name
    path.write_text("my notes\n")
    with pytest.raises(InputError, match=f"{name}: exists and was not written by `annotate`"):
        annotating(questions(1))
    assert path.read_text() == "my notes\n" and annotating.server.requests == 0


def test_a_full_disk_names_the_output(annotating, full_disk):
    rows = [row | {"input": row["input"] + "x" * 200_000} for row in questions(8)]
    source, settings = annotating.write(rows), {"task": "generic", "model": "stub"}
    named = pytest.raises(OSError, match=r"large: .*out\.jsonl\.partial'$")
    with StubServer(by_rule).serve() as server, full_disk(1_000_000), named:
        annotate(source, annotating.output, base_url=server.url, **settings)
