"""Lists the fields of templates such as "{rationale} so {label}", and parses texts written with them."""

import functools
import string

from stepdistill_jax.errors import InputError


@functools.lru_cache(256)  # called for every row
def fields_of(template: str) -> tuple[str, ...]:
    """Returns the names of a template's `{fields}`, in order.

    Example: `fields_of("{rationale} so {label}")` is ("rationale", "label").

    Raises:
        InputError: a brace has no partner, or braces contain more than a name.
    """
    # an untrusted `{input:>9999999999}` would fill the memory, and `{input:{label.__class__}}` read attributes
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}") from None
    for _, name, spec, conversion in parsed:
        if spec or conversion:
            raise InputError(
                f"template {template!r}: expected only a field's name in the braces that contain {name!r}"
            )
    return tuple(name for _, name, _, _ in parsed if name is not None)


@functools.lru_cache(256)
def words_and_fields(template: str) -> tuple[tuple[str, str | None], ...]:
    """Splits a template at its fields into pairs (words before the field, field).

    The last pair is (words after the last field, None). Whitespace becomes one space. Words at the start or end of
    the template get a space on their outer side, since `parse` adds a space to both ends of the text.

    Example: `words_and_fields("{rationale} so {label}.")` is
    `(("", "rationale"), (" so ", "label"), (". ", None))`.
    """
    found: list[tuple[str, str | None]] = []
    words = ""

    def add(field: str | None) -> None:
        core = " ".join(words.split())
        before = " " if core and (not found or words[0].isspace()) else ""
        after = " " if core and (field is None or words[-1].isspace()) else ""
        found.append((f"{before}{core}{after}", field))

    for text, field, _, _ in string.Formatter().parse(template):
        words += text
        if field is not None:  # None: the text ends, or a doubled brace splits it
            add(field)
            words = ""
    add(None)
    return tuple(found)


def parse(template: str, text: str, field: str) -> dict[str, str] | None:
    """Returns the fields of a text that was written with the template, or None if the text does not match.

    Example: with the template `{rationale} so {label}` and the field "label", the text "wet so slow so no" gives
    {"rationale": "wet so slow", "label": "no"}.

    Whitespace counts as one space.

    Args:
        template: must have words between any two fields.
        field: name of the field to find first. It begins after the last occurrence of the words that precede it
            in the template, and ends at the next occurrence of the words that follow it there.
    """
    *pieces, (last_words, _) = words_and_fields(template)
    first_words = pieces[0][0]
    # One space at either end, so that words at an end match as they do between fields: " so " also
    # matches an empty rationale's "so no" and an empty label's "wet so".
    text = f" {' '.join(text.split())} "
    if not text.endswith(last_words):
        return None
    text = f"{text.removesuffix(last_words)} "
    if not text.startswith(first_words):
        return None
    rest = f" {text.removeprefix(first_words)}"
    names, found = [str(name) for _, name in pieces], {}
    at = names.index(field)
    # An empty field leaves a single space between the words on its two sides, and both match only with a
    # space. So each search below first adds a space where the previous words were cut off.
    after = rest
    # leftwards from `field`: pieces[number] are the words between names[number - 1] and names[number]
    for number in range(at, 0, -1):
        rest, words, value = f"{rest} ".rpartition(pieces[number][0])
        if not words:
            return None
        if number == at:
            after = value  # `field` and all that follows it
        else:
            found[names[number]] = value.strip()
    if at:
        found[names[0]] = rest.strip()
    # rightwards from `field`
    for number in range(at + 1, len(pieces)):
        value, words, after = f" {after}".partition(pieces[number][0])
        if not words:
            return None
        found[names[number - 1]] = value.strip()
    found[names[-1]] = after.strip()
    return found
