"""What stands in front of every route: the key, the size of a body, and pages of other web sites.

Plain ASGI: it passes `receive` on as it is but for counting, so that a route still hears when its client leaves.

A browser lets any page on the internet send requests to a server on this machine, and shows it the answers if the
server says so. This one never does (no CORS headers), and refuses requests of foreign pages altogether, since sending
alone costs time. Without a key, whoever can open a connection may use the server: it listens on this machine only
unless it is told otherwise.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minicpm_ref.engine.server.errors import ApiError


class Guard:
    """ASGI middleware. `api_key` None asks for no key; `max_body` in bytes."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int):
        self._app, self._key, self._most = app, api_key, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise self._too_large()  # in the route that reads the body, where refusals become answers
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most} bytes", code="request_too_large")

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        protected = scope["path"].startswith("/v1")
        origin = headers.get("origin")
        if protected and origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return ApiError(403, f"the page {origin} belongs to another site", code="foreign_origin")
        if protected and self._key is not None and scope["method"] != "OPTIONS" and not self._knows(headers):
            return ApiError(
                401, "the API key is missing or wrong: send 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._most:
            return self._too_large()
        return None

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").strip().partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), str(self._key).encode())
