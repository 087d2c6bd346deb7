"""What a request may say: names, types and ranges, checked before anything runs.

Types are strict (`"0.5"` and `true` are no temperature), numbers finite, unknown fields harmless, and a field that is
known but not supported is refused by name instead of being dropped without a word.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minicpm_ref.engine.server.errors import ApiError
from minicpm_ref.sampling import SamplingParams

Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
SEPARATOR = "\n"  # between the text parts of one message


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class TemplateOptions(BaseModel):
    """`chat_template_kwargs`, the other place for the same switch."""

    model_config = ConfigDict(strict=True)
    enable_thinking: bool | None = None


class _Request(BaseModel):
    """What both endpoints share. Default temperature 1, as in the interface that this follows."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Share = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1.0
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None

    def sampling(self) -> SamplingParams:
        """The sampling parameters. Raises ApiError for a bias whose key is no token id."""
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            if not key.isascii() or not key.isdigit():
                raise ApiError(400, f"logit_bias has the key {key!r}: expected a token id", "logit_bias")
            bias[int(key)] = value
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=bias,
            seed=self.seed,
        )

    def stops(self) -> list[str]:
        """The stop strings. Raises ApiError for an empty one, which is part of every text."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in stops:
            raise ApiError(400, "stop holds an empty string: expected strings of at least one character", "stop")
        return stops

    def check(self, unsupported: dict[str, object], given: dict[str, Any]) -> None:
        """Raise ApiError for what cannot be done. `unsupported`: fields with the one value that is understood."""
        if self.n not in (None, 1):
            raise ApiError(400, f"n = {self.n}: expected 1, one answer a request", "n")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options without stream: expected stream = true", "stream_options")
        for name, fine in unsupported.items():
            if given.get(name) not in (None, fine):
                raise ApiError(400, f"{name} is not supported here: expected it to be left out", name)


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None
    tool_calls: list[Any] | None = None


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    def turns(self) -> list[dict[str, str]]:
        """The messages as role and text: parts joined in order by a line break, "developer" as "system", an assistant
        that said nothing as "". Raises ApiError for parts that are not text, tools, and a silent user."""
        turns = []
        for place, message in enumerate(self.messages):
            name, content = f"messages.{place}.content", message.content
            if message.tool_calls:
                raise ApiError(400, "tool_calls are not supported here", f"messages.{place}.tool_calls")
            if content is None and message.role != "assistant":
                raise ApiError(400, f"{name} is null: expected text for the role {message.role!r}", name)
            if isinstance(content, list):
                for part in content:
                    if part.get("type") != "text" or not isinstance(part.get("text"), str):
                        raise ApiError(400, f"{name} has a part of type {part.get('type')!r}: expected 'text'", name)
                content = SEPARATOR.join(part["text"] for part in content)
            role = "system" if message.role == "developer" else message.role
            turns.append({"role": role, "content": content or ""})
        if self.continue_final_message and turns[-1]["role"] != "assistant":
            raise ApiError(400, "continue_final_message needs an assistant message last", "continue_final_message")
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(400, "continue_final_message excludes add_generation_prompt", "continue_final_message")
        return turns

    @property
    def thinking(self) -> bool | None:
        """Whether to think, from either place; at the top level first."""
        if self.enable_thinking is None and self.chat_template_kwargs is not None:
            return self.chat_template_kwargs.enable_thinking
        return self.enable_thinking

    @property
    def limit(self) -> int | None:
        """The most tokens; of two limits the smaller."""
        return min((n for n in (self.max_tokens, self.max_completion_tokens) if n is not None), default=None)

    @property
    def top(self) -> int | None:
        """How many alternatives to report for each token; None for no logarithms at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs without logprobs: expected logprobs = true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False

    def prompts(self) -> list[str | list[int]]:
        """Each prompt on its own. Raises ApiError for none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or [] in self.prompt:
            raise ApiError(400, "prompt is empty: expected a text or token ids", "prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


CHAT_UNSUPPORTED: dict[str, object] = {
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "audio": None,
    "response_format": {"type": "text"},
}
COMPLETION_UNSUPPORTED: dict[str, object] = {"suffix": "", "best_of": 1}
Parsed = TypeVar("Parsed", ChatRequest, CompletionRequest)


def parse(kind: type[Parsed], body: bytes, unsupported: dict[str, object]) -> Parsed:
    """A checked request. Raises ApiError, always 400, naming the parameter."""
    try:
        given = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(given, dict):
        raise ApiError(400, "the body is JSON, but no object", code="invalid_json")
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = [str(part) for part in first["loc"]]  # in a union pydantic names the type, too: not for clients
        param = ".".join(part for part in place if "[" not in part and part not in ("str", "list", "int"))
        raise ApiError(400, f"{param}: {first['msg']}", param) from error
    request.check(unsupported, given)
    return request


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
