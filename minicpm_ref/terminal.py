"""Text on a terminal as it is: what a model writes belongs to its reader, not to the terminal's decoration.

`rich` draws the tables here, and it means well with text: `[red]` becomes red, `:100:` a picture, a tab some blanks, a
form feed nothing. Code that is printed so is another program. What users and models wrote therefore goes past it.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style


def show(console: Console, text: str, style: str | None = None) -> None:
    """Print `text` unchanged and at once, without a line break behind it."""
    console.print(Segments([Segment(text, Style.parse(style) if style else None)]), end="", crop=False, soft_wrap=True)
    console.file.flush()


def accept_any_text() -> None:
    """Let the standard streams spell characters that their encoding lacks (as \\u4f60) instead of failing in a text."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
