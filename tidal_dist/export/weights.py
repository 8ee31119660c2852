"""The float32 weights of a checkpoint, whoever of the ranks holds them, read piece by piece.

DeepSpeed leaves them in flat buffers of the ranks (`training/slices.py` says which elements are where). Here every
parameter is a list of stretches of files. What is read is compared with the digests that the training wrote down.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tidal_dist.errors import CheckpointError
from tidal_dist.export.torch_file import StoredTensor, Stub, read_torch_file
from tidal_dist.training.checkpoint import PARAMETER_ORDER, TrainingState
from tidal_dist.training.digest import partial_digest, wrapped

UNIVERSAL = "zero"  # the folder of a universal checkpoint that holds the parameters
_PIECE = 1 << 22  # elements that are read at a time
_REMEDY = "use another checkpoint"


@dataclass(frozen=True)
class Weights:
    """Weights that are read when asked for.

    Attributes:
        shapes: by name. pieces: the elements of a parameter in order, (n,) float32 each.
        tied: names of weights that are others of them: the name of each by its own.
    """

    shapes: dict[str, tuple[int, ...]]
    pieces: Callable[[str], Iterator[torch.Tensor]]
    tied: dict[str, str] = field(default_factory=dict)

    def whole(self, name: str) -> torch.Tensor:
        """A weight in memory."""
        return torch.cat(list(self.pieces(name))).view(self.shapes[name])

    @property
    def numel(self) -> int:
        """Number of elements of all."""
        return sum(map(math.prod, self.shapes.values()))


@dataclass(frozen=True)
class _Stretch:
    """`count` elements of a stored tensor from `first` on."""

    tensor: StoredTensor
    first: int
    count: int

    def pieces(self) -> Iterator[torch.Tensor]:
        for first in range(0, self.count, _PIECE):
            yield self.tensor.read(self.first + first, min(_PIECE, self.count - first)).float()


_Parts = dict[str, list[_Stretch]]


def held(weights: Mapping[str, torch.Tensor]) -> Weights:
    """Weights that lie in memory."""

    def pieces(name: str) -> Iterator[torch.Tensor]:
        yield from weights[name].detach().reshape(-1).float().split(_PIECE)

    return Weights({name: tuple(w.shape) for name, w in weights.items()}, pieces)


def stored_weights(checkpoint: Path, state: TrainingState) -> Weights:
    """The weights of a checkpoint of any ZeRO stage and number of ranks, or of a universal one.

    Reading them raises CheckpointError where they are not, bit for bit, what the training had.

    Raises:
        CheckpointError: files are missing, torn, or of another layout.
    """
    shapes = {name: tuple(parameter["shape"]) for name, parameter in state.parameters.items()}
    try:
        parts, tied = _parts(checkpoint, state, shapes)
        for name, shape in shapes.items():
            if sum(part.count for part in parts[name]) != math.prod(shape):
                raise ValueError(f"{name} is not there in full")
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else f"{error}"
        raise CheckpointError(f"{checkpoint}: not as DeepSpeed writes a checkpoint ({reason}); {_REMEDY}") from None

    def pieces(name: str) -> Iterator[torch.Tensor]:
        found, total = 0, 0
        for part in parts[name]:
            for piece in part.pieces():
                total = wrapped(total + int(partial_digest(piece, found)))
                found += len(piece)
                yield piece
        if total != state.parameters[name]["digest"][0]:
            raise CheckpointError(f"{checkpoint}: {name} is not what the training had; {_REMEDY}")

    return Weights(shapes, pieces, tied)


def _parts(checkpoint: Path, state: TrainingState, shapes: dict[str, tuple[int, ...]]) -> tuple[_Parts, dict[str, str]]:
    if (checkpoint / UNIVERSAL).is_dir():
        return _universal(checkpoint / UNIVERSAL, shapes), {}
    if state.is_whole:
        return _whole(read_torch_file(checkpoint / "mp_rank_00_model_states.pt"), shapes)
    stage, ranks = state.layout["zero_optimization"]["stage"], state.layout["ranks"]
    optimizers = [_optimizer(checkpoint, rank) for rank in range(ranks)]
    if stage < 3:
        model = read_torch_file(checkpoint / "mp_rank_00_model_states.pt")
        return _laid_end_to_end(optimizers), dict(model["shared_params"] or {})
    model = read_torch_file(checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    order = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    return _cut_in_equal_parts(optimizers, order), dict(model["shared_params"] or {})


def _optimizer(checkpoint: Path, rank: int) -> dict[str, Any]:
    names = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for prefix in ("", "bf16_")]
    path = next((checkpoint / name for name in names if (checkpoint / name).exists()), None)
    if path is None:
        raise CheckpointError(f"{checkpoint}: no {names[0]}, the part of rank {rank}; {_REMEDY}")
    return read_torch_file(path)["optimizer_state_dict"]


def _laid_end_to_end(optimizers: Sequence[dict[str, Any]]) -> _Parts:
    """Stages 1 and 2: the parameters of a group end to end, cut among the ranks wherever that falls."""
    parts: _Parts = {}
    for optimizer in optimizers:
        buffers, mappings = optimizer["single_partition_of_fp32_groups"], optimizer["param_slice_mappings"]
        for buffer, mapping in zip(buffers, mappings, strict=True):
            for name, address in mapping.items():
                place = address.state if isinstance(address, Stub) else vars(address)
                parts.setdefault(name, []).append(_Stretch(buffer, place["start"], place["numel"]))
    return parts


def _cut_in_equal_parts(optimizers: Sequence[dict[str, Any]], order: Mapping[str, tuple[int, ...]]) -> _Parts:
    """Stage 3: each parameter cut into as many equal parts as there are ranks, the last ones ending in padding."""
    ranks, offset, parts = len(optimizers), 0, {}
    groups = [optimizer["fp32_flat_groups"] for optimizer in optimizers]
    for name, shape in order.items():
        numel = math.prod(shape)
        size = -(-numel // ranks)
        counts = [max(0, min(size, numel - rank * size)) for rank in range(ranks)]
        parts[name] = [part for g, n in zip(groups, counts, strict=True) for part in _stretches(g, offset, n)]
        offset += size
    return parts


def _stretches(groups: Sequence[StoredTensor], first: int, count: int) -> Iterator[_Stretch]:
    """Elements of a rank's buffers laid end to end: a parameter may go over from one to the next."""
    start = 0
    for group in groups:
        begin, end = max(first, start), min(first + count, start + group.numel)
        if begin < end:
            yield _Stretch(group, begin - start, end - begin)
        start += group.numel


def _whole(model: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> tuple[_Parts, dict[str, str]]:
    """Without ZeRO: one file; in bf16 the float32 copies are the optimizer's."""
    module = dict(model["module"])
    masters = [master for group in model["optimizer"].get("fp32_groups", []) for master in group]
    found = dict(zip(model[PARAMETER_ORDER], masters, strict=True)) if masters else module
    owners = {(module[name].storage, module[name].start): name for name in shapes}
    others = {name: (w.storage, w.start) for name, w in module.items() if name not in shapes}
    tied = {name: owners[place] for name, place in others.items() if place in owners}
    return {name: [_Stretch(found[name], 0, found[name].numel)] for name in shapes}, tied


def _universal(folder: Path, shapes: dict[str, tuple[int, ...]]) -> _Parts:
    """A universal checkpoint: a file of each parameter, whole; from stage 3 flat, and it may end in padding."""
    parts: _Parts = {}
    for name, shape in shapes.items():
        content = read_torch_file(folder / name / "fp32.pt")
        tensor = content["param"] if isinstance(content, dict) else content
        parts[name] = [_Stretch(tensor, 0, min(tensor.numel, math.prod(shape)))]
    return parts


def averaged(several: Sequence[Weights], decay: float) -> Weights:
    """The exponential moving average of weights, the newest last: each older one counts `decay` times the next.

    Raises:
        CheckpointError: they are not of one model.
    """
    newest = several[-1]
    if any(weights.shapes != newest.shapes for weights in several):
        raise CheckpointError("the checkpoints of the average hold different models; export one of them instead")
    powers = [decay**age for age in reversed(range(len(several)))]
    shares = [power / math.fsum(powers) for power in powers]

    def pieces(name: str) -> Iterator[torch.Tensor]:
        for together in zip(*(_even(weights.pieces(name)) for weights in several), strict=True):
            total = torch.zeros(len(together[0]), dtype=torch.float64)
            for share, piece in zip(shares, together, strict=True):
                total.add_(piece, alpha=share)
            yield total.float()

    return Weights(newest.shapes, pieces, newest.tied)


def _even(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same elements in pieces of `_PIECE`: checkpoints of other numbers of ranks are cut elsewhere."""
    kept: list[torch.Tensor] = []
    for piece in pieces:
        while len(piece):
            room = _PIECE - sum(map(len, kept))
            kept.append(piece[:room])
            piece = piece[room:]
            if sum(map(len, kept)) == _PIECE:
                yield torch.cat(kept)
                kept = []
    if kept:
        yield torch.cat(kept)
