"""MixedTokenizer: one id space for chars (bytes), specials and byte-level BPE tokens.

Ids 0..255 are chars, then the specials, then the BPE tokens. The output vocabulary is chars and specials only.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.errors import TokenizerError
from data_pipeline.files import replace_file
from data_pipeline.section import Section
from data_pipeline.segmentation import SegmentationConfig, segment

PAD, BOS, EOS, BOB, EOB = range(256, 261)
SPECIALS = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<bob>": BOB, "<eob>": EOB}
_NAMES = {special: name for name, special in SPECIALS.items()}
OUTPUT_VOCABULARY = 261  # chars and specials
FIRST_TOKEN = OUTPUT_VOCABULARY


class TokenizerConfig(Section):
    """Which BPE is used, or how it is trained."""

    path: str | None = Field(None, description="a tokenizer.json of any byte-level BPE; none: train one")
    vocab_size: int = Field(8000, ge=256, description="BPE tokens, the 256 single bytes included (training only)")
    single_digits: bool = Field(True, description="no token holds more than one digit (training only)")
    sample_bytes: int = Field(
        50_000_000, ge=1, description="at most this much text, from all over the corpus, trains the BPE"
    )


def _byte_of_symbol() -> dict[str, int]:
    """The byte-level alphabet of GPT-2 (Radford et al. 2019, `bytes_to_unicode`): printable symbol -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class MixedTokenizer:
    """Encodes blocks, one by one, to token ids, and chars back to text. Blocks repeat, so encodings are kept."""

    def __init__(self, bpe: Tokenizer, segmentation: SegmentationConfig):
        self.segmentation = segmentation
        self._bpe = bpe
        self._bytes = _token_bytes(bpe)
        self._cache: dict[str, tuple[int, ...]] = {}
        self.vocab_size = FIRST_TOKEN + len(self._bytes)
        self.hash = hashlib.sha256(json.dumps(json.loads(bpe.to_str()), sort_keys=True).encode()).hexdigest()
        # Bytes of the text that each id stands for; specials stand for none.
        self.byte_lengths = np.array([1] * 256 + [0] * 5 + [len(b) for b in self._bytes], dtype=np.int64)

    @classmethod
    def load(cls, path: str | Path, segmentation: SegmentationConfig) -> "MixedTokenizer":
        """Load a `tokenizer.json`.

        Raises:
            TokenizerError: the file is missing, broken or not a byte-level BPE.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path}: cannot load the tokeniser ({error}); check the path") from None
        return cls.parse(data, str(path), segmentation)

    @classmethod
    def parse(cls, data: bytes, where: str, segmentation: SegmentationConfig) -> "MixedTokenizer":
        """The tokeniser of a `tokenizer.json`'s content; `where` names the file.

        Raises:
            TokenizerError: it is broken or not a byte-level BPE.
        """
        try:
            bpe = Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            hint = "is it a tokenizer.json of the tokenizers library?"
            raise TokenizerError(f"{where}: cannot load the tokeniser ({error}); {hint}") from None
        try:
            return cls(bpe, segmentation)
        except TokenizerError as error:
            raise TokenizerError(f"{where}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`, whole or not at all."""
        replace_file(Path(path), self._bpe.to_str(pretty=True).encode())

    def encode_block(self, block: str) -> tuple[int, ...]:
        """Token ids of one block.

        Raises:
            TokenizerError: they stand for another text.
        """
        ids = self._cache.get(block)
        if ids is None:
            ids = tuple(i + FIRST_TOKEN for i in self._bpe.encode(block, add_special_tokens=False).ids)
            if b"".join(self._bytes[i - FIRST_TOKEN] for i in ids) != block.encode():
                raise TokenizerError(f"the tokeniser changes the text {block!r}; use a BPE without a normaliser")
            if len(self._cache) < 1_000_000:
                self._cache[block] = ids
        return ids

    def encode_blocks(self, blocks: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """What `encode_block` gives for each of many blocks, fast, and not kept.

        Returns:
            ids: (n,) int32, the token ids of all blocks, end to end. counts: (k,) int64, tokens of each block.

        Raises:
            TokenizerError: those of a block stand for another text.
        """
        together = self._encode_together(blocks)
        if together is not None:
            return together
        ids = [self.encode_block(block) for block in blocks]
        return np.array([i for each in ids for i in each], np.int32), np.array([len(each) for each in ids], np.int64)

    def _encode_together(self, blocks: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """`encode_blocks` with the blocks as the words of one sequence; None where they do not stand for the text."""
        if self._bpe.padding:  # a short block would be padded, a long sequence is not
            return None
        _use_one_thread()
        bpe_ids = self._bpe.encode_batch_fast([blocks], is_pretokenized=True, add_special_tokens=False)[0].ids
        texts = [block.encode() for block in blocks]
        ids = np.array(bpe_ids, np.int32) + FIRST_TOKEN
        token_ends, block_ends = np.cumsum(self.byte_lengths[ids]), np.cumsum([len(text) for text in texts])
        # No token crosses a word, so the tokens of a block are those that end with it or within it.
        ends = np.searchsorted(token_ends, block_ends) + 1
        same = b"".join([self._bytes[i] for i in bpe_ids]) == b"".join(texts)
        if not same or not np.array_equal(token_ends[ends - 1], block_ends) or not self.byte_lengths[ids].all():
            return None
        return ids, np.diff(ends, prepend=0)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`: those of its blocks, one after the other."""
        return [i for block in segment(text, self.segmentation) for i in self.encode_block(block)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a BPE token stands for."""
        return self._bytes[token - FIRST_TOKEN]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of chars and tokens in reading order; specials stand for nothing; ill-formed UTF-8 becomes U+FFFD."""
        parts = (bytes([i]) if i < 256 else self.token_bytes(i) if i >= FIRST_TOKEN else b"" for i in ids)
        return b"".join(parts).decode(errors="replace")

    def name(self, i: int) -> str:
        """A readable name of one id."""
        return char_name(i) if i < FIRST_TOKEN else self.token_bytes(i).decode(errors="backslashreplace")


def char_name(i: int) -> str:
    """A readable name of a char or special."""
    return _NAMES[i] if i in _NAMES else bytes([i]).decode(errors="backslashreplace")


def _token_bytes(bpe: Tokenizer) -> list[bytes]:
    """Bytes of every BPE token, by id.

    Raises:
        TokenizerError: the BPE is not byte-level, or has not a token for every byte.
    """
    symbols = _byte_of_symbol()
    tokens: list[bytes] = []
    for i in range(bpe.get_vocab_size(with_added_tokens=True)):
        token = bpe.id_to_token(i)
        if token is None:
            raise TokenizerError(f"the vocabulary has no token {i}; its ids must be 0..n-1")
        # Added tokens such as <|endoftext|> may hold symbols outside the alphabet; blocks never encode to them.
        tokens.append(bytes(symbols.get(s, 0x3F) for s in token))
    single = {bpe.id_to_token(i) for i in range(len(tokens))} & set(symbols)
    if len(single) < 256:
        raise TokenizerError(f"not a byte-level BPE: {256 - len(single)} of the 256 bytes have no token")
    return tokens


def _use_one_thread() -> None:
    # tokenizers counts and encodes in parallel; it must not warn or deadlock where a process forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, segmentation: SegmentationConfig) -> MixedTokenizer:
    """Train a byte-level BPE on the blocks of `texts`, at most `config.sample_bytes` of them."""
    _use_one_thread()
    bpe = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if config.single_digits else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_blocks_in_batches(texts, config.sample_bytes, segmentation), trainer)
    return MixedTokenizer(bpe, segmentation)


def _blocks_in_batches(texts: Iterable[str], max_bytes: int, segmentation: SegmentationConfig) -> Iterator[list[str]]:
    def blocks() -> Iterator[str]:
        used = 0
        for text in texts:
            yield from segment(text, segmentation)
            used += len(text.encode())
            if used >= max_bytes:
                return

    stream = blocks()
    while batch := list(islice(stream, 10_000)):
        yield batch
