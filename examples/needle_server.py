"""Serve the needle model with LRQK, ask for a needle in a long haystack over the OpenAI API, and show what it took.

    python examples/needle_server.py [--context 32768] [--top-k 512] [--rank 16] [--depth 0.5]

The exit status is 0 only if the answer is right. The hot cache is switched on, as on a GPU, so that hits and
misses can be seen on a machine that has none.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import requests
from needle_model import build, haystack, question
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

START_LIMIT_SECONDS = 600


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=32768, help="words of the haystack (one token each)")
    parser.add_argument("--depth", type=float, default=0.5, help="where the needle lies, 0 to 1")
    parser.add_argument("--top-k", type=int, default=512, help="tokens selected per step and KV head")
    parser.add_argument("--rank", type=int, default=16, help="rank of the key factors")
    return parser.parse_args()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serve(model: Path, arguments: argparse.Namespace, log: Path) -> Iterator[str]:
    """Run `vllm serve` and yield its address once it answers."""
    port = free_port()
    settings = {"lrqk": {"top_k": arguments.top_k, "rank": arguments.rank, "hot_cache": True}}
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model), "--attention-backend", "LRQK", "--additional-config", json.dumps(settings)),
        *("--max-model-len", str(arguments.context + 64), "--max-num-seqs", "2", "--dtype", "bfloat16"),
        *("--enforce-eager", "--host", "127.0.0.1", "--port", str(port)),
    ]
    # The development endpoint lets this script read the worker's counters.
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    print("$", " ".join(command))
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_until_ready(server: subprocess.Popen, url: str, log: Path) -> None:
    started = time.monotonic()
    with tqdm(desc="server start-up", unit="s", bar_format="{desc}: {elapsed}") as bar:
        while time.monotonic() - started < START_LIMIT_SECONDS:
            if server.poll() is not None:
                break
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{url}/health", timeout=5).ok:
                    return
            time.sleep(1)
            bar.update()
    raise SystemExit(f"The server did not start; its log ends with:\n{log.read_text()[-3000:]}")


def ask(url: str, prompt: str, words: int) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1200)
    model = client.models.list().data[0].id
    pieces = []
    with tqdm(desc="prompt and answer", total=words, unit="token") as bar:
        for event in client.completions.create(
            model=model, prompt=prompt, max_tokens=words, temperature=0, stream=True
        ):
            pieces.append(event.choices[0].text)
            bar.update()
    return "".join(pieces).strip()


def counters(url: str) -> dict:
    """The counters of the first rank; every layer must be served by LRQK."""
    reply = requests.post(f"{url}/collective_rpc", json={"method": "lrqk_counters"}, timeout=60)
    reply.raise_for_status()
    result = reply.json()["results"][0]
    if set(result["implementations"].values()) != {"LRQKImpl"}:
        raise SystemExit(f"Not every layer runs LRQK: {result['implementations']}")
    return result


def series(url: str, expected: dict) -> dict[str, float]:
    """The LRQK series of the server's `/metrics`, once they have caught up: they are written once a second."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        text = requests.get(f"{url}/metrics", timeout=30).text
        samples = (sample for metric in text_string_to_metric_families(text) for sample in metric.samples)
        found = {sample.name: sample.value for sample in samples if sample.name.startswith("vllm:lrqk_")}
        if found.get("vllm:lrqk_rows_attended_total") == expected["rows_attended"]:
            return found
        time.sleep(0.5)
    raise SystemExit(f"/metrics shows {found}, but the worker counted {expected}")


def report(answer: str, right: str, seconds: float, context: int, counted: dict, shown: dict) -> None:
    table = Table(title=f"needle in {context:,} tokens, {seconds:.1f} s")
    table.add_column("")
    table.add_column("LRQK", justify="right")
    table.add_column("dense attention", justify="right")
    device, host = counted["device_bytes_per_token"], counted["host_bytes_per_token"]
    table.add_row("device bytes per token", f"{device:,.0f}", f"{host:,.0f}")
    table.add_row("host bytes per token", f"{host:,.0f}", "0")
    rows = counted["rows_attended"] / max(1, counted["decode_tokens"])
    table.add_row("rows attended per decode step and layer", f"{rows:,.0f}", f"{context:,}")
    table.add_row("rows hit in the hot cache", f"{counted['rows_hit']:,}", "")
    table.add_row("rows missed, fetched from the host", f"{counted['rows_missed']:,}", "")
    table.add_row("bytes fetched", f"{counted['bytes_fetched']:,}", "")
    for name, value in shown.items():
        table.add_row(name, f"{value:,.0f}", "")
    Console().print(table)
    print("answer:  ", answer)
    print("expected:", right)


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        model = build(Path(folder, "needle-model"))
        depths = [arguments.depth]
        prompt, right = question(haystack(arguments.context - 1, depths), 0)
        with serve(model, arguments, Path(folder, "server.log")) as url:
            started = time.monotonic()
            answer = ask(url, prompt, len(right.split()))
            seconds = time.monotonic() - started
            counted = counters(url)
            report(answer, right, seconds, arguments.context, counted, series(url, counted))
    print("found" if answer == right else "NOT FOUND")
    return 0 if answer == right else 1


if __name__ == "__main__":
    sys.exit(main())
