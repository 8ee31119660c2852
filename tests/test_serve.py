"""The server's answers over a real engine, and what it says of requests that are wrong."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.builders import small_tokenizer
from tests.serving import HTTP, MODEL, client_of, server_here, until
from tests.test_engine import Failing
from tests.test_generation import lively_model
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.events import Generation
from tidal_dist.generation.request import Limits, Request
from tidal_dist.generation.sampling import Sampling
from tidal_dist.generation.scoring import score
from tidal_dist.generation.server import service
from tidal_dist.model.transformer import TidalTransformer

TOKENIZER = small_tokenizer()
PROMPT = "12 + 34 ="


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A real one; a test that asks it directly does so while no request is under way."""
    return Engine(lively_model(6, torch.float32), TOKENIZER, batch_size=4)


@pytest.fixture(scope="module")
def real(engine: Engine) -> Iterator[str]:
    limits = {"max_request_bytes": 100_000, "max_prompt_bytes": 2000, "max_bytes_limit": 80}
    with server_here(lambda: engine, TOKENIZER, **limits) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(real: str) -> openai.OpenAI:
    return client_of(real)


def alone(prompt: str, sampling: Sampling, limits: Limits, alternatives: int = 0) -> Any:
    """What an engine of its own gives."""
    engine = Engine(lively_model(6, torch.float32), TOKENIZER)
    return next(engine.run([Request(prompt, sampling, limits, alternatives=alternatives)]))


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

    def test_the_lowest_temperature_is_greedy(self, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20}
        for temperature in (1e-300, 5e-324):
            text = client.completions.create(**asked, temperature=temperature).choices[0].text
            assert text == alone(PROMPT, Sampling(), Limits(20)).text

    def test_a_text_as_long_as_allowed(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(model=MODEL, prompt="a" * 2000, max_tokens=80, temperature=0)
        assert len(answer.choices[0].text.encode()) <= 80


class TestPrompts:
    """`echo`: the prompt before the text, and how likely it is."""

    PROMPTS = ("12 + 34 = 46", "un café 潮水退去", "")

    def test_alone_it_is_answered_as_it_came(self, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": MODEL, "prompt": list(self.PROMPTS), "max_tokens": 0, "echo": True}
        answer = client.completions.create(**asked, n=2)
        assert [c.text for c in answer.choices] == [p for p in self.PROMPTS for _ in range(2)]
        assert {(c.finish_reason, c.logprobs) for c in answer.choices} == {("length", None)}
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 0
        pieces = [c for piece in client.completions.create(**asked, stream=True) for c in piece.choices]
        assert "".join(c.text for c in pieces) == "".join(self.PROMPTS)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("max_tokens", [0, 30])
    def test_its_log_probabilities_are_its_score(self, client: openai.OpenAI, stream: bool, max_tokens: int) -> None:
        asked: dict[str, Any] = {"model": MODEL, "prompt": list(self.PROMPTS), "temperature": 0, "logprobs": 2}
        answer = client.completions.create(**asked, max_tokens=max_tokens, echo=True, stream=stream)
        choices = [c for piece in answer for c in piece.choices] if stream else answer.choices
        model = lively_model(6, torch.float32)
        for index, prompt in enumerate(self.PROMPTS):
            mine = [c for c in choices if c.index == index]
            entries = [
                entry
                for c in mine
                for entry in zip(
                    c.logprobs.tokens,
                    c.logprobs.token_logprobs,
                    c.logprobs.top_logprobs,
                    c.logprobs.text_offset,
                    strict=True,
                )
            ]
            text = "".join(c.text for c in mine)
            of_prompt = [entry for entry in entries if entry[3] < len(prompt)]
            (expected,) = score(model, TOKENIZER, "cpu", [("", prompt)])
            assert sum(p for _, p, _, _ in of_prompt) == pytest.approx(expected.logprob, rel=1e-4)
            assert len(of_prompt) == len(prompt.encode()) + len(expected.blocks)
            assert all(text[o] == t for t, _, _, o in entries if len(t) == 1)
            assert all(t in top and top[t] == p and len(top) >= 2 for t, p, top, _ in entries)
            written = alone(prompt, Sampling(), Limits(30)) if max_tokens else Generation()
            assert text == prompt + written.text
            assert sum(p for _, p, _, o in entries if o >= len(prompt)) == pytest.approx(written.logprob, rel=1e-4)

    def test_a_long_one_is_scored_between_the_passes_of_others(self, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "temperature": 0}
        prompts = ["the tide runs out " * 100] * 8
        with ThreadPoolExecutor(1) as pool:
            judged = pool.submit(client.completions.create, **asked, prompt=prompts, echo=True, logprobs=0)
            assert client.completions.create(**asked, prompt=PROMPT).choices[0].text
            expected = prompts[0] + alone(prompts[0], Sampling(), Limits(20)).text
            assert {c.text for c in judged.result().choices} == {expected}


class TestFailure:
    """A real model, some passes of which fail."""

    @pytest.fixture
    def model(self) -> TidalTransformer:
        return lively_model(6, torch.float32)

    @pytest.fixture
    def url(self, model: TidalTransformer) -> Iterator[str]:
        with server_here(partial(Engine, model, TOKENIZER, batch_size=4), TOKENIZER) as (url, _):
            yield url

    @pytest.mark.parametrize("fields", [{"n": 3}, {"stream": True}, {"echo": True, "logprobs": 0}])
    def test_once(self, model: TidalTransformer, url: str, fields: dict[str, Any]) -> None:
        def fail(*_: Any) -> None:
            hook.remove()
            raise torch.OutOfMemoryError("no memory for 3 GiB,\nas a test has it")

        hook = model.register_forward_pre_hook(fail)
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 20}
        with pytest.raises(openai.APIError, match=r"a pass of the model has failed \(OutOfMemoryError\)") as caught:
            list(client_of(url).completions.create(**asked | fields))
        assert caught.value.code == "pass_failed"
        text = client_of(url).completions.create(**asked).choices[0].text
        assert text == alone(PROMPT, Sampling(), Limits(20)).text

    @pytest.mark.parametrize("fields", [{"n": 2}, {"stream": True}])
    def test_of_one_request_alone(
        self,
        model: TidalTransformer,
        url: str,
        fields: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(service, "constraint_of", lambda *_: Failing("after", 0))
        both_are_in = threading.Event()
        hook = model.register_forward_pre_hook(lambda *_: both_are_in.wait(30) and None)
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 40} | fields
        with ThreadPoolExecutor(2) as pool:
            failing = pool.submit(lambda: list(client_of(url).completions.create(**asked, extra_body={"regex": "a"})))
            other = pool.submit(client_of(url).completions.create, **asked | {"stream": False})
            until(lambda: waiting_and_running(url) == 2 * asked.get("n", 1))
            both_are_in.set()
            with pytest.raises(openai.APIError, match=r"has failed \(LookupError\)") as caught:
                failing.result()
            assert caught.value.code == "text_failed"
            expected = alone(PROMPT, Sampling(), Limits(40)).text
            assert {choice.text for choice in other.result().choices} == {expected}
        hook.remove()
        assert "tidal_failed_passes_total 0.0" in HTTP.get(f"{url}/metrics").text
        until(lambda: waiting_and_running(url) == 0)
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("tidal serve: a text of a request has failed: LookupError: no way on after 0 (")

    def test_always(self, model: TidalTransformer, url: str) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("the device is lost")

        hook = model.register_forward_pre_hook(fail)
        with pytest.raises(openai.InternalServerError, match="a pass of the model has failed"):
            client_of(url).completions.create(model=MODEL, prompt="a")
        until(lambda: HTTP.get(f"{url}/health").status_code == 503)
        hook.remove()
        with pytest.raises(openai.InternalServerError, match="restart the server"):
            client_of(url).completions.create(model=MODEL, prompt="a")


def waiting_and_running(url: str) -> float:
    lines = HTTP.get(f"{url}/metrics").text.splitlines()
    return sum(float(x.split()[1]) for x in lines if x.startswith(("tidal_queue_length ", "tidal_running ")))


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
        ({"stop": ""}, 422, "stop"),
        ({"stop": ["a", ""]}, 422, "stop"),
        ({"stop": [1]}, 422, "stop"),
        ({"stop": "x" * 1001}, 422, "stop"),
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
