"""Mixed load over HTTP for a while: memory, blocks and pages left in use, wrong tokens, and how long a stop takes.

    python benchmarks/soak.py [--minutes 30] [--backend LRQK] [--output .run/soak]

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
from stops import MIDDLEWARE, MOST_SECONDS
from tqdm import tqdm

MODEL = Path(__file__).parents[1] / "vllm_lrqk" / "evaluation" / "model"
VOCABULARY, LENGTH = 2000, 4096
COVERED, TOP_K, ANSWER = 400, 512, 24
"""Prompts of so many tokens and their answers are covered by the selection."""
CLEAR = 0.02
"""Log-probability between the best token and the next one from which rounding cannot exchange them (float32)."""
COMMON = [str(MODEL), "--dtype", "float32", "--max-model-len", str(LENGTH), "--enforce-eager"]
LRQK = {"top_k": TOP_K, "page_size": 64, "rank": 16, "hot_cache": True, "host_memory_gib": 0.012}
LIMITS = ["--max-num-seqs", "6", "--max-num-batched-tokens", "512"]
DENSE = [*COMMON, "--attention-backend", "CPU_ATTN", "--kv-cache-memory-bytes"]
SERVE = {
    "LRQK": [*COMMON, *LIMITS, "--attention-backend", "LRQK", "--additional-config", json.dumps({"lrqk": LRQK})],
    "CPU_ATTN": [*DENSE, str(24 << 20), *LIMITS],
}
MOST_GROWTH = 0.02
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""oneDNN keeps what it has compiled for 1,024 shapes of products, and each number of tokens in a step is another: it
would grow for a quarter of an hour, with every attention backend. Large tensors in mappings of their own leave no holes
in the heap."""


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


Memory = list[tuple[float, dict[str, dict[str, int]]]]
"""Seconds, and bytes by process and kind as of `Server.memory`."""


async def load(server: Server, cases: list[Case], seconds: float, clients: int) -> tuple[Tally, Memory]:
    """Run the clients; what they saw, and the server's memory every few seconds."""
    tally, started = Tally(), time.monotonic()
    memory: Memory = []
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


def of_parts(memory: Memory, seconds: float) -> list[dict[str, float]]:
    """Bytes by process and kind in the second and in the last sixth of the time, medians."""
    found = []
    for first, end in ((1 / 6, 2 / 6), (5 / 6, 9)):
        rows = [parts for at, parts in memory if first <= at / seconds < end]
        names = {(process, kind) for parts in rows for process, kinds in parts.items() for kind in kinds}
        sizes = {
            f"{process} {kind}": [parts.get(process, {}).get(kind, 0) for parts in rows] for process, kind in names
        }
        sizes["total"] = [sum(sum(kinds.values()) for kinds in parts.values()) for parts in rows]
        found.append({name: statistics.median(values) for name, values in sizes.items()})
    return found


def left_in_use(server: Server) -> dict[str, float]:
    """Series that must be zero when nothing runs, once they are, or after half a minute."""
    names = ["vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:lrqk_host_pages_in_use"]
    deadline = time.monotonic() + 30
    while True:
        shown = server.series()
        left = {name: shown[name] for name in names if name in shown}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def describe(before: dict[str, float], after: dict[str, float]) -> Table:
    """What grew or shrank by more than a mebibyte."""
    table = Table("memory", "second sixth", "last sixth", "more", title="MiB; keys and values lie in the worker's")
    for name in sorted({*before, *after}, key=lambda name: -after.get(name, 0)):
        first, last = before.get(name, 0) / 2**20, after.get(name, 0) / 2**20
        if name == "total" or abs(last - first) > 1:
            table.add_row(name, f"{first:,.1f}", f"{last:,.1f}", f"{last - first:+,.1f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--backend", choices=SERVE, default="LRQK")
    parser.add_argument("--output", type=Path, default=Path(".run/soak"))
    parsed = parser.parse_args()
    parsed.output.mkdir(parents=True, exist_ok=True)
    asked, seconds = prompts(40, random.Random(1)), parsed.minutes * 60
    with running([*DENSE, str(256 << 20)], parsed.output / "dense.log") as server:
        cases = asyncio.run(dense_answers(server.url, asked))
    with running([*SERVE[parsed.backend], *MIDDLEWARE], parsed.output / "server.log", ENVIRONMENT) as server:
        tally, memory = asyncio.run(load(server, cases, seconds, parsed.clients))
        if server.process.poll() is not None:
            print(f"The server died; see {server.log}. First errors:", *tally.errors[:5], sep="\n")
            return 1
        left, shown = left_in_use(server), server.series()
        stop = server.stop()
    before, after = of_parts(memory, seconds)
    grown, preemptions = after["total"] / before["total"] - 1, shown["vllm:num_preemptions_total"]
    checks = {
        "memory growth": (f"{grown:+.1%}", grown < MOST_GROWTH),
        "left in use": (str(left), not any(left.values())),
        "wrong answers": (f"{len(tally.wrong)} of {tally.checked_tokens} clear tokens", not tally.wrong),
        "failed requests": (str(len(tally.errors)), not tally.errors),
        "preemptions": (f"{preemptions:g}", preemptions > 0),
        "stop after the load": (f"{stop:.1f} s", stop < MOST_SECONDS),
    }
    title = f"{parsed.backend}, {seconds / 60:g} minutes, {parsed.clients} clients, {tally.requests}"
    table = Table("", "found", "passes", title=title)
    for name, (found, passes) in checks.items():
        table.add_row(name, found, "yes" if passes else "NO")
    Console(width=120).print(table, describe(before, after))
    result = {"requests": tally.requests, "wrong": tally.wrong, "errors": tally.errors[:100], "stop": stop}
    result |= {"memory": memory, "series": shown, "checks": {name: found for name, (found, _) in checks.items()}}
    (parsed.output / "soak.json").write_text(json.dumps(result, indent=1))
    return 0 if all(passes for _, passes in checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
