"""How long a stop of `vllm serve` takes, from the signal until the last process has gone.

    python benchmarks/stops.py [--backend LRQK CPU_ATTN] [--middleware on off] [--again 3] [--output .run/stops]

One server for every state of it: while Python loads, when the engine process begins, when it has the weights and
measures memory, idle, while it reads prompts, answers, and streams answers. Clients wait for 60 s. With `--again` the
signal is sent a second time after so many seconds, as an operator would.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table
from server import START_SECONDS, Server

MODEL = Path(__file__).parents[1] / "vllm_lrqk" / "evaluation" / "model"
VOCABULARY, LENGTH, CLIENTS, CLIENT_SECONDS = 2000, 4096, 6, 60
MOST_SECONDS = 10.0
MIDDLEWARE = ["--middleware", "vllm_lrqk.integration.stop.EndRequests"]
COMMON = [str(MODEL), "--dtype", "float32", "--max-model-len", str(LENGTH), "--enforce-eager"]
COMMON += ["--max-num-seqs", "6", "--max-num-batched-tokens", "512"]
LRQK = {"top_k": 512, "page_size": 64, "rank": 16, "hot_cache": True, "host_memory_gib": 0.05}
BACKENDS = {
    "LRQK": ["--attention-backend", "LRQK", "--additional-config", json.dumps({"lrqk": LRQK})],
    "CPU_ATTN": ["--attention-backend", "CPU_ATTN", "--kv-cache-memory-bytes", str(64 << 20)],
}
STARTING = {
    "Python loads": lambda server: True,
    "engine begins": lambda server: any("EngineCore" in name for name in server.names()),
    "model loads": lambda server: "Starting to load model" in server.log.read_text(),
    "memory is made": lambda server: "KV cache size" in server.log.read_text(),
}
SERVING = ("idle", "prompts", "answers", "streams")


def wait_for(server: Server, is_there: Callable[[Server], bool]) -> None:
    """Until a server that starts has come so far, looked at twenty times a second."""
    deadline = time.monotonic() + START_SECONDS
    while not is_there(server):
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"The server did not start; {server.log} ends with:\n{server.log.read_text()[-3000:]}")
        time.sleep(0.05)


async def ask(client: httpx.AsyncClient, prompt: list[int], tokens: int, is_stream: bool) -> int:
    """The status of a reply; 0: the connection ended before it was complete."""
    request = {"model": str(MODEL), "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": is_stream}
    try:
        async with client.stream("POST", "/v1/completions", json=request) as reply:
            await reply.aread()
            return reply.status_code
    except httpx.TransportError:
        return 0


async def stop_under_load(server: Server, state: str, repeat: int, again: float | None) -> tuple[float, list[int]]:
    """Seconds that a stop takes in one of `SERVING`, and what the clients got."""
    generator = random.Random(repeat)
    tokens = 1 if state == "prompts" else 1000
    prompts = [[generator.randrange(VOCABULARY) for _ in range(3000)] for _ in range(CLIENTS)]
    async with httpx.AsyncClient(base_url=server.url, timeout=CLIENT_SECONDS) as client:
        asked = [] if state == "idle" else prompts
        tasks = [asyncio.create_task(ask(client, prompt, tokens, state == "streams")) for prompt in asked]
        if state == "idle":  # after work, with connections that are kept
            await asyncio.gather(*(ask(client, prompt[:100], 4, False) for prompt in prompts))
        await asyncio.sleep(0.3 if state == "prompts" else 4)
        took = await asyncio.to_thread(server.stop, again=again)
        return took, list(await asyncio.gather(*tasks))


def measure(arguments: list[str], state: str, repeat: int, again: float | None, log: Path) -> tuple[float, list[int]]:
    """As `stop_under_load`, in any state."""
    server = Server(arguments, log)
    try:
        if state in STARTING:
            wait_for(server, STARTING[state])
            if state == "Python loads":
                time.sleep(3)
            return server.stop(again=again), []
        server.wait_until_ready()
        return asyncio.run(stop_under_load(server, state, repeat, again))
    finally:
        if server.process.poll() is None:
            server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["LRQK"])
    parser.add_argument("--middleware", nargs="+", choices=("on", "off"), default=["on"])
    parser.add_argument("--states", nargs="+", choices=(*STARTING, *SERVING), default=[*STARTING, *SERVING])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--again", type=float, help="seconds until a second signal; default: none is sent")
    parser.add_argument("--output", type=Path, default=Path(".run/stops"))
    parsed = parser.parse_args()
    parsed.output.mkdir(parents=True, exist_ok=True)
    table = Table("backend", "middleware", "state", "seconds", "replies")
    found = []
    for backend in parsed.backend:
        for middleware in parsed.middleware:
            arguments = [*COMMON, *BACKENDS[backend], *(MIDDLEWARE if middleware == "on" else [])]
            for state in parsed.states:
                log = parsed.output / f"{backend}-{middleware}-{state.replace(' ', '-')}.log"
                runs = [measure(arguments, state, repeat, parsed.again, log) for repeat in range(parsed.repeats)]
                seconds = [took for took, _ in runs]
                replies = sorted({reply for _, replies in runs for reply in replies})
                found.append({"backend": backend, "middleware": middleware, "state": state, "seconds": seconds})
                found[-1]["replies"] = [replies for _, replies in runs]
                table.add_row(backend, middleware, state, ", ".join(f"{took:.1f}" for took in seconds), str(replies))
                (parsed.output / "stops.json").write_text(json.dumps(found, indent=1))
    Console(width=120).print(table)
    return 0 if all(max(row["seconds"]) < MOST_SECONDS for row in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
