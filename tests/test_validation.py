"""What validation generates and how it is counted, on any number of ranks."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.corpus import Document
from data_pipeline.shards import Manifest, ShardWriter, write_manifest
from tests.builders import small_model, small_tokenizer
from tests.mixed_shards import sums, tides
from tidal_dist.config import ValidationConfig
from tidal_dist.generation.decoder import Decoder
from tidal_dist.generation.request import Limits
from tidal_dist.generation.utf8 import allowed
from tidal_dist.training import validation
from tidal_dist.training.validation import (
    Outcome,
    Task,
    as_markdown,
    generation_metrics,
    generation_quality,
    generation_tasks,
    validation_generation,
)

TOKENIZER = small_tokenizer()
CONFIG = ValidationConfig(prompts=6, continuations=2, continuation_bytes=20, prompt_blocks=3, max_bytes=12)


def held_out(folder: Path, documents: list[Document]) -> Manifest:
    folder.mkdir()
    TOKENIZER.save(folder / "tokenizer.json")
    writer = ShardWriter(folder, "validation", TOKENIZER, 10_000)
    for document in documents:
        writer.write(document)
    write_manifest(folder, TOKENIZER, {"train": [], "validation": writer.close()}, {}, {})
    return Manifest.load(folder)


def test_tasks_of_answers_and_of_texts(tmp_path: Path) -> None:
    tasks = generation_tasks(held_out(tmp_path / "s", [*sums(3), *tides(4)]), CONFIG)
    assert [t.kind for t in tasks] == ["answer"] * 3 + ["next_block"] * 3 + ["continuation"] * 2
    for task, document in zip(tasks, sums(3), strict=False):
        assert ("".join(task.prompt), task.reference) == (document.prompt, document.text)
        assert task.limits == Limits(12)
    for task, document in zip(tasks[3:6], tides(3), strict=True):
        assert len(task.prompt) == 3
        assert document.text.startswith("".join(task.prompt) + task.reference)
        assert task.limits == Limits(12, 1)
    for task, document in zip(tasks[6:], tides(2), strict=True):
        assert document.text.startswith("".join(task.prompt) + task.reference)
        assert 17 <= len(task.reference.encode()) <= 20  # whole characters
        assert task.limits == Limits(20)


def test_no_figure_without_what_it_is_a_share_of() -> None:
    answer, block = Outcome("answer", True, 2, 1, 0), Outcome("next_block", False, 1, 1, 0)
    text = Outcome("continuation", False, 8, 0, 3)
    assert generation_metrics([]) == {}
    assert generation_metrics([block, text, text]) == {
        "validation/next_block_match": 0.0,
        "validation/ill_formed_blocks": 0.0,
        "validation/off_canonical_joins_per_block": 6 / 16,
    }
    assert generation_metrics([answer, text]) == {
        "validation/exact_match": 1.0,
        "validation/ill_formed_blocks": 0.1,
        "validation/off_canonical_joins_per_block": 0.3,
    }
    assert generation_metrics([Outcome("answer", False, 0, 0, 0)])["validation/ill_formed_blocks"] == 0.0


def test_better_generation_goes_before_fewer_bits() -> None:
    def metrics(name: str, match: float, bits: float) -> dict[str, float]:
        return {f"validation/{name}": match, "validation/bits_per_byte": bits}

    assert generation_quality({}) == -float("inf")
    assert generation_quality(metrics("exact_match", 0.5, 9.0)) > generation_quality(metrics("exact_match", 0.4, 1.0))
    assert generation_quality(metrics("exact_match", 0.5, 1.0)) > generation_quality(metrics("exact_match", 0.5, 1.1))
    texts = [metrics("next_block_match", 0.2, 2.0), metrics("next_block_match", 0.1, 1.0)]
    assert generation_quality(texts[0]) > generation_quality(texts[1])


def test_blocks_that_the_mask_mended_are_counted() -> None:
    model = small_model(TOKENIZER, 3)
    with torch.no_grad():
        model.output.weight[0x80:0x100] *= 1.5  # leans towards bytes that need others beside them
    logits: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: logits.append(output[0, -1]))
    (result,) = Decoder(model, TOKENIZER).generate(["the tide"], limits=Limits(60))
    hook.remove()
    expected, steps = 0, iter(logits)
    for block in result.blocks:
        written = b""
        is_ill_formed = False
        for char in [*reversed(block.encode()), None]:
            may_come = allowed(written, TOKENIZER.segmentation.max_block_bytes)
            is_ill_formed |= not may_come[int(next(steps).argmax())]
            written += bytes([char]) if char is not None else b""
        expected += is_ill_formed
    assert result.ill_formed_blocks == expected
    assert 0 < expected <= len(result.blocks)


class Ranks:
    """Ranks as threads: exchanges that only end when every rank takes part, and passes counted on each."""

    def __init__(self, world: int, patch: pytest.MonkeyPatch):
        self.world, self.passes = world, [0] * world
        self._barrier, self._values, self._rank = (
            threading.Barrier(world, timeout=20),
            [None] * world,
            threading.local(),
        )
        patch.setattr(validation, "gather_objects", self._exchange)
        patch.setattr(validation, "device", lambda: "cpu")

    def any_rank(self, flag: bool) -> bool:
        return any(self._exchange(flag))

    def _exchange(self, value: Any) -> list[Any]:
        self._values[self._rank.number] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found

    def run(self, action: Callable[[int, Any], Any]) -> list[Any]:
        results: list[Any] = [None] * self.world
        models = [small_model(TOKENIZER, 1) for _ in results]  # here: the random numbers are those of all threads

        def count(rank: int) -> None:
            self.passes[rank] += 1

        def work(rank: int) -> None:
            self._rank.number = rank
            models[rank].register_forward_hook(lambda *_: count(rank))
            results[rank] = action(rank, models[rank])

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


def tasks_of(answers: int, texts: int) -> list[Task]:
    found = [Task("answer", [f"{i}", " ="], f" {i}", Limits(6)) for i in range(answers)]
    found += [Task("next_block", ["the"] * (i + 1), " tide", Limits(8, 1)) for i in range(texts)]
    return found + [Task("continuation", ["the"] * (i + 1), " tide", Limits(10)) for i in range(texts)]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("answers", "texts"), [(0, 0), (1, 0), (0, 1), (2, 3), (5, 1)])
def test_ranks_make_equally_many_passes_and_count_alike(
    world: int, answers: int, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, ranks = tasks_of(answers, texts), Ranks(world, monkeypatch)
    results = ranks.run(
        lambda rank, model: validation_generation(model, TOKENIZER, tasks, (rank, world), ranks.any_rank)
    )
    assert len(set(ranks.passes)) == 1
    assert (ranks.passes[0] > 0) == bool(tasks)
    assert all(outcomes == results[0] for outcomes in results)
    assert sorted(o.kind for o in results[0]) == sorted(t.kind for t in tasks)
    one = Ranks(1, monkeypatch)
    alone = one.run(lambda rank, model: validation_generation(model, TOKENIZER, tasks, (rank, 1), one.any_rank))
    assert generation_metrics(results[0]) == generation_metrics(alone[0])


def test_examples_tell_task_text_and_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Ranks(1, monkeypatch)
    (outcomes,) = one.run(
        lambda rank, model: validation_generation(model, TOKENIZER, tasks_of(20, 1), (rank, 1), one.any_rank)
    )
    examples = [o.example for o in outcomes if o.example]
    assert [e["kind"] for e in examples] == ["answer"] * 8 + ["next_block", "continuation"]
    assert examples[0]["prompt"] == "0 ="
    assert examples[0]["right"] is False
    assert examples[-1]["right"] is None
    assert examples[-1]["trace"][0].startswith("  <bob> ")
    text = as_markdown(examples)
    assert text.count("**wrong**") == 9
    assert examples[-1]["trace"][0] in text
