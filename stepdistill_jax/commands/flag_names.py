"""Replaces Python parameters in messages and docstrings, such as `num_beams`, by flags and settings."""

import argparse
import functools
import re
from collections.abc import Callable

_NAMED = re.compile(r"`([A-Za-z]\w*(?:\.\w+)?)(?:=([^`\s]*))?`")


def as_typed(parser: argparse.ArgumentParser) -> Callable[[str], str]:
    """Returns a function that rewrites a message for the users of a command.

    "`num_beams`" becomes "--num-beams", and "`on_error=skip`" becomes "--on-error skip". If the command
    reads a config, "`batch_size=8`" becomes "BATCH_SIZE=8". Other names in backticks stay.
    """
    options = {a.dest: a for a in parser._actions if a.option_strings}

    def typed(match: re.Match) -> str:
        name, value = match.groups()
        if option := options.get(name):
            flag = option.option_strings[0]
            if option.nargs != 0 and value is not None:
                return f"{flag} {value}"
            return flag if value in (None, str(option.const)) else match[0]
        setting = _settings().get(name) if "gin_bindings" in options else None
        if setting is None:
            return match[0]
        return setting if value is None else f"{setting}={value}"

    return lambda text: _NAMED.sub(typed, text)


def as_set(text: str, field: str) -> str:
    """Rewrites a docstring for users who write configs: "`init_from`" becomes "INIT_FROM".

    A name without an owner is a field of the text's owner, else of `train` or `supervision`. Other names in
    backticks stay.

    Args:
        field: full name of the setting that the text explains, such as `train.init_rules`; `OWNER.` if the
            text explains a class or function.
    """
    owner, own = field.partition(".")[0], _settings().get(field)

    def written(match: re.Match) -> str:
        found = map(_settings().get, (f"{owner}.{match[1]}", match[1]))
        return next((name for name in found if name not in (None, own)), match[0])

    return _NAMED.sub(written, text)


@functools.cache
def _settings() -> dict[str, str]:
    """Returns a dict from each setting's name in messages to its name in configs.

    Example: {"batch_size": "BATCH_SIZE", "LoraConfig": "@lora()", ...}.
    """
    from stepdistill_jax.commands.configurables import CONFIGURABLES, defaults, main_bindings

    macros = {key: b[1:] for key, b in main_bindings().items() if b.startswith("%")}
    keys = [f"{owner}.{field}" for owner in CONFIGURABLES for field in defaults(owner)]
    settings = {key: macros.get(key, key) for key in keys}
    settings |= {
        c.__name__: f"@{name}()" for name, c in CONFIGURABLES.items() if isinstance(c, type)
    }
    for owner in ("supervision", "train"):  # messages name fields of these two without the owner
        settings |= {field: settings[f"{owner}.{field}"] for field in defaults(owner)}
    return settings
