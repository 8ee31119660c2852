"""What a person watches: TensorBoard, files with the same figures, and a bar or plain lines on standard error."""

import io
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from tidal_dist.config import Config
from tidal_dist.history.event_files import cut_back
from tidal_dist.history.generations import generations_log
from tidal_dist.history.scalars import scalars_log

# What TensorBoard's table of runs shows beside their settings.
RESULTS = ["train/loss", "validation/loss", "validation/bits_per_byte", "validation/exact_match"]


def flat_settings(config: Config) -> dict[str, str | float | bool]:
    """What one compares runs by, by dotted names: the settings of model and training, rows and seeds."""
    sections = config.model_dump(include={"model": True, "training": True, "data": {"row_tokens", "row_chars", "seed"}})
    flat = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return {name: value for name, value in flat.items() if value is not None}


class Monitor:
    """Writes for rank 0; on other ranks it does nothing. A disk that is full costs points of the curves, not the run.

    Args:
        run: its folder. first_step: where it goes on; what was written of later steps is removed.
    """

    def __init__(self, run: Path, rank: int, first_step: int, steps: int):
        self._writes = rank == 0
        self._writer: SummaryWriter | None = None
        self._bar: tqdm | None = None
        self._folder = run / "tensorboard"
        self._is_broken = False
        if not self._writes:
            return
        cut_back(self._folder, first_step)
        self._scalars, self._generations = scalars_log(run, first_step), generations_log(run, first_step)
        # For a TensorBoard that is running and has read already what is cut off now.
        purge = first_step + 1 if first_step else None
        threading.excepthook = _quietly(threading.excepthook)
        self._writer = self._opened(purge)
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", file=sys.stderr, dynamic_ncols=True)

    def _opened(self, purge_step: int | None = None) -> SummaryWriter:
        return SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=10)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._is_broken:
                self.line(f"cannot write what is watched ({error.strerror or error}); the curves will have a gap")
            self._is_broken = True

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write figures to TensorBoard and to the scalars file."""
        if self._writer:
            with self._writing():
                self._scalars.add(step, values)
            with self._writing():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Write a text to TensorBoard."""
        if self._writer:
            with self._writing():
                self._writer.add_text(name, markdown, step)

    def generations(self, step: int, examples: list[dict[str, Any]], markdown: str) -> None:
        """Write what the model wrote, as objects to a file and as a text to TensorBoard."""
        if self._writer:
            with self._writing():
                self._generations.add(step, {"examples": examples})
        self.text(step, "validation/generated", markdown)

    def image(self, step: int, name: str, png: bytes) -> None:
        """Write a picture to TensorBoard."""
        if self._writer:
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            with self._writing():
                self._writer.add_image(name, pixels, step, dataformats="HWC")

    def histograms(self, step: int, prefix: str, samples: dict[str, np.ndarray]) -> None:
        """Write samples of each layer to TensorBoard, as histograms; those with a number that is not finite are left
        out, since there is no bin for it."""
        if self._writer:
            for layer, values in samples.items():
                if len(values) and np.isfinite(values).all():
                    with self._writing():
                        self._writer.add_histogram(f"{prefix}/{layer}", values, step)

    def settings(self, values: dict[str, str | float | bool], metrics: list[str]) -> None:
        """Write the run's settings and the names of its results, for TensorBoard's table of runs."""
        if self._writer:
            # Its own `add_hparams` would write them as another run, in a folder of its own.
            experiment, start, _ = hparams(values, dict.fromkeys(metrics, 0.0))
            files = self._writer.file_writer
            assert files is not None
            with self._writing():
                files.add_summary(experiment)
                files.add_summary(start)

    def flush(self) -> None:
        """Write out everything up to now, so that a checkpoint never stands without the curves before it."""
        if self._writer:
            with self._writing():
                self._writer.flush()
            if self._is_broken:  # its thread has ended: a new one writes as soon as there is room again
                self._is_broken, self._writer = False, self._opened()

    def progress(self, step: int, values: dict[str, Any]) -> None:
        """Move the bar to `step`, or write a plain line."""
        if self._bar is not None:
            self._bar.set_postfix(values)
            self._bar.update(step - self._bar.n)
        elif self._writes:
            print(f"step {step}: " + " ".join(f"{k} {v}" for k, v in values.items()), file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """Write a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._writes:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Write out everything."""
        if self._bar is not None:
            self._bar.close()
        if self._writer:
            with self._writing():
                self._writer.close()


def _quietly(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook for errors of threads that leaves out those of TensorBoard's, which the next call there raises again."""

    def told_once(error: Any) -> None:
        is_of_the_writer = type(error.thread).__module__.startswith("tensorboard.")
        if not (is_of_the_writer and isinstance(error.exc_value, OSError)):
            hook(error)

    return told_once
