"""Servers for tests: one in a thread of the test's process over any engine, and `tidal serve` as a process."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from data_pipeline.segmentation import segment
from data_pipeline.tokenizer import EOB, EOS, MixedTokenizer
from tests.ranks import ROOT, environment
from tidal_dist.generation.events import Block, Char, Generation, Text
from tidal_dist.generation.request import Request
from tidal_dist.generation.server.run import Server, listen
from tidal_dist.generation.server.service import Service
from tidal_dist.generation.server.settings import ServerSettings

MODEL = "small"
FABLE = " The tide runs out, and the tide comes in; 12 + 34 = 46 潮水退去 👍."

HTTP = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))  # one, since making one takes long


class FakeJob:
    def __init__(self, request: Request, listener: Callable[[Any], None] | None):
        self.request, self.generation, self.done, self.error = request, Generation(), False, None
        self.listener = listener or (lambda _: None)
        self.written: list[int] = []


class FakeEngine:
    """Writes `FABLE` for every prompt, a char a pass, for tests that say when a pass may happen.

    gate: released once for each pass that may happen; None: all may. break_at: the number of the pass that fails.
    jobs: those being written.
    """

    def __init__(self, tokenizer: MixedTokenizer, batch_size: int, gate: threading.Semaphore | None = None):
        self.tokenizer, self.batch_size, self.gate = tokenizer, batch_size, gate
        self.jobs: list[FakeJob] = []
        self.waiting: list[FakeJob] = []
        self.cancelled: list[FakeJob] = []
        self.passes, self.break_at, self.most = 0, -1, 0

    @property
    def has_work(self) -> bool:
        return bool(self.jobs or self.waiting)

    def submit(self, request: Request, listener: Callable[[Any], None] | None = None) -> FakeJob:
        job = FakeJob(request, listener)
        self.waiting.append(job)
        return job

    def cancel(self, job: FakeJob) -> None:
        self.cancelled.append(job)
        self._end(job, "cancelled")

    def step(self) -> None:
        if self.gate is not None:
            self.gate.acquire()
        self.passes += 1
        while self.waiting and len(self.jobs) < self.batch_size:
            self.jobs.append(self.waiting.pop(0))
        if self.passes == self.break_at:
            raise RuntimeError("the engine fails, as a test asks")
        self.most = max(self.most, len(self.jobs))
        for job in list(self.jobs):
            self._write(job)

    def _write(self, job: FakeJob) -> None:
        blocks = segment(FABLE, self.tokenizer.segmentation)
        block = blocks[len(job.generation.blocks)]
        is_last = len(job.generation.blocks) == len(blocks) - 1
        data = block.encode()[::-1]
        job.written.append(data[len(job.written)] if len(job.written) < len(data) else EOS if is_last else EOB)
        chars = [Char(i, -0.25, ((i, -0.25), (ord("z"), -2.0))[: job.request.alternatives]) for i in job.written]
        job.listener(chars[-1])
        if job.written[-1] < 256:
            return
        job.written.clear()
        if len((job.generation.text + block).encode()) > job.request.limits.max_bytes:
            self._end(job, "length")
            return
        job.generation.text += block
        tokens = self.tokenizer.encode_block(block)
        names, positions = tuple(map(self.tokenizer.name, tokens)), tuple(range(len(chars)))
        job.generation.details.append(Block(block, tuple(chars), tokens, names, 1, positions))
        job.listener(job.generation.details[-1])
        job.listener(Text(block))
        if is_last:
            self._end(job, "eos")

    def _end(self, job: FakeJob, finish: str) -> None:
        job.done, job.generation.finish = True, finish  # type: ignore[assignment]
        (self.jobs if job in self.jobs else self.waiting).remove(job)


@contextmanager
def server_here(
    make_engine: Callable[[], Any],
    tokenizer: MixedTokenizer,
    gate: threading.Semaphore | None = None,
    **settings: Any,
) -> Iterator[tuple[str, Service]]:
    """A server in a thread of this process; its address and its service. gate: that of the engines."""
    service = Service(make_engine, tokenizer, ServerSettings(**{"model": MODEL, "batch_size": 4, **settings}))
    server = Server(service)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
        finally:
            if gate is not None:
                gate.release(10_000)
            server.handle_exit(0, None)
            thread.join(20)
            assert not thread.is_alive(), "the server does not end"


@contextmanager
def server_process(export: Path, *arguments: str, **variables: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """`tidal serve` on a free port; its address and its process, which is told to end at the end of the block."""
    command = [sys.executable, "-m", "tidal_dist.cli", "serve", str(export), "--port", "0", "--json", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment() | variables
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise AssertionError(process.communicate()[1])
        yield json.loads(line)["url"], process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        finally:
            process.kill()


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def sent(url: str, body: bytes, length: int | None = None) -> socket.socket:
    """A connection over which a request was sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body)
    return connection


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to be"
        time.sleep(0.01)
