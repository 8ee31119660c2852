"""Started on every rank by the deepspeed launcher: what the gradients are under each stage, and what a step leaves
behind that is discarded. Rank 0 writes what was found to `run_dir`/found.json."""

import argparse
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch._dynamo.utils import counters

from data_pipeline.quarantine import QuarantineRecord
from data_pipeline.shards import Manifest
from data_pipeline.stream import Share, StepDataset
from tidal_dist.config import Config, load_config
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.training import engine as ds
from tidal_dist.training.data import open_data
from tidal_dist.training.gradients import global_gradient_norm, gradient_norms, owned_gradients
from tidal_dist.training.phases import Phases

PHASES = Phases(lambda: None)
RATE = 3e-3
CASES: dict[str, list[str]] = {
    "0 fp32": ["training.zero_stage=0"],
    "0 bf16": ["training.zero_stage=0", "training.precision=bf16"],
    "1 fp32": ["training.zero_stage=1"],
    "1 bf16": ["training.zero_stage=1", "training.precision=bf16", "deepspeed={data_types: {grad_accum_dtype: fp32}}"],
    "2 fp32 offload": ["training.zero_stage=2", "deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"],
    "2 bf16 accumulated": ["training.zero_stage=2", "training.precision=bf16", "training.accumulation_steps=2"],
    "3 fp32 accumulated": [
        "training.accumulation_steps=2",
        "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    ],
    "3 bf16": ["training.precision=bf16"],
    "3 bf16 offload": [
        "training.precision=bf16",
        "training.accumulation_steps=2",
        "deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}",
    ],
    "1 bf16 compiled": ["training.zero_stage=1", "training.precision=bf16", "training.compile=true"],
    "3 fp32 compiled": [
        "training.compile=true",
        "training.activation_checkpointing=true",
        "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    ],
    "2 bf16 draft head": [
        "training.zero_stage=2",
        "training.precision=bf16",
        "training.activation_checkpointing=true",
        "model.draft_layers=1",
    ],
    "3 fp32 draft head compiled": [
        "training.compile=true",
        "training.activation_checkpointing=true",
        "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
        "model.draft_layers=1",
    ],
}
# What is compiled is traced and differentiated as ever; kernels would take a minute to make, and are PyTorch's own.
torch.compile = functools.partial(torch.compile, backend="aot_eager")


class Case:
    """An engine and the batches of its steps."""

    def __init__(self, config: Config, rank: int, world: int):
        manifest = Manifest.of(config.data)
        tokenizer = manifest.tokenizer()
        data = open_data(config, manifest, tokenizer, QuarantineRecord(manifest.hash), (rank, world), False)
        share = Share(config.training.batch_rows, config.training.accumulation_steps, rank, world)
        self._steps = StepDataset(data.reader, data.stream.order, share, 0)
        self._all = StepDataset(data.reader, data.stream.order, Share(config.training.batch_rows, 1, 0, 1), 0)
        sizes = tokenizer.vocab_size, config.segmentation.max_block_bytes
        self._build = lambda: TidalTransformer(config.model, *sizes, ds.activation_checkpoint(config.training))
        self.engine = ds.build_engine(config, world, self._build)
        self.engine.train()

    def pass_step(self, step: int) -> float:
        return ds.pass_batches(self.engine, self._steps.step(step).batches, PHASES)[0]

    def make_step(self, step: int) -> None:
        self.pass_step(step)
        ds.apply_step(self.engine, RATE, PHASES)

    def pass_planted(self, step: int, rank: int, factor: float) -> float:
        """Like `pass_step`, with the gradients that leave the loss multiplied on one rank."""
        forward = self.engine.module.forward

        def planted(*arguments: Any, **named: Any) -> torch.Tensor:
            loss = forward(*arguments, **named)
            if torch.distributed.get_rank() == rank:
                loss.register_hook(lambda gradient: gradient * factor)
            return loss

        self.engine.module.forward = planted
        try:
            return self.pass_step(step)
        finally:
            self.engine.module.forward = forward

    def weights(self) -> dict[str, torch.Tensor]:
        named = dict(self.engine.module.named_parameters())
        is_partitioned = self.engine.zero_optimization_stage() == 3
        with deepspeed.zero.GatheredParameters(list(named.values()), enabled=is_partitioned):
            return {name: parameter.detach().clone() for name, parameter in named.items()}

    def state(self) -> dict[str, str]:
        """Hashes of weights, of all that the optimizer holds, and the counters."""
        engine = self.engine
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        held = [tensor for key, values in inner.state.items() for tensor in (key, *values.values())]
        counters = [
            engine.micro_steps % engine.gradient_accumulation_steps(),
            engine.global_steps,
            engine.skipped_steps,
        ]
        return {
            "weights": hash_of(list(self.weights().values())),
            "optimizer": hash_of([tensor for tensor in held if torch.is_tensor(tensor)]),
            "tensors held": str(len(held)),
            "counters": str(counters),
        }

    def gradients_of_plain_pytorch(self, step: int) -> dict[str, torch.Tensor]:
        """Of the whole batch on one rank, in fp32, with the weights of now."""
        model = self._build().float()
        model.load_state_dict({name: weight.float() for name, weight in self.weights().items()}, strict=False)
        batch = self._all.step(step).batches[0].to("cpu")
        (model(batch.tokens, batch.chars, batch.labels) / batch.label_count()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def gathered_gradients(self) -> dict[str, torch.Tensor]:
        """The slices of all ranks, laid end to end."""
        own = {name: gradient.float().clone() for name, gradient in owned_gradients(self.engine)}
        parts = ds.gather_objects(own)
        names = [name for name, _ in self.engine.module.named_parameters()]
        return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def hash_of(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.flatten() - expected.flatten()).norm() / expected.norm())


def examine(config: Config, rank: int, world: int) -> dict[str, Any]:
    """Steps 0, 1, 4 with the steps 2 and 3 discarded, of which one has NaN; and steps 0, 1, 4 alone."""
    plain, tried = Case(config, rank, world), Case(config, rank, world)
    for step in (0, 1):
        plain.make_step(step)
        tried.make_step(step)
    compiled = _compiled_graphs()
    before = tried.state()
    expected = tried.gradients_of_plain_pytorch(2)
    tried.pass_step(2)
    norm, by_name, found = global_gradient_norm(tried.engine), gradient_norms(tried.engine), tried.gathered_gradients()
    ds.discard_step(tried.engine)
    after = tried.state()
    loss = tried.pass_planted(3, rank=1, factor=float("nan"))
    norm_of_nan = global_gradient_norm(tried.engine)
    ds.discard_step(tried.engine)
    after_nan = tried.state()
    tried.pass_planted(3, rank=1, factor=1e4)
    spike = global_gradient_norm(tried.engine)
    ds.discard_step(tried.engine)
    plain.make_step(4)
    tried.make_step(4)
    whole = torch.cat([gradient.flatten() for gradient in expected.values()])
    return {
        "graphs": {
            "first": compiled,
            "all": _compiled_graphs(),
            "breaks": len(counters["graph_break"]),
        },
        "same names": list(found) == list(expected),
        "gradient error": relative_error(torch.cat(list(found.values())), whole),
        "norm": norm,
        "expected norm": float(whole.norm()),
        "norm by name": sum(value**2 for value in by_name.values()) ** 0.5,
        "loss beside NaN gradients": loss,
        "norm of NaN": str(norm_of_nan),
        "spike": spike,
        "before": ds.gather_objects(before),
        "after": ds.gather_objects(after),
        "after NaN": ds.gather_objects(after_nan),
        "went on": ds.gather_objects(tried.state()),
        "without": ds.gather_objects(plain.state()),
    }


def _compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--local_rank", type=int)
    path = parser.parse_args().config
    found, plain = {}, load_config(path)
    with ds.process_group(plain.training, Path(plain.run_dir)) as (rank, world):
        for name, overrides in CASES.items():
            config = load_config(path, ["training.activation_checkpointing=false", *overrides])
            found[name] = examine(config, rank, world)
            if rank == 0:
                out = Path(config.run_dir)
                out.mkdir(parents=True, exist_ok=True)
                (out / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
    os._exit(0)
