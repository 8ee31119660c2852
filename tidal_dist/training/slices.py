"""Which parts of the parameters this rank owns, and how the optimizer holds them, under every ZeRO stage.

DeepSpeed keeps a float32 copy of what it trains (the master) and AdamW's moments in flat buffers that the ranks share
out: stage 3 cuts every parameter into equal parts, stages 1 and 2 cut the parameters laid end to end, stage 0 gives
every rank all of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """Elements of a parameter that this rank owns: views into the optimizer's buffers, so writing to them sets it.

    Attributes:
        name, shape: of the parameter. start: index of the first element in the flattened parameter.
        is_counted: false where another rank owns the same elements and counts them.
        weight: float32. moments: exp_avg and exp_avg_sq; empty before the optimizer's first step.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    is_counted: bool
    weight: torch.Tensor
    moments: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The weight and the moments."""
        return self.weight, *self.moments


def owned_slices(engine: Any) -> Iterator[Slice]:
    """The slices of all parameters that this rank owns, in the model's order; padding belongs to none.

    Under stage 3 with the optimizer on NVMe the tensors are copies, and writing to them sets nothing.
    """
    optimizer = engine.optimizer
    find = _finder(optimizer)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and (place := find(parameter)) is not None:
            yield _slice_of(name, parameter, *place)


@dataclass(frozen=True)
class _Place:
    """Where the optimizer keeps elements of a parameter: `count` of its `buffer`, from `offset` on."""

    buffer: torch.Tensor
    state: dict[str, Any]
    offset: int
    count: int


_Found = tuple[int, bool, _Place] | None


def _slice_of(name: str, parameter: torch.nn.Parameter, start: int, is_counted: bool, place: _Place) -> Slice:
    def part(buffer: torch.Tensor) -> torch.Tensor:
        return buffer.detach().view(-1).narrow(0, place.offset, place.count)

    moments = tuple(part(place.state[key]) for key in MOMENTS if key in place.state)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return Slice(name, shape, start, is_counted, part(place.buffer), moments)


def _finder(optimizer: Any) -> Callable[[torch.nn.Parameter], _Found]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return lambda parameter: _in_stage_3(optimizer, parameter)
    if not hasattr(optimizer, "fp16_groups"):
        if isinstance(optimizer, torch.optim.Optimizer):
            return lambda p: (0, dist.get_rank() == 0, _Place(p.data, optimizer.state.get(p, {}), 0, p.numel()))
        return lambda parameter: _in_stages_1_and_2(optimizer, parameter)
    masters, state = _masters_of_stage_0(optimizer), optimizer.optimizer.state
    return lambda p: (0, dist.get_rank() == 0, _Place(masters[p], state.get(masters[p], {}), 0, p.numel()))


def _in_stage_3(optimizer: Any, parameter: Any) -> _Found:
    group, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = part * optimizer._get_param_partition_rank(parameter)
    count = max(0, min(part, parameter.ds_numel - start))  # the last parts end in padding
    flat = optimizer.fp32_partitioned_groups_flat[group]
    # With MiCS several groups of ranks hold the same parts: only the first of them counts.
    parts = optimizer._get_param_partition_world_size(parameter)
    return start, dist.get_rank() < parts, _Place(flat, optimizer.optimizer.state.get(flat, {}), offset, count)


def _in_stages_1_and_2(optimizer: Any, parameter: Any) -> _Found:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
    address = mapping.get_hp_fragment_address()
    place = _Place(flat, optimizer.optimizer.state.get(flat, {}), address.start, address.numel)
    return mapping.lp_fragment_address.start, True, place


def _masters_of_stage_0(optimizer: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The float32 copy of each parameter of DeepSpeed's optimizer for bf16 without ZeRO."""
    return {
        parameter: master
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for parameter, master in zip(group, masters, strict=True)
    }


def shapes(engine: Any) -> dict[str, list[int]]:
    """The shapes of the trained parameters, also of those that are partitioned."""
    return {n: list(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters() if p.requires_grad}


def step_count(engine: Any) -> float:
    """How many steps the optimizer counts, which its bias correction depends on; 0 before the first."""
    inner = _inner(engine.optimizer)
    counts = [state["step"] for state in inner.state.values() if "step" in state]
    counts += [group["step"] for group in inner.param_groups if "step" in group]
    return float(counts[0]) if counts else 0.0


def set_step_count(engine: Any, count: float) -> None:
    """Set what `step_count` tells, and give the optimizer moments to write to where it has none yet."""
    inner = _inner(engine.optimizer)
    is_torch = isinstance(inner, torch.optim.Adam)
    for master in _masters(engine.optimizer):
        state = inner.state[master]
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(master, requires_grad=False))
        on_device = is_torch and (inner.defaults["fused"] or inner.defaults["capturable"])
        device = master.device if on_device else "cpu"
        state["step"] = torch.tensor(count, dtype=torch.float32, device=device) if is_torch else int(count)
    if not is_torch:  # DeepSpeed's own keep one count for a group
        for group in inner.param_groups:
            group["step"] = int(count)


def parameter_order(engine: Any) -> list[str]:
    """The parameters' names in the order in which the optimizer numbers them; [] under ZeRO, which flattens them."""
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        groups = [group["params"] for group in optimizer.param_groups]
    elif hasattr(optimizer, "fp32_groups"):
        groups = optimizer.fp16_groups
    else:
        return []
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return [names[parameter] for group in groups for parameter in group]


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _masters(optimizer: Any) -> list[torch.Tensor]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3 keeps them out of the optimizer's groups
        return optimizer.fp32_partitioned_groups_flat
    return [master for group in _inner(optimizer).param_groups for master in group["params"]]


def refresh_parameters(engine: Any) -> None:
    """Give the parameters that the model computes with the values of the masters, after writing to slices."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()  # partitions what is whole at the moment
        for n, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[n].data.copy_(master.data)
            optimizer._unflatten_partitioned_parameters(n)
        optimizer.checkpoint_event_epilogue()  # and gathers it again
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_groups"):
        for parameter, master in _masters_of_stage_0(optimizer).items():
            parameter.data.copy_(master.data)
