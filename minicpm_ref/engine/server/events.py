"""Server-sent events, and noticing that a client has left.

An event is a line `data: {...}` and a blank line. A line that begins with a colon is a comment, which every parser
skips: it fills the silence of a long prompt, so that nobody between server and client takes the connection for dead.

A client that leaves is noticed by listening: the connection then says "http.disconnect". The listener runs beside
whatever is being done for this client, and whoever is first stops the other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"
COMMENT = b": still working\n\n"
Value = TypeVar("Value")


def event(content: Mapping[str, Any]) -> bytes:
    """One event; NaN and infinities, which JSON does not have, raise ValueError."""
    return b"data: " + json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


class EventStream(Response):
    """Sends `parts` as they come and closes the iterator, also when the client leaves in the middle."""

    def __init__(self, parts: AsyncGenerator[bytes, None]):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await or_disconnect(self._send(send), receive)

    async def _send(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self._parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._parts.aclose()


async def or_disconnect(work: Coroutine[Any, Any, Value], receive: Receive) -> Value | None:
    """The outcome of `work`, or None when the client left first; `work` is cancelled then."""
    working, listening = asyncio.create_task(work), asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.wait({working, listening})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
