"""Suspect 8: dropout off, deterministic, and what a lower precision and the cache change."""

import copy

import torch

from tidal_dist.doctor.compare import changed_choices
from tidal_dist.doctor.evidence import Case, Evidence, one_pass
from tidal_dist.doctor.report import Finding

# Largest difference of a logit, relative to the largest logit: many roundings of 2^-24 and of 2^-9 in a row. A single
# rounding to a half precision, 2^-9 or 2^-12, must show in float32.
FLOAT32_BOUND = 1e-4
BFLOAT16_BOUND = 0.25


def evaluation_mode(evidence: Evidence) -> Finding:
    """No module is in training mode while decoding."""
    count = max(written.modules_in_training for written in evidence.written)
    where = f"{evidence.subject.path}: {count} modules in training mode, should be 0" if count else ""
    return Finding(count, 0, "modules in training mode", where)


def deterministic(evidence: Evidence) -> Finding:
    """The same decoding twice gives the same logits, bit for bit."""
    wrong = []
    for case in evidence.cases[:4]:
        once, again = (evidence.dictate([case], evidence.subject.model)[0].logits.nan_to_num() for _ in range(2))
        if not torch.equal(once, again):
            i = int((once - again).abs().amax(dim=1).argmax())
            gap = float((once[i] - again[i]).abs().max())
            wrong.append(f"{case.name}, from block {case.first}, char {i}: logits of two runs differ by {gap:.3g}")
    return Finding(len(wrong), 0, "documents whose logits differ", wrong[0] if wrong else "")


def float32_gap(evidence: Evidence) -> Finding:
    """Logits of one pass in float32 against float64, and how often the first choice differs."""
    return _precision_gap(evidence, evidence.subject.model, FLOAT32_BOUND)


def bfloat16_gap(evidence: Evidence) -> Finding:
    """Logits of one pass in bf16 against float64, and how often the first choice differs."""
    return _precision_gap(evidence, copy.deepcopy(evidence.subject.model).bfloat16(), BFLOAT16_BOUND)


def cached_gap(evidence: Evidence) -> Finding:
    """Logits of decoding with the cache, in float32, against one pass in float32, and changed first choices."""
    subject, pairs = evidence.subject, []
    for case in evidence.cases:
        own = torch.from_numpy(case.in_stretch())
        truth = one_pass(subject.model, subject.device, [case.laid_out])[0][own]
        pairs.append((case, evidence.dictate([case], subject.model)[0].logits, truth))
    return _gap(pairs, FLOAT32_BOUND)


def _precision_gap(evidence: Evidence, model: torch.nn.Module, bound: float) -> Finding:
    device = evidence.subject.device
    found = [one_pass(model, device, [case.laid_out])[0] for case in evidence.cases]  # type: ignore[arg-type]
    return _gap(list(zip(evidence.cases, found, evidence.alone, strict=True)), bound)


def _gap(pairs: list[tuple[Case, torch.Tensor, torch.Tensor]], bound: float) -> Finding:
    """The largest relative gap of logits. Choices that change although the gap is within the bound are near ties."""
    gap, changed, clearly, total, where = 0.0, 0, 0, 0, ""
    for case, found, truth in pairs:
        if found.shape != truth.shape:
            return Finding(float("inf"), bound, "largest relative difference", f"{case.name}: other chars were fed")
        scale = max(1.0, float(truth.abs().max()))
        difference = float((found - truth).abs().max()) / scale
        if not difference <= gap:
            gap, where = (
                difference,
                f"{case.name}: logits differ by {difference * scale:.3g}, the largest is {scale:.3g}",
            )
        some, clear = changed_choices(found, truth, tie=2 * bound * scale)
        changed, clearly, total = changed + some, clearly + clear, total + len(truth)
    more = f"first choice changed {changed} times in {total:,} ({clearly} not near a tie)"
    return Finding(gap, bound, "largest relative difference of a logit", where if not gap <= bound else "", more)
