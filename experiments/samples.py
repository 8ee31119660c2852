"""Texts that trained models write, side by side: the same beginnings, the same temperature."""

from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.baselines import plain_slots
from data_pipeline.pieces import blocks_of_piece, piece_of_text
from data_pipeline.stream import batch_of_rows
from data_pipeline.tokenizer import EOS, OUTPUT_VOCABULARY
from experiments.evaluate import Document, Trained
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.request import Limits, Request, requests_of
from tidal_dist.generation.sampling import Sampling

_TEMPERATURE = 0.7
_BYTES = 200
_CONTEXT_BLOCKS = 48
_SHOWN_CONTEXT = 80


def samples(trained: Trained, documents: Sequence[Document], count: int = 2) -> list[dict[str, str]]:
    """How a model goes on after the beginnings of the first texts: `context` (its end), `text` and `reference`.

    Blocks that were trained to be written from their start are not: no decoder knows them.
    """
    if trained.config.model.char_order != "reversed":
        return []
    contexts, found = [], []
    for _, text in documents[:count]:
        blocks = blocks_of_piece(piece_of_text("", text, trained.tokenizer))
        context = blocks[: min(_CONTEXT_BLOCKS, len(blocks) // 2)]
        contexts.append(context)
        reference = text.encode()[len("".join(context).encode()) :][:_BYTES].decode(errors="ignore")
        found.append({"context": "".join(context)[-_SHOWN_CONTEXT:], "reference": reference})
    write = _by_blocks if trained.config.model.writes == "blocks" else _by_units
    return [shown | {"text": text} for shown, text in zip(found, write(trained, contexts), strict=True)]


def _by_blocks(trained: Trained, contexts: Sequence[list[str]]) -> list[str]:
    engine = Engine(trained.model, trained.tokenizer, batch_size=len(contexts))
    like = Request("", Sampling(temperature=_TEMPERATURE, seed=1), Limits(max_bytes=_BYTES))
    return [generation.text for generation in engine.run(requests_of(contexts, like))]


def _by_units(trained: Trained, contexts: Sequence[list[str]]) -> list[str]:
    return [_continue(trained, context, seed) for seed, context in enumerate(contexts, 1)]


@torch.inference_mode()
def _continue(trained: Trained, context: list[str], seed: int) -> str:
    """A plain decoder's text, everything computed anew for each unit: samples are short."""
    tokenizer, text = trained.tokenizer, "".join(context).encode()
    is_bytes = trained.config.model.writes == "bytes"
    ids = [*text] if is_bytes else [i for block in context for i in tokenizer.encode_block(block)]
    may_come = torch.zeros(trained.model.output.out_features, dtype=torch.bool)
    may_come[:256] = is_bytes
    may_come[OUTPUT_VOCABULARY:] = True
    may_come[EOS] = True
    random, written = torch.Generator().manual_seed(seed), b""
    while len(written) < _BYTES:
        tokens, chars = plain_slots(np.array(ids))
        batch = batch_of_rows([(tokens, chars, chars.ids)])
        logits = trained.model(batch.tokens, batch.chars)[0, -1].masked_fill(~may_come, -torch.inf)
        chosen = int(torch.multinomial((logits / _TEMPERATURE).softmax(-1), 1, generator=random))
        if chosen == EOS:
            break
        ids.append(chosen)
        written += bytes([chosen]) if is_bytes else tokenizer.token_bytes(chosen)
    return written.decode(errors="replace")
