"""The middleware that ends open requests when a server stops, in a uvicorn of its own."""

import asyncio
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from vllm_lrqk.integration.stop import EndRequests

SECONDS = 30


def application() -> FastAPI:
    """One that answers, never answers, or streams without an end."""
    app = FastAPI()
    app.state.ended = []

    @app.get("/answer")
    async def answer() -> str:
        return "done"

    @app.get("/never")
    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            app.state.ended.append("never")

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def words() -> Any:
            yield "first "
            await asyncio.Event().wait()

        return StreamingResponse(words())

    app.add_middleware(EndRequests)
    return app


async def serve(app: FastAPI, port: int) -> tuple[uvicorn.Server, asyncio.Task]:
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off"))
    app.state.server = server
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    return server, task


async def until_stopped(app: FastAPI, port: int, paths: list[str]) -> list[tuple[int, str]]:
    """Replies to requests that are open when the server stops: status and text, status 0 where the text breaks off."""
    server, task = await serve(app, port)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:

        async def ask(path: str) -> tuple[int, str]:
            text = ""
            try:
                async with client.stream("GET", path) as reply:
                    async for part in reply.aiter_text():
                        text += part
                    return reply.status_code, text
            except httpx.RemoteProtocolError:
                return 0, text

        assert await ask("/answer") == (200, '"done"')
        asked = [asyncio.create_task(ask(path)) for path in paths]
        while len(server.server_state.tasks) < len(paths):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert not any(own.done() for own in asked)
        server.should_exit = True
        await asyncio.wait_for(task, SECONDS)
        return list(await asyncio.gather(*asked))


@pytest.fixture
def port() -> int:
    import socket

    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def test_open_requests_end_with_the_server(port: int) -> None:
    app = application()
    never, other, stream = asyncio.run(until_stopped(app, port, ["/never", "/never", "/stream"]))
    assert never[0] == other[0] == 503
    assert "stopping" in never[1]
    assert stream == (0, "first ")
    assert app.state.ended == ["never", "never"]


def test_without_a_server_requests_pass() -> None:
    """Before vLLM has put its server into the application's state."""
    app = application()

    async def ask() -> int:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://own") as client:
            return (await client.get("/answer")).status_code

    assert asyncio.run(ask()) == 200


def test_a_client_that_leaves_is_not_refused(port: int) -> None:
    """A cancellation that has another reason than a stop goes on as one."""
    app = application()

    async def cancel() -> None:
        _server, task = await serve(app, port)
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "app": app, "path": "/never", "method": "GET", "headers": [], "query_string": b""}
        never = asyncio.Event()
        own = asyncio.create_task(app.build_middleware_stack()(scope, never.wait, send))
        await asyncio.sleep(0.1)
        own.cancel()
        with pytest.raises(asyncio.CancelledError):
            await own
        assert not sent
        app.state.server.should_exit = True
        await asyncio.wait_for(task, SECONDS)

    asyncio.run(cancel())
