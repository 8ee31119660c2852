"""The server's answers, its limits, and what becomes of rude clients; over an engine whose passes a test releases."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.builders import small_tokenizer
from tests.launching import tidal_error
from tests.serving import FABLE, MODEL, FakeEngine, server_here
from tests.test_generation import lively_model
from tidal_dist.errors import UserError
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.request import Limits, Request
from tidal_dist.generation.sampling import Sampling
from tidal_dist.generation.server.service import Service
from tidal_dist.generation.server.settings import read_api_key

TOKENIZER = small_tokenizer()
PROMPT = "12 + 34 ="
HTTP = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))  # one, since making one takes long


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A real one; a test that asks it directly does so while no request is under way."""
    return Engine(lively_model(6, torch.float32), TOKENIZER, batch_size=4)


@pytest.fixture(scope="module")
def real(engine: Engine) -> Iterator[str]:
    limits = {"max_request_bytes": 100_000, "max_prompt_bytes": 2000, "max_bytes_limit": 80}
    with server_here(engine, TOKENIZER, **limits) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(real: str) -> openai.OpenAI:
    return client_of(real)


def alone(prompt: str, sampling: Sampling, limits: Limits, alternatives: int = 0) -> Any:
    """What an engine of its own gives."""
    engine = Engine(lively_model(6, torch.float32), TOKENIZER)
    return next(engine.run([Request(prompt, sampling, limits, alternatives=alternatives)]))


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to be"
        time.sleep(0.01)


class TestCompletions:
    def test_texts_are_those_of_the_engine(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model=MODEL, prompt=[PROMPT, "潮"], n=2, temperature=1.0, seed=5, max_tokens=30
        )
        expected = [
            alone(prompt, Sampling(1.0, seed=5 + i), Limits(30)) for i, prompt in enumerate([PROMPT] * 2 + ["潮"] * 2)
        ]
        assert [choice.text for choice in answer.choices] == [g.text for g in expected]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        reasons = {"eos": "stop", "length": "length"}
        assert [choice.finish_reason for choice in answer.choices] == [reasons[g.finish] for g in expected]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len((PROMPT + "潮").encode())
        assert answer.usage.completion_tokens == sum(len(g.text.encode()) for g in expected)

    def test_a_stream_is_the_same_in_pieces(self, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 60, "n": 2}
        whole = client.completions.create(**asked, echo=True)
        pieces = list(
            client.completions.create(**asked, echo=True, stream=True, stream_options={"include_usage": True})
        )
        for index in range(2):
            mine = [c for piece in pieces for c in piece.choices if c.index == index]
            assert "".join(c.text for c in mine) == whole.choices[index].text
            assert mine[0].text == PROMPT
            assert [c.finish_reason for c in mine if c.finish_reason] == [whole.choices[index].finish_reason]
        assert len(pieces) > 5
        assert pieces[-1].usage == whole.usage
        assert len({piece.id for piece in pieces}) == 1

    def test_a_chunk_without_choices_comes_only_where_usage_was_asked_for(self, client: openai.OpenAI) -> None:
        pieces = list(client.completions.create(model=MODEL, prompt="", max_tokens=9, temperature=0, stream=True))
        assert all(piece.choices for piece in pieces)

    @pytest.mark.parametrize("stream", [False, True])
    def test_logprobs_are_of_each_char_in_reading_order_and_add_up(self, client: openai.OpenAI, stream: bool) -> None:
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 1.5, "seed": 11, "max_tokens": 40}
        expected = alone(PROMPT, Sampling(1.5, seed=11), Limits(40), alternatives=3)
        answer = client.completions.create(**asked, logprobs=3, stream=stream)
        found: list[Any] = (
            [c.logprobs for piece in answer for c in piece.choices] if stream else [answer.choices[0].logprobs]
        )
        tokens = [t for logprobs in found for t in logprobs.tokens]
        shown = [t for t in tokens if t not in ("<eob>", "<eos>")]
        text = b"".join(bytes([int(t[-2:], 16)]) if t.startswith("bytes:") else t.encode() for t in shown)
        assert text.decode() == expected.text
        assert len(tokens) - len(shown) == len(expected.details)
        assert sum(p for logprobs in found for p in logprobs.token_logprobs) == pytest.approx(expected.logprob)
        offsets = [o for logprobs in found for o in logprobs.text_offset]
        assert all(expected.text[o] == t for o, t in zip(offsets, tokens, strict=True) if len(t) == 1)
        likeliest = [top for logprobs in found for top in logprobs.top_logprobs]
        assert all(3 <= len(top) <= 4 for top in likeliest)
        assert all(token in top for top, token in zip(likeliest, tokens, strict=True))

    def test_stop_strings_are_held_back(self, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 1.5, "max_tokens": 60}
        texts = [choice.text for choice in client.completions.create(**asked, n=8, seed=1).choices]
        text = max(texts, key=len)
        stop = text[len(text) // 2 :][:3]
        seed = 1 + texts.index(text)
        pieces = list(client.completions.create(**asked, seed=seed, stop=[stop], stream=True, logprobs=0))
        assert "".join(c.text for piece in pieces for c in piece.choices) == text[: text.index(stop)]
        assert pieces[-1].choices[0].finish_reason == "stop"

    def test_the_tide(self, real: str) -> None:
        body = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 40, "trace": True, "logprobs": 2}
        whole = HTTP.post(f"{real}/v1/completions", json=body).json()["choices"][0]
        assert "".join(block["text"] for block in whole["tide"]) == whole["text"]
        events = tide_events(HTTP.post(f"{real}/v1/completions", json=body | {"stream": True}).text)
        blocks = [event for event in events if event["event"] == "block"]
        assert [b["text"] for b in blocks] == [b["text"] for b in whole["tide"]]
        chars: list[dict[str, Any]] = []
        number = 0
        for event in events:
            if event["event"] == "char":
                chars.append({k: v for k, v in event.items() if k != "event"})
                assert len(event["top"]) == 2
            else:
                assert chars == whole["tide"][number]["chars"]
                assert bytes(c["id"] for c in chars[-2::-1]).decode() == event["text"]
                assert sum(t["bytes"] for t in event["tokens"]) == len(event["text"].encode())
                chars, number = [], number + 1

    def test_a_text_as_long_as_allowed(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model=MODEL, prompt="a" * 2000, max_tokens=80, temperature=0)
        assert len(answer.choices[0].text.encode()) <= 80


def tide_events(text: str) -> list[dict[str, Any]]:
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    return [c["tide"] for chunk in chunks for c in chunk["choices"] if "tide" in c]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"temperature": "warm"}, 422, "temperature"),
        ({"temperature": True}, 422, "temperature"),
        ({"temperature": -1}, 422, "temperature"),
        ({"top_p": 0}, 422, "top_p"),
        ({"max_tokens": 0}, 422, "max_tokens"),
        ({"max_tokens": -5}, 422, "max_tokens"),
        ({"max_tokens": "7"}, 422, "max_tokens"),
        ({"max_tokens": 81}, 400, "max_tokens"),
        ({"n": 0}, 422, "n"),
        ({"n": 1000}, 400, "n"),
        ({"best_of": 2}, 422, "best_of"),
        ({"logprobs": 6}, 422, "logprobs"),
        ({"logprobs": True}, 422, "logprobs"),
        ({"logprobs": 1, "echo": True}, 422, "echo"),
        ({"stop": ""}, 422, "stop"),
        ({"stop": ["a", ""]}, 422, "stop"),
        ({"stop": [1]}, 422, "stop"),
        ({"seed": -1}, 422, "seed"),
        ({"presence_penalty": 0.5}, 422, "presence_penalty"),
        ({"frequency_penalty": -0.5}, 422, "frequency_penalty"),
        ({"logit_bias": {"50256": -100}}, 422, "logit_bias"),
        ({"suffix": "end"}, 422, "suffix"),
        ({"stream_options": {"include_usage": True}}, 422, "stream_options"),
        ({"prompt": [1, 2, 3]}, 422, "prompt"),
        ({"prompt": [[1, 2], [3]]}, 422, "prompt"),
        ({"prompt": []}, 422, "prompt"),
        ({"prompt": 7}, 422, "prompt"),
        ({"prompt": "half a pair \ud83d"}, 422, "prompt"),
        ({"prompt": "x" * 2001}, 400, "prompt"),
        ({"regex": "a", "choice": ["b"]}, 422, "regex"),
        ({"choice": [""]}, 422, "choice"),
        ({"model": "another"}, 404, "model"),
        ({"tempreature": 1}, 422, "tempreature"),
        ({"\ud83d": 1}, 422, None),
        ({"stop": ["\ud83d"]}, 422, "stop"),
    ],
)
def test_what_is_wrong_is_named(real: str, fields: dict[str, Any], status: int, param: str | None) -> None:
    response = post(real, json.dumps({"model": MODEL, "prompt": "a"} | fields).encode())
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert (param or "field") in error["message"]


def post(url: str, body: bytes, kind: str = "application/json", **headers: str) -> httpx.Response:
    return HTTP.post(f"{url}/v1/completions", content=body, headers={"Content-Type": kind, **headers})


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b'{"model": "small"', 400),
        (b'{"model": "small", "prompt": "caf\xe9"}', 400),
        (b'{"model": "small", "temperature": NaN}', 400),
        (b"[" * 50_000, 400),
        (b'{"model": "small", "seed": ' + b"9" * 5000 + b"}", 400),
        (b"[]", 422),
        (b"null", 422),
        (b'{"prompt": "a"}', 422),
        (b"\xef\xbb\xbf{}", 400),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else str(value),
)
def test_bodies_that_are_no_request(real: str, body: bytes, status: int) -> None:
    response = post(real, body)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_prompts_of_every_kind(client: openai.OpenAI) -> None:
    for prompt in ("", "\x00", "a\x00b\n", "\U0010ffff\u202e", " " * 500):
        asked: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        assert client.completions.create(**asked).choices[0].text == alone(prompt, Sampling(), Limits(12)).text


def test_other_paths(real: str, client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    assert post(real, b"{}", kind="text/plain").status_code == 415
    assert HTTP.get(f"{real}/nowhere").json()["error"]["message"] == "Not Found"
    assert HTTP.get(f"{real}/v1/completions").status_code == 405
    assert HTTP.get(f"{real}/health").json() == {"status": "ok"}
    page = HTTP.get(real)
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert "/v1/completions" in HTTP.get(f"{real}/openapi.json").json()["paths"]


def metric(url: str, name: str) -> float:
    lines = [line for line in HTTP.get(f"{url}/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[1])


class Gated:
    """A server whose engine makes a pass only when a test lets it."""

    def __init__(self, **settings: Any):
        self.gate = threading.Semaphore(0)
        self.engine = FakeEngine(TOKENIZER, settings.get("batch_size", 4), self.gate)
        self._settings = settings

    def __enter__(self) -> "Gated":
        self._context = server_here(self.engine, TOKENIZER, **self._settings)
        self.url, self.service = self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def ask(self, **fields: Any) -> httpx.Response:
        return HTTP.post(f"{self.url}/v1/completions", json={"model": MODEL, "prompt": "a"} | fields, timeout=30)


class TestLoad:
    def test_what_is_too_much_is_refused_and_what_was_accepted_finishes(self) -> None:
        with Gated(batch_size=2, queue=3) as here, ThreadPoolExecutor(40) as pool:
            asked = [pool.submit(here.ask) for _ in range(40)]
            until(lambda: sum(a.done() for a in asked) == 35)
            refused = [a.result() for a in asked if a.done()]
            assert {r.status_code for r in refused} == {429}
            assert {r.headers["retry-after"] for r in refused} == {"1"}
            assert refused[0].json()["error"]["code"] == "queue_full"
            here.gate.release(2)  # the first pass may have begun with one text
            until(lambda: metric(here.url, "tidal_running") == 2)
            assert metric(here.url, "tidal_queue_length") == 3
            here.gate.release(10_000)
            accepted = [a.result() for a in asked if a.result().status_code != 429]
            assert [r.json()["choices"][0]["text"] for r in accepted] == [FABLE] * 5
            assert here.engine.most == 2
            until(lambda: metric(here.url, "tidal_running") == metric(here.url, "tidal_queue_length") == 0)
            assert metric(here.url, "tidal_generated_bytes_total") == 5 * len(FABLE.encode())
            assert metric(here.url, "tidal_passes_total") == here.engine.passes
            assert metric(here.url, "tidal_first_byte_seconds_count") == 5
            assert metric(here.url, 'tidal_requests_total{code="429",path="/v1/completions"}') == 35

    def test_texts_of_one_request_are_taken_up_all_or_none(self) -> None:
        with Gated(batch_size=2, queue=2) as here, ThreadPoolExecutor(2) as pool:
            first = pool.submit(here.ask, n=3)
            until(lambda: here.service.worker.texts == 3)
            assert here.ask(n=2).status_code == 429
            last = pool.submit(here.ask)
            until(lambda: here.service.worker.texts == 4)
            here.gate.release(10_000)
            assert [c["text"] for c in first.result().json()["choices"]] == [FABLE] * 3
            assert last.result().status_code == 200

    def test_who_hangs_up_is_written_for_no_longer(self) -> None:
        with Gated() as here:
            for stream, passes in ((False, 0), (True, 0), (True, 3), (False, 3)):
                connection = sent(here.url, json.dumps({"model": MODEL, "prompt": "a", "stream": stream}).encode())
                until(lambda: here.service.worker.texts == 1)
                for _ in range(passes):
                    here.gate.release()
                connection.close()
                until(lambda: (here.gate.release(1) or True) and here.service.worker.texts == 0)
            assert len(here.engine.cancelled) == 4
            here.gate.release(10_000)
            assert here.ask().json()["choices"][0]["text"] == FABLE

    @pytest.mark.parametrize("stream", [False, True])
    def test_time_that_is_over_before_anything_was_written(self, stream: bool) -> None:
        with Gated(timeout_seconds=0.2) as here, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(here.ask, stream=stream)
            until(lambda: here.service.worker.texts == 1)
            time.sleep(0.3)
            here.engine.jobs[0].listener = lambda _: None  # its first pass brings nothing
            here.gate.release(10_000)
            response = asked.result()
            error = json.loads(response.text.removeprefix("data: ") if stream else response.text)["error"]
            assert (response.status_code, error["code"]) == (200 if stream else 408, "timeout")

    def test_time_that_is_over_ends_a_text_with_what_there_is(self) -> None:
        with Gated(timeout_seconds=0.5) as here, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(here.ask)
            here.gate.release(20)
            time.sleep(0.6)
            here.gate.release(1)
            choice = asked.result().json()["choices"][0]
            assert choice["finish_reason"] == "length"
            assert choice["finish"] == "timeout"
            assert choice["text"]
            assert FABLE.startswith(choice["text"])

    def test_an_engine_that_fails_is_told_to_all(self, capfd: pytest.CaptureFixture[str]) -> None:
        with Gated() as here, ThreadPoolExecutor(2) as pool:
            here.engine.break_at = 5
            asked, streamed = pool.submit(here.ask), pool.submit(here.ask, stream=True)
            until(lambda: here.service.worker.texts == 2)
            assert HTTP.get(f"{here.url}/health").status_code == 200
            here.gate.release(10_000)
            assert asked.result().status_code == 503
            assert '"code": "generation_failed"' in streamed.result().text
            until(lambda: HTTP.get(f"{here.url}/health").status_code == 503)
            assert here.ask().status_code == 503
        assert "the engine fails, as a test asks" in capfd.readouterr().err

    def test_a_request_that_the_engine_refuses_harms_no_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with Gated() as here:
            here.gate.release(10_000)

            def refuse(*_: Any) -> None:
                raise UserError("prompt: not this one")

            with monkeypatch.context() as patch:
                patch.setattr(here.engine, "submit", refuse)
                response = here.ask()
            assert (response.status_code, response.json()["error"]["message"]) == (422, "prompt: not this one")
            assert here.ask().status_code == 200

    def test_stopping_lets_go_of_what_waits_and_finishes_what_is_written(self) -> None:
        with Gated(batch_size=1, queue=4, grace_seconds=5.0) as here, ThreadPoolExecutor(2) as pool:
            first = pool.submit(here.ask)
            here.gate.release(3)
            until(lambda: metric(here.url, "tidal_running") == 1)
            second = pool.submit(here.ask)
            until(lambda: here.service.worker.texts == 2)
            here.service.close_soon()
            until(lambda: here.service.worker._is_closed)
            assert here.ask().status_code == 503
            here.gate.release(10_000)
            assert second.result().status_code == 503
            assert first.result().json()["choices"][0]["text"] == FABLE

    def test_stopping_ends_what_is_not_finished_within_the_grace(self) -> None:
        with Gated(grace_seconds=0.2) as here, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(here.ask, stream=True)
            here.gate.release(20)
            until(lambda: metric(here.url, "tidal_passes_total") == 20)
            here.service.close_soon()
            time.sleep(0.4)
            here.gate.release(1)
            assert '"finish": "shutdown"' in asked.result().text
            assert asked.result().text.endswith("data: [DONE]\n\n")


def sent(url: str, body: bytes, length: int | None = None) -> socket.socket:
    """A connection over which a request was sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body)
    return connection


def test_half_a_body(real: str) -> None:
    connection = sent(real, b'{"model": "small", "pro', length=200)
    connection.close()
    with server_here(FakeEngine(TOKENIZER, 4), TOKENIZER, body_seconds=0.2) as (url, _):
        connection = sent(url, b'{"model": "small", "pro', length=200)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        connection.close()
    assert HTTP.get(f"{real}/health").status_code == 200


class TestKey:
    def test_the_api_needs_it_and_the_page_says_so(self) -> None:
        with server_here(FakeEngine(TOKENIZER, 4), TOKENIZER, api_key="moon-9") as (url, _):
            assert client_of(url, "moon-9").completions.create(model=MODEL, prompt="a").choices[0].text == FABLE
            for wrong in ("moon-8", "moon-9x", "ключ"):
                headers = {"Authorization": f"Bearer {wrong}".encode()}
                response = HTTP.post(f"{url}/v1/completions", json={}, headers=headers)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert HTTP.get(f"{url}/v1/models").status_code == 401
            assert HTTP.get(f"{url}/health").status_code == 200
            assert 'data-key="needed"' in HTTP.get(url).text

    def test_where_it_comes_from(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TIDAL_API_KEY", raising=False)
        assert read_api_key(None) is None
        monkeypatch.setenv("TIDAL_API_KEY", "from-outside")
        assert read_api_key(None) == "from-outside"
        file = tmp_path / "key"
        file.write_text("from-file\n")
        assert read_api_key(file) == "from-file"
        for text in ("", "\n", "two words", "ключ"):
            file.write_text(text)
            with pytest.raises(UserError, match="--api-key-file"):
                read_api_key(file)
        monkeypatch.setenv("TIDAL_API_KEY", "")
        with pytest.raises(UserError, match="TIDAL_API_KEY: holds no key"):
            read_api_key(None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--port", "70000"], "--port 70000: must be between"),
        (["--queue", "-1"], "--queue -1: must be at least 0"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: Cannot assign"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere: cannot read (No such file"),
        (["--port", "TAKEN"], "Address already in use; choose another with --port"),
        (["--port", "0"], "nowhere: no config.json, so no exported model"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments: list[str], expected: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert expected in tidal_error("serve", "nowhere", *(port if a == "TAKEN" else a for a in arguments))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [
        m for m in sys.modules if m.startswith("tidal_dist.generation.server.") and not m.endswith("settings")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "tidal serve needs uvicorn, which is missing: pip install 'tidal-dist[serve]'" in tidal_error("serve", "x")


def test_a_service_can_be_made_without_a_loop() -> None:
    from tidal_dist.generation.server.settings import ServerSettings

    service = Service(FakeEngine(TOKENIZER, 4), TOKENIZER, ServerSettings(MODEL))  # type: ignore[arg-type]
    assert not service.worker.is_alive
