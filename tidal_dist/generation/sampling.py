"""Choosing the next char from its logits. Pure functions over numpy arrays; V ids of the output vocabulary."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from data_pipeline.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How chars are chosen: greedily at temperature 0, else by sampling.

    Attributes:
        temperature: divides the logits. top_k: keep the k likeliest; 0: all.
        top_p: keep the likeliest until their probabilities reach p.
        min_p: keep those that are at least this many times as likely as the likeliest (Nguyen et al. 2024).
        repetition_penalty: of ids that would repeat a block of the text so far, see `penalised`; 1: none.
        seed: of this request's random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_lawful, rule in (
            ("temperature", 0.0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0.0 < self.top_p <= 1.0, "more than 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", 1.0 <= self.repetition_penalty < float("inf"), "at least 1"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
        ):
            if not is_lawful:
                raise UserError(f"{name} {getattr(self, name)}: must be {rule}")


GREEDY = Sampling()
SAMPLING_NAMES = tuple(field.name for field in fields(Sampling))


def choose(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """One id from logits (V,); excluded ids have -inf. Draws one random number, or none at temperature 0."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # at the lowest temperatures all but the likeliest become -inf
        scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    kept = keep(scaled, sampling.top_k, sampling.top_p, sampling.min_p)
    totals = np.exp(kept - kept.max()).cumsum()
    return int(np.searchsorted(totals, random.random() * totals[-1], side="right"))


def keep(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The logits (V,) with those outside the top k, the nucleus of probability p and `min_p` set to -inf.

    Nucleus sampling: Holtzman et al. 2020. The likeliest id is always kept.
    """
    if not top_k and top_p >= 1.0 and min_p == 0.0:
        return logits
    ids = np.argsort(-logits, kind="stable")
    ordered = logits[ids]
    weights = np.exp(ordered - ordered[0])
    is_kept = weights >= min_p
    if top_k:
        is_kept[top_k:] = False
    if top_p < 1.0:
        nucleus = np.where(is_kept, weights, 0.0)
        is_kept &= nucleus.cumsum() - nucleus < top_p * nucleus.sum()
    is_kept[0] = True
    result = np.full_like(logits, -np.inf)
    result[ids[is_kept]] = ordered[is_kept]
    return result


def penalised(logits: np.ndarray, repeating: Iterable[int], penalty: float) -> np.ndarray:
    """The logits (V,) with those of the `repeating` ids made less likely as Keskar et al. 2019 do."""
    ids = np.fromiter(repeating, dtype=np.int64)
    result = logits.copy()
    result[ids] = np.where(result[ids] > 0.0, result[ids] / penalty, result[ids] * penalty)
    return result
