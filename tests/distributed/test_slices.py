"""What two real ranks own under every ZeRO stage, precision and offloading: every element once, as it was written."""

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tidal_dist.launching import free_port
from tidal_dist.training.digest import partial_digest
from tidal_dist.training.slices import owned_slices, refresh_parameters, set_step_count, step_count

pytestmark = pytest.mark.slow

LAYOUTS = [
    (stage, precision, offload)
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    for offload in ((False, True) if stage else (False,))
]


def model() -> torch.nn.Module:
    """Parameters whose sizes two ranks do not divide; the last is tiny."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))


def wanted() -> dict[str, tuple[torch.Tensor, ...]]:
    """The weight and moments that are written."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tuple(torch.randn(parameter.shape, generator=generator) for _ in range(3))
        for name, parameter in model().named_parameters()
    }


def write_and_read(rank: int, port: int, folder: str) -> None:
    """Write all slices of an engine of each layout; what is then owned, and what the model computes with."""
    import os

    import deepspeed

    from tidal_dist.config import TrainingConfig
    from tidal_dist.training import engine as ds
    from tidal_dist.training.resume import digests_of

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = []
    with ds.process_group(TrainingConfig(steps=1, batch_rows=2, learning_rate=1e-3), Path(folder)):
        for stage, precision, offload in LAYOUTS:
            settings = {
                "train_micro_batch_size_per_gpu": 1,
                "bf16": {"enabled": precision == "bf16"},
                "zero_optimization": {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {}),
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            }
            module = model()
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
            set_step_count(engine, 7)
            for part in owned_slices(engine):
                for target, whole in zip(part.tensors, wanted()[part.name], strict=True):
                    target.copy_(whole.view(-1)[part.start : part.start + target.numel()])
            refresh_parameters(engine)
            parameters = list(engine.module.parameters())
            with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
                computed = [parameter.float().flatten().tolist() for parameter in parameters]
            found.append([digests_of(engine), computed, step_count(engine)])
    Path(folder, f"{rank}").write_text(json.dumps(found))


def test_every_layout_holds_what_was_written(tmp_path: Path) -> None:
    mp.start_processes(write_and_read, (free_port(), str(tmp_path)), nprocs=2, start_method="fork")
    ours, theirs = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert ours == theirs
    digests = {n: [int(partial_digest(t, 0)) for t in tensors] for n, tensors in wanted().items()}
    for (_, precision, _), (found, computed, steps) in zip(LAYOUTS, ours, strict=True):
        assert found == digests
        assert steps == 7
        weights = [weight for weight, *_ in wanted().values()]
        if precision == "bf16":
            weights = [weight.bfloat16().float() for weight in weights]
        assert computed == [weight.flatten().tolist() for weight in weights]
