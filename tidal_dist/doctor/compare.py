"""Comparing what was computed with the truth, and saying where they part."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.layout import Slots
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.doctor.evidence import Case
from tidal_dist.doctor.report import Finding

# Float64 carries 16 digits; sums in another order cost a few of them, a true difference shows far above.
EXACT = 1e-9


@dataclass(frozen=True)
class Difference:
    """Two values that should agree: what they are, of which block of which document, at which position."""

    case: Case
    block: int
    position: Any
    what: str
    found: Any
    truth: Any

    def __str__(self) -> str:
        text = repr(self.case.blocks[self.block]) if 0 <= self.block < len(self.case.blocks) else "<bos>"
        return (
            f"{self.case.name}, block {self.block} {text}, position {self.position}: "
            f"{self.what} {self.found}, should be {self.truth}"
        )


def counted(differences: Iterable[Difference], unit: str, more: str = "") -> Finding:
    """How many differences there are; none may be. `where` is the first."""
    found = list(differences)
    return Finding(len(found), 0, unit, str(found[0]) if found else "", more)


def largest(gaps: Iterable[tuple[float, str]], unit: str, bound: float = EXACT, more: str = "") -> Finding:
    """The largest of the gaps, each with where it is; NaN counts as the largest."""
    gap, where = max(gaps, key=lambda g: float("inf") if np.isnan(g[0]) else g[0], default=(0.0, ""))
    return Finding(gap, bound, unit, where if not gap <= bound else "", more)


def array_differences(
    case: Case, what: str, found: Sequence[Any], truth: Sequence[Any], blocks: Any, positions: Any
) -> Iterator[Difference]:
    """Where two sequences differ; `blocks` and `positions` belong to the elements of `truth`."""
    for i, (a, b) in enumerate(zip(found, truth, strict=False)):
        if a != b:
            found_here, true_here = (repr(v) if isinstance(v, str) else v for v in (a, b))
            yield Difference(case, int(blocks[i]), positions[i], what, found_here, true_here)
    if len(found) != len(truth):
        i = min(len(found), len(truth) - 1)
        yield Difference(case, int(blocks[i]), positions[i], f"number of slots ({what})", len(found), len(truth))


def logit_gap(
    case: Case, found: torch.Tensor, truth: torch.Tensor, chars: Slots, tokenizer: MixedTokenizer
) -> tuple[float, str]:
    """The largest difference of two (n, V) logits of `chars` (n,), relative to the largest logit, and where it is."""
    if found.shape != truth.shape:
        return float("inf"), f"{case.name}: {len(found)} char slots, should be {len(truth)}"
    if not len(truth):
        return 0.0, ""
    gap = (found - truth).abs() / max(1.0, float(truth.abs().max()))
    at, i = divmod(int(gap.nan_to_num(float("inf")).argmax()), gap.shape[1])
    what, values = f"logit of {tokenizer.name(i)!r}", (float(found[at, i]), float(truth[at, i]))
    return float(gap[at, i]), str(Difference(case, int(chars.block[at]), chars.position[at], what, *values))


def changed_choices(found: torch.Tensor, truth: torch.Tensor, tie: float) -> tuple[int, int]:
    """How often the argmax of (n, V) logits differs: in all, and where the truth's first two lie over `tie` apart."""
    changed = found.argmax(dim=-1) != truth.argmax(dim=-1)
    top = truth.topk(2, dim=-1).values
    return int(changed.sum()), int((changed & (top[:, 0] - top[:, 1] > tie)).sum())


def shown(ids: Iterable[int], tokenizer: MixedTokenizer) -> str:
    """Ids as readable names."""
    return " ".join(repr(tokenizer.name(int(i)))[1:-1].replace(" ", "␣") for i in ids)
