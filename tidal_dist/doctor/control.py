"""Suspect 5: does generation feed what training fed, and write what the model's choice is, end marks included?"""

from functools import lru_cache

import numpy as np
import torch

from data_pipeline import rows
from data_pipeline.layout import Slots, alone
from data_pipeline.pieces import piece_of_blocks, slot_counts
from data_pipeline.tokenizer import EOB, EOS
from tidal_dist.doctor.compare import Difference, array_differences, counted
from tidal_dist.doctor.evidence import Case, Evidence
from tidal_dist.doctor.follow import Followed
from tidal_dist.doctor.report import Finding
from tidal_dist.generation.utf8 import allowed

# Choices closer than this are ties: the decoder chooses in float32.
TIE = 1e-4


def inputs_are_those_of_training(evidence: Evidence) -> Finding:
    """What the decoder feeds char by char, `<bob>` first, are the chars of training."""
    differences: list[Difference] = []
    for case, written in evidence.each():
        chars, own = case.laid_out[1], case.in_stretch()
        truth = [evidence.tokenizer.name(int(i)) for i in chars.ids[own]]
        found = [evidence.tokenizer.name(int(i)) for i in written.chars.ids]
        differences += array_differences(case, "input", found, truth, chars.block[own], chars.position[own])
    return counted(differences, "chars fed")


def end_marks_end(evidence: Evidence) -> Finding:
    """`<eob>` ends a block, `<eos>` the document, and nothing else does."""
    differences = []
    for case, written in evidence.each():
        ends = case.piece.ends_document and case.end == len(case.blocks)
        truth = ("eos" if ends else "length", case.end - case.first)
        found = (written.result.finish, len(written.result.blocks))
        if found != truth:
            differences.append(Difference(case, case.end - 1, "its end", "end and blocks", found, truth))
    return counted(differences, "documents that end otherwise")


def runs_through(evidence: Evidence) -> Finding:
    """The model takes everything that the decoder feeds."""
    differences = [
        Difference(case, case.first, "any", "the model's answer", written.error, "logits")
        for case, written in evidence.each()
        if written.error
    ]
    return counted(differences, "documents that the model cannot take")


@lru_cache(maxsize=4096)
def may_follow(written: bytes, max_block_bytes: int) -> torch.Tensor:
    """Ids that the decoder allows after the bytes written so far, (V,) bool."""
    return torch.from_numpy(allowed(written, max_block_bytes))


def held_to_text(logits: torch.Tensor, chars: Slots, max_block_bytes: int) -> torch.Tensor:
    """Logits (n, V) of chars in order, -inf where the decoder would not allow the id."""
    written, masks = b"", []
    for i, c in zip(chars.ids.tolist(), chars.index.tolist(), strict=True):
        written = b"" if c == 0 else written + bytes([i])
        masks.append(may_follow(written, max_block_bytes))
    return logits.masked_fill(~torch.stack(masks), -torch.inf)


def generation_follows_the_argmax(evidence: Evidence) -> Finding:
    """Everything written greedily is the choice of a training pass over what was written, ties left out."""
    differences: list[Difference] = []
    total = 0
    for case, free in zip(evidence.cases, evidence.free, strict=True):
        found = _departures(case, free, evidence)
        differences += found
        total += len(free.chars.ids)
    return counted(differences, "choices that differ", f"{total:,} choices")


def _departures(case: Case, free: Followed, evidence: Evidence) -> list[Difference]:
    """Where a generation is not what training's own pass over it would choose."""
    blocks, ended = free.result.blocks, free.result.finish == "eos"
    if not blocks:
        return []
    piece = piece_of_blocks([*case.blocks[: case.first], *blocks], evidence.tokenizer, case.first, ended)
    shape = slot_counts(piece.block_tokens, piece.block_bytes, piece.supervised_from)
    settings = evidence.tokenizer.byte_lengths, evidence.config.char_positions
    tokens, all_chars, labels = rows.lay_out_rows([[piece]], [[0]], *settings, shape)
    row = alone((tokens.at(0), all_chars.at(0), labels[0]), 1)
    chars, truth = row[1], _as_written(blocks, ended)
    logits = evidence.logits(row)
    held = held_to_text(logits, chars, evidence.tokenizer.segmentation.max_block_bytes)
    top = held.topk(2, dim=-1)
    clear = top.values[:, 0] - top.values[:, 1] > TIE * max(1.0, float(logits.abs().max()))
    wrong = np.flatnonzero((clear & (top.indices[:, 0] != torch.tensor(truth))).numpy())
    name = evidence.tokenizer.name
    return [
        Difference(
            case,
            int(chars.block[i]),
            int(chars.position[i]),
            "generation wrote",
            repr(name(truth[i])),
            f"{name(int(top.indices[i, 0]))!r} by the training pass",
        )
        for i in wrong
    ]


def _as_written(blocks: list[str], ended: bool) -> list[int]:
    """Ids that were chosen: each block's bytes from its end and its end mark."""
    ids = [i for block in blocks for i in [*reversed(block.encode()), EOB]]
    return [*ids[:-1], EOS if ended else EOB]
