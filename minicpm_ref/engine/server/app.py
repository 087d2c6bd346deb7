"""The routes: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/health` and the chat page.

A request is checked, its prompt made (in another thread: a long text takes a while, and `/health` must not wait), put
into the queue or refused with 429, and answered whole or as a stream. All that is known to be wrong is refused before
the first byte of a stream; what fails later is an event of its own.

Left out: tools, images, several answers to one request, and stored conversations.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import FileResponse, JSONResponse, Response

from minicpm_ref.engine.conversation import chat_prompt
from minicpm_ref.engine.engine import ContextLengthError, Engine
from minicpm_ref.engine.request import Piece, Request
from minicpm_ref.engine.server.answers import ChatAnswer, CompletionAnswer, Json
from minicpm_ref.engine.server.errors import ApiError
from minicpm_ref.engine.server.events import COMMENT, DONE, EventStream, event, or_disconnect
from minicpm_ref.engine.server.guard import Guard
from minicpm_ref.engine.server.schema import (
    CHAT_UNSUPPORTED,
    COMPLETION_UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    parse,
)
from minicpm_ref.engine.server.worker import Running, Worker

PAGE = Path(__file__).parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
COMPLETION_TOKENS = 16  # without a limit, as in the interface that this follows
Prepare = Callable[[Callable[[], None]], Request]  # given what to call when something is new


@dataclass
class Desk:
    """What the routes share: the engine's thread, the name of the model, and how many may be here at once."""

    worker: Worker
    model: str
    most: int
    created: int
    active: int = 0

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for a model that is not served."""
        if name is not None and name != self.model:
            raise ApiError(
                404, f"the model {name!r} does not exist: expected {self.model!r}", "model", "model_not_found"
            )

    @contextlib.asynccontextmanager
    async def admitted(self, prepare: Sequence[Prepare]) -> AsyncIterator[list[Running]]:
        """Requests in the engine; they leave it when the block ends, however it does. Raises ApiError 429 when there is
        no room for them, and 400 for what the engine refuses."""
        if self.active + len(prepare) > self.most:
            raise ApiError(
                429, f"{self.active} requests are here already: expected at most {self.most}", code="queue_full"
            )
        self.active += len(prepare)
        running: list[Running] = []
        try:
            loop = asyncio.get_running_loop()
            made: list[tuple[Request, asyncio.Event]] = []
            for one in prepare:
                changed = asyncio.Event()
                made.append((await asyncio.to_thread(one, _caller(loop, changed)), changed))
            running += [Running(request, self.worker, changed) for request, changed in made]
            yield running
        except ContextLengthError as error:
            raise ApiError(400, str(error), "messages", "context_length_exceeded") from error
        except ValueError as error:
            raise ApiError(400, str(error), str(error).split(" ", 1)[0]) from error
        finally:
            for one_running in running:
                one_running.cancel()
            self.active -= len(prepare)


def create_app(
    engine: Engine, model: str = "minicpm-ref", queue: int = 16, api_key: str | None = None, max_body: int = 2**20
) -> Guard:
    """The ASGI application. `queue`: how many requests may wait beside those that run.

    >>> app = create_app(Engine(batch=4), api_key="secret")
    """
    worker = Worker(engine)
    desk = Desk(worker, model, engine.executor.batch + queue, int(time.time()))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_pages(app, desk)

    @app.post("/v1/chat/completions")
    async def chat(http: HTTPRequest) -> Response:
        asked = parse(ChatRequest, await http.body(), CHAT_UNSUPPORTED)
        desk.check_model(asked.model)
        prepare = _chat_request(engine, asked)
        answer = ChatAnswer(model, engine.tokenizer)
        usage = asked.stream_options is not None and asked.stream_options.include_usage

        async def parts(running: list[Running]) -> AsyncGenerator[Json | bytes, None]:
            yield answer.first()
            async for piece in running[0].pieces():
                yield COMMENT if piece is None else answer.chunk(running[0].request, piece)
            _raise_error(running[0].request)
            yield answer.last(running[0].request)
            if usage:
                yield answer.counts([running[0].request])

        async def whole(running: list[Running]) -> Json:
            return answer.whole(running[0].request, await _collect(running[0]))

        return await _respond(desk, http, [prepare], asked.stream, parts, whole, usage)

    @app.post("/v1/completions")
    async def completions(http: HTTPRequest) -> Response:
        asked = parse(CompletionRequest, await http.body(), COMPLETION_UNSUPPORTED)
        desk.check_model(asked.model)
        params, stops, prompts = asked.sampling(), asked.stops(), asked.prompts()
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        limit = asked.max_tokens or COMPLETION_TOKENS

        def prepare(prompt: str | list[int]) -> Prepare:
            return lambda changed: engine.request(
                prompt, limit, params, stops, top_logprobs=asked.logprobs, on_change=changed
            )

        def answer_to(running: list[Running]) -> CompletionAnswer:
            texts = [p if isinstance(p, str) else engine.tokenizer.decode(p) for p in prompts]
            return CompletionAnswer(model, engine.tokenizer, [one.request for one in running], texts, asked.echo)

        async def parts(running: list[Running]) -> AsyncGenerator[Json | bytes, None]:
            answer = answer_to(running)
            for index, one in enumerate(running):  # they run side by side and are told one after the other
                if (first := answer.first(one.request, index)) is not None:
                    yield first
                async for piece in one.pieces():
                    yield COMMENT if piece is None else answer.chunk(one.request, piece, index)
                _raise_error(one.request)
                yield answer.last(one.request, index)
            if usage:
                yield answer.counts([one.request for one in running])

        async def whole(running: list[Running]) -> Json:
            pieces = [await _collect(one) for one in running]
            return answer_to(running).whole([one.request for one in running], pieces)

        return await _respond(desk, http, [prepare(p) for p in prompts], asked.stream, parts, whole, usage)

    return Guard(app, api_key, max_body)


def _chat_request(engine: Engine, asked: ChatRequest) -> Prepare:
    """Everything about a chat request that can be checked at once, and the rest for another thread."""
    turns, params, stops, top = asked.turns(), asked.sampling(), asked.stops(), asked.top

    def prepare(changed: Callable[[], None]) -> Request:
        ids = chat_prompt(engine.tokenizer, turns, asked.thinking, asked.continue_final_message)
        return engine.request(ids, asked.limit, params, stops, split_thoughts=True, top_logprobs=top, on_change=changed)

    return prepare


async def _respond(
    desk: Desk,
    http: HTTPRequest,
    prepare: Sequence[Prepare],
    stream: bool,
    parts: Callable[[list[Running]], AsyncGenerator[Json | bytes, None]],
    whole: Callable[[list[Running]], Awaitable[Json]],
    usage: bool,
) -> Response:
    """Run the requests and answer in the way that was asked for."""
    if not stream:

        async def work() -> Json:
            async with desk.admitted(prepare) as running:
                return await whole(running)

        content = await or_disconnect(work(), http.receive)
        return JSONResponse(content) if content is not None else Response(status_code=499)  # nobody reads it
    # what can be refused is refused here, before the headers: so the block begins outside of the stream
    block = desk.admitted(prepare)
    running = await block.__aenter__()

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            async for part in parts(running):
                if isinstance(part, bytes):
                    yield part
                else:  # with usage asked for, every chunk has the key
                    yield event({"usage": None, **part} if usage else part)
            yield DONE
        except ApiError as error:
            yield event(error.body)
        finally:
            await block.__aexit__(None, None, None)

    return EventStream(events())


def _caller(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> Callable[[], None]:
    """What another thread may call to set `changed`."""

    def call() -> None:
        loop.call_soon_threadsafe(changed.set)

    return call


async def _collect(running: Running) -> list[Piece]:
    pieces = [piece async for piece in running.pieces() if piece is not None]
    _raise_error(running.request)
    return pieces


def _raise_error(request: Request) -> None:
    if request.finish_reason == "error":
        raise ApiError(500, f"the model failed: {request.error}", code="engine_error")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(http: HTTPRequest, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def unknown(http: HTTPRequest, error: HTTPException) -> Response:
        return ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def broken(http: HTTPRequest, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says more").response()


def _add_pages(app: FastAPI, desk: Desk) -> None:
    card = {"id": desk.model, "object": "model", "created": desk.created, "owned_by": "minicpm_ref"}

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Json:
        desk.check_model(name)
        return card

    @app.get("/health")
    async def health() -> Json:
        return {"status": "ok", "active": desk.active}

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY})

    @app.get("/page/{name}")
    async def part(name: str) -> Response:
        if name not in ("chat.js", "chat.css"):
            raise HTTPException(404, "no such file")
        return FileResponse(PAGE / name, headers={"Content-Security-Policy": POLICY})


def serve(app: Guard, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer until Ctrl-C; open streams get two seconds to end."""
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once everything is closed
        uvicorn.Server(config).run()
