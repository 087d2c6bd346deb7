"""Conversations as text: the publisher's own template, run without trusting it or the messages.

A chat model was trained on turns written in one exact way. The way is published as a Jinja template, a small program
in a file from the internet that is fed with text from strangers. So it runs in Jinja's sandbox, where it can reach
nothing but its variables; and the caller must be able to tell the template's control tokens from the same characters
in a message, or a user could open a system turn. `render` therefore marks the special tokens that a message spells out:
one character that occurs nowhere else stands behind their first, and `split` takes it out again.

Left out: tools. Source: transformers' chat templates (their environment, `raise_exception`, `tojson`).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROLES = ("system", "user", "assistant", "tool")


def plain_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Role and content of each message, the content as a string: text parts are joined, and an assistant that said
    nothing (it called a tool) said "". Other keys are left out: nobody has checked what is in them.

    Raises ValueError naming the message for an unknown role and for a content that is not text.
    """
    return [
        {"content": _content(f"messages[{i}]", message), "role": message["role"]} for i, message in enumerate(messages)
    ]


def _content(name: str, message: object) -> str:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} = {message!r}: expected an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{name}: role {role!r}: expected one of {', '.join(ROLES)}")
    if content is None and role == "assistant":
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{name}.content holds {part!r}: expected {{'type': 'text', 'text': ...}}")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{name}.content = {content!r}: expected a text")
    return content


def render(
    template: str, messages: Sequence[Mapping[str, str]], mark: str, special: re.Pattern[str], **more: Any
) -> str:
    """The text of a conversation, with `mark` behind the first character of each special token that a message spells
    out. `more` are the template's other variables. Raises ValueError with the template's own complaint.
    """
    marked = [
        dict(m) | {"content": special.sub(lambda found: found[0][0] + mark + found[0][1:], m["content"])}
        for m in messages
    ]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    environment.globals["raise_exception"] = _complain
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(messages=marked, **more)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error


def free_mark(texts: Iterable[str]) -> str:
    """A private-use character that occurs in none of `texts`."""
    used = set().union(*texts)
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)


def split(text: str, mark: str, special: re.Pattern[str]) -> list[tuple[bool, str]]:
    """`text` cut into (is it a special token?, its characters), without the marks."""
    pieces, start = [], 0
    for found in special.finditer(text):
        pieces += [(False, text[start : found.start()]), (True, found[0])]
        start = found.end()
    pieces.append((False, text[start:]))
    return [(kind, piece.replace(mark, "")) for kind, piece in pieces if piece]


def _complain(message: str) -> NoReturn:
    raise TemplateError(message)
