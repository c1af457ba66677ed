"""OpenAI's batch files: requests out, results in, and then a run that asks nothing."""

import json

import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.teacher import batch
from stepdistill_jax.teacher.stub_server import by_rule


def questions(count):
    return [{"input": f"Is parcel {i} late?", "label": "yes"} for i in range(count)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def result_of(request, text=None, finish_reason="stop", status=200):
    """A line of results as OpenAI documents it."""
    text = by_rule(request["body"]).text if text is None else text
    choice = {"index": 0, "message": {"content": text}, "finish_reason": finish_reason}
    body = {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 6}}
    if status != 200:
        body = {"error": {"message": "rate limit"}}
    return {
        "id": "batch_req_1",
        "custom_id": request["custom_id"],
        "response": {"status_code": status, "request_id": "r", "body": body},
        "error": None,
    }


def test_a_batch_that_came_back_whole_leaves_nothing_to_ask(annotating):
    path = annotating.folder / "requests.jsonl"
    written, _ = annotating(questions(5), samples=2, batch_file=("write", path))
    requests = lines(path)
    assert (written["requests"], len(requests)) == (10, 10)
    assert len({r["custom_id"] for r in requests}) == 10
    assert {(r["method"], r["url"]) for r in requests} == {("POST", "/v1/chat/completions")}
    assert requests[0]["body"]["model"] == "stub"
    assert requests[0]["body"]["messages"][0]["content"].endswith("- no\nA:")
    results = annotating.folder / "results.jsonl"
    shuffled = requests[::-1]
    results.write_text("".join(json.dumps(result_of(r)) + "\n" for r in shuffled))
    read, _ = annotating(questions(5), samples=2, batch_file=("read", results))
    assert (read["results"], read["kept"], read["failed"], read["other"]) == (10, 10, 0, 0)
    result, out = annotating(questions(5), samples=2)
    assert annotating.server.requests == 0
    assert len(out) == result["with_rationale"] == 5
    written, _ = annotating(questions(7), samples=2, batch_file=("write", path))
    assert written["requests"] == 4  # only what is not in the cache


def test_results_that_cannot_be_used_are_counted_and_asked_for_later(annotating):
    path, results = annotating.folder / "r.jsonl", annotating.folder / "results.jsonl"
    annotating(questions(5), batch_file=("write", path))
    good, vague, cut, failed, late = lines(path)
    rows = [
        result_of(good),
        result_of(vague, "I do not know."),
        result_of(cut, finish_reason="length"),
        result_of(failed, status=429),
        {"custom_id": late["custom_id"], "response": None, "error": {"code": "batch_expired"}},
        result_of(good) | {"custom_id": "0" * 64},
    ]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read, _ = annotating(questions(5), batch_file=("read", results))
    assert (read["results"], read["kept"], read["failed"], read["other"]) == (6, 1, 2, 1)
    assert read["defects"] == {"no_answer": 1, "truncated": 1}
    result, _ = annotating(questions(5))
    assert annotating.server.requests == 4
    assert result["with_rationale"] == 5


def test_a_job_that_one_file_does_not_hold_is_cut(annotating, monkeypatch):
    monkeypatch.setattr(batch, "MOST_REQUESTS", 4)
    path = annotating.folder / "requests.jsonl"
    written, _ = annotating(questions(10), batch_file=("write", path))
    assert [len(lines(annotating.folder / n)) for n in map(str, written["files"])] == [4, 4, 2]
    assert [str(p).rpartition("/")[2] for p in written["files"]] == [
        "requests.jsonl",
        "requests-2.jsonl",
        "requests-3.jsonl",
    ]
    monkeypatch.setattr(batch, "MOST_REQUESTS", 100)
    size = len((annotating.folder / "requests.jsonl").read_bytes())
    monkeypatch.setattr(batch, "MOST_BYTES", size)
    annotating(questions(10), batch_file=("write", path))
    assert all(p.stat().st_size <= size for p in annotating.folder.glob("requests*.jsonl"))


def test_a_file_that_holds_no_results_is_named_by_line(annotating):
    path = annotating.folder / "r.jsonl"
    annotating(questions(2), batch_file=("write", path))
    with pytest.raises(InputError, match=r"r.jsonl:1: .*custom_id"):
        annotating(questions(2), batch_file=("read", path))


def test_requests_are_never_written_over_an_input_or_another_file(annotating, monkeypatch):
    monkeypatch.setattr(batch, "MOST_REQUESTS", 2)
    path = annotating.folder / "in.jsonl"
    with pytest.raises(InputError, match=r"in\.jsonl: it is the input"):
        annotating(questions(3), batch_file=("write", path))
    assert len(lines(path)) == 3
    theirs = annotating.folder / "in-2.jsonl"
    theirs.write_text("my notes\n")
    with pytest.raises(InputError, match=r"in-2\.jsonl: exists and was not written by `annotate"):
        annotating(questions(3), batch_file=("write", annotating.folder / "in-2.jsonl"))
    exemplars = annotating.write(
        [row | {"rationale": "Late."} for row in questions(2)], "requests-2.jsonl"
    )
    with pytest.raises(InputError, match=r"requests-2\.jsonl: it is the input"):
        annotating(
            questions(3),
            exemplars=exemplars,
            batch_file=("write", annotating.folder / "requests.jsonl"),
        )
    assert theirs.read_text() == "my notes\n" and len(lines(exemplars)) == 2
