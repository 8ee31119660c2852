"""The server under load: what is refused, what hangs up, what takes too long, what fails; keys; and how it starts.

The engine makes a pass only when a test lets it.
"""

import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.builders import small_tokenizer
from tests.launching import tidal_error
from tests.serving import FABLE, HTTP, MODEL, FakeEngine, client_of, sent, server_here, until
from tidal_dist.errors import UserError
from tidal_dist.generation.server import service
from tidal_dist.generation.server.service import Service
from tidal_dist.generation.server.settings import ServerSettings, read_api_key

TOKENIZER = small_tokenizer()


def metric(url: str, name: str) -> float:
    lines = [line for line in HTTP.get(f"{url}/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[1])


class Gated:
    """A server whose engine makes a pass only when a test lets it."""

    def __init__(self, **settings: Any):
        self.gate = threading.Semaphore(0)
        self.engines: list[FakeEngine] = []
        self.next_break_at = -1
        self._settings = settings

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    def _make_engine(self) -> FakeEngine:
        self.engines.append(FakeEngine(TOKENIZER, self._settings.get("batch_size", 4), self.gate))
        self.engine.break_at = self.next_break_at
        return self.engine

    def __enter__(self) -> "Gated":
        self._context = server_here(self._make_engine, TOKENIZER, self.gate, **self._settings)
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

    def test_texts_whose_constraint_is_being_made_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        go = threading.Event()
        monkeypatch.setattr(service, "constraint_of", lambda *_: go.wait(30) and None)
        with Gated(batch_size=2, queue=2, timeout_seconds=20) as here, ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(here.ask, choice=["a"], n=2) for _ in range(2)]
            until(lambda: here.service._held_texts == 4)
            assert here.ask().status_code == 429
            go.set()
            here.gate.release(10_000)
            assert [a.result().status_code for a in asked] == [200, 200]

    def test_a_constraint_is_not_waited_for_longer_than_a_request_may_take(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        go = threading.Event()
        monkeypatch.setattr(service, "constraint_of", lambda *_: go.wait(30) and None)
        with Gated(timeout_seconds=0.1) as here:
            response = here.ask(regex="a")
            go.set()
            assert (response.status_code, response.json()["error"]["code"]) == (408, "timeout")

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
            until(lambda: bool(here.engine.waiting))
            here.engine.waiting[0].listener = lambda _: None  # its first pass brings nothing
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

    def test_a_pass_that_fails_harms_only_the_requests_being_written(self, capfd: pytest.CaptureFixture[str]) -> None:
        with Gated(batch_size=2, queue=4) as here, ThreadPoolExecutor(4) as pool:
            here.engine.break_at = 5
            asked, streamed = pool.submit(here.ask), pool.submit(here.ask, stream=True)
            until(lambda: here.service.worker.texts == 2)
            waiting = [pool.submit(here.ask, n=2), pool.submit(here.ask, stream=True)]
            until(lambda: here.service.worker.texts == 5)
            here.gate.release(10_000)
            error = asked.result().json()["error"]
            assert (asked.result().status_code, error["code"], error["type"]) == (500, "pass_failed", "server_error")
            assert "RuntimeError" in error["message"]
            assert json.loads(streamed.result().text.split("data: ")[-1]) == {"error": error}
            assert [c["text"] for c in waiting[0].result().json()["choices"]] == [FABLE] * 2
            assert waiting[1].result().text.endswith("data: [DONE]\n\n")
            assert HTTP.get(f"{here.url}/health").status_code == 200
            assert metric(here.url, "tidal_failed_passes_total") == 1
            assert here.service.worker.texts == 0
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(
            "tidal serve: a pass has failed, and with it 2 of the requests: RuntimeError: the engine"
        )

    def test_where_a_new_engine_fails_too_everybody_is_told(self, capfd: pytest.CaptureFixture[str]) -> None:
        with Gated(batch_size=1) as here, ThreadPoolExecutor(2) as pool:
            here.engine.break_at, here.next_break_at = 5, 1
            asked = pool.submit(here.ask)
            until(lambda: here.service.worker.texts == 1)
            streamed = pool.submit(here.ask, stream=True)
            until(lambda: here.service.worker.texts == 2)
            assert HTTP.get(f"{here.url}/health").status_code == 200
            here.gate.release(10_000)
            assert asked.result().status_code == 500
            assert '"code": "generation_failed"' in streamed.result().text
            until(lambda: HTTP.get(f"{here.url}/health").status_code == 503)
            assert "restart the server" in HTTP.get(f"{here.url}/health").json()["status"]
            assert here.ask().status_code == 503
            assert metric(here.url, "tidal_failed_passes_total") == 2
        assert "nothing can be written; restart the server: RuntimeError" in capfd.readouterr().err

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


class TestSlowClients:
    """Who sends half a request, and then nothing more or a byte now and then."""

    @pytest.mark.parametrize(
        ("half", "what"),
        [
            (b"POST /v1/comp", b"header"),
            (b"GET /health HTTP/1.1\r\nHost: a\r\nX-Long: a", b"header"),
            (
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b'Content-Length: 200\r\n\r\n{"model": "small", "pro',
                b"body",
            ),
        ],
    )
    def test_half_a_request_is_answered_and_takes_no_place(self, half: bytes, what: bytes) -> None:
        settings = {"header_seconds": 1.0, "body_seconds": 1.0, "batch_size": 1, "queue": 0}
        with server_here(lambda: FakeEngine(TOKENIZER, 1), TOKENIZER, **settings) as (url, service), raw(url) as slow:
            slow.sendall(half)
            assert client_of(url).completions.create(model=MODEL, prompt="a").choices[0].text == FABLE
            assert service.worker.texts == 0
            answer = b"".join(iter(lambda: slow.recv(4096), b""))
            head, body = answer.split(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b"connection: close" in head.lower()
            assert json.loads(body)["error"]["code"] == "timeout"
            assert what in body

    @pytest.mark.parametrize(
        "begun",
        [
            b"",
            b"GET /health HTTP/1.1\r\nHost: a\r\nX-Long: ",
            b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",  # the next one is slow
            b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n",  # its body, which nobody reads
        ],
    )
    def test_a_byte_now_and_then_does_not_keep_a_connection(self, begun: bytes) -> None:
        settings = {"header_seconds": 0.2, "body_seconds": 0.2}
        with server_here(lambda: FakeEngine(TOKENIZER, 4), TOKENIZER, **settings) as (url, _), raw(url) as slow:
            slow.sendall(begun)
            slow.settimeout(0.02)
            until(lambda: is_closed_after(slow, b"a"))

    def test_who_waits_for_an_answer_is_not_cut_off(self) -> None:
        with Gated(header_seconds=0.5) as here, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(here.ask)
            until(lambda: here.service.worker.texts == 1)
            time.sleep(0.6)
            here.gate.release(10_000)
            assert asked.result().json()["choices"][0]["text"] == FABLE


def raw(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def is_closed_after(connection: socket.socket, byte: bytes) -> bool:
    """Send a byte; whether the other side has closed the connection."""
    try:
        connection.sendall(byte)
        return not connection.recv(4096)
    except TimeoutError:
        return False
    except ConnectionError:
        return True


class TestKey:
    def test_the_api_needs_it_and_the_page_says_so(self) -> None:
        with server_here(lambda: FakeEngine(TOKENIZER, 4), TOKENIZER, api_key="moon-9") as (url, _):
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
    for name in [
        m for m in sys.modules if m.startswith("tidal_dist.generation.server.") and not m.endswith("settings")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "tidal serve needs uvicorn, which is missing: pip install 'tidal-dist[serve]'" in tidal_error("serve", "x")


def test_a_service_can_be_made_without_a_loop() -> None:
    service = Service(lambda: FakeEngine(TOKENIZER, 4), TOKENIZER, ServerSettings(MODEL))  # type: ignore[arg-type]
    assert not service.worker.is_alive
