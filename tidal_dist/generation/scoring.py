"""How likely a text is: the likelihood of its blocks, laid out as in training, their end marks included.

Text -> blocks -> one piece, or several where it is long -> rows of one batch -> one pass without a cache.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.layout import lay_out_rows
from data_pipeline.packing import batches_alike, cut_document
from data_pipeline.pieces import Piece, piece_of_blocks, reverse_block, slot_counts
from data_pipeline.segmentation import segment
from data_pipeline.stream import batch_of
from data_pipeline.tokenizer import EOB, EOS, MixedTokenizer
from tidal_dist.generation.scores import BlockScore, Score
from tidal_dist.generation.utf8 import allowed
from tidal_dist.model.transformer import TidalTransformer

Text = str | Sequence[str]  # or the blocks of one that is already segmented
DEFAULT_BATCH_SLOTS = 16_384


@dataclass(frozen=True)
class Window:
    """The most that one pass sees of a text: token and char slots, as of a row in training.

    A longer text is cut at block borders, as training cuts it; each part sees up to half the tokens of the window from
    before its first block.
    """

    tokens: int = 1024
    chars: int = 4096


DEFAULT_WINDOW = Window()


@dataclass(frozen=True)
class _Part:
    """A piece of pair number `pair`; `is_open`: its last block's text may go on or end."""

    pair: int
    piece: Piece
    blocks: Sequence[str]
    is_open: bool

    @property
    def slots(self) -> tuple[int, int]:
        """Token and char slots."""
        return slot_counts(self.piece.block_tokens, self.piece.block_bytes, self.piece.supervised_from)


def score(
    model: TidalTransformer,
    tokenizer: MixedTokenizer,
    device: torch.device | str,
    pairs: Sequence[tuple[Text, Text]],
    ends: bool = False,
    window: Window = DEFAULT_WINDOW,
    batch_slots: int = DEFAULT_BATCH_SLOTS,
) -> list[Score]:
    """Log-likelihoods of texts, each after its context; `Scoring` says what is meant by what.

    Raises:
        UserError: a text is not UTF-8, a block is empty or too long, or the window is too small.
    """
    scoring = Scoring(model, tokenizer, device, pairs, ends, window, batch_slots)
    while not scoring.is_done:
        scoring.step()
    return scoring.scores()


class Scoring:
    """Finds log-likelihoods of texts pass by pass, for those who have something else to do between."""

    def __init__(
        self,
        model: TidalTransformer,
        tokenizer: MixedTokenizer,
        device: torch.device | str,
        pairs: Sequence[tuple[Text, Text]],
        ends: bool = False,
        window: Window = DEFAULT_WINDOW,
        batch_slots: int = DEFAULT_BATCH_SLOTS,
        alternatives: int = 0,
    ):
        """Lay the texts out.

        Context and text are cut into blocks apart, as a prompt and its answer are in training.

        Args:
            pairs: (context, text) each. A text without a block has the likelihood 1.
            ends: the last block ends in `<eos>`: the likelihood of this text and no more. Otherwise in either end mark,
                with the sum of their probabilities: the likelihood of all texts that begin with these blocks.
            batch_slots: of tokens and chars together in one pass, which bounds the memory.
            alternatives: how many of the likeliest ids are reported with each char.

        Raises:
            UserError: a text is not UTF-8, a block is empty or too long, or the window is too small.
        """
        check_window(window, tokenizer)
        self._model, self._tokenizer, self._device, self._alternatives = model, tokenizer, device, alternatives
        self._parts = [part for i, pair in enumerate(pairs) for part in _parts(i, pair, tokenizer, ends, window)]
        self._batches = deque(batches_alike([part.slots for part in self._parts], batch_slots))
        self._n_pairs = len(pairs)
        self._scored: dict[int, tuple[list[BlockScore], bool]] = {}

    @property
    def is_done(self) -> bool:
        """Whether no pass is left to make."""
        return not self._batches

    @torch.inference_mode()
    def step(self) -> None:
        """One pass of the model."""
        batch = self._batches.popleft()
        was_training = self._model.training
        self._model.eval()
        parts = [self._parts[i] for i in batch]
        found = _score_batch(self._model, self._tokenizer, self._device, parts, self._alternatives)
        self._model.train(was_training)
        self._scored.update(zip(batch, found, strict=True))

    def scores(self) -> list[Score]:
        """Those of all texts, once all passes are made."""
        found: list[list[BlockScore]] = [[] for _ in range(self._n_pairs)]
        greedy = [True] * self._n_pairs
        for i, part in enumerate(self._parts):
            blocks, is_greedy = self._scored[i]
            found[part.pair] += blocks
            greedy[part.pair] &= is_greedy
        return [Score(tuple(blocks), is_greedy) for blocks, is_greedy in zip(found, greedy, strict=True)]


def check_window(window: Window, tokenizer: MixedTokenizer) -> None:
    """See that any block fits.

    Raises:
        UserError: one may not.
    """
    longest = tokenizer.segmentation.max_block_bytes + 1
    if window.tokens < 2 or window.chars < longest:
        raise UserError(f"a window of {window.tokens} tokens and {window.chars} chars: needs 2 and {longest} at least")


def _parts(
    pair: int, texts: tuple[Text, Text], tokenizer: MixedTokenizer, ends: bool, window: Window
) -> Iterator[_Part]:
    """The pieces of a pair, those of a long one as training cuts a document."""
    context, blocks = (_blocks(text, tokenizer, pair) for text in texts)
    together = [*context, *blocks]
    if not blocks:
        return
    tokens = np.array([len(tokenizer.encode_block(block)) for block in together])
    sizes = np.array([len(block.encode()) for block in together])
    t, c = slot_counts(tokens, sizes, len(context))
    cuts: Iterator[tuple[int, int, int]] = iter([(0, len(context), len(together))])
    if t > window.tokens or c > window.chars:
        cuts = cut_document(tokens, sizes, len(context), window.tokens, window.chars, window.tokens // 2)
    for first, supervised, end in cuts:
        is_last = end == len(together)
        piece = piece_of_blocks(together[first:end], tokenizer, supervised - first, is_last and ends)
        yield _Part(pair, piece, together[supervised:end], is_last and not ends)


def _blocks(text: Text, tokenizer: MixedTokenizer, pair: int) -> list[str]:
    try:
        if isinstance(text, str):
            text.encode()
            return segment(text, tokenizer.segmentation)
        sizes = [len(block.encode()) for block in text]
    except UnicodeEncodeError:
        raise UserError(f"pair {pair}: the text is not UTF-8; mend it") from None
    most = tokenizer.segmentation.max_block_bytes
    if not all(0 < size <= most for size in sizes):
        raise UserError(f"pair {pair}: a block is empty or longer than {most} bytes; give the text itself")
    return list(text)


def _score_batch(
    model: TidalTransformer,
    tokenizer: MixedTokenizer,
    device: torch.device | str,
    parts: Sequence[_Part],
    alternatives: int,
) -> list[tuple[list[BlockScore], bool]]:
    """The blocks' scores of each part, and whether they are what greedy decoding writes."""
    shape = max(part.slots[0] for part in parts), max(part.slots[1] for part in parts)
    rows = [[part.piece] for part in parts]
    laid_out = lay_out_rows(rows, [[0]] * len(rows), tokenizer.byte_lengths, model.config.char_positions, shape)
    batch = batch_of(laid_out).to(device)
    logits = model(batch.tokens, batch.chars)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = logits.log_softmax(dim=-1)
    either = torch.logaddexp(nats[..., EOB], nats[..., EOS])
    of_labels = nats.gather(2, batch.labels.clamp_min(0)[..., None])[..., 0]
    likeliest = nats.topk(alternatives, dim=-1)
    arrays = (of_labels, either, logits, likeliest.indices, likeliest.values)
    longest = tokenizer.segmentation.max_block_bytes
    rows_of = zip(*(array.cpu().numpy() for array in arrays), strict=True)
    return [_of_part(part, longest, *row) for part, row in zip(parts, rows_of, strict=True)]


def _of_part(
    part: _Part,
    max_block_bytes: int,
    of_labels: np.ndarray,
    either: np.ndarray,
    logits: np.ndarray,
    likeliest: np.ndarray,
    nats: np.ndarray,
) -> tuple[list[BlockScore], bool]:
    """Scores of the blocks of one row.

    Args:
        of_labels, either: (C,) nats of the labels, of any end mark. logits: (C, V).
        likeliest, nats: (C, alternatives), the likeliest ids and their nats.
    """
    scores, is_greedy, start = [], True, 0
    for number, block in enumerate(part.blocks):
        written = reverse_block(block.encode())
        end = start + len(written)
        ends_either_way = part.is_open and number == len(part.blocks) - 1
        is_last = number == len(part.blocks) - 1 and part.piece.ends_document
        mark = either[end] if ends_either_way else of_labels[end]
        at = slice(start, end + 1)
        alternatives = _pairs(likeliest[at], nats[at]) if likeliest.size else ()
        logprobs = (*of_labels[start:end].tolist(), float(mark))
        scores.append(BlockScore(block, logprobs, EOS if is_last else EOB, alternatives))
        if is_greedy:
            marks = {EOB, EOS} if ends_either_way else {EOS if is_last else EOB}
            is_greedy = _is_greedy(written, marks, logits[at], max_block_bytes)
        start = end + 1
    return scores, is_greedy


def _pairs(ids: np.ndarray, nats: np.ndarray) -> tuple[tuple[tuple[int, float], ...], ...]:
    """Ids with their nats, both (c, alternatives)."""
    return tuple(tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), nats.tolist(), strict=True))


def _is_greedy(written: bytes, marks: set[int], logits: np.ndarray, max_block_bytes: int) -> bool:
    """Whether the likeliest ids, of those that may come, are these bytes and then one of the marks. logits: (c, V)."""
    for c, likeliest in enumerate(logits.argmax(axis=1).tolist()):
        wanted = marks if c == len(written) else {written[c]}
        if likeliest in wanted:
            continue
        may_come = allowed(written[:c], max_block_bytes)
        if int(np.where(may_come, logits[c], -np.inf).argmax()) not in wanted:
            return False
    return True
