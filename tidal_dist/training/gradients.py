"""The averaged gradients between the last backward pass and the optimizer's step, wherever DeepSpeed keeps them.

Stage 3 keeps a rank's partition of every parameter, stages 1 and 2 the stretch of the flat group that the rank owns,
stage 0 everything on every rank; with offload they lie in host memory or on disk already. What a rank yields here is
its part, so that the parts of all ranks together are the gradient, once.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from tidal_dist.training.engine import device


def owned_gradients(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The name of a parameter and the flat slice of its averaged gradient that this rank owns, of every parameter of
    which it owns something, on the device where it lies.

    With MiCS several ranks own the same slice; what is on NVMe is read, so ask seldom.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if hasattr(optimizer, "_wait_for_offload_copies"):
        optimizer._wait_for_offload_copies()
    if stage == 3:
        slices = _of_partitions(optimizer)
    elif stage == 0:
        slices = _of_replicas(engine.module)
    elif hasattr(optimizer, "bf16_groups"):  # stage 1 that accumulates bf16 gradients in fp32
        slices = _of_full_buffers(optimizer)
    else:
        slices = _of_flat_groups(optimizer)
    for parameter, gradient in slices:
        if gradient.numel():
            yield names[id(parameter)], gradient


def _of_replicas(module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for parameter in module.parameters():
        if parameter.grad is not None:
            yield parameter, parameter.grad.reshape(-1).tensor_split(dist.get_world_size())[dist.get_rank()]


def _of_full_buffers(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for group, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
        for parameter, gradient in zip(group, gradients, strict=True):
            if parameter._hp_mapping is not None:
                own = parameter._hp_mapping.lp_fragment_address
                yield parameter, gradient.narrow(0, own.start, own.numel)


def _of_flat_groups(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for i, parameters in enumerate(optimizer.params_in_partition):
        if optimizer.cpu_offload:
            flat = optimizer.single_partition_of_fp32_groups[i].grad.view(-1)
            for parameter in parameters:
                _, _, start, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
                yield parameter, flat.narrow(0, start, count)
        else:
            gradients = [g for g in optimizer.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
            # Where a partition ends in padding, that is one tensor more.
            for parameter, gradient in zip(parameters, gradients, strict=False):
                yield parameter, gradient.reshape(-1)


def _of_partitions(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for i, parameters in enumerate(optimizer.fp16_groups):
        for j, parameter in enumerate(parameters):
            if not optimizer.offload_optimizer:
                gradient = optimizer.averaged_gradients[i][j]
            elif optimizer._swappable_optimizer_subgroup(i):
                gradient = optimizer.get_local_fp32_grad_for_param(parameter)
            else:
                _, start, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
                gradient = optimizer.fp32_partitioned_groups_flat[i].grad.narrow(0, start, count)
            # The last partitions are filled up: what lies there is no gradient.
            size = parameter.partition_numel()
            left = parameter.ds_numel - size * dist.get_rank(group=parameter.ds_process_group)
            yield parameter, gradient.view(-1).narrow(0, 0, min(size, max(0, left)))


def global_gradient_norm(engine: Any) -> float:
    """The norm of the whole averaged gradient, before clipping; not finite where any number of it on any rank is not.

    One small exchange. DeepSpeed's own norm comes with its step, too late to withhold that, and hides what is not
    finite behind -1, or does not exist (stage 0 in fp32).
    """
    squares = [square for _, square in _squares(engine)]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=device())
    dist.all_reduce(total)
    return total.sqrt().item()


def gradient_norms(engine: Any) -> dict[str, float]:
    """The same of every parameter, by name; one exchange."""
    names = [name for name, _ in engine.module.named_parameters()]
    places = {name: i for i, name in enumerate(names)}
    total = torch.zeros(len(names), device=device())
    for name, square in _squares(engine):
        total[places[name]] += square
    dist.all_reduce(total)
    return dict(zip(names, total.sqrt().tolist(), strict=True))


def _squares(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Of every parameter that this rank owns something of, its share of the square of the gradient's norm."""
    replicas = _replicas(engine)
    for name, norm in _norms_of_offloaded(engine) or _norms_of_owned(engine):
        yield name, norm**2 / replicas


def _norms_of_owned(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, gradient in owned_gradients(engine):
        yield name, torch.linalg.vector_norm(gradient, dtype=torch.float32)


def _norms_of_offloaded(engine: Any) -> list[tuple[str, torch.Tensor]]:
    """What DeepSpeed measures of gradients before they leave the device: cheaper than on the host, or from a disk."""
    optimizer = engine.optimizer
    if not (getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)):
        return []
    measured = optimizer.norm_for_param_grads
    found = []
    for name, parameter in engine.module.named_parameters():
        norm = measured.get(optimizer.get_param_id(parameter))
        if norm is not None:
            found.append((name, norm.to(device(), torch.float32)))
    return found


def _replicas(engine: Any) -> int:
    """How many ranks own the same slice; more than one with MiCS alone."""
    if engine.zero_optimization_stage() != 3:
        return 1
    group = next(engine.module.parameters()).ds_process_group
    return dist.get_world_size() // dist.get_world_size(group=group)
