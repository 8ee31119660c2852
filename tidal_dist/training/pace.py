"""How fast training is and where the time goes: figures by TensorBoard's names."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from data_pipeline.stream import Batch
from data_pipeline.tokenizer import OUTPUT_VOCABULARY
from tidal_dist.config import Config
from tidal_dist.flops import row_flops
from tidal_dist.training.phases import Phase, Phases

# What a step consists of; what is between them counts as "other".
_OF_A_STEP: tuple[Phase, ...] = ("data", "agree", "forward", "backward", "optimizer")
_BETWEEN_STEPS: tuple[Phase, ...] = ("validation", "checkpoint")
_GIB = 2**30
_NARROWEST, _WIDEST = 256, 4096  # columns of a product
_LONG_SECONDS = 0.02  # of a product that has all a device can do


@dataclass(frozen=True)
class Work:
    """What a step costs. `flops_per_step`: of the model, on each rank. `peak_tflops`: of a rank's device."""

    flops_per_step: float
    peak_tflops: float

    @classmethod
    def of(
        cls,
        config: Config,
        world: int,
        peak_tflops: float,
        shape: tuple[int, int],
        output_size: int = OUTPUT_VOCABULARY,
    ) -> "Work":
        """The work of a configuration on so many ranks, in rows of `shape` token and char slots."""
        row = row_flops(config.model, *shape, config.segmentation.max_block_bytes, output_size=output_size)
        rows = config.training.batch_rows / world
        return cls(row.training * rows, peak_tflops)

    def figures(self, seconds_per_step: float) -> dict[str, float]:
        """TFLOP/s that this rank achieves, and their share of the peak."""
        achieved = self.flops_per_step / seconds_per_step / 1e12
        return {"speed/tflops_per_rank": achieved, "speed/utilisation": achieved / self.peak_tflops}


class Pace:
    """The speed of training since the last `take`, over all ranks as far as one can tell from this one."""

    def __init__(self, world: int, phases: Phases, work: Work, byte_lengths: np.ndarray | None = None):
        self._world, self._phases, self._work, self._byte_lengths = world, phases, work, byte_lengths
        self._steps = self._bytes = self._tokens = 0
        phases.take()  # the time before the first step

    def add(self, batches: Sequence[Batch]) -> None:
        """Count a step."""
        self._steps += 1
        self._bytes += sum(b.byte_count(self._byte_lengths) for b in batches) * self._world
        self._tokens += sum(b.token_count() for b in batches) * self._world

    def take(self) -> dict[str, float]:
        """The figures so far, after one step at least; count anew.

        `time/` is seconds per step, `time_share/` their share of all that passed; validation and checkpoints, which are
        no training, are in these two alone.
        """
        spent = self._phases.take()
        steps = {phase: spent.pop(phase, 0.0) for phase in _OF_A_STEP}
        pauses = {phase: spent.pop(phase, 0.0) for phase in _BETWEEN_STEPS}
        steps |= {"other": sum(spent.values())}  # type: ignore[dict-item]
        elapsed = max(sum(steps.values()), 1e-9)
        everything = elapsed + sum(pauses.values())
        figures = {
            "speed/tokens_per_second": self._tokens / elapsed,
            "speed/bytes_per_second": self._bytes / elapsed,
            "speed/seconds_per_step": elapsed / max(self._steps, 1),
            "speed/data_wait_share": steps["data"] / elapsed,
        }
        figures |= self._work.figures(elapsed / max(self._steps, 1))
        for phase, seconds in (steps | pauses).items():
            figures[f"time/{phase}"] = seconds / max(self._steps, 1)
            figures[f"time_share/{phase}"] = seconds / everything
        self._steps = self._bytes = self._tokens = 0
        return figures


def host_memory() -> dict[str, float]:
    """Resident memory of this process."""
    return {"memory/host_resident_gib": psutil.Process().memory_info().rss / _GIB}


def measured_tflops(device: torch.device, dtype: torch.dtype, widest: int = _WIDEST) -> float:
    """What a large matrix product achieves on a device whose peak nobody has written down; takes parts of a second.

    Products grow until one takes long: where a type has no instructions of its own, as bf16 on many CPUs, that is soon.
    Large GPUs need more than the usual `widest` to show all they can, and memory for three matrices of it.
    """
    width = _NARROWEST
    while (seconds := _product_seconds(width, device, dtype)) < _LONG_SECONDS and width < widest:
        width *= 2
    return 2 * width**3 / seconds / 1e12


def _product_seconds(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of the fastest of some."""
    a = torch.ones(width, width, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # which waits for the product
        best = min(best, time.perf_counter() - started)
    return best
