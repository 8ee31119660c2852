"""How far `tidal plan` is from the memory that small models really take: `python benchmarks/plan_check.py`.

Trains each model on 1 and 2 ranks, by DeepSpeed's launcher, and counts the bytes of all live tensors: after the engine
is built, and at the most during a forward and backward pass and a step. What an allocator, CUDA or NCCL holds beyond
tensors is not measured, nor is a GPU. As on a GPU every group of chars attends to all tokens of its row.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.layout import Slots
from tidal_dist.config import Config, parse_config
from tidal_dist.flops import recomputed_layers
from tidal_dist.plan import pass_shape
from tidal_dist.planning.activations import pass_memory
from tidal_dist.planning.content import RowContent
from tidal_dist.planning.parameters import parameters
from tidal_dist.planning.states import state_memory, zero_of

ROOT = Path(__file__).parents[1]
_VOCABULARY = 1000
_BUCKETS = {
    "reduce_bucket_size": 200_000,
    "allgather_bucket_size": 200_000,
    "stage3_prefetch_bucket_size": 100_000,
    "stage3_max_live_parameters": 300_000,
    "stage3_max_reuse_distance": 300_000,
    "stage3_param_persistence_threshold": 1_000,
}
_MODELS: dict[str, dict[str, Any]] = {
    "4 layers of 128, T 128, C 512": {"n_layers": 4, "width": 128, "n_heads": 4, "T": 128, "C": 512},
    "8 layers of 192, chars in 2, T 256, C 512": {
        "n_layers": 8, "width": 192, "n_heads": 6, "char_layers": 2, "T": 256, "C": 512,
    },
    "3 layers of 320, gelu, alibi, T 96, C 320": {
        "n_layers": 3, "width": 320, "n_heads": 5, "mlp": "gelu", "encoding": "alibi", "T": 96, "C": 320,
    },
}  # fmt: skip


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is on, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As PyTorch asks for it."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _config(model: dict[str, Any], rows: int, **training: Any) -> Config:
    shape = {k: v for k, v in model.items() if k not in ("T", "C")}
    return parse_config(
        {
            "run_dir": "none",
            "corpus": {"sources": [{"path": "none", "format": "text"}]},
            "data": {"shards": "none", "row_tokens": model["T"], "row_chars": model["C"]},
            "model": shape,
            "training": {"steps": 1, "batch_rows": rows, "learning_rate": 1e-3} | training,
            "deepspeed": {"zero_optimization": dict(_BUCKETS)},
        },
        "plan_check",
    )


def _cases() -> Iterator[tuple[str, Config, int]]:
    """Name, configuration and ranks of each."""
    for name, model in _MODELS.items():
        for text, settings in (
            ("checkpointed", {}),
            ("every 2nd layer", {"activation_checkpoint_every_layers": 2}),
            ("kept", {"activation_checkpointing": False}),
        ):
            yield f"{name}; {text}", _config(model, 2, zero_stage=3, **settings), 1
    model = _MODELS["4 layers of 128, T 128, C 512"]
    for stage in range(4):
        yield f"ZeRO-{stage}, 2 ranks", _config(model, 4, zero_stage=stage), 2
    yield "ZeRO-3, bf16, 2 ranks", _config(model, 4, zero_stage=3, precision="bf16"), 2


def _predicted(config: Config, ranks: int) -> dict[str, float]:
    element = 2 if config.training.precision == "bf16" else 4
    block = config.segmentation.max_block_bytes
    counted = parameters(config.model, _VOCABULARY, block)
    zero = zero_of(config.training.zero_stage, config.deepspeed["zero_optimization"])
    states = state_memory(counted, zero, ranks, element)
    content = RowContent(0, config.data.row_chars, 0, _VOCABULARY, "")
    shape = pass_shape(config, config.training.batch_rows // ranks, content, element, fused_norms=False)
    passes = pass_memory(shape, recomputed_layers(config.model, config.training), inputs_on_host=False)
    whole = states.gradients if config.training.zero_stage < 2 else 0  # made by the first pass, not before
    kept = states.gradients if config.training.zero_stage == 3 else 0
    bucket = zero.reduce_bucket * element if zero.stage == 3 else 0
    states_bytes = states.weights + states.optimizer + kept + bucket
    return {"states": states_bytes, "pass": passes.total + states.gathered + states.buckets - bucket + whole}


def _measured(configs: list[Config]) -> list[dict[str, float]]:
    """Of each configuration in turn, on this rank."""
    import torch._dynamo  # noqa: F401  its import fails while DeepSpeed has replaced PyTorch's constructors

    from tidal_dist.model import split
    from tidal_dist.training import engine as ds

    split.asks_rows = lambda _: False  # as on a GPU
    found = []
    with ds.process_group(configs[0].training, Path(configs[0].run_dir)) as (_, world):
        for config in configs:
            live = LiveTensors()
            found.append(_measured_run(config, world, live))
            gc.collect()
    return found


def _measured_run(config: Config, world: int, live: LiveTensors) -> dict[str, float]:
    from tidal_dist.model.transformer import TidalTransformer
    from tidal_dist.training import engine as ds

    training, data = config.training, config.data

    def build() -> TidalTransformer:
        again = ds.activation_checkpoint(training), training.activation_checkpoint_every_layers
        return TidalTransformer(config.model, _VOCABULARY, config.segmentation.max_block_bytes, *again)

    with live:
        engine = ds.build_engine(config, world, build)
    gc.collect()  # DeepSpeed leaves the first weights in a cycle
    engine.train()
    rows = training.batch_rows // world
    tokens, chars = _slots("token", rows, data.row_tokens), _slots("char", rows, data.row_chars)
    labels = torch.zeros(rows, data.row_chars, dtype=torch.long)

    def passes() -> None:
        loss = engine(tokens, chars, labels)
        engine.backward(loss / labels.numel(), scale_wrt_gas=False)

    found: dict[str, float] = {}
    with live:
        for _ in range(3):
            before = live.peak = live.now
            passes()
            found = {"states": float(before), "pass": float(live.peak - before)}
            engine.step()
    seconds = []
    for _ in range(5):
        start = time.process_time()
        passes()
        engine.step()
        seconds.append(time.process_time() - start)
    return found | {"cpu_seconds": min(seconds)}


def _slots(stream: Any, rows: int, n: int) -> Slots:
    zeros = np.zeros((rows, n), np.int64)
    arrays = dict.fromkeys(("ids", "block", "index", "start_pos", "position", "place"), zeros) | {"document": zeros + 1}
    return Slots(stream, **arrays).map(torch.from_numpy)


def _launched(ranks: int) -> list[dict[str, float]]:
    """All cases of so many ranks, measured on rank 0 of a launch of their own."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", "29677"]
        command += [str(Path(__file__)), "--measure", str(ranks), "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if not out.exists():
            raise RuntimeError(result.stdout[-2000:] + result.stderr[-2000:])
        return json.loads(out.read_text())


def main() -> None:
    """Measure every case and print predicted against measured."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--measure", type=int, help="the cases of so many ranks, as the launcher starts it")
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--local_rank", type=int)
    given = arguments.parse_args()
    if given.measure is not None:
        found = _measured([config for _, config, ranks in _cases() if ranks == given.measure])
        if os.environ.get("RANK", "0") == "0":
            given.out.write_text(json.dumps(found))
        return
    print("| case | states: predicted, measured, MB | error | pass: predicted, measured, MB | error | CPU s a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for ranks in (1, 2):
        named = [(name, config) for name, config, of in _cases() if of == ranks]
        for (name, config), measured in zip(named, _launched(ranks), strict=True):
            print(_as_row(name, _predicted(config, ranks), measured), flush=True)


def _as_row(name: str, predicted: dict[str, float], measured: dict[str, float]) -> str:
    row = [name]
    for part in ("states", "pass"):
        ours, theirs = predicted[part] / 1e6, measured[part] / 1e6
        row += [f"{ours:.2f}, {theirs:.2f}", f"{ours / theirs - 1:+.1%}"]
    return f"| {' | '.join([*row, format(measured['cpu_seconds'], '.3f')])} |"


if __name__ == "__main__":
    main()
