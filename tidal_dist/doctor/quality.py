"""Suspect 6: is the text as good as the loss says? And does the loss repeat what the training measured?"""

import math

import torch

from data_pipeline.layout import IGNORED
from data_pipeline.stream import fixed_batches
from data_pipeline.tokenizer import EOS
from tidal_dist.doctor.control import TIE, held_to_text
from tidal_dist.doctor.evidence import Case, Evidence
from tidal_dist.doctor.report import Finding
from tidal_dist.model.likelihood import bits_per_byte

_STANDARD_ERRORS = 4.0
# A training in bf16 repeats its figure only roughly.
_REPEATS = {"fp32": 1e-3, "bf16": 2e-2}


def exposure_gap(evidence: Evidence) -> Finding:
    """Stretches that the decoder writes rightly by itself, against those rightly chosen on the true context.

    Both are greedy, so a stretch that is right in every choice on its true context is just the one that the decoder
    writes rightly on its own; stretches with ties are left out.
    """
    forced = free = by_block = by_block_free = counted = 0
    where = ""
    for case, alone, run in zip(evidence.cases, evidence.alone, evidence.free, strict=True):
        right, tied = _right_choices(case, alone, evidence)
        truth, written = case.blocks[case.first : case.end], run.result.blocks
        by_block += sum(right)
        by_block_free += sum(a == b for a, b in zip(written, truth, strict=False))
        if tied:
            continue
        ends_alike = (run.result.finish == "eos") == (case.end_mark(case.end - 1) == EOS)
        freely = written == truth and ends_alike
        forced, free, counted = forced + all(right), free + freely, counted + 1
        if all(right) != freely and not where:
            state = "right" if all(right) else "not right"
            where = f"{case.name}, block {case.first}: {truth} is {state} on its true context; alone it wrote {written}"
    blocks = sum(case.end - case.first for case in evidence.cases)
    more = (
        f"exact match {forced}/{counted} teacher-forced, {free}/{counted} free-running; "
        f"block by block {by_block}/{blocks}, {by_block_free}/{blocks}"
    )
    return Finding(abs(forced - free) / max(counted, 1), 0, "share of documents", where, more)


def _right_choices(case: Case, alone: torch.Tensor, evidence: Evidence) -> tuple[list[bool], bool]:
    """For each block of a stretch whether every choice on its true context is right; whether any is a tie."""
    own = case.in_stretch()
    chars = case.laid_out[1].at(own)
    logits = alone[torch.from_numpy(own)]
    held = held_to_text(logits, chars, evidence.tokenizer.segmentation.max_block_bytes)
    top = held.topk(2, dim=-1)
    truth = torch.tensor(case.labels_on_paper(case.first, case.end))
    if len(truth) != len(held):
        return [False] * (case.end - case.first), False
    tied = bool((top.values[:, 0] - top.values[:, 1] <= TIE * max(1.0, float(logits.abs().max()))).any())
    right = top.indices[:, 0] == truth
    return [bool(right[torch.from_numpy(chars.block == b)].all()) for b in range(case.first, case.end)], tied


def _bits_per_label(evidence: Evidence) -> float:
    nats = labels = 0.0
    for case, alone in zip(evidence.cases, evidence.alone, strict=True):
        truth = torch.from_numpy(case.laid_out[2]).long()
        counts = truth != IGNORED
        chosen = alone[counts].log_softmax(dim=-1).gather(1, truth[counts][:, None])
        nats, labels = nats - float(chosen.sum()), labels + int(counts.sum())
    return nats / max(labels, 1) / math.log(2)


def ill_formed_choices(evidence: Evidence) -> Finding:
    """How often the model's first choice, left to itself, is none that text allows: ill-formed UTF-8, empty blocks.

    Training has no such choice, so each costs at least one bit: where the text is as good as the loss, the rate a
    char is at most the bits a label.
    """
    wrong = total = 0
    where = ""
    longest = evidence.tokenizer.segmentation.max_block_bytes
    for case, free in zip(evidence.cases, evidence.free, strict=True):
        held = held_to_text(free.logits, free.chars, longest)
        bad = torch.isneginf(held.gather(1, free.logits.argmax(dim=-1, keepdim=True)))[:, 0]
        wrong, total = wrong + int(bad.sum()), total + len(bad)
        if bad.any() and not where:
            i = int(bad.nonzero()[0])
            choice = evidence.tokenizer.name(int(free.logits[i].argmax()))
            where = (
                f"{case.name}, block {free.chars.block[i]}, position {free.chars.position[i]}: "
                f"first choice {choice!r}, should be one that UTF-8 and the block's length allow"
            )
    return _rate(wrong, total, _bits_per_label(evidence), "a char", where)


def off_canonical_joins(evidence: Evidence) -> Finding:
    """How often generated blocks join otherwise than segmentation would cut their text, against the bits a label."""
    joins = sum(free.result.off_canonical_joins for free in evidence.free)
    chars = sum(len(free.chars.ids) for free in evidence.free)
    wrong = [
        f"{case.name}, from block {case.first}: {free.result.blocks}, cut otherwise as one text"
        for case, free in zip(evidence.cases, evidence.free, strict=True)
        if free.result.off_canonical_joins
    ]
    return _rate(joins, chars, _bits_per_label(evidence), "a char", wrong[0] if wrong else "")


def _rate(count: int, total: int, bits: float, unit: str, where: str) -> Finding:
    """A rate against the bits a label, with room for chance: a few standard errors and one event."""
    rate, allowed = count / max(total, 1), min(bits, 1.0)
    chance = _STANDARD_ERRORS * math.sqrt(allowed * (1 - allowed) / max(total, 1)) + 1 / max(total, 1)
    bound = allowed + chance
    return Finding(rate, bound, unit, where if rate > bound else "", f"{count} of {total:,}; {bits:.3f} bits a label")


def bits_repeat(evidence: Evidence) -> Finding:
    """Bits per byte of the held-out rows are those that the training measured last."""
    subject = evidence.subject
    recorded = subject.provenance.metrics.get("validation/bits_per_byte")
    validation = subject.config.validation
    is_same = subject.manifest.hash == subject.provenance.manifest_hash
    step = subject.provenance.step
    measured_then = step % validation.every_steps == 0 or step == subject.config.training.steps
    measured = _bits_per_byte(evidence, validation.rows)
    if recorded is None or not is_same or not measured_then:
        return Finding(
            0.0, 0.0, "difference", "", f"{measured:.4f} bits per byte; no figure of the training to compare"
        )
    bound = _REPEATS[subject.provenance.precision] * max(1.0, recorded)
    where = f"{subject.path}: {measured:.6f} bits per byte of held-out rows, the training measured {recorded:.6f}"
    return Finding(
        abs(measured - recorded), bound, "bits per byte of difference", where, f"{measured:.4f} bits per byte"
    )


def _bits_per_byte(evidence: Evidence, max_rows: int) -> float:
    nats, text_bytes = 0.0, 0
    subject = evidence.subject
    for batch in fixed_batches(evidence.reader, max_rows, 1, (0, 1)):
        moved = batch.to(subject.device)
        subject.model.eval()
        with torch.no_grad():
            nats += float(subject.model(moved.tokens, moved.chars, moved.labels))
        text_bytes += batch.byte_count()
    return bits_per_byte(nats, text_bytes)
