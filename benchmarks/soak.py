"""Mixed load over HTTP for a while: memory, blocks and pages left in use, wrong tokens, and how long a stop takes.

    python benchmarks/soak.py [--minutes 30] [--output .run/soak]

The small model of the evaluation is served with a hot cache and so little host memory that requests are preempted.
Clients send short prompts, whose tokens must be those of dense attention since the selection covers them, and long
ones with shared prefixes; they leave in the middle of answers and of prompts. Everything stays on this machine.
The exit status is 0 only if every check passes.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table
from server import Server, running
from tqdm import tqdm

MODEL = Path(__file__).parents[1] / "vllm_lrqk" / "evaluation" / "model"
VOCABULARY, LENGTH = 2000, 4096
COVERED, TOP_K, ANSWER = 400, 512, 24
"""Prompts of so many tokens and their answers are covered by the selection."""
CLEAR = 0.02
"""Log-probability between the best token and the next one from which rounding cannot exchange them (float32)."""
COMMON = [str(MODEL), "--dtype", "float32", "--max-model-len", str(LENGTH), "--enforce-eager"]
LRQK = {"top_k": TOP_K, "page_size": 64, "rank": 16, "hot_cache": True, "host_memory_gib": 0.012}
SERVE = [*COMMON, "--attention-backend", "LRQK", "--additional-config", json.dumps({"lrqk": LRQK})]
SERVE += ["--max-num-seqs", "6", "--max-num-batched-tokens", "512"]
MOST_GROWTH, MOST_SECONDS = 0.02, 10.0


@dataclass
class Tally:
    """What the clients did and saw."""

    requests: dict[str, int] = field(default_factory=dict)
    checked_tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def count(self, kind: str) -> None:
        self.requests[kind] = self.requests.get(kind, 0) + 1


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    answer: list[int]
    """Of dense attention, as far as every token is clear."""


def prompts(count: int, generator: random.Random) -> list[list[int]]:
    """Prompts that the selection covers."""
    lengths = [generator.randint(1, COVERED) for _ in range(count)]
    return [[generator.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def body(prompt: list[int], tokens: int, **more: object) -> dict[str, object]:
    common = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": str(MODEL), **common, **more}


async def dense_answers(url: str, asked: list[list[int]]) -> list[Case]:
    """What dense attention answers."""
    cases = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for prompt in asked:
            reply = (await client.post("/v1/completions", json=body(prompt, ANSWER, logprobs=2))).json()
            choice = reply["choices"][0]
            clear = 0
            for options in choice["logprobs"]["top_logprobs"]:
                best, *rest = sorted(options.values(), reverse=True)
                if rest and best - rest[0] < CLEAR:
                    break
                clear += 1
            cases.append(Case(prompt, choice["token_ids"][:clear]))
    return cases


class Client:
    """One user, who does one thing after the other."""

    def __init__(self, client: httpx.AsyncClient, cases: list[Case], tally: Tally, seed: int) -> None:
        self.client, self.cases, self.tally = client, cases, tally
        self.generator = random.Random(seed)
        shared = random.Random(0)
        self.shared = [[shared.randrange(VOCABULARY) for _ in range(1500)] for _ in range(3)]

    async def run(self, until: float) -> None:
        kinds = [self.covered, self.covered, self.long, self.leave_answer, self.leave_prompt, self.sampled]
        while time.monotonic() < until:
            act = self.generator.choice(kinds)
            self.tally.count(act.__name__)
            try:
                await act()
            except Exception as error:  # every failure of a request is a finding, and the load goes on
                self.tally.errors.append(f"{act.__name__}: {error!r}")

    def long_prompt(self) -> list[int]:
        """Half of them begin like others."""
        length = self.generator.randint(600, LENGTH - 200)
        start = self.generator.choice(self.shared) if self.generator.random() < 0.5 else []
        return [*start, *(self.generator.randrange(VOCABULARY) for _ in range(length - len(start)))][:length]

    async def ask(self, request: dict[str, object]) -> dict:
        reply = await self.client.post("/v1/completions", json=request)
        reply.raise_for_status()
        return reply.json()

    async def covered(self) -> None:
        case = self.generator.choice(self.cases)
        choice = (await self.ask(body(case.prompt, ANSWER)))["choices"][0]
        self.tally.checked_tokens += len(case.answer)
        if choice["token_ids"][: len(case.answer)] != case.answer:
            self.tally.wrong.append(f"{len(case.prompt)} tokens: {choice['token_ids']} for {case.answer}")

    async def long(self) -> None:
        await self.ask(body(self.long_prompt(), self.generator.randint(1, 100)))

    async def sampled(self) -> None:
        more = {"temperature": 1.0, "frequency_penalty": 0.5, "n": 2}  # no seed: see docs/operations.md
        await self.ask(body(self.long_prompt()[:1000], 40, **more))

    async def leave_answer(self) -> None:
        request = body(self.long_prompt(), 150, stream=True)
        async with self.client.stream("POST", "/v1/completions", json=request) as reply:
            left = self.generator.randint(1, 20)
            async for _ in reply.aiter_lines():
                left -= 1
                if left == 0:
                    return

    async def leave_prompt(self) -> None:
        try:
            await asyncio.wait_for(self.ask(body(self.long_prompt(), 20)), self.generator.uniform(0.01, 0.5))
        except TimeoutError:
            return


async def load(
    server: Server, cases: list[Case], seconds: float, clients: int
) -> tuple[Tally, list[tuple[float, int]]]:
    """Run the clients; what they saw, and the server's memory every few seconds."""
    tally, memory, started = Tally(), [], time.monotonic()
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        users = [Client(client, cases, tally, seed).run(started + seconds) for seed in range(clients)]
        running_users = asyncio.gather(*users)
        with tqdm(total=round(seconds), unit="s", desc="load") as bar:
            while not running_users.done():
                now = time.monotonic() - started
                memory.append((now, await asyncio.to_thread(server.memory)))
                bar.update(round(min(now, seconds)) - bar.n)
                await asyncio.wait([running_users], timeout=5)
        await running_users
    return tally, memory


def growth(memory: list[tuple[float, int]], seconds: float) -> float:
    """Of the last sixth over the second sixth of the time, by medians."""
    parts = [
        [size for at, size in memory if first <= at / seconds < end] for first, end in ((1 / 6, 2 / 6), (5 / 6, 9))
    ]
    return statistics.median(parts[1]) / statistics.median(parts[0]) - 1


def left_in_use(server: Server) -> dict[str, float]:
    """Series that must be zero when nothing runs, once they are, or after half a minute."""
    names = "vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:lrqk_host_pages_in_use"
    deadline = time.monotonic() + 30
    while True:
        shown = server.series()
        left = {name: shown[name] for name in names}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


async def stop_while(server: Server, state: str) -> float:
    """Seconds that a stop takes: idle, in a prompt, while answering, or before the server is ready."""
    if state == "starting":
        await asyncio.sleep(6)
        return server.stop()
    server.wait_until_ready()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        users = [Client(client, [], Tally(), seed) for seed in range(6)]
        tokens = 1 if state == "prompt" else 1000
        pending = [asyncio.ensure_future(user.ask(body(user.long_prompt()[:3000], tokens))) for user in users]
        if state == "idle":
            for task in pending:
                task.cancel()
        await asyncio.sleep(0.3 if state == "prompt" else 4)
        took = await asyncio.to_thread(server.stop)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path(".run/soak"))
    parsed = parser.parse_args()
    parsed.output.mkdir(parents=True, exist_ok=True)
    asked, seconds = prompts(40, random.Random(1)), parsed.minutes * 60
    dense = [*COMMON, "--attention-backend", "CPU_ATTN", "--kv-cache-memory-bytes", str(256 << 20)]
    with running(dense, parsed.output / "dense.log") as server:
        cases = asyncio.run(dense_answers(server.url, asked))
    with running(SERVE, parsed.output / "lrqk.log") as server:
        tally, memory = asyncio.run(load(server, cases, seconds, parsed.clients))
        if server.process.poll() is not None:
            print(f"The server died; see {server.log}. First errors:", *tally.errors[:5], sep="\n")
            return 1
        left, shown = left_in_use(server), server.series()
        stops = {"after the load": server.stop()}
    for state in ("starting", "idle", "prompt", "answer"):
        server = Server(SERVE, parsed.output / f"stop-{state}.log")
        stops[state] = asyncio.run(stop_while(server, state))
    grown = growth(memory, seconds)
    checks = {
        "memory growth": (f"{grown:+.1%}", grown < MOST_GROWTH),
        "left in use": (str(left), not any(left.values())),
        "wrong answers": (f"{len(tally.wrong)} of {tally.checked_tokens} clear tokens", not tally.wrong),
        "failed requests": (str(len(tally.errors)), not tally.errors),
        "preemptions": (f"{shown['vllm:num_preemptions_total']:g}", shown["vllm:num_preemptions_total"] > 0),
        "longest stop": (f"{max(stops.values()):.1f} s", max(stops.values()) < MOST_SECONDS),
    }
    table = Table("", "found", "passes", title=f"{seconds / 60:g} minutes, {parsed.clients} clients, {tally.requests}")
    for name, (found, passes) in checks.items():
        table.add_row(name, found, "yes" if passes else "NO")
    Console().print(table)
    result = {"requests": tally.requests, "wrong": tally.wrong, "errors": tally.errors[:100], "stops": stops}
    result |= {"memory": memory, "series": shown, "checks": {name: found for name, (found, _) in checks.items()}}
    (parsed.output / "soak.json").write_text(json.dumps(result, indent=1))
    return 0 if all(passes for _, passes in checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
