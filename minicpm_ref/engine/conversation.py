"""From messages to the ids of a prompt: one function for Python, the terminal and the server, so that all three agree.

Message text is text: whatever it spells, the control ids in a prompt are the template's own. `/think` or `/no_think` at
the end of the newest user turn switches thinking for the answer to it; the text goes to the model as it is, which was
trained with it. Thoughts of earlier answers are left out, as the published template does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from minicpm_ref.chat_template import plain_messages
from minicpm_ref.engine.text import CLOSE, OPEN
from minicpm_ref.tokenizer import Tokenizer

_SWITCH = re.compile(r"(?:^|\s)/(no_)?think\s*$")
_THOUGHT = re.compile(rf"\s*{OPEN}.*?{CLOSE}\n*", re.DOTALL)


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    enable_thinking: bool | None = None,
    continue_final_message: bool = False,
) -> list[int]:
    """Ids of a conversation, ready for the answer to it.

    `messages` as in `Tokenizer.apply_chat_template`. With `continue_final_message` the last one, the assistant's, is
    left open and goes on; otherwise a new answer begins, whoever spoke last. Raises ValueError for no messages, unknown
    roles, and content that is not text.

    >>> ids = chat_prompt(tokenizer, [{"role": "user", "content": "2 + 2? /no_think"}])
    """
    if not messages:
        raise ValueError("messages is empty: expected at least one")
    clean = plain_messages(messages)
    for message in clean:
        if message["role"] == "assistant" and _THOUGHT.match(message["content"]):
            message["content"] = _THOUGHT.sub("", message["content"], count=1)
    if not continue_final_message:
        return tokenizer.apply_chat_template(clean, switched(clean, enable_thinking))
    if clean[-1]["role"] != "assistant":
        raise ValueError(f"continue_final_message, and the last role is {clean[-1]['role']!r}: expected 'assistant'")
    ids = tokenizer.apply_chat_template(clean, add_generation_prompt=False)
    ends = [place for place, token in enumerate(ids) if token in tokenizer.eos_ids]
    return ids[: ends[-1]] if ends else ids  # without the end marker, and the line break behind it


def switched(messages: Sequence[Mapping[str, str]], enable_thinking: bool | None) -> bool | None:
    """`enable_thinking`, unless the newest user turn ends in `/think` or `/no_think`."""
    newest = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    switch = _SWITCH.search(newest)
    return enable_thinking if switch is None else not switch.group(1)
