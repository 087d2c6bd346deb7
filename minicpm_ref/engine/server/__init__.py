"""The engine behind OpenAI's HTTP interface, and a chat page.

Read in this order: `schema` (what may be asked), `worker` (the thread that drives the engine), `answers` (the shape of
what comes back), `events` (streams, and clients that leave), `guard` (keys, sizes, other web sites), `app` (the
routes).
"""

from minicpm_ref.engine.server.app import create_app, serve

__all__ = ["create_app", "serve"]
