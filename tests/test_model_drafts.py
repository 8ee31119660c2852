"""Drafts by the model's own head: the same text in fewer passes, whatever the head says, and nothing left behind."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tidal_dist
from data_pipeline.errors import UserError
from data_pipeline.tokenizer import OUTPUT_VOCABULARY
from tests.builders import document_of, packed, small_model
from tests.exporting import write_export_of
from tests.launching import tidal_error, tidal_here
from tests.serving import HTTP, MODEL, client_of, server_here
from tests.test_draft_head import as_model_of_its_own
from tests.test_engine import Dictated, generations_of
from tests.test_generation import PROMPTS, TOKENIZER, UNSEEN, blocks_of, lively_model
from tidal_dist.bench import generate as bench
from tidal_dist.doctor import oracle
from tidal_dist.generation.constraint import constraint_of
from tidal_dist.generation.draft import ByModel, draft_named
from tidal_dist.generation.drafting import Drafting
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.events import Generation
from tidal_dist.generation.request import Limits, Request, requests_of
from tidal_dist.generation.sampling import Sampling
from tidal_dist.model.transformer import Layer, TidalTransformer

# Of three layers.
SETTINGS: list[dict[str, Any]] = [
    {"encoding": "rope", "draft_layers": 2},
    {"encoding": "alibi", "char_layers": 2, "draft_layers": 1},
    {"encoding": "none", "char_layers": 2, "handoff": False, "token_attention": "causal", "draft_layers": 1},
    {"char_positions": "forward", "handoff": True, "places": False, "draft_layers": 1},
]
# Two settings greedily, one without handoff among the chars' own; the others, and drawn texts, are left to `make test`.
NUMBERS = [pytest.param(n, marks=() if n in (1, 3) else pytest.mark.slow) for n in range(len(SETTINGS))]
TEMPERATURES = [0.0, pytest.param(0.8, marks=pytest.mark.slow)]


def agreeing_model(seed: int, **settings: Any) -> TidalTransformer:
    """A model whose draft head says what all its layers say: those that it leaves out do nothing to a char."""
    model = lively_model(seed, **settings)
    config = model.config
    with torch.no_grad():
        for layer in list(model.layers)[config.n_layers - config.char_depth : config.draft_entry]:
            assert isinstance(layer, Layer)
            layer.out.weight.zero_()
            layer.mlp.down.weight.zero_()
        if config.has_handoff:
            model.draft_handoff.weight.copy_(model.handoff.weight)
            model.draft_handoff_norm.weight.copy_(model.handoff_norm.weight)
        else:
            model.draft_handoff.weight.zero_()
    return model


def compared(
    model: TidalTransformer, requests: Sequence[Request], **options: Any
) -> tuple[list[Generation], list[Generation]]:
    """Generations without and with the draft."""
    plain, drafted = (generations_of(model, requests, draft=draft, **options) for draft in (None, ByModel()))
    assert drafted == plain  # texts, blocks, tokens, positions, ends
    for one, other in zip(plain, drafted, strict=True):
        assert other.logprob == pytest.approx(one.logprob, abs=1e-5)
        assert one.draft_passes == one.drafted == 0
        assert other.accepted <= other.drafted <= other.draft_passes
    return plain, drafted


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_draft_changes_the_passes_and_nothing_else(number: int, temperature: float) -> None:
    model = lively_model(number, **SETTINGS[number])
    prompts = [*PROMPTS, "12 + 34 = 46; 12 +"]
    requests = list(requests_of(prompts, Request("", Sampling(temperature, seed=7), Limits(12))))
    plain, drafted = compared(model, requests, batch_size=3)
    assert sum(g.passes for g in drafted) <= sum(g.passes for g in plain)
    assert sum(g.drafted for g in drafted) > 0
    assert generations_of(model, requests, batch_size=1, draft=ByModel()) == plain


@pytest.mark.parametrize("number", NUMBERS)
def test_a_head_that_agrees_has_all_its_chars_accepted(number: int) -> None:
    """Then a block takes two passes: one for its first char, one that checks the rest."""
    model = agreeing_model(number, **SETTINGS[number])
    requests = list(requests_of([*PROMPTS, UNSEEN], Request("", limits=Limits(30))))
    plain, drafted = compared(model, requests)
    assert any(g.passes > 2 * (len(g.blocks) + 1) for g in plain)
    for g in drafted:
        assert g.accepted == g.drafted
        assert g.passes in (2 * len(g.blocks), 2 * len(g.blocks) + 2)  # of one that no longer fits
    assert any(g.drafted for g in drafted)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_head_says_what_a_model_of_its_layers_says(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = lively_model(number, **SETTINGS[number]), []
    make_pass = Drafting._pass

    def listened(drafting: Drafting, rows: slice, jobs: Any, feeds: Any) -> np.ndarray:
        logits = make_pass(drafting, rows, jobs, feeds)
        said.append((feeds[0].chars, logits[0, : len(feeds[0].chars)]))
        return logits

    monkeypatch.setattr(Drafting, "_pass", listened)
    prompt = "un café 潮水退 12 ="
    (g,) = generations_of(model, [Request(prompt, Sampling(0.8, seed=3), Limits(16))], draft=ByModel())
    config, weights = as_model_of_its_own(model)
    blocks = [*blocks_of(prompt), *g.blocks, "never written"]
    sign = -1 if config.char_positions == "mirrored" else 1
    assert len(said) > 2
    for chars, logits in said:
        block, start = chars[0][2:]
        context = oracle.sample(oracle.Document((), tuple(blocks)), block, TOKENIZER, config).tokens
        assert start == len(context)
        slots = [oracle.Slot(i, start + sign * c, c + 1, block, c) for i, c, _, _ in chars]
        with torch.no_grad():
            truth = oracle.logits(oracle.Sample(context, slots, []), config, weights)
        torch.testing.assert_close(torch.from_numpy(logits), truth.float(), rtol=1e-5, atol=1e-5)


def test_dropped_drafts_leave_nothing_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(1, **SETTINGS[1])
    engine = Engine(model, TOKENIZER, batch_size=4, draft=ByModel())
    draft, rounds = Drafting.draft, 0

    def watched(drafting: Drafting, *arguments: Any) -> None:
        nonlocal rounds
        before = {name: buffer.clone() for name, buffer in engine._cache._buffers.items()}
        drafted = [job.writing.generation.draft_passes for job in engine.jobs]
        draft(drafting, *arguments)
        rounds += [job.writing.generation.draft_passes for job in engine.jobs] != drafted
        for name, kept in before.items():
            assert torch.equal(engine._cache._buffers[name], kept), name

    monkeypatch.setattr(Drafting, "draft", watched)
    jobs = [engine.submit(request) for request in requests_of(PROMPTS, Request("", Sampling(1.0), Limits(20)))]
    while engine.has_work:
        engine.step()
    assert rounds > 2
    assert sum(job.generation.drafted - job.generation.accepted for job in jobs) > 0


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 5])
def test_sequences_enter_leave_and_share_a_long_prompt(batch_size: int) -> None:
    model, prompt = lively_model(7, **SETTINGS[1]), "the tide 12 + 34 " * 12
    requests = [*requests_of([prompt, prompt, "12", prompt, *PROMPTS], Request("", Sampling(1.0), Limits(12)))]
    compared(model, requests, batch_size=batch_size)


@pytest.mark.parametrize(
    "held", [{"regex": r"(12 \+ 34 = 46; )+"}, {"choices": ["12 + 34 = 47", "潮水又来。潮水退去"]}]
)
def test_a_constraint_goes_together_with_it(held: dict[str, Any]) -> None:
    model, most = lively_model(2, **SETTINGS[2]), TOKENIZER.segmentation.max_block_bytes
    constraint = constraint_of(held.get("regex"), held.get("choices"), most)
    compared(model, [*requests_of(PROMPTS, Request("", Sampling(0.9), Limits(30), constraint))])


def test_what_is_dictated_is_drafted_as_dictated() -> None:
    blocks = ["12", " +", " 34", " =", " 46", ";", " "] * 2
    request = Request("", limits=Limits(99, len(blocks)), constraint=Dictated(blocks))
    _, (g,) = compared(lively_model(3, **SETTINGS[3]), [request])
    assert g.text == "".join(blocks)
    assert g.accepted == g.drafted == len(g.text) - len(blocks)  # all but the first char of each block
    assert g.passes == 2 * len(blocks)


class FailsAhead:
    """Allows everything, and fails where a block has two chars."""

    def start(self) -> int:
        return 0

    def allowed(self, state: int, written: bytes, room: int) -> np.ndarray:  # noqa: ARG002
        if len(written) >= 2:
            raise LookupError("no way on")
        return np.arange(OUTPUT_VOCABULARY) < 256  # no end mark

    def after(self, state: int, block: bytes) -> int:  # noqa: ARG002
        return state


def test_a_constraint_that_fails_in_a_draft_harms_no_other() -> None:
    model = lively_model(5, **SETTINGS[0])
    requests = [*requests_of(PROMPTS, Request("", Sampling(0.9), Limits(12)))]
    expected = generations_of(model, requests)
    engine = Engine(model, TOKENIZER, draft=ByModel())
    failing = engine.submit(Request("12", constraint=FailsAhead()))
    jobs = [engine.submit(request) for request in requests]
    while engine.has_work:
        engine.step()
    assert [job.generation for job in jobs] == expected
    assert failing.writing.generation.passes == 1  # which wrote a char; the second was drafted, and then a third asked
    with pytest.raises(LookupError, match="no way on"):
        _ = failing.generation


def test_what_has_no_head_cannot_draft() -> None:
    model = lively_model()
    for make in (
        lambda: Engine(model, TOKENIZER, draft=ByModel()),
        lambda: draft_named("model", model.config),
    ):
        with pytest.raises(UserError, match="this model has no draft head"):
            make()
    with pytest.raises(UserError, match="draft guess: choose from lookup, model"):
        draft_named("guess", model.config)


@pytest.fixture(scope="module")
def drafting_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a small model with a draft head."""
    out = tmp_path_factory.mktemp("exported") / "export"
    model = small_model(TOKENIZER, dtype=torch.float32, char_layers=2, draft_layers=1).eval()
    probe = packed([[document_of("the tide 12 + 34")]], TOKENIZER, (48, 48))
    write_export_of(out, model, TOKENIZER, probe, "run_dir: somewhere\n")
    return out


def test_the_library_and_the_command_draft(drafting_export: Path, small_export: Path) -> None:
    tidal = tidal_dist.load(drafting_export, device="cpu")
    plain = tidal.generate(PROMPTS, max_bytes=16)
    for draft in ("model", "lookup"):
        assert tidal.generate(PROMPTS, max_bytes=16, draft=draft) == plain
        assert "".join(tidal.stream(PROMPTS[1], max_bytes=16, draft=draft)) == plain[1].text
    ask = ["generate", drafting_export, "--json", "--max-bytes", "16", "--prompt", PROMPTS[1], "--draft"]
    for words in ([], ["lookup"], ["model"]):
        found = json.loads(tidal_here(*ask, *words).stdout)
        assert found["text"] == plain[1].text
        assert (found["draft_passes"] > 0) == (words == ["model"])
    for command in ("generate", "serve"):
        more = ["--prompt", "a"] if command == "generate" else ["--port", "0"]
        assert "no draft head" in tidal_error(command, small_export, *more, "--draft", "model")
    with pytest.raises(UserError, match="no draft head"):
        tidal_dist.load(small_export, device="cpu").stream("12", draft="model")


def test_a_server_drafts_and_says_how_often_it_was_right() -> None:
    model, asked = agreeing_model(1, **SETTINGS[1]), {"model": MODEL, "prompt": PROMPTS, "max_tokens": 20}
    plain = generations_of(model, [*requests_of(PROMPTS, Request("", limits=Limits(20)))])
    with server_here(lambda: Engine(model, TOKENIZER, batch_size=4, draft=ByModel()), TOKENIZER) as (url, _):
        answer = client_of(url).completions.create(**asked, temperature=0)
        lines = HTTP.get(f"{url}/metrics").text.splitlines()
    assert [choice.text for choice in answer.choices] == [g.text for g in plain]
    drafted, accepted = (
        float(line.split()[1])
        for name in ("drafted", "accepted")
        for line in lines
        if line.startswith(f"tidal_{name}_chars_total ")
    )
    assert drafted == accepted > 0


def test_the_bench_says_what_the_head_saves_at_most() -> None:
    model = lively_model(0, **SETTINGS[0])
    alone, drafted = (bench._generate(model, TOKENIZER, "cpu", 1, 4, draft) for draft in (None, ByModel()))
    assert (alone["passes"], alone["draft_passes"]) == (4 * 6, 0)
    assert (drafted["passes"], drafted["draft_passes"]) == (4 * 2, 4 * 5)
    (line,) = bench._format_draft_head(alone, drafted)
    assert line.startswith("draft head, all its chars accepted: 8 passes instead of 24, and 20 of its own: ")
    assert bench._format_draft_head(alone, None) == []
