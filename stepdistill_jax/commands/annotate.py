"""`stepdistill annotate`: asks a large model for rationales and labels for the questions in a file."""

import argparse
import dataclasses
import json
import pathlib
import shlex
from typing import Any

from stepdistill_jax.commands.terminal import console, say
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import check_file
from stepdistill_jax.runtime.progress import log, translated

# the fields of `teacher.Settings` that are texts or numbers; their defaults are in that class
FLAGS: dict[str, dict[str, str | tuple[type, str]]] = {
    "teacher": {
        "--model M": "name of the model on the server",
        "--base-url URL": "URL of an OpenAI-compatible server, such as http://localhost:8000/v1"
        " (default: $OPENAI_BASE_URL, else OpenAI's server)",
        "--api-key-env NAME": "environment variable that contains the API key (default: OPENAI_API_KEY);"
        " the key is never stored",
        "--teacher hf:DIR": "local transformers directory to use instead of a server",
    },
    "prompt": {
        "--task NAME": "prompt to use: cqa, svamp, esnli, anli, or generic for your own rows",
        "--exemplars FILE.jsonl": 'file of a few rows {"input", "rationale", "label"}, which the prompt shows'
        " as examples",
        "--instructions TEXT": "text before the exemplars; @FILE reads it from a file",
        "--choices A,B,...": "allowed answers for rows without the field `choices` (a JSON list if an"
        " answer contains a comma)",
    },
    "answers": {
        "--samples K": (
            int,
            "number of answers per row (default: 1); with several, the row gets the commonest label, and"
            " the row's weight is multiplied by the share of usable answers with this label",
        ),
        "--temperature T": "sampling temperature (default: 0, or 0.7 with several samples);"
        " with `--temperature default`, no temperature is sent, and the server uses its own",
        "--max-tokens N": (
            int,
            "largest number of tokens in an answer, reasoning included (default: 1024)",
        ),
        "--reasoning-effort E": "for reasoning models: low, medium, high",
        "--retries N": (
            int,
            "number of times to ask again after an unreadable answer (default: 1)",
        ),
        "--max-truncated SHARE": (
            float,
            "largest share of unusable answers, including answers truncated at --max-tokens;"
            " after 20 answers, a larger share stops the run (default: 0.05)",
        ),
    },
    "cost and load": {
        "--price-input P": (float, "price of a million prompt tokens"),
        "--price-output P": (float, "price of a million answer tokens"),
        "--max-cost C": (float, "largest cost of this run"),
        "--max-tokens-total N": (int, "largest number of tokens that this run may use"),
        "--concurrency N": (
            int,
            "number of simultaneous requests; for a local teacher, its batch size (default: 16)",
        ),
        "--attempts N": (
            int,
            "number of times to send a request before a server error is final (default: 8)",
        ),
        "--timeout SECS": (float, "time limit of a request, in seconds (default: 300)"),
        "--cache FILE": "SQLite file of answers (default: teacher_cache.sqlite next to the output)",
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `annotate`. A flag sets the field of that name in `teacher.Settings`."""
    parser.add_argument(
        "input",
        metavar="INPUT.jsonl",
        type=pathlib.Path,
        help='file of rows {"input": ...}, which may also have "id", "label" and "choices"',
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT.jsonl",
        type=pathlib.Path,
        help="file to write: the rows with rationales, for `prepare jsonl`; after a stop, run the"
        " same command again to continue",
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
    groups["prompt"].add_argument(
        "--label-given",
        action="store_true",
        help="show the teacher the gold label, and ask only for a rationale; the output"
        " marks these rationales",
    )
    groups["answers"].add_argument(
        "--parameter",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="additional field of the request, such as top_p=0.9; may be given several times",
    )
    groups["cost and load"].add_argument(
        "--dry-run",
        action="store_true",
        help="send nothing, and only show the first prompt and the estimated cost of the file",
    )
    groups["cost and load"].add_argument(
        "--batch-file",
        nargs="+",
        default=(),
        metavar=("write|read", "FILE"),
        help="write: write the requests to FILE in OpenAI's batch format; read: copy the"
        " answers of the result files into the cache",
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
        raise InputError(f"--instructions {text}: the file cannot be read ({error})") from None


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
        raise InputError(f"--choices: expected a list of strings, none of them empty, got {text!r}")
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
            raise InputError(f"--parameter: expected NAME=JSON, got {pair!r}")
        try:
            found[name] = json.loads(value)
        except RecursionError:
            raise InputError(
                f"--parameter {name}: the value has too many nested brackets"
            ) from None
        except ValueError:
            found[name] = value  # a bare word is a text
    return found


def _show_dry_run(result: dict[str, Any]) -> None:
    from stepdistill_jax.teacher.annotate import in_words

    say(result["prompt"])
    say("-" * 20)
    parameters = json.dumps(result["parameters"], sort_keys=True)
    say(
        f"this is one user message of about {result['first_prompt_tokens']} tokens; parameters: {parameters}"
    )
    say(f"{in_words(result)}; nothing was sent")
    if result["cost"] is None:
        say("to estimate the cost, pass --price-input and --price-output (per million tokens)")


def _show_batch(action: str, result: dict[str, Any]) -> None:
    if action == "write":
        files = ", ".join(result["files"]) or "no file: every answer is in the cache"
        say(f"{result['rows']} rows, {result['requests']} requests: {files}")
        return
    say(
        f"{result['results']} results: {result['kept']} saved, {result['failed']} failed,"
        f" {result['other']} ignored (already saved, or not for these rows)"
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
            f" are in {output}.partial; run the same command again to continue: readable answers are kept"
        )
        say(used)
    else:
        say(f"{output}: {result['rows']} rows, {used}")
        say(
            f"next: {shlex.join(['stepdistill', 'prepare', 'jsonl', '--source', str(output)])} --name NEW"
        )


def _table(result: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from stepdistill_jax.teacher.answers import KINDS

    rows = result["rows"]
    table = Table(title=f"{rows} rows", title_justify="left", title_style="bold")
    for name, where in (("", "left"), ("answers", "right"), ("share", "right"), ("note", "left")):
        table.add_column(name, justify=where)  # type: ignore[arg-type]

    def line(name: str, count: int, share: float | None, comment: str = "") -> None:
        table.add_row(name, str(count), "" if share is None else f"{share:.2%}", comment)

    count = result["with_rationale"]
    line("rows with a rationale", count, count / rows)
    if "teacher_accuracy" in result:
        share = result["teacher_accuracy"]
        labelled = result["with_label"]
        comment = f"of {labelled} rows with a gold label; unreadable answers count as wrong"
        line("teacher_accuracy", round(share * labelled), share, comment)
    if result["asked_again"]:
        line("asked again", result["asked_again"], None, "the first answer was unreadable")
    table.add_section()
    for kind, count in result["defects"].items():
        first = f"first: {result['first_defects'][kind]}"
        line(kind, count, count / rows, escape(f"{KINDS.get(kind, '')} ({first})"))
    return table
