"""Checkpoints in the layout of DeepSpeed's files, of any stage and number of ranks, without any training."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.segmentation import segmentation_hash
from data_pipeline.stream import Batch
from data_pipeline.tokenizer import MixedTokenizer
from tests.builders import document_of, packed, small_model, small_tokenizer
from tidal_dist.config import Config
from tidal_dist.generation.decoder import Decoder
from tidal_dist.generation.request import Limits
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.provenance import Provenance, StoredText, probe_bytes, probe_loss, texts_bytes
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training import commit
from tidal_dist.training.digest import partial_digest
from tidal_dist.training.writer import write_object

PROMPTS = (["12", " +", " 34", " ="], ["潮水"])
DATA = {"shards": "shards", "row_tokens": 48, "row_chars": 48}
_Group = OrderedDict[str, torch.Tensor]


@dataclass
class fragment_address:
    """Where a rank holds elements of a parameter, as DeepSpeed's class of this name says it."""

    numel: int
    start: int


class LossScaler:
    """An object of a class that a reader need not know."""

    def __init__(self) -> None:
        self.cur_scale = 1.0


def write_small_run(run: Path, steps: Sequence[int] = (1,), stage: int = 3, ranks: int = 2, **settings: Any) -> Path:
    """A run whose checkpoints hold models of random weights, another one at each step; the last checkpoint."""
    tokenizer = small_tokenizer()
    probe = packed([[document_of("the tide 12 + 34"), document_of(" 46", prompt="12 + 34 =")]], tokenizer, (48, 48))
    for step in steps:
        model = small_model(tokenizer, seed=step, dtype=torch.float32, **settings).eval()
        last = write_checkpoint(run / "checkpoints", step, model, tokenizer, probe, stage, ranks, texts_of(model))
    return last


def texts_of(model: TidalTransformer) -> list[StoredText]:
    """What a model writes after some prompts."""
    results = Decoder(model, small_tokenizer()).generate(PROMPTS, limits=Limits(12))
    return [StoredText(list(p), list(r.blocks), r.finish, 12, None) for p, r in zip(PROMPTS, results, strict=True)]


def write_checkpoint(
    folder: Path,
    step: int,
    model: TidalTransformer,
    tokenizer: MixedTokenizer,
    probe: Batch,
    stage: int,
    ranks: int,
    texts: Sequence[StoredText] = (),
) -> Path:
    """A committed checkpoint of a float32 model."""
    partial = commit.partial_folder(folder, step)
    partial.mkdir(parents=True)
    written = [write_object(partial / name, content) for name, content in _objects(model, stage, ranks)]
    config = Config.model_validate(
        {
            "run_dir": str(folder.parent),
            "corpus": {"sources": [{"path": "corpus.jsonl", "format": "jsonl"}]},
            "data": DATA,
            "segmentation": tokenizer.segmentation.model_dump(),
            "model": model.config.model_dump(),
            "training": {"steps": 9, "batch_rows": 8, "learning_rate": 1e-3},
        }
    )
    (partial / ckpt.CONFIG).write_text(config.to_yaml())
    tokenizer.save(partial / ckpt.TOKENIZER)
    (partial / ckpt.PROBE).write_bytes(probe_bytes(probe))
    if texts:
        (partial / ckpt.TEXTS).write_bytes(texts_bytes(texts))
    made = Provenance(
        run=str(folder.parent),
        config_hash="2" * 64,
        step=step,
        rows=8 * step,
        rolling_hash="0" * 64,
        manifest_hash="1" * 64,
        tokenizer_hash=tokenizer.hash,
        segmentation_hash=segmentation_hash(tokenizer.segmentation),
        precision="fp32",
        probe_loss=probe_loss(model, probe, "cpu"),
        metrics={"validation/bits_per_byte": 2.5},
    )
    parameters = {
        name: {"shape": list(p.shape), "digest": [int(partial_digest(p, 0)), 0, 0]}
        for name, p in model.named_parameters()
    }
    layout = {"ranks": ranks if stage else None, "zero_optimization": {"stage": stage}, "bf16": False}
    uses = [{"source": "sums", "rows": 8 * step, "epochs": 0.25, "repeats": 0, "quarantined": 0}]
    state = ckpt.TrainingState(made, ranks, "", 1.0, layout, float(step), parameters=parameters)
    corpus = {"files": 2, "hashed": 1, "list_sha256": "3" * 64, "lines": [f"{'4' * 64}  data/a file.jsonl"]}
    state.extra.update(coverage=uses, corpus=corpus)
    (partial / ckpt.STATE).write_bytes(state.as_json())
    known = {file.name for file in written}
    written += [commit.written_file(partial, path) for path in partial.iterdir() if path.name not in known]
    commit.commit(partial, commit.final_folder(folder, step), step, written)
    return commit.final_folder(folder, step)


def _objects(model: TidalTransformer, stage: int, ranks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the ranks save, one file at a time."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    groups = [OrderedDict((n, w) for n, w in weights.items() if (n in linear) == decayed) for decayed in (True, False)]
    shapes = [OrderedDict((name, w.shape) for name, w in group.items()) for group in groups]
    others = {"buffer_names": [], "shared_params": {}, "frozen_param_shapes": None, "ds_version": "0.19.8"}
    model_states = {"module": OrderedDict(weights), "param_shapes": shapes, "optimizer": None} | others
    if stage == 0:
        moments = {i: _moments(w) for i, w in enumerate(w for group in groups for w in group.values())}
        order = [name for group in groups for name in group]
        model_states |= {"optimizer": {"state": moments, "param_groups": []}, ckpt.PARAMETER_ORDER: order}
        yield "mp_rank_00_model_states.pt", model_states
        return
    if stage < 3:
        yield "mp_rank_00_model_states.pt", model_states
    for rank in range(ranks):
        if stage == 3:
            module = OrderedDict((name, torch.empty(0)) for name in weights)
            yield f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", model_states | {"module": module}
        saved = _stage_3(groups, rank, ranks) if stage == 3 else _stages_1_and_2(groups, rank, ranks)
        saved |= {"loss_scaler": LossScaler(), "zero_stage": stage, "partition_count": ranks}
        yield f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": saved, "ds_config": {}}


def _moments(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"step": torch.tensor(1.0), "exp_avg": weight / 2, "exp_avg_sq": weight**2}


def _stage_3(groups: Sequence[_Group], rank: int, ranks: int) -> dict[str, Any]:
    """Each parameter padded to a multiple of the ranks and cut."""
    parts = [torch.cat([_padded(w.reshape(-1), ranks).chunk(ranks)[rank] for w in g.values()]) for g in groups]
    moments = {"state": {i: _moments(part) for i, part in enumerate(parts)}, "param_groups": []}
    return {"fp32_flat_groups": parts, "optimizer_state_dict": moments}


def _stages_1_and_2(groups: Sequence[_Group], rank: int, ranks: int) -> dict[str, Any]:
    """The parameters of a group end to end, padded to a multiple of twice the ranks, cut."""
    parts, mappings = [], []
    for group in groups:
        flat = _padded(torch.cat([w.reshape(-1) for w in group.values()]), 2 * ranks)
        size, start = len(flat) // ranks, 0
        mapping: OrderedDict[str, fragment_address] = OrderedDict()
        for name, w in group.items():
            first, end = max(start, rank * size), min(start + w.numel(), (rank + 1) * size)
            if first < end:
                mapping[name] = fragment_address(end - first, first - rank * size)
            start += w.numel()
        parts.append(flat[rank * size : (rank + 1) * size].clone())
        mappings.append(mapping)
    moments = {"state": {i: _moments(part) for i, part in enumerate(parts)}, "param_groups": []}
    return {
        "single_partition_of_fp32_groups": parts,
        "param_slice_mappings": mappings,
        "base_optimizer_state": moments,
    }


def _padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.nn.functional.pad(flat, (0, -len(flat) % multiple), value=7.0)
