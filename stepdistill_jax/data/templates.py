"""Templates of texts with `{fields}`: what they name, and the fields of a text that was written by one."""

import functools
import string

from stepdistill_jax.errors import InputError


@functools.lru_cache(256)  # asked for every row
def fields_of(template: str) -> tuple[str, ...]:
    """Names of the `{fields}` of a template, in order.

    Raises:
        InputError: a brace without its pair, or a field that is more than a name. Templates come with
            model directories: `{input:>9999999999}` would fill the memory, and a field inside a
            format would read attributes (`{input:{label.__class__}}`).
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}") from None
    for _, name, spec, conversion in parsed:
        if spec or conversion:
            raise InputError(
                f"template {template!r}: in braces a field's name alone is wanted, at {name!r}"
            )
    return tuple(name for _, name, _, _ in parsed if name is not None)


@functools.lru_cache(256)
def words_and_fields(template: str) -> tuple[tuple[str, str | None], ...]:
    """Each field with the words before it; then the words behind the last one, without a field.

    Runs of whitespace are one space, and words at either end have one outside, as `parse` writes a
    text.

    Example: `(("", "rationale"), (" so ", "label"), (". ", None))` of `{rationale} so {label}.`
    """
    found: list[tuple[str, str | None]] = []
    words = ""

    def add(field: str | None) -> None:
        core = " ".join(words.split())
        before = " " if core and (not found or words[0].isspace()) else ""
        behind = " " if core and (field is None or words[-1].isspace()) else ""
        found.append((f"{before}{core}{behind}", field))

    for text, field, _, _ in string.Formatter().parse(template):
        words += text
        if field is not None:  # else a doubled brace ends the text
            add(field)
            words = ""
    add(None)
    return tuple(found)


def parse(template: str, text: str, field: str) -> dict[str, str] | None:
    """The fields of a text that the template may have made, by name; None where it is of another form.

    Other fields may hold the words that stand around `field`. So those before it are taken where they
    stand last, and from there those behind it where they stand first. Whitespace is told apart no
    better than by a tokenizer: runs of it are one space.

    Args:
        template: with words between any two fields.
        text: of any form.
        field: of the template, the one to find.
    """
    *pieces, (last_words, _) = words_and_fields(template)
    first_words = pieces[0][0]
    text = f" {' '.join(text.split())} "
    if not text.endswith(last_words):
        return None
    text = f"{text.removesuffix(last_words)} "
    if not text.startswith(first_words):
        return None
    rest = f" {text.removeprefix(first_words)}"
    names, found = [str(name) for _, name in pieces], {}
    at = names.index(field)
    # an empty field has one space on both sides, which the words before and behind it share
    behind = rest
    for number in range(at, 0, -1):
        rest, words, value = f"{rest} ".rpartition(pieces[number][0])
        if not words:
            return None
        if number == at:
            behind = value
        else:
            found[names[number]] = value.strip()
    if at:
        found[names[0]] = rest.strip()
    for number in range(at + 1, len(pieces)):
        value, words, behind = f" {behind}".partition(pieces[number][0])
        if not words:
            return None
        found[names[number - 1]] = value.strip()
    found[names[-1]] = behind.strip()
    return found
