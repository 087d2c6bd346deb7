"""The thread that drives the engine while there is something to do.

The event loop of the server must answer within milliseconds whatever the model does, so it never makes a step itself:
it hands a request over and is woken when there is something new.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator

from minicpm_ref.engine.engine import Engine
from minicpm_ref.engine.request import Piece, Request

KEEP_ALIVE = 5.0  # seconds of silence after which a stream says that it lives


class Worker:
    """Steps of `engine` in a thread of their own, from `start` to `stop`."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._wake, self._stopping = threading.Event(), False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the present step."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def wake(self) -> None:
        """There is something to do: a new request, or one that was cancelled."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            if self.engine.busy:
                self.engine.step()
            else:
                self._wake.wait()
                self._wake.clear()


class Running:
    """A request in the engine, as seen from the event loop."""

    def __init__(self, request: Request, worker: Worker, changed: asyncio.Event):
        self.request, self._worker, self._changed = request, worker, changed
        self._stream = worker.engine.submit(request)  # forgetting it would cancel the request
        worker.wake()

    async def pieces(self) -> AsyncGenerator[Piece | None, None]:
        """The pieces as they come; None after some seconds without one."""
        request = self.request
        while True:
            self._changed.clear()
            while request.pieces:
                yield request.pieces.popleft()
            if request.finish_reason is not None and not request.pieces:
                return
            try:
                await asyncio.wait_for(self._changed.wait(), KEEP_ALIVE)
            except TimeoutError:
                yield None

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self._stream.close()
        self._worker.wake()
