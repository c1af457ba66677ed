"""Replaces the names of Python parameters in messages by the flags and settings of the running command.

The library's messages name parameters in backticks, such as "`num_beams` must be ..." and "pass
`on_error=skip`".
"""

import argparse
import functools
import re
from collections.abc import Callable

_NAMED = re.compile(r"`([A-Za-z]\w*(?:\.\w+)?)(?:=([^`\s]*))?`")


def as_typed(parser: argparse.ArgumentParser) -> Callable[[str], str]:
    """Returns a function that rewrites a message for the users of a command.

    It replaces "`num_beams`" by "--num-beams", and "`on_error=skip`" by "--on-error skip". If the command
    reads a config, it also replaces "`batch_size=8`" by "BATCH_SIZE=8". Other names in backticks are left
    unchanged.
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


@functools.cache
def _settings() -> dict[str, str]:
    """Maps the name of each field or class in an error message to the name that a user writes in a config.

    In a config, the name of a field is its macro in `train.gin`, or `train.FIELD` if it has no macro. A
    class is written as a gin reference, such as `@lora()` for `LoraConfig`.
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
