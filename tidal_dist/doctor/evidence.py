"""What all checks look at: sampled rows and documents, as training lays them out and as decoding feeds them.

T token slots, C char slots, V chars and specials.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch

from data_pipeline.layout import LaidOut, alone
from data_pipeline.ordering import RowAddress
from data_pipeline.pieces import Piece
from data_pipeline.rows import RowReader
from data_pipeline.stream import Batch, batch_of_rows
from data_pipeline.tokenizer import EOB, EOS, MixedTokenizer
from tidal_dist.doctor import oracle
from tidal_dist.doctor.follow import Followed, follow
from tidal_dist.doctor.sizes import Sizes
from tidal_dist.doctor.subject import Subject, reader_of
from tidal_dist.generation.request import Limits
from tidal_dist.model.transformer import TidalTransformer

_MAX_ORACLE_TOKENS = 1024  # the oracle's cost grows with the square of the context


@dataclass(frozen=True)
class Row:
    """One row as training reads it: its streams and labels, its pieces, where each comes from, and where it begins."""

    laid_out: LaidOut
    pieces: list[Piece]
    names: list[str]
    first_blocks: list[int]


@dataclass(frozen=True, eq=False)  # a case is itself alone, and may be the key of a cache
class Case:
    """A piece of a document, and the stretch `first..end` of its supervised blocks that is written again.

    Attributes:
        name: where it stands. begins: whether it begins where the document does.
        row: index of its row among the sampled ones. document: its number in that row.
        laid_out: the row's slots and labels that are its own. blocks: its texts, from the bytes of its tokens.
    """

    name: str
    begins: bool
    row: int
    document: int
    piece: Piece
    blocks: list[str]
    first: int
    end: int
    laid_out: LaidOut

    def context(self, block: int) -> int:
        """Tokens before a block, `<bos>` included."""
        return 1 + int(self.piece.block_tokens[:block].sum())

    def in_stretch(self) -> np.ndarray:
        """(C,) which of its char slots belong to the stretch."""
        block = self.laid_out[1].block
        return (block >= self.first) & (block < self.end)

    def document_on_paper(self) -> oracle.Document:
        """The piece as the oracle takes it."""
        s = self.piece.supervised_from
        return oracle.Document(tuple(self.blocks[:s]), tuple(self.blocks[s:]), self.piece.ends_document)

    def end_mark(self, block: int) -> int:
        """What ends a block, on paper."""
        return EOS if self.piece.ends_document and block == len(self.blocks) - 1 else EOB

    def labels_on_paper(self, first: int, end: int) -> list[int]:
        """Every id to write for the blocks `first..end`: each block's bytes from its end, and its end mark."""
        return [i for b in range(first, end) for i in [*reversed(self.blocks[b].encode()), self.end_mark(b)]]


def texts_of_tokens(piece: Piece, tokenizer: MixedTokenizer) -> list[str]:
    """The blocks of a piece by its tokens alone; ill-formed UTF-8 becomes U+FFFD."""
    ends = np.cumsum(piece.block_tokens).tolist()
    return [tokenizer.decode(piece.tokens[a:b].tolist()) for a, b in pairwise([0, *ends])]


class Evidence:
    """Gathered once, when first asked for. Logits are float64 on the CPU."""

    def __init__(self, subject: Subject, sizes: Sizes):
        self.subject, self.sizes = subject, sizes
        self.tokenizer, self.config = subject.tokenizer, subject.model.config
        held_out = sum(entry["documents"] for entry in subject.manifest.shards("validation"))
        self.split = "validation" if held_out else "train"
        self.sample = lru_cache(maxsize=None)(self._sample)

    @cached_property
    def reader(self) -> RowReader:
        """The training's own reader of the split."""
        return reader_of(self.subject, self.split)

    @cached_property
    def rows(self) -> list[Row]:
        """Rows spread evenly over the split."""
        reader = self.reader
        addresses = [RowAddress(0, s, r) for s, rows in enumerate(reader.shard_rows) for r in range(rows)]
        chosen = np.unique(np.linspace(0, len(addresses) - 1, min(self.sizes.rows, len(addresses))).astype(int))
        picked = [addresses[i] for i in chosen]
        return [_row(reader, address) for address in picked]

    @cached_property
    def cases(self) -> list[Case]:
        """Documents to decode, from all rows in turn and from all places within them."""
        longest = max(len(row.pieces) for row in self.rows)
        turns = [(r, (n + r) % longest) for n in range(longest) for r in range(len(self.rows))]
        found = [(r, n) for r, n in turns if _is_supervised(self.rows[r].pieces[n : n + 1])]
        return [self._case(r, n, k) for k, (r, n) in enumerate(found[: self.sizes.documents])]

    def _case(self, r: int, n: int, k: int) -> Case:
        row = self.rows[r]
        piece = row.pieces[n]
        n_blocks, s = len(piece.block_tokens), piece.supervised_from
        last = max(n_blocks - self.sizes.blocks, s)
        # By turns at the document's end and, spread evenly, before it.
        first = last if k % 2 == 0 else s + (last - s) * k // max(self.sizes.documents, 1)
        blocks, end = texts_of_tokens(piece, self.tokenizer), min(first + self.sizes.blocks, n_blocks)
        return Case(
            row.names[n], row.first_blocks[n] == 0, r, n + 1, piece, blocks, first, end, alone(row.laid_out, n + 1)
        )

    @cached_property
    def alone(self) -> list[torch.Tensor]:
        """(C, V) logits of each case alone, in one pass."""
        return [self.logits(case.laid_out) for case in self.cases]

    def batch(self, row: LaidOut) -> Batch:
        """A row as a batch of its own, on the model's device."""
        return batch_of_rows([row]).to(self.subject.device)

    def logits(self, row: LaidOut) -> torch.Tensor:
        """(C, V) logits of a row, in one pass of the exact model."""
        return one_pass(self.subject.exact, self.subject.device, [row])[0]

    @cached_property
    def written(self) -> list[Followed]:
        """The decoder, alone with each case, told to write its stretch."""
        return [self.dictate([case])[0] for case in self.cases]

    def dictate(self, cases: list[Case], model: TidalTransformer | None = None) -> list[Followed]:
        """The decoder, with a batch of cases, told to write their stretches."""
        ids = [case.labels_on_paper(case.first, case.end) for case in cases]
        stretches = [case.end - case.first for case in cases]
        return self._follow(cases, Limits(1 << 30, max(stretches)), ids, model)

    @cached_property
    def free(self) -> list[Followed]:
        """The decoder left to itself, for as many blocks as each case's stretch has."""
        limits = [Limits(self._most_bytes(case), case.end - case.first) for case in self.cases]
        return [self._follow([case], limit)[0] for case, limit in zip(self.cases, limits, strict=True)]

    def _most_bytes(self, case: Case) -> int:
        return self.tokenizer.segmentation.max_block_bytes + sum(
            len(block.encode()) for block in case.blocks[case.first : case.end]
        )

    def _follow(
        self,
        cases: list[Case],
        limits: Limits,
        ids: list[list[int]] | None = None,
        model: TidalTransformer | None = None,
    ) -> list[Followed]:
        prompts = [case.blocks[: case.first] for case in cases]
        return follow(model or self.subject.exact, self.tokenizer, self.subject.device, prompts, limits, ids)

    @cached_property
    def true_logits(self) -> list[tuple[int, int, torch.Tensor]]:
        """(case, block, logits) by the oracle, of the last block of each stretch whose context is not too long."""
        weights = {name: w.detach() for name, w in self.subject.exact.state_dict().items()}
        found = []
        for i, case in enumerate(self.cases):
            sample = self.sample(case, case.end - 1)
            if len(sample.tokens) <= _MAX_ORACLE_TOKENS:
                with torch.no_grad(), torch.device(self.subject.device):
                    logits = oracle.logits(sample, self.config, weights)
                found.append((i, case.end - 1, logits.cpu()))
        return found

    def _sample(self, case: Case, block: int) -> oracle.Sample:
        """One block of a case as the oracle has it."""
        return oracle.sample(case.document_on_paper(), block, self.tokenizer, self.config)

    def each(self) -> Iterator[tuple[Case, Followed]]:
        """Each case with its dictated decoding."""
        return zip(self.cases, self.written, strict=True)


def one_pass(model: TidalTransformer, device: str, rows: list[LaidOut]) -> torch.Tensor:
    """Logits (B, C, V) of rows of equal shape, in one pass, in evaluation mode; float64 on the CPU."""
    batch = batch_of_rows(rows).to(device)
    model.eval()
    with torch.no_grad():
        return model(batch.tokens, batch.chars).double().cpu()


def _row(reader: RowReader, address: RowAddress) -> Row:
    names, first_blocks = zip(*reader.documents(address), strict=True)
    parts = [f", from its block {first}" if first else "" for first in first_blocks]
    places = [name + part for name, part in zip(names, parts, strict=True)]
    return Row(reader.row(address, None), reader.pieces(address), places, list(first_blocks))


def _is_supervised(pieces: list[Piece]) -> bool:
    return any(len(piece.block_tokens) > piece.supervised_from for piece in pieces)
