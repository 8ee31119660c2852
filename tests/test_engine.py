"""Continuous batching, drafts, stop strings, penalties and what listeners are told."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.tokenizer import EOB, EOS, OUTPUT_VOCABULARY
from tests.test_generation import PROMPTS, TOKENIZER, UNSEEN, lively_model, teacher_forced
from tidal_dist.generation import cache as cache_module
from tidal_dist.generation import engine as engine_module
from tidal_dist.generation.constraint import constraint_of
from tidal_dist.generation.draft import LookUp
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.events import Block, Char, Event, Generation, Text
from tidal_dist.generation.repetition import WrittenBlocks
from tidal_dist.generation.request import Limits, Request, requests_of
from tidal_dist.generation.sampling import Sampling, keep, penalised

REPETITIVE = "12 + 34 = 46; 12 + 34 = 46; 12 + 34 ="
SETTINGS = [
    {"encoding": "rope"},
    {"encoding": "alibi", "char_layers": 1},
    {"encoding": "none", "char_layers": 2, "handoff": False, "token_attention": "causal"},
    {"char_positions": "forward", "char_layers": 2, "handoff": True},
]


class Dictated:
    """Holds a text to given blocks; what may come behind them is free."""

    def __init__(self, blocks: Sequence[str]):
        self.blocks = [block.encode()[::-1] for block in blocks]

    def start(self) -> int:
        return 0

    def allowed(self, state: int, written: bytes, room: int) -> np.ndarray:  # noqa: ARG002
        mask = np.zeros(OUTPUT_VOCABULARY, dtype=bool)
        block = self.blocks[state]
        mask[block[len(written)] if len(written) < len(block) else EOB] = True
        return mask

    def after(self, state: int, block: bytes) -> int:  # noqa: ARG002
        return state + 1


def generations_of(model: torch.nn.Module, requests: Sequence[Request], **options: object) -> list[Generation]:
    return list(Engine(model, TOKENIZER, **options).run(requests))  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_a_draft_changes_the_passes_and_nothing_else(number: int, temperature: float) -> None:
    model = lively_model(number, **SETTINGS[number])
    prompts = [*PROMPTS, REPETITIVE, "潮水退去，潮水又来。潮水退去，"]
    requests = list(requests_of(prompts, Request("", Sampling(temperature, seed=7), Limits(40))))
    plain, drafted = (generations_of(model, requests, batch_size=3, draft=d) for d in (None, LookUp()))
    assert drafted == plain  # texts, blocks, tokens, positions, ends
    assert sum(g.drafted for g in drafted) > 0
    assert sum(g.passes for g in drafted) <= sum(g.passes for g in plain)
    for one, other in zip(plain, drafted, strict=True):
        assert other.logprob == pytest.approx(one.logprob, abs=1e-5)
        assert one.drafted == one.accepted == 0


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_text_that_repeats_takes_fewer_than_half_the_passes_with_a_draft(number: int) -> None:
    model = lively_model(number, **SETTINGS[number])
    blocks = ["12", " +", " 34", " =", " 46", ";", " "] * 6
    request = Request("".join(blocks[:7]), limits=Limits(200, len(blocks)), constraint=Dictated(blocks))
    (plain,), (drafted,) = (generations_of(model, [request], draft=d) for d in (None, LookUp()))
    assert drafted == plain
    assert drafted.logprob == pytest.approx(plain.logprob, abs=1e-4)
    assert drafted.passes < 0.5 * plain.passes


def test_chars_have_the_logprobs_of_one_uncached_pass() -> None:
    model = lively_model(3)
    request = Request("12 + 34 =", Sampling(1.0, seed=5), Limits(30), alternatives=3)
    (generation,) = generations_of(model, [request])
    logits, labels = teacher_forced(model, request.prompt, generation)  # type: ignore[arg-type]
    expected = logits.log_softmax(dim=-1)
    chars = [char for block in generation.details for char in block.chars]
    assert [char.id for char in chars] == labels.tolist()
    for char, row in zip(chars, expected, strict=True):
        assert char.logprob == pytest.approx(float(row[char.id]), abs=1e-5)
        assert [i for i, _ in char.alternatives] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_sequences_enter_and_leave_and_get_what_they_get_alone(batch_size: int) -> None:
    model = lively_model(5, char_layers=2)
    prompts = [*PROMPTS, UNSEEN, "the tide " * 12] * 2
    requests = list(requests_of(prompts, Request("", Sampling(0.9), Limits(25))))
    alone = [generations_of(model, [request], batch_size=1)[0] for request in requests]
    assert generations_of(model, requests, batch_size=batch_size) == alone


def test_a_long_prompt_is_fed_in_parts_between_the_passes_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(6)
    requests = list(
        requests_of(["12", "the tide 12 + 34 " * 6, "", "潮水退去" * 9], Request("", Sampling(0.7), Limits(20)))
    )
    whole = generations_of(model, requests)
    monkeypatch.setattr(engine_module, "_PROMPT_TOKENS", 7)
    monkeypatch.setattr(engine_module, "_FEW_TOKENS", 2)
    parts = generations_of(model, requests)
    assert parts == whole
    assert [g.logprob for g in parts] == pytest.approx([g.logprob for g in whole], abs=1e-5)
    assert parts[1].passes > whole[1].passes


def told(model: torch.nn.Module, request: Request) -> tuple[Generation, list[Event]]:
    events: list[Event] = []
    engine = Engine(model, TOKENIZER)  # type: ignore[arg-type]
    job = engine.submit(request, events.append)
    while engine.has_work:
        engine.step()
    return job.generation, events


def test_listeners_are_told_of_chars_blocks_and_text() -> None:
    generation, events = told(lively_model(4), Request("12", Sampling(1.0, seed=2), Limits(24)))
    assert [e for e in events if isinstance(e, Block)] == generation.details
    assert "".join(e.text for e in events if isinstance(e, Text)) == generation.text
    chars = [e for e in events if isinstance(e, Char)]
    finished = [char for block in generation.details for char in block.chars]
    assert chars[: len(finished)] == finished
    assert all(char.id < 256 or char.id in (EOB, EOS) for char in chars)


@pytest.mark.parametrize("seed", range(5))
def test_text_ends_before_a_stop_string_and_no_part_of_it_is_shown(seed: int) -> None:
    model = lively_model(seed)
    whole, _ = told(model, Request("12", Sampling(1.0, seed=seed), Limits(60)))
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    generation, events = told(model, Request("12", Sampling(1.0, seed=seed), Limits(60, stop=("never\0", stop))))
    assert generation.finish == "stop"
    assert generation.text == whole.text[: whole.text.index(stop)]
    assert "".join(e.text for e in events if isinstance(e, Text)) == generation.text
    assert whole.blocks[: len(generation.blocks)] == generation.blocks


def test_a_cancelled_request_leaves_and_the_others_go_on() -> None:
    model = lively_model(2)
    requests = list(requests_of(PROMPTS, Request("", Sampling(1.0), Limits(30))))
    undisturbed = generations_of(model, requests)
    engine = Engine(model, TOKENIZER, batch_size=2)
    jobs = [engine.submit(request) for request in requests]
    engine.step()
    engine.cancel(jobs[1])
    engine.cancel(jobs[3])  # it waits still
    while engine.has_work:
        engine.step()
    assert [job.generation.finish for job in jobs].count("cancelled") == 2
    for i in (0, 2):
        assert jobs[i].generation == undisturbed[i]


class Failing:
    """Allows everything, and fails in one of its methods from some block on."""

    def __init__(self, method: str, block: int):
        self._method, self._block = method, block

    def start(self) -> int:
        return 0

    def allowed(self, state: int, written: bytes, room: int) -> np.ndarray:  # noqa: ARG002
        self._fail("allowed", state)
        return np.ones(OUTPUT_VOCABULARY, dtype=bool)

    def after(self, state: int, block: bytes) -> int:  # noqa: ARG002
        self._fail("after", state)
        return state + 1

    def _fail(self, method: str, state: int) -> None:
        if (method, state) == (self._method, self._block):
            raise LookupError(f"no way on {method} {state}")


class FailingDraft:
    """Proposes nothing, and for prompts with a certain block fails to."""

    def __init__(self, block: str):
        self._block, self._fails = block, False

    def begin(self, blocks: Sequence[str]) -> "FailingDraft":
        begun = FailingDraft(self._block)
        begun._fails = self._block in blocks
        return begun

    def add(self, block: str) -> None:
        pass

    def propose(self, written: bytes) -> list[bytes]:  # noqa: ARG002
        if self._fails:
            raise LookupError("no way on propose")
        return []


def fail_to_listen(event: Event) -> None:
    if isinstance(event, Block):
        raise LookupError("no way on listen")


class TestOneThatFails:
    """A request whose constraint, draft or listener fails."""

    PROMPTS = (*PROMPTS, *["the tide runs out " * 3] * 3)  # the last are read once

    @pytest.mark.parametrize("batch_size", [2, 20])
    @pytest.mark.parametrize("place", ["allowed", "after", "listen", "propose"])
    def test_harms_no_other(self, batch_size: int, place: str) -> None:
        model = lively_model(5, char_layers=2)
        requests = list(requests_of(self.PROMPTS, Request("", Sampling(0.9), Limits(10))))
        expected = generations_of(model, requests, batch_size=batch_size)
        engine = Engine(
            model, TOKENIZER, batch_size=batch_size, draft=FailingDraft("!?") if place == "propose" else None
        )
        constraint = Failing(place, 0) if place in ("allowed", "after") else None
        jobs = [engine.submit(request) for request in requests[:4]]
        prompts = ("!?",) if place == "propose" else ("12", self.PROMPTS[-1])
        failing = [
            engine.submit(Request(prompt, constraint=constraint), fail_to_listen if place == "listen" else None)
            for prompt in prompts
        ]
        jobs += [engine.submit(request) for request in requests[4:]]
        while engine.has_work:
            engine.step()
        assert [job.generation for job in jobs] == expected
        for job in failing:
            assert job.done
            with pytest.raises(LookupError, match=f"no way on {place}"):
                _ = job.generation
            engine.cancel(job)  # there is nothing left to end
            assert isinstance(job.error, LookupError)

    def test_is_raised_in_its_turn(self) -> None:
        model = lively_model(5)
        requests = [Request("12", limits=Limits(9)), Request("12", constraint=Failing("after", 0))]
        generations = Engine(model, TOKENIZER).run(requests)
        assert next(generations) == generations_of(model, requests[:1])[0]
        with pytest.raises(LookupError, match="no way on after 0"):
            next(generations)


def test_a_penalty_makes_repeating_rarer() -> None:
    shares = []
    for penalty in (1.0, 3.0):
        sampling = Sampling(repetition_penalty=penalty)
        generations = [
            g for seed in range(4) for g in generations_of(lively_model(seed), [Request("12", sampling, Limits(90))])
        ]
        shares.append(sum(len(set(g.blocks)) for g in generations) / sum(len(g.blocks) for g in generations))
    assert shares[1] > shares[0]


@given(
    st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), max_size=6),
    st.text(st.sampled_from("abc"), max_size=3),
)
def test_what_would_repeat_a_block_is_what_an_earlier_block_has_there(blocks: list[str], end: str) -> None:
    written = end[::-1].encode()
    expected: set[int] = set()
    for block in blocks:
        if block == end:
            expected |= {EOB, EOS}
        elif block.endswith(end):
            expected.add(block.encode()[len(block) - len(end) - 1])
    assert WrittenBlocks(blocks).next_ids(written) == expected


@given(
    st.lists(st.integers(-800, 800).map(lambda i: i / 100), min_size=2, max_size=20, unique=True), st.floats(0.0, 1.0)
)
@settings(max_examples=50)
def test_min_p_keeps_what_is_so_many_times_as_likely_as_the_likeliest(values: list[float], min_p: float) -> None:
    logits = np.array(values)
    kept = np.isfinite(keep(logits, 0, 1.0, min_p))
    ratio = np.exp(logits - logits.max())
    assert kept[ratio > min_p + 1e-9].all()
    assert not kept[ratio < min_p - 1e-9].any()


def test_a_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    assert penalised(np.array([2.0, -2.0, 1.0]), {0, 1}, 2.0).tolist() == [1.0, -4.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Limits(0), "max_bytes 0: must be at least 1"),
        (lambda: Limits(stop=("a", "")), "an empty string would stop every text"),
        (lambda: Sampling(temperature=-1.0), "temperature -1.0: must be at least 0"),
        (lambda: Sampling(temperature=float("nan")), "temperature nan: must be"),
        (lambda: Sampling(top_p=0.0), "top_p 0.0: must be more than 0"),
        (lambda: Sampling(min_p=1.5), "min_p 1.5: must be between 0 and 1"),
        (lambda: Sampling(repetition_penalty=0.5), "repetition_penalty 0.5: must be at least 1"),
        (lambda: Sampling(seed=-1), "seed -1: must be"),
    ],
)
def test_what_cannot_be_asked(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]


REQUESTS = [
    ({"regex": r"(12 \+ 34 = 46; )+"}, Sampling()),
    ({"regex": r"(the tide |runs out )+"}, Sampling(1.0, seed=3)),
    ({"choices": ["12 + 34 = 46; 12", "12 + 34 = 47", "潮水又来。潮水退去"]}, Sampling(1.0, seed=1)),
    ({"choices": ["the tide runs out and the tide comes in"]}, Sampling(0.7, top_k=9, repetition_penalty=1.5)),
]


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_a_constraint_and_a_draft_go_together(number: int) -> None:
    held, sampling = REQUESTS[number]
    model, most = lively_model(number, **SETTINGS[number]), TOKENIZER.segmentation.max_block_bytes
    constraint = constraint_of(held.get("regex"), held.get("choices"), most)  # type: ignore[arg-type]
    prompts = [REPETITIVE, "the tide runs out and the tide comes in. ", "潮水退去，潮水又来。"]
    requests = list(requests_of(prompts, Request("", sampling, Limits(45), constraint)))
    plain, drafted = (generations_of(model, requests, draft=d) for d in (None, LookUp()))
    assert drafted == plain
    assert sum(g.accepted for g in drafted) > 0
    for one, other in zip(plain, drafted, strict=True):
        assert [c.logprob for b in other.details for c in b.chars] == pytest.approx(
            [c.logprob for b in one.details for c in b.chars], abs=1e-6
        )


def tokens_fed(engine: Engine) -> int:
    """Tokens that the model is given until all is done."""
    fed = 0

    def count(_: object, inputs: tuple) -> None:
        nonlocal fed
        fed += int(inputs[0].document.sum())

    hook = engine.model.register_forward_pre_hook(count)
    while engine.has_work:
        engine.step()
    hook.remove()
    return fed


@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_long_prompt_of_several_requests_is_read_once(batch_size: int) -> None:
    model = lively_model(7, char_layers=2)
    prompt = "the tide 12 + 34 " * 40
    requests = [*requests_of([prompt, prompt, "12", prompt, prompt], Request("", Sampling(1.0), Limits(20)))]
    alone = [generations_of(model, [request])[0] for request in requests]
    engine = Engine(model, TOKENIZER, batch_size=batch_size)
    jobs = [engine.submit(request) for request in requests]
    n_tokens = jobs[0].writing.prompt_tokens
    fed = tokens_fed(engine)
    assert [job.generation for job in jobs] == alone
    assert n_tokens < fed < 2 * n_tokens


def test_room_for_a_long_sequence_is_given_back_when_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_KEPT_TOKENS", 100)
    model = lively_model(5)
    requests = [
        Request("潮水退去" * 150, limits=Limits(max_blocks=1), constraint=Dictated([" 12"])),
        Request("12 + 34 =", limits=Limits(max_blocks=3), constraint=Dictated([" 46", ";", " 7"])),
    ]
    alone = [generations_of(model, [request])[0] for request in requests]
    engine = Engine(model, TOKENIZER)
    jobs = [engine.submit(request) for request in requests]
    rooms = []
    while engine.has_work:
        engine.step()
        rooms.append(engine._cache.token_capacity)
    assert [job.generation for job in jobs] == alone
    assert max(rooms) >= jobs[0].writing.prompt_tokens
    assert rooms[-1] < max(rooms) / 4


def test_prompts_that_do_not_fit_side_by_side_take_turns_and_one_that_never_fits_is_an_error() -> None:
    model = lively_model(5)
    requests = [*requests_of(["潮水退去" * 30, "12", "the tide" * 30], Request("", Sampling(1.0), Limits(20)))]
    needed = max(Engine(model, TOKENIZER)._bytes_of(1, 1 + len(str(r.prompt).encode())) for r in requests)
    engine = Engine(model, TOKENIZER, cache_bytes=needed)
    jobs, most = [engine.submit(request) for request in requests], 0
    while engine.has_work:
        engine.step()
        most = max(most, len(engine.jobs))
    assert most < len(requests)
    assert [job.generation for job in jobs] == [generations_of(model, [request])[0] for request in requests]
    with pytest.raises(UserError, match=r"a prompt of .* tokens needs .* GB for keys and values on cpu"):
        engine.submit(Request("潮水退去" * 3000))
