"""A `vllm serve` of its own on the loopback address, and what it and its processes take."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import requests
from process_memory import by_kind, of_process

START_SECONDS = 600


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


class Server:
    """A server process and its children.

    Args:
        arguments: of `vllm serve`, the model first.
        log: file of everything that it writes.
        environment: variables beside those of this process.
    """

    def __init__(self, arguments: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        vllm = str(Path(sys.executable).with_name("vllm"))
        command = [vllm, "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )

    def wait_until_ready(self) -> None:
        """Until it answers; ends the program with its last words if it does not."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            time.sleep(0.5)
        raise SystemExit(f"The server did not start; {self.log} ends with:\n{self.log.read_text()[-3000:]}")

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes in memory of its processes, by their titles and by kinds of memory; what they share is divided."""
        found: dict[str, dict[str, int]] = {}
        for process in self._processes():
            with contextlib.suppress(psutil.Error, OSError):
                name = process.name()
                name = name if name.startswith("VLLM") else "API server"
                kinds = found.setdefault(name, {})
                for kind, size in by_kind(of_process(process.pid)).items():
                    kinds[kind] = kinds.get(kind, 0) + size
        return found

    def _processes(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.Error:
            return []

    def names(self) -> list[str]:
        """Titles of its processes."""
        found = []
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                found.append(" ".join(process.cmdline()))
        return found

    def series(self) -> dict[str, float]:
        """Samples of `/metrics` by name; those of several labels are added."""
        found: dict[str, float] = {}
        text = requests.get(f"{self.url}/metrics", timeout=30).text
        for name, value in re.findall(r"^(vllm:\w+)(?:\{[^}]*\})? ([\d.eE+-]+)$", text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def stop(self, seconds: float = 60, again: float | None = None) -> float:
        """Ask it to end; seconds until it and all its children have gone.

        Args:
            seconds: after which they are killed.
            again: seconds after which it is asked a second time; None: never.
        """
        started, processes = time.monotonic(), self._processes()
        for wait in [seconds] if again is None else [again, seconds - again]:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(wait)
                break
        _, alive = psutil.wait_procs(processes[1:], max(0.1, seconds - (time.monotonic() - started)))
        took = time.monotonic() - started
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        return took


@contextlib.contextmanager
def running(arguments: list[str], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server that answers; it is stopped at the end if it still runs."""
    server = Server(arguments, log, environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
