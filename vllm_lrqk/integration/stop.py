"""Ends the requests that vLLM's server still has open when it stops; `--middleware` of `vllm serve` takes it.

vLLM 0.32 ends its engine first and does not always tell the requests, for whose connections its HTTP server then waits
without a limit: until every client gives up. This is so with every attention backend.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
LOOK_SECONDS = 0.5
"""Between two looks whether the server stops."""
_BODY = json.dumps({"error": {"message": "The server is stopping.", "type": "ServiceUnavailable", "code": 503}})


class EndRequests:
    """Middleware of an ASGI application that answers 503 to what is open when its server stops, and ends streams.

    Args:
        app: the application. Its state holds the uvicorn server, as that of `vllm serve` does; while it holds none,
            requests pass unchanged.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._open: set[asyncio.Task] = set()
        self._watch: asyncio.Task | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        server = getattr(scope["app"].state, "server", None) if scope["type"] == "http" else None
        task = asyncio.current_task()
        if server is None or task is None:
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        self._open.add(task)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._end_at_stop(server))
        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            if not server.should_exit:
                raise
            task.uncancel()
            if not has_begun:
                await _refuse(send)
        finally:
            self._open.discard(task)

    async def _end_at_stop(self, server: Any) -> None:
        while self._open and not server.should_exit:
            await asyncio.sleep(LOOK_SECONDS)
        for task in self._open:
            task.cancel()


async def _refuse(send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": _BODY.encode()})
