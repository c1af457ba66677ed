"""`stepdistill annotate`: rationales and labels of a large model for a file of questions."""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

from stepdistill_jax.commands.terminal import console, say
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import check_file
from stepdistill_jax.runtime.progress import log, translated

# the fields of `teacher.Settings` that are a text or a number, which has the defaults
FLAGS: dict[str, dict[str, str | tuple[type, str]]] = {
    "who is asked": {
        "--model M": "the server's name of the model",
        "--base-url URL": "OpenAI-compatible server, e.g. http://localhost:8000/v1 (default:"
        " $OPENAI_BASE_URL, else OpenAI)",
        "--api-key-env NAME": "environment variable with the key (default: OPENAI_API_KEY); it is"
        " written nowhere",
        "--teacher hf:DIR": "a local transformers directory instead of a server",
    },
    "what is asked": {
        "--task NAME": "the prompt: cqa, svamp, esnli, anli, or generic for your own rows",
        "--exemplars FILE.jsonl": 'a handful of rows {"input", "rationale", "label"} that show how to'
        " answer",
        "--instructions TEXT": "what to do, before the exemplars; @FILE reads it from a file",
        "--choices A,B,...": "allowed answers of rows that name none (a JSON list where one holds a"
        " comma)",
    },
    "how it answers": {
        "--samples K": (
            int,
            "answers per row; the label is voted for, and the share is the weight (default: 1)",
        ),
        "--temperature T": "of sampling (default: 0, with several samples 0.7); `default` sends none",
        "--max-tokens N": (int, "most tokens of an answer, reasoning included (default: 1024)"),
        "--reasoning-effort E": "of reasoning models: low, medium, high",
        "--retries N": (
            int,
            "how often an answer that cannot be read is asked for again, once the run has had one"
            " that can (default: 1)",
        ),
        "--max-truncated SHARE": (
            float,
            "stop when more answers than this are cut at --max-tokens or cannot be used for any"
            " other reason, after 20 answers (default: 0.05)",
        ),
    },
    "how much": {
        "--price-input P": (float, "money per million tokens of prompts"),
        "--price-output P": (float, "money per million tokens of answers"),
        "--max-cost C": (float, "most money of this run"),
        "--max-tokens-total N": (int, "most tokens of this run"),
        "--concurrency N": (int, "requests at once; of a local teacher, its batch (default: 16)"),
        "--attempts N": (
            int,
            "how often a request is sent before a server's failure is final (default: 8)",
        ),
        "--timeout SECS": (float, "of a whole request (default: 300)"),
        "--cache FILE": "SQLite file of answers (default: teacher_cache.sqlite beside the output)",
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `annotate`; each is a field of `teacher.Settings`."""
    parser.add_argument(
        "input",
        metavar="INPUT.jsonl",
        type=pathlib.Path,
        help='rows {"input": ...}, and if known "id", "label", "choices"',
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT.jsonl",
        type=pathlib.Path,
        help="the same rows with rationales, for `prepare jsonl`; a stopped run goes on",
    )
    groups = {title: parser.add_argument_group(title) for title in FLAGS}
    for title, flags in FLAGS.items():
        for spec, what in flags.items():
            flag, metavar = spec.split()
            kind, text = (str, what) if isinstance(what, str) else what
            groups[title].add_argument(
                flag,
                type=kind,
                metavar=metavar,
                default=argparse.SUPPRESS,
                required=flag == "--task",
                help=text,
            )
    groups["what is asked"].add_argument(
        "--label-given",
        action="store_true",
        help="tell the gold label and ask for its rationale, which is marked as such",
    )
    groups["how it answers"].add_argument(
        "--parameter",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="one more field of the request, e.g. top_p=0.9 (repeatable)",
    )
    groups["how much"].add_argument(
        "--dry-run",
        action="store_true",
        help="show the first prompt and the estimated cost of the file; send nothing",
    )
    groups["how much"].add_argument(
        "--batch-file",
        nargs="+",
        default=(),
        metavar=("write|read", "FILE"),
        help="write requests in OpenAI's batch format, or read results into the cache",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `teacher.annotate` and prints its summary."""
    from stepdistill_jax.teacher import Settings, annotate

    fields = {field.name for field in dataclasses.fields(Settings)}
    settings = {name: value for name, value in vars(args).items() if name in fields}
    readers = {
        "instructions": _instructions,
        "choices": _choices,
        "temperature": _temperature,
        "parameters": _parameters,
    }
    for name in settings.keys() & readers:
        settings[name] = readers[name](settings[name])
    instructions = getattr(args, "instructions", "")
    result = annotate(
        args.input,
        args.output,
        read=[instructions[1:]] if instructions.startswith("@") else (),
        **settings,
    )
    if args.dry_run:
        _show_dry_run(result)
    elif args.batch_file:
        _show_batch(args.batch_file[0], result)
    else:
        if result["stopped"]:
            result["stopped"] = translated(result["stopped"])
        _show(args.output, result)
    return result


def _instructions(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        check_file(text[1:])
        return pathlib.Path(text[1:]).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"--instructions {text}: cannot be read ({error})") from None


def _choices(text: str) -> tuple[str, ...]:
    if not text:
        return ()
    parts: Any = text.split(",")
    if text.lstrip().startswith("["):
        try:
            parts = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--choices: broken JSON ({error})") from None
    found = tuple(part.strip() for part in parts if isinstance(part, str))
    if len(found) != len(parts) or not all(found):
        raise InputError(f"--choices: texts are wanted, none of them empty, got {text!r}")
    return found


def _temperature(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _parameters(pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError(f"--parameter: NAME=JSON is wanted, got {pair!r}")
        try:
            found[name] = json.loads(value)
        except RecursionError:
            raise InputError(f"--parameter {name}: JSON that cannot be read") from None
        except ValueError:
            found[name] = value  # a bare word is a text
    return found


def _show_dry_run(result: dict[str, Any]) -> None:
    from stepdistill_jax.teacher.annotate import in_words

    say(result["prompt"])
    say("-" * 20)
    parameters = json.dumps(result["parameters"], sort_keys=True)
    say(f"one message of the user, about {result['first_prompt_tokens']} tokens; {parameters}")
    say(f"{in_words(result)}; nothing was sent")
    if result["cost"] is None:
        say("--price-input and --price-output (per million tokens) tell what that costs")


def _show_batch(action: str, result: dict[str, Any]) -> None:
    if action == "write":
        files = ", ".join(result["files"]) or "no file: every answer is in the cache"
        say(f"{result['rows']} rows, {result['requests']} requests: {files}")
        return
    say(
        f"{result['results']} results: {result['kept']} kept, {result['failed']} failed,"
        f" {result['other']} of other rows or already kept"
    )
    for kind, count in result["defects"].items():
        say(f"{kind}: {count}")


def _show(output: pathlib.Path, result: dict[str, Any]) -> None:
    if result["rows"]:
        console(highlight=False).print(_table(result))
    cost = "" if result["cost"] is None else f", cost {result['cost']:.4g}"
    tokens = f"{result['prompt_tokens']:,} + {result['completion_tokens']:,} tokens"
    used = f"{result['requests']} answers asked for, {tokens}{cost}"
    if result["stopped"]:
        log(
            f"stepdistill: stopped: {' '.join(result['stopped'].split())}; {result['rows']} rows"
            f" are in {output}.partial; the same command goes on: it pays for no whole answer twice,"
            " and asks again for those that could not be read"
        )
        say(used)
    else:
        say(f"{output}: {result['rows']} rows, {used}")


def _table(result: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from stepdistill_jax.teacher.answers import KINDS

    rows = result["rows"]
    table = Table(title=f"{rows} rows", title_justify="left", title_style="bold")
    for name, where in (("", "left"), ("answers", "right"), ("share", "right"), ("what", "left")):
        table.add_column(name, justify=where)  # type: ignore[arg-type]

    def line(name: str, count: int, share: float | None, comment: str = "") -> None:
        table.add_row(name, str(count), "" if share is None else f"{share:.2%}", comment)

    count = result["with_rationale"]
    line("rows with a rationale", count, count / rows)
    if "teacher_accuracy" in result:
        share = result["teacher_accuracy"]
        labelled = result["with_label"]
        comment = f"of {labelled} rows with a gold label; unread answers count as wrong"
        line("teacher_accuracy", round(share * labelled), share, comment)
    line("asked again", result["asked_again"], None, "the first answer could not be read")
    table.add_section()
    for kind, count in result["defects"].items():
        first = f"first: {result['first_defects'][kind]}"
        line(kind, count, count / rows, escape(f"{KINDS.get(kind, '')} ({first})"))
    return table
