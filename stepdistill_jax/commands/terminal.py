"""Prints lines, tables and tracebacks, with control characters escaped."""

import sys
import traceback
from typing import TYPE_CHECKING, Any

from stepdistill_jax.errors import escaped

if TYPE_CHECKING:
    from rich.console import Console


def say(text: object) -> None:
    """Prints a string on standard output, with control characters escaped."""
    print(escaped(text))


def show_traceback() -> None:
    """Prints the traceback of the current exception on standard error."""
    print(escaped(traceback.format_exc()), end="", file=sys.stderr)


def console(**settings: Any) -> "Console":
    """Returns a `rich.console.Console(**settings)` that escapes control characters."""
    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
    from rich.segment import Segment

    class Escaped:
        def __init__(self, renderable: ConsoleRenderable):
            self._renderable = renderable

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            # colours are added after this, from each segment's style
            for segment in console.render(self._renderable, options):
                yield segment if segment.control else Segment(escaped(segment.text), segment.style)

    class Escaping(RenderHook):
        def process_renderables(
            self, renderables: list[ConsoleRenderable]
        ) -> list[ConsoleRenderable]:
            return [Escaped(renderable) for renderable in renderables]

    made = Console(**settings)
    made.push_render_hook(Escaping())
    return made
