"""Whether a model still writes the greedy texts that the checkpoint's validation wrote."""

from collections.abc import Sequence
from itertools import zip_longest

import torch

from data_pipeline.layout import lay_out
from data_pipeline.pieces import piece_of_blocks, reverse_block
from data_pipeline.stream import batch_of_rows
from data_pipeline.tokenizer import EOB, EOS, MixedTokenizer
from tidal_dist.errors import ExportError
from tidal_dist.generation.decoder import Decoder
from tidal_dist.generation.request import Limits
from tidal_dist.generation.utf8 import allowed
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.provenance import StoredText

# How far two logits may be apart where one program's sums choose one and another's the other: logits of this model are
# about 10, so in bf16 (8 bits) 0.06 is one step of the last place, and a few of these add up on the way.
MARGIN = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.25}


def generate_texts(model: TidalTransformer, tokenizer: MixedTokenizer, texts: Sequence[StoredText]) -> list[StoredText]:
    """What a model writes after the prompts of texts, in their order."""
    decoder, found = Decoder(model, tokenizer), list(texts)
    for limits in {(text.max_bytes, text.max_blocks) for text in texts}:
        group = [i for i, text in enumerate(texts) if (text.max_bytes, text.max_blocks) == limits]
        results = decoder.generate([texts[i].prompt for i in group], limits=Limits(*limits))
        for i, result in zip(group, results, strict=True):
            found[i] = StoredText(list(texts[i].prompt), list(result.blocks), result.finish, *limits)
    return found


def compare_texts(
    model: TidalTransformer, tokenizer: MixedTokenizer, texts: Sequence[StoredText], precision: str, where: str
) -> int:
    """Generate texts again; how many differ, from a char on at which rounding decides.

    Args:
        precision: the coarsest that weights and activations have had.

    Raises:
        ExportError: one differs where it should not.
    """
    near = 0
    for stored, found in zip(texts, generate_texts(model, tokenizer, texts), strict=True):
        if stored == found:
            continue
        apart = _apart(model, tokenizer, stored, found)
        if not apart <= MARGIN[precision]:
            raise ExportError(
                f"{where}: after {''.join(stored.prompt)[-40:]!r} it writes {''.join(found.blocks)!r}, the checkpoint "
                f"wrote {''.join(stored.blocks)!r}; their chars are {apart:.3g} apart, rounding explains "
                f"{MARGIN[precision]:g}"
            )
        near += 1
    return near


def _apart(model: TidalTransformer, tokenizer: MixedTokenizer, stored: StoredText, found: StoredText) -> float:
    """How far the logits of the first chars that differ are apart.

    Where one text ends before the other, its next block was longer than there was room for, and what it would have
    been is not known: then the nearest runner-up of the other's block counts.
    """
    sides = zip_longest(_written(stored), _written(found))
    number, (ours, theirs) = next((i, pair) for i, pair in enumerate(sides) if pair[0] != pair[1])
    known = theirs or ours
    blocks = found.blocks if theirs else stored.blocks
    piece = piece_of_blocks(
        [*stored.prompt, *blocks[: number + 1]], tokenizer, len(stored.prompt) + number, ends_document=False
    )
    batch = batch_of_rows([lay_out(piece, tokenizer.byte_lengths, model.config.char_positions)])
    with torch.no_grad():
        logits = model(batch.tokens, batch.chars)[0].float()
    if ours and theirs:
        c = next(c for c, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        return float((logits[c, ours[c]] - logits[c, theirs[c]]).abs())
    return min(_lead(logits[c], known, c, tokenizer.segmentation.max_block_bytes) for c in range(len(known)))


def _lead(logits: torch.Tensor, chars: Sequence[int], c: int, max_block_bytes: int) -> float:
    """How far char c of a block is before the likeliest other that was allowed."""
    others = torch.from_numpy(allowed(bytes(chars[:c]), max_block_bytes).copy())
    others[chars[c]] = False
    return float(logits[chars[c]] - logits[others].max()) if others.any() else float("inf")


def _written(text: StoredText) -> list[list[int]]:
    """The chars of each block in the order of generation, end marks included."""
    ends = [EOB] * len(text.blocks)
    if text.finish == "eos" and ends:
        ends[-1] = EOS
    return [[*reverse_block(block.encode()), end] for block, end in zip(text.blocks, ends, strict=True)]
