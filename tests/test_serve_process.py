"""`tidal serve` as a process: a thousand requests at once, and signals."""

import asyncio
import collections
import json
import signal
from pathlib import Path

import openai
import pytest

from tests.serving import server_process

pytestmark = pytest.mark.slow
BODY = {"model": "export", "prompt": "12 + 34 =", "max_tokens": 24, "temperature": 0}
KEY = "moon-9"


async def ask(port: int, go: asyncio.Event) -> tuple[int, str]:
    """Send a request when all are ready; status and body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(BODY).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    await go.wait()
    writer.write(body)
    answer = (await reader.read()).decode()
    writer.close()
    return int(answer.split()[1]), answer.split("\r\n\r\n", 1)[1]


async def ask_all(port: int, count: int) -> list[tuple[int, str]]:
    go = asyncio.Event()
    asked = [asyncio.create_task(ask(port, go)) for _ in range(count)]
    await asyncio.sleep(0.5)
    go.set()
    return await asyncio.gather(*asked)


def test_a_thousand_requests_and_then_a_signal(small_export: Path) -> None:
    arguments = ["--batch-size", "8", "--queue", "56"]
    with server_process(small_export, *arguments, TIDAL_API_KEY=KEY) as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        alone = client.completions.create(**BODY).choices[0].text
        answers = asyncio.run(ask_all(int(url.rsplit(":", 1)[1]), 1000))
        counts = collections.Counter(status for status, _ in answers)
        assert set(counts) == {200, 429}
        assert counts[200] >= 64
        assert {json.loads(body)["choices"][0]["text"] for status, body in answers if status == 200} == {alone}

        stream = client.completions.create(**BODY | {"max_tokens": 4000, "temperature": 1.0, "seed": 1}, stream=True)
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason in ("stop", "length")
        assert first.choices[0].text or rest
        assert process.wait(15) == 0
        assert process.stderr is not None
        assert process.stderr.read().startswith("serving export at http://127.0.0.1:")
