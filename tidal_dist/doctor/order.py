"""Suspect 1: does everything stand where the definition on paper says, at training and at decoding?"""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from data_pipeline.layout import Slots
from data_pipeline.pieces import reverse_block
from tidal_dist.doctor.compare import Difference, array_differences, counted
from tidal_dist.doctor.evidence import Case, Evidence, texts_of_tokens
from tidal_dist.doctor.report import Finding
from tidal_dist.generation import utf8

# What the sampled documents may lack: characters of two, three and four bytes.
_OF_SEVERAL_BYTES = (" né", "潮水", "a👍🏽")

Field = Literal["position", "place"]


def chars_are_reversed_bytes(evidence: Evidence) -> Finding:
    """The chars of the shards are each block's bytes from its end, by the bytes that its tokens stand for."""
    wrong = []
    for row in evidence.rows:
        for name, piece in zip(row.names, row.pieces, strict=True):
            start = 0
            for b, text in enumerate(texts_of_tokens(piece, evidence.tokenizer)):
                found, start = piece.chars[start : start + piece.block_bytes[b]].tobytes(), start + piece.block_bytes[b]
                if found != bytes(reversed(text.encode())):
                    wrong.append(f"{name}, block {b} {text!r}: chars {found!r}, should be {text.encode()[::-1]!r}")
    return Finding(len(wrong), 0, "blocks not reversed byte by byte", wrong[0] if wrong else "")


def reversing_twice(evidence: Evidence) -> Finding:
    """Reversing a block twice gives the block, and once its bytes from the end."""
    differences = [
        Difference(case, b, "any", "reversed", reverse_block(block.encode()), block.encode()[::-1])
        for case in evidence.cases
        for b, block in enumerate(case.blocks)
        if reverse_block(reverse_block(block.encode())) != block.encode()
        or reverse_block(block.encode()) != block.encode()[::-1]
    ]
    return counted(differences, "blocks")


def written_blocks_are_turned_round(evidence: Evidence) -> Finding:
    """A block that the decoder is told to write, from its end, comes out as that block."""
    differences: list[Difference] = []
    for case, written in evidence.each():
        truth, numbers = case.blocks[case.first : case.end], range(case.first, case.end)
        differences += array_differences(case, "block", written.result.blocks, truth, numbers, numbers)
    if not differences:
        differences = [
            Difference(
                evidence.cases[0], evidence.cases[0].first, "any", f"{text!r}, if it were written,", repr(out), text
            )
            for text in _OF_SEVERAL_BYTES
            if (out := utf8.block_text(bytes(reversed(text.encode())))) != text
        ]
    return counted(differences, "blocks that come out otherwise")


def _on_paper(case: Case, evidence: Evidence, field: Field) -> tuple[list[int], list[int]]:
    """A field of the context and of the chars of a case's stretch, by the oracle."""
    samples = [evidence.sample(case, b) for b in range(case.first, case.end)]
    tokens = [getattr(slot, field) or 0 for slot in samples[-1].tokens]
    return tokens, [getattr(slot, field) or 0 for sample in samples for slot in sample.chars]


Streams = Callable[[Evidence], Iterator[tuple[Case, Slots, Slots]]]


def at_training(evidence: Evidence) -> Iterator[tuple[Case, Slots, Slots]]:
    """Of each case the context and the chars of its stretch as training has them."""
    for case in evidence.cases:
        tokens, chars, _ = case.laid_out
        n, own = case.context(case.end - 1), case.in_stretch()
        yield case, tokens.at(slice(n)), chars.at(own)


def at_decoding(evidence: Evidence) -> Iterator[tuple[Case, Slots, Slots]]:
    """The same as the decoder feeds them."""
    for case, written in evidence.each():
        yield case, written.tokens, written.chars


def positions(evidence: Evidence, streams: Streams) -> Finding:
    """Positions are those of the definition on paper."""
    return _field(evidence, streams, "position")


def places(evidence: Evidence, streams: Streams) -> Finding:
    """Places are those of the definition on paper."""
    return _field(evidence, streams, "place")


def _field(evidence: Evidence, streams: Streams, field: Field) -> Finding:
    differences: list[Difference] = []
    slots = 0
    for case, tokens, chars in streams(evidence):
        for found, truth in zip((tokens, chars), _on_paper(case, evidence, field), strict=True):
            what = f"{field} of a {found.stream}"
            values, slots = getattr(found, field).tolist(), slots + len(truth)
            blocks = _blocks(case, found.stream, len(truth))
            differences += array_differences(case, what, values, truth, blocks, truth)
    return counted(differences, "slots", f"{slots:,} slots")


def _blocks(case: Case, stream: str, count: int) -> np.ndarray:
    """Block of each slot on paper."""
    if stream == "token":
        numbers = np.arange(len(case.blocks))
        return np.concatenate([[-1], np.repeat(numbers, case.piece.block_tokens)])[:count]
    numbers = np.arange(case.first, case.end)
    return np.repeat(numbers, [1 + len(case.blocks[b].encode()) for b in numbers])


def decoding_equals_training(evidence: Evidence) -> Finding:
    """Positions and places of step-by-step decoding are those of training."""
    differences: list[Difference] = []
    for (case, *training), (_, *decoding) in zip(at_training(evidence), at_decoding(evidence), strict=True):
        for there, here in zip(training, decoding, strict=True):
            for field in ("position", "place", "index", "start_pos", "block"):
                found, truth = (getattr(slots, field).tolist() for slots in (here, there))
                what = f"{field} of a {there.stream} at decoding"
                differences += array_differences(case, what, found, truth, there.block, there.position)
    return counted(differences, "values")
