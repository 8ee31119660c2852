"""Whether a step is bad: its loss or gradients are not finite, or its gradients far larger than those before. Pure.

Everything is decided from numbers of the global batch, which all ranks have alike, and from norms that are in every
checkpoint, so that a resumed run decides the same.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from tidal_dist.settings import GuardConfig

_NORMAL = 1.4826  # the standard deviation of a normal distribution in median absolute deviations
# The spread of the logarithms is taken to be no smaller and no larger than this. Single healthy batches reach 7 times
# the median where the spread of most is 0.2, and no bound must be near them; norms that fall tenfold within the window
# must not make one that nothing exceeds. With a factor of 10 the bound is 20 to 148 times the median.
_LEAST_SPREAD, _LARGEST_SPREAD = 0.3, 0.5


@dataclass(frozen=True)
class BadStep:
    """Why a step is bad, and the numbers that say so: of the global batch, the norm before clipping."""

    why: str
    loss: float
    gradient_norm: float
    is_finite: bool


class Guard:
    """Judges the steps of a run.

    Args:
        kept: what is saved and found again with the run's state; {} at its start. The guard changes it.
    """

    def __init__(self, config: GuardConfig, kept: dict[str, Any]):
        self._factor, self._window = config.spike_factor, config.window_steps
        self._norms: list[float] = kept.setdefault("norms", [])
        del self._norms[: -self._window]

    def judge(self, loss: float, gradient_norm: float) -> BadStep | None:
        """Why a step must not be made; None where it may."""
        if not math.isfinite(loss):
            return BadStep(f"the loss is {loss}", loss, gradient_norm, is_finite=False)
        if not math.isfinite(gradient_norm):
            return BadStep(f"the gradient norm is {gradient_norm}", loss, gradient_norm, is_finite=False)
        bound = self.bound()
        if gradient_norm > bound:
            why = f"the gradient norm {gradient_norm:.4g} is above {bound:.4g}"
            return BadStep(f"{why}, of late {self._median():.4g}", loss, gradient_norm, is_finite=True)
        return None

    def accept(self, gradient_norm: float) -> None:
        """Compare later steps with this one, which was made."""
        self._norms.append(gradient_norm)
        del self._norms[: -self._window]

    def bound(self) -> float:
        """What the gradient norm may not exceed: `spike_factor` robust standard deviations of the logarithms of recent
        norms above their median. Infinite until a quarter of the window is there, 8 steps at least.

        Median and median absolute deviation hold against the outliers that are looked for (Hampel 1974; Leys et al.
        2013), which mean and deviation follow. Norms are positive and skewed, so their logarithms are compared.
        """
        if self._factor is None or len(self._norms) < max(8, self._window // 4):
            return math.inf
        logarithms = [math.log(max(norm, 1e-30)) for norm in self._norms]
        middle = statistics.median(logarithms)
        spread = _NORMAL * statistics.median(abs(value - middle) for value in logarithms)
        exponent = middle + self._factor * min(max(spread, _LEAST_SPREAD), _LARGEST_SPREAD)
        return math.exp(exponent) if exponent < 700 else math.inf

    def scalars(self) -> dict[str, float]:
        """What TensorBoard shows of it."""
        bound = self.bound()
        return {"guard/gradient_norm_bound": bound} if math.isfinite(bound) else {}

    def _median(self) -> float:
        return statistics.median(self._norms)
