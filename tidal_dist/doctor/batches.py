"""Suspect 9: is a sample alone the same as in a batch, packed, padded, and dealt to ranks?"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from data_pipeline.layout import IGNORED, NO_DOCUMENT, alone, pack
from tidal_dist.doctor.compare import largest, logit_gap
from tidal_dist.doctor.evidence import Case, Evidence, LaidOut, one_pass
from tidal_dist.doctor.report import Finding
from tidal_dist.training import loss

_BATCH = 4
_PADDING = (5, 7)  # token and char slots; any number must do


def packed_equals_alone(evidence: Evidence) -> Finding:
    """Logits of a document in its packed row are those of the document alone."""
    rows = {r: evidence.rows[r].laid_out for r in {case.row for case in evidence.cases}}
    logits = {r: evidence.logits(row) for r, row in rows.items()}
    gaps = []
    for case, truth in zip(evidence.cases, evidence.alone, strict=True):
        own = torch.from_numpy(rows[case.row][1].document == case.document)
        gaps.append(logit_gap(case, logits[case.row][own], truth, case.laid_out[1], evidence.tokenizer))
    return largest(gaps, "largest relative difference of a logit")


def padded_equals_alone(evidence: Evidence) -> Finding:
    """Padding behind a document changes none of its logits."""
    gaps = []
    for case, truth in zip(evidence.cases, evidence.alone, strict=True):
        tokens, chars, _ = case.laid_out
        padded = pack([case.laid_out], len(tokens.ids) + _PADDING[0], len(chars.ids) + _PADDING[1])
        gaps.append(logit_gap(case, evidence.logits(padded)[: len(truth)], truth, chars, evidence.tokenizer))
    return largest(gaps, "largest relative difference of a logit")


def batch_equals_alone(evidence: Evidence) -> Finding:
    """Documents of other lengths as further rows of a batch change none of its logits."""
    gaps: list[tuple[float, str]] = []
    for start in range(0, len(evidence.cases), _BATCH):
        cases = evidence.cases[start : start + _BATCH]
        shape = [max(len(case.laid_out[i].ids) for case in cases) for i in (0, 1)]  # type: ignore[union-attr]
        rows = [pack([case.laid_out], *shape) for case in cases]
        logits = one_pass(evidence.subject.exact, evidence.subject.device, rows)
        for case, found, truth in zip(cases, logits, evidence.alone[start:], strict=False):
            gaps.append(logit_gap(case, found[: len(truth)], truth, case.laid_out[1], evidence.tokenizer))
    return largest(gaps, "largest relative difference of a logit")


def decoding_in_a_batch(evidence: Evidence) -> Finding:
    """Prompts of other lengths in one batch change nothing that the decoder feeds or is answered."""
    gaps: list[tuple[float, str]] = []
    for start in range(0, len(evidence.cases), _BATCH):
        cases = evidence.cases[start : start + _BATCH]
        for case, found, truth in zip(cases, evidence.dictate(cases), evidence.written[start:], strict=False):
            n = min(len(found.logits), len(truth.logits))
            gaps.append(logit_gap(case, found.logits[:n], truth.logits[:n], truth.chars, evidence.tokenizer))
    return largest(gaps, "largest relative difference of a logit")


def loss_over_ranks(evidence: Evidence) -> Finding:
    """Rows dealt to two ranks that average have the loss of one rank that has them all: nats over all labels."""
    gaps = []
    cases = sorted(evidence.cases, key=lambda case: len(case.laid_out[2]))
    for few, many in pairwise([cases[0], cases[-1], *cases]):
        found, truth = _dealt_to_two_ranks([few, many], evidence)
        gaps.append(
            (abs(found - truth), f"{few.name} on rank 0, {many.name} on rank 1: loss {found}, should be {truth}")
        )
    return largest(gaps, "nats a label")


def _dealt_to_two_ranks(cases: list[Case], evidence: Evidence) -> tuple[float, float]:
    """The loss that the ranks' average has, and the sum of nats over the number of labels."""
    nats = [nats_of(case.laid_out, evidence) for case in cases]
    labels = [int((case.laid_out[2] != IGNORED).sum()) for case in cases]
    scales = [loss.loss_scale(n, len(cases), lambda _: sum(labels))[0] for n in labels]
    averaged = sum(scale * n for scale, n in zip(scales, nats, strict=True)) / len(cases)
    return averaged, sum(nats) / sum(labels)


def nats_of(row: LaidOut, evidence: Evidence) -> float:
    """The model's own loss of a row: the sum over its labels, in nats."""
    batch = evidence.batch(row)
    with torch.no_grad():
        return float(evidence.subject.exact(batch.tokens, batch.chars, batch.labels))


def losses_add_up(evidence: Evidence) -> Finding:
    """A packed and padded row has the sum of its documents' losses."""
    return largest(_row_gaps(evidence), "relative difference of a loss")


def _row_gaps(evidence: Evidence) -> Iterator[tuple[float, str]]:
    for row in [evidence.rows[r] for r in sorted({case.row for case in evidence.cases})]:
        packed = row.laid_out[1].document
        documents = np.unique(packed[packed != NO_DOCUMENT]).tolist()
        truth = sum(nats_of(alone(row.laid_out, document), evidence) for document in documents)
        found = nats_of(row.laid_out, evidence)
        yield abs(found - truth) / max(1.0, abs(truth)), f"row of {row.names[0]}: loss {found}, its documents' {truth}"
