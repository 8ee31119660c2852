"""Suspect 3: who sees whom, the encodings, and whether the cache gives what one pass gives."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from data_pipeline.layout import Slots
from data_pipeline.tokenizer import FIRST_TOKEN
from tidal_dist.doctor import oracle
from tidal_dist.doctor.compare import Difference, counted, largest, logit_gap
from tidal_dist.doctor.evidence import Case, Evidence
from tidal_dist.doctor.report import Finding
from tidal_dist.model.attention import Prepared

_MAX_MASK_TOKENS = 512  # the table on paper is written pair by pair
_CHANGED_SLOTS = 6  # seen slots that are changed one at a time, in each stretch


def mask(evidence: Evidence) -> Finding:
    """The biases that the model prepares show, pair by pair, who sees whom on paper."""
    differences: list[Difference] = []
    pairs = 0
    for case, sample, found in _prepared(evidence):
        truth = oracle.visible_slots([*sample.tokens, *sample.chars], evidence.config)
        visible = found.amax(dim=0) > torch.finfo(torch.float64).min / 4
        pairs += visible.numel()
        differences += _wrong_pairs(case, sample, visible, truth)
    return counted(differences, "pairs", f"{pairs:,} pairs")


def alibi(evidence: Evidence) -> Finding:
    """The biases of visible pairs are -slope * distance, by the published slopes; without alibi they are 0."""
    return largest(_bias_gaps(evidence), "largest difference of a bias")


def _bias_gaps(evidence: Evidence) -> Iterator[tuple[float, str]]:
    config = evidence.config
    slopes = [
        oracle.press_slope(h, config.n_heads) if config.encoding == "alibi" else 0.0 for h in range(config.n_heads)
    ]
    for case, sample, found in _prepared(evidence):
        slots = [*sample.tokens, *sample.chars]
        position = torch.tensor([float(slot.position) for slot in slots], dtype=torch.float64)
        visible = oracle.visible_slots(slots, config)
        n = len(slots)
        for head in range(len(found)):
            truth = -slopes[head] * (position[:, None] - position[None, :]).abs()
            # Pairs that are wrongly hidden are the mask's, not the encoding's.
            ours = found[head][:, :n]
            counts = visible & (ours > torch.finfo(torch.float64).min / 4)
            gap = ((ours - truth).abs() / truth.abs().clamp_min(1.0)).masked_fill(~counts, 0.0)
            q, k = divmod(int(gap.argmax()), n)
            yield (
                float(gap[q, k]),
                f"{case.name}, head {head}, query at {slots[q].position}, key at {slots[k].position}: "
                f"bias {float(ours[q, k])}, should be {float(truth[q, k])}",
            )


def rope(evidence: Evidence) -> Finding:
    """The angles that the model prepares are position * base^(-2 i / D), the training's base; none without rope."""
    config = evidence.subject.config.model
    half = config.width // config.n_heads // 2
    gaps = []
    for case in evidence.cases:
        batch = evidence.batch(case.laid_out)
        _, angles = evidence.subject.exact.prepare(batch.tokens, batch.chars, torch.float64, None)
        if (angles is None) != (config.encoding != "rope"):
            gaps.append((float("inf"), f"{case.name}: rope is {'off' if angles is None else 'on'}, not as in training"))
        elif angles is not None:
            gaps.append(_angle_gap(case, angles, half, config.rope_base))
    return largest(gaps, "largest difference of a cosine or sine")


def _angle_gap(case: Case, angles: tuple[torch.Tensor, ...], half: int, base: float) -> tuple[float, str]:
    position = np.concatenate([case.laid_out[0].position, case.laid_out[1].position])
    truth = torch.tensor(position[:, None] * base ** (-np.arange(half) / half))
    gap = torch.maximum((angles[0][0, 0].cpu() - truth.cos()).abs(), (angles[1][0, 0].cpu() - truth.sin()).abs())
    at, i = divmod(int(gap.argmax()), half)
    found = float(torch.atan2(angles[1][0, 0, at, i], angles[0][0, 0, at, i]))
    turned = float(torch.atan2(truth[at, i].sin(), truth[at, i].cos()))
    return float(gap[at, i]), f"{case.name}, position {position[at]}, pair {i}: angle {found}, should be {turned}"


def _prepared(evidence: Evidence) -> Iterator[tuple[Case, oracle.Sample, torch.Tensor]]:
    """Of the last block of each stretch: the oracle's sample, and the model's biases (H or 1, n, all slots).

    Queries are the sample's slots; keys the sample's slots, then all others of the document.
    """
    for case in evidence.cases:
        sample = evidence.sample(case, case.end - 1)
        t = len(sample.tokens)
        if t > _MAX_MASK_TOKENS:
            continue
        batch = evidence.batch(case.laid_out)
        prepared, _ = evidence.subject.exact.prepare(batch.tokens, batch.chars, torch.float64, None)
        assert not isinstance(prepared, torch.Tensor)
        yield case, sample, _table(prepared, case, t)


def _table(prepared: Prepared, case: Case, t: int) -> torch.Tensor:
    """Biases of the first t tokens and of the chars of the stretch's last block, (H or 1, n, N).

    Keys: those slots, in their order, then all others of the document. -inf where the model computes no score.
    """
    n_tokens, chars = len(case.laid_out[0].ids), case.laid_out[1]
    own = np.flatnonzero(chars.block == case.end - 1)
    first = [*range(t), *(n_tokens + own).tolist()]
    asking = slice(0, t), slice(n_tokens + own[0], n_tokens + own[-1] + 1)  # a block's chars lie end to end
    table = torch.cat([prepared.table(queries)[0] for queries in asking], dim=1)
    return table[:, :, [*first, *sorted(set(range(table.shape[2])) - set(first))]]


def _wrong_pairs(case: Case, sample: oracle.Sample, visible: torch.Tensor, truth: torch.Tensor) -> Iterator[Difference]:
    slots = [*sample.tokens, *sample.chars]
    truth = torch.cat([truth, torch.zeros(len(truth), visible.shape[1] - len(truth), dtype=torch.bool)], dim=1)
    for q, k in (visible != truth).nonzero().tolist():
        kinds = ["token" if s.c is None else "char" for s in slots]
        key = f"{kinds[k]} at {slots[k].position}" if k < len(slots) else "a slot outside its block and its context"
        what = f"{kinds[q]} sees {key}:"
        yield Difference(case, slots[q].block, slots[q].position, what, bool(visible[q, k]), bool(truth[q, k]))


def unseen_changes_nothing(evidence: Evidence) -> Finding:
    """Changing every slot that a block must not see leaves its logits as they are."""
    gaps = []
    for case, alone in zip(evidence.cases, evidence.alone, strict=True):
        block = case.end - 1
        tokens, chars, labels = case.laid_out
        own = chars.block == block
        start = case.context(block)
        changed = (
            _changed(tokens, tokens.index >= start, evidence),
            _changed(chars, ~own, evidence),
            labels,
        )
        logits = evidence.logits(changed)
        gaps.append(logit_gap(case, logits[own], alone[own], chars.at(own), evidence.tokenizer))
    return largest(gaps, "largest change of a logit")


def seen_changes_something(evidence: Evidence) -> Finding:
    """Changing any one slot that a block must see changes its logits."""
    differences: list[Difference] = []
    tried = 0
    for case, alone in zip(evidence.cases, evidence.alone, strict=True):
        block = case.end - 1
        tokens, chars, labels = case.laid_out
        last = int(np.flatnonzero(chars.block == block)[-1])
        for stream, i in _seen_slots(case, block):
            slots = tokens if stream == "token" else chars
            only = np.arange(len(slots.ids)) == i
            row = (
                _changed(tokens, only, evidence) if stream == "token" else tokens,
                _changed(chars, only, evidence) if stream == "char" else chars,
                labels,
            )
            logits = evidence.logits(row)
            tried += 1
            if torch.equal(logits[last], alone[last]):
                what = f"effect of the {stream} at {slots.position[i]} on the block's last char:"
                differences.append(Difference(case, block, int(chars.position[last]), what, "none", "some"))
    return counted(differences, "slots without effect", f"{tried} changed")


def _seen_slots(case: Case, block: int) -> list[tuple[str, int]]:
    """Slots that the last char of a block sees: `<bos>`, its last context token and some between; some own chars."""
    start = case.context(block)
    own = np.flatnonzero(case.laid_out[1].block == block)
    tokens = np.unique(np.linspace(0, start - 1, min(_CHANGED_SLOTS // 2, start)).astype(int))
    chars = own[np.unique(np.linspace(0, len(own) - 1, min(_CHANGED_SLOTS // 2, len(own))).astype(int))]
    return [("token", int(i)) for i in tokens] + [("char", int(i)) for i in chars]


def _changed(slots: Slots, where: np.ndarray, evidence: Evidence) -> Slots:
    """The slots with other ids where `where` is true: the next token, or the next byte."""
    n_tokens = evidence.tokenizer.vocab_size - FIRST_TOKEN
    next_ids = FIRST_TOKEN + (slots.ids + 1) % n_tokens if slots.stream == "token" else (slots.ids + 1) % 256
    return replace(slots, ids=np.where(where, next_ids, slots.ids))


def one_pass_equals_the_oracle(evidence: Evidence) -> Finding:
    """Logits of training's one pass are those of one sample for each block."""
    gaps = []
    for i, block, truth in evidence.true_logits:
        case, own = evidence.cases[i], evidence.cases[i].laid_out[1].block == block
        found = evidence.alone[i][torch.from_numpy(own)]
        gaps.append(logit_gap(case, found, truth, case.laid_out[1].at(own), evidence.tokenizer))
    return largest(gaps, "largest relative difference of a logit", more=f"{len(gaps)} blocks")


def cached_equals_one_pass(evidence: Evidence) -> Finding:
    """Logits of step-by-step decoding with the cache are those of training's one pass."""
    gaps = []
    for (case, written), alone in zip(evidence.each(), evidence.alone, strict=True):
        own = case.in_stretch()
        truth = alone[torch.from_numpy(own)]
        gaps.append(logit_gap(case, written.logits, truth, case.laid_out[1].at(own), evidence.tokenizer))
    return largest(gaps, "largest relative difference of a logit")
