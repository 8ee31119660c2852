"""What a person watches: TensorBoard scalars and texts, and a progress bar or plain lines on standard error."""

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data_pipeline.stream import Batch


class Pace:
    """The speed of training since the last `restart`, over all ranks as far as one can tell from this one."""

    def __init__(self, world: int):
        self._world = world
        self._count_from_now()

    def _count_from_now(self) -> None:
        self._started, self._waited = time.monotonic(), 0.0
        self._steps = self._bytes = self._tokens = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Around what is no training."""
        started = time.monotonic()
        yield
        self._started += time.monotonic() - started

    def add(self, batches: list[Batch]) -> None:
        """Count a step."""
        self._steps += 1
        self._bytes += sum(b.byte_count() for b in batches) * self._world
        self._tokens += sum(b.token_count() for b in batches) * self._world

    def restart(self) -> dict[str, float]:
        """The figures so far, after one step at least, by TensorBoard's names; count anew."""
        elapsed = time.monotonic() - self._started
        figures = {
            "speed/tokens_per_second": self._tokens / elapsed,
            "speed/bytes_per_second": self._bytes / elapsed,
            "speed/seconds_per_step": elapsed / self._steps,
            "speed/data_wait_share": self._waited / elapsed,
        }
        self._count_from_now()
        return figures


class Monitor:
    """Writes for rank 0; on other ranks it does nothing."""

    def __init__(self, folder: Path, rank: int, first_step: int, steps: int):
        # What a run wrote after the checkpoint that is resumed from must not stand beside what is written now.
        purge = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10) if rank == 0 else None
        self._bar = None
        if rank == 0 and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", file=sys.stderr, dynamic_ncols=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write scalars to TensorBoard."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Write a text to TensorBoard."""
        if self._writer:
            self._writer.add_text(name, markdown, step)

    def image(self, step: int, name: str, png: bytes) -> None:
        """Write a picture to TensorBoard."""
        if self._writer:
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def progress(self, step: int, values: dict[str, Any]) -> None:
        """Move the bar to `step`, or write a plain line."""
        if self._bar is not None:
            self._bar.set_postfix(values)
            self._bar.update(step - self._bar.n)
        elif self._writer:
            print(f"step {step}: " + " ".join(f"{k} {v}" for k, v in values.items()), file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """Write a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._writer:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Write out everything."""
        if self._bar is not None:
            self._bar.close()
        if self._writer:
            self._writer.close()
