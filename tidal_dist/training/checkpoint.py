"""Checkpoints: DeepSpeed's files with the training state beside them, copied to host memory and written from there."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tidal_dist.errors import CheckpointError
from tidal_dist.provenance import Provenance
from tidal_dist.training.commit import BEST, best_checkpoint, complete_checkpoints
from tidal_dist.training.slices import MOMENTS, owned_slices, parameter_order
from tidal_dist.training.writer import Copied, HostSlice

STATE, PROBE, CONFIG, TOKENIZER = "state.json", "probe.safetensors", "config.yaml", "tokenizer.json"
TEXTS = "texts.json"  # where its step was validated
PARAMETER_ORDER = "tidal_parameter_order"
_WHOLE = "mp_rank_00_model_states.pt"


@dataclass(frozen=True)
class TrainingState:
    """Where training stands, beside weights and optimizer.

    Attributes:
        provenance: of the weights. ranks: how many wrote the checkpoint.
        order_hash: of everything that the order of the rows depends on. train_seconds: spent in training so far.
        layout: how the ranks share the state; a checkpoint of another layout is converted.
        optimizer_steps: what the optimizer counts. schedule: of the learning rate, and where it stands.
        random: how and from what random numbers are drawn. best: figures of the best checkpoints so far.
        parameters: of each its shape and the digests of weight, exp_avg and exp_avg_sq.
        extra: what parts of the loop keep, by their names.
    """

    provenance: Provenance
    ranks: int
    order_hash: str
    train_seconds: float
    layout: dict[str, Any] = field(default_factory=dict)
    optimizer_steps: float = 0.0
    schedule: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether one file holds the weights of all ranks: that is so without ZeRO."""
        return self.layout.get("zero_optimization", {}).get("stage") == 0

    def as_json(self) -> bytes:
        """The content of `state.json`."""
        return json.dumps(asdict(self), indent=1).encode()


def load_state(checkpoint: Path) -> TrainingState:
    """The training state of a checkpoint.

    Raises:
        CheckpointError: it has none, or it cannot be read.
    """
    try:
        content = json.loads((checkpoint / STATE).read_bytes())
        return TrainingState(**content | {"provenance": Provenance(**content["provenance"])})
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: no {STATE}, so this is no complete checkpoint") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint / STATE}: cannot read ({error}); use an older checkpoint") from None


def best_metrics(folder: Path, mark: str = BEST) -> dict[str, float]:
    """The metrics of the checkpoint marked as best; {} where there is none."""
    best = best_checkpoint(folder, mark)
    return load_state(best).provenance.metrics if best else {}


class _HostCopies:
    """A checkpoint engine for DeepSpeed that copies to host memory what it is given, and leaves the writing to others.

    It has the methods of DeepSpeed's `CheckpointEngine` that saving calls; not its subclass, so that a checkpoint can
    be looked at where DeepSpeed is not installed. DeepSpeed's own engines that write beside the training do not hold
    up: docs/checkpoints.md says what was found.
    """

    def __init__(self) -> None:
        self.name = "host copies"
        self.objects: list[tuple[str, Any]] = []
        self._copies: list[tuple[int, int, torch.Tensor]] = []

    def create(self, _: Any) -> None:
        """Nothing has to be made."""

    def commit(self, _: Any) -> bool:
        """Nothing has been written yet."""
        return True

    def is_decoupled(self) -> bool:
        """It does not want to be asked at every step."""
        return False

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; where that fails on one rank only, the others must not wait: writing will fail, and tell."""
        with suppress(OSError):
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a copy."""
        self.objects.append((os.path.basename(path), self._copied(state_dict)))

    def preserves_storage_sharing(self) -> bool:
        """Views are copied as what they show, so DeepSpeed need not clone them out of their buffers first."""
        return False

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host copy of a tensor: part of one made already, where it is a part of what was saved."""
        first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if tensor.is_contiguous():
            for start, end, copy in self._copies:
                if start <= first and first + size <= end and copy.dtype == tensor.dtype:
                    return copy.view(-1).narrow(0, (first - start) // tensor.element_size(), tensor.numel())
        return _on_host(tensor)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            copy = _on_host(value)
            if value.is_contiguous() and value.numel():
                start = value.data_ptr()
                self._copies.append((start, start + value.numel() * value.element_size(), copy))
            return copy
        if isinstance(value, dict):
            copies = {key: self._copied(item) for key, item in value.items()}
            return OrderedDict(copies) if isinstance(value, OrderedDict) else copies
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(self._copied(item) for item in value)
        return value


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; from a device it arrives in pinned memory some time later."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def copy_to_host(engine: Any, partial: Path) -> Copied:
    """What this rank has to write of a checkpoint in the folder `partial`; called by all ranks.

    The caller waits for the device before the copies are read.
    """
    copies, usual = _HostCopies(), engine.checkpoint_engine
    engine.checkpoint_engine = copies
    # It would write a script beside the checkpoints on rank 0, and leave the others waiting where the disk is full.
    engine._copy_recovery_script = lambda _: None
    try:
        order = {PARAMETER_ORDER: parameter_order(engine)}
        engine.save_checkpoint(str(partial.parent), tag=partial.name, client_state=order, save_latest=False)
        slices = [
            HostSlice(part.name, part.start, tuple(copies.copy_of(tensor) for tensor in part.tensors))
            for part in owned_slices(engine)
            if part.is_counted
        ]
    finally:
        engine.checkpoint_engine = usual
    return Copied(copies.objects, slices)


def whole_tensors(checkpoint: Path) -> Callable[[str], tuple[torch.Tensor, ...]]:
    """Weight and moments by parameter's name, in float32, of a checkpoint without ZeRO: one file holds everything."""
    content = torch.load(checkpoint / _WHOLE, mmap=True, map_location="cpu", weights_only=False)
    optimizer = content["optimizer"]
    numbers = {name: number for number, name in enumerate(content[PARAMETER_ORDER])}
    masters = [master for group in optimizer.get("fp32_groups", []) for master in group]
    moments = optimizer.get("optimizer_state_dict", optimizer)["state"]

    def tensors(name: str) -> tuple[torch.Tensor, ...]:
        number = numbers[name]
        return (masters[number] if masters else content["module"][name]), *(moments[number][key] for key in MOMENTS)

    return tensors


def load_same_layout(engine: Any, checkpoint: Path) -> None:
    """Load weights and optimizer on all ranks as they were saved.

    Raises:
        CheckpointError: DeepSpeed could not.
    """
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(f"{checkpoint}: DeepSpeed could not load it; use an older checkpoint")


__all__ = ["BEST", "best_checkpoint", "complete_checkpoints"]
