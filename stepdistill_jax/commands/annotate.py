"""`stepdistill annotate`: rationales and labels of a large model for a file of questions."""

import argparse
import json
import pathlib
from typing import Any

from stepdistill_jax.commands.terminal import console, say
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import check_file
from stepdistill_jax.runtime.progress import log


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
    _add_teacher_arguments(parser)
    _add_prompt_arguments(parser)
    _add_answer_arguments(parser)
    _add_limit_arguments(parser)


def _add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who is asked")
    group.add_argument("--model", metavar="M", help="the server's name of the model")
    group.add_argument(
        "--base-url",
        metavar="URL",
        help="OpenAI-compatible server, e.g. http://localhost:8000/v1 (default:"
        " $OPENAI_BASE_URL, else OpenAI)",
    )
    group.add_argument(
        "--api-key-env",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="environment variable with the key (default: OPENAI_API_KEY); it is written nowhere",
    )
    group.add_argument(
        "--teacher", metavar="hf:DIR", help="a local transformers directory instead of a server"
    )


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--task",
        metavar="NAME",
        required=True,
        help="the prompt: cqa, svamp, esnli, anli, or generic for your own rows",
    )
    group.add_argument(
        "--exemplars",
        metavar="FILE.jsonl",
        type=pathlib.Path,
        help='a handful of rows {"input", "rationale", "label"} that show how to answer',
    )
    group.add_argument(
        "--instructions",
        metavar="TEXT",
        default="",
        help="what to do, before the exemplars; @FILE reads it from a file",
    )
    group.add_argument(
        "--choices",
        metavar="A,B,...",
        help="allowed answers of rows that name none (a JSON list where one holds a comma)",
    )
    group.add_argument(
        "--label-given",
        action="store_true",
        help="tell the gold label and ask for its rationale, which is marked as such",
    )


def _add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it answers")
    group.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="K",
        help="answers per row; the label is voted for, and the share is the weight (default: 1)",
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        help="of sampling (default: 0, with several samples 0.7); `default` sends none",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="most tokens of an answer, reasoning included (default: 1024)",
    )
    group.add_argument(
        "--reasoning-effort", metavar="E", help="of reasoning models: low, medium, high"
    )
    group.add_argument(
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="one more field of the request, e.g. top_p=0.9 (repeatable)",
    )
    group.add_argument(
        "--retries",
        type=int,
        default=1,
        metavar="N",
        help="how often an answer that cannot be read is asked for again, once the run has had one"
        " that can (default: 1)",
    )
    group.add_argument(
        "--max-truncated",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="stop when more answers than this are cut at --max-tokens or cannot be used for any"
        " other reason, after 20 answers (default: 0.05)",
    )


def _add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how much")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="show the first prompt and the estimated cost of the file; send nothing",
    )
    group.add_argument(
        "--price-input", type=float, metavar="P", help="money per million tokens of prompts"
    )
    group.add_argument(
        "--price-output", type=float, metavar="P", help="money per million tokens of answers"
    )
    group.add_argument("--max-cost", type=float, metavar="C", help="most money of this run")
    group.add_argument("--max-tokens-total", type=int, metavar="N", help="most tokens of this run")
    group.add_argument(
        "--concurrency",
        type=int,
        default=16,
        metavar="N",
        help="requests at once; of a local teacher, its batch (default: 16)",
    )
    group.add_argument(
        "--attempts",
        type=int,
        default=8,
        metavar="N",
        help="how often a request is sent before a server's failure is final (default: 8)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECS",
        help="of a whole request (default: 300)",
    )
    group.add_argument(
        "--cache",
        type=pathlib.Path,
        metavar="FILE",
        help="SQLite file of answers (default: teacher_cache.sqlite beside the output)",
    )
    group.add_argument(
        "--batch-file",
        nargs="+",
        default=(),
        metavar=("write|read", "FILE"),
        help="write requests in OpenAI's batch format, or read results into the cache",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `teacher.annotate` and prints its summary."""
    from stepdistill_jax.teacher import annotate

    result = annotate(
        args.input,
        args.output,
        read=[args.instructions[1:]] if args.instructions.startswith("@") else (),
        task=args.task,
        model=args.model,
        teacher=args.teacher,
        base_url=args.base_url,
        api_key_env=args.api_key_env,
        exemplars=args.exemplars,
        instructions=_instructions(args.instructions),
        choices=_choices(args.choices),
        samples=args.samples,
        temperature=_temperature(args.temperature),
        max_tokens=args.max_tokens,
        reasoning_effort=args.reasoning_effort,
        parameters=_parameters(args.parameter),
        label_given=args.label_given,
        concurrency=args.concurrency,
        retries=args.retries,
        attempts=args.attempts,
        timeout=args.timeout,
        max_truncated=args.max_truncated,
        max_tokens_total=args.max_tokens_total,
        max_cost=args.max_cost,
        price_input=args.price_input,
        price_output=args.price_output,
        cache=args.cache,
        batch_file=args.batch_file,
        dry_run=args.dry_run,
    )
    if args.dry_run:
        _show_dry_run(result)
    elif args.batch_file:
        _show_batch(args.batch_file[0], result)
    else:
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


def _choices(text: str | None) -> tuple[str, ...]:
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


def _temperature(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
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
