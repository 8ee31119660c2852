"""Encoding in batches gives what `piece_of_text` gives for each document."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from data_pipeline import block_table
from data_pipeline.encoding import BatchEncoder, EncodedDocuments
from data_pipeline.errors import TokenizerError
from data_pipeline.pieces import piece_of_text
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.tokenizer import MixedTokenizer
from tests.conftest import TEXTS
from tests.test_segmentation import texts

documents = st.lists(st.tuples(st.one_of(st.just(""), texts), texts), max_size=5)
batches_of_documents = st.lists(documents, min_size=1, max_size=3)
Document = tuple[str, str]


def encode(encoder: BatchEncoder, batch: list[Document]) -> EncodedDocuments:
    return encoder.encode([prompt for prompt, _ in batch], [text for _, text in batch])


def assert_plain(encoded: EncodedDocuments, batch: list[Document], tokenizer: MixedTokenizer) -> None:
    pieces = [piece_of_text(prompt, text, tokenizer) for prompt, text in batch]
    for name, dtype in (("chars", "uint8"), ("tokens", "int32"), ("block_tokens", "uint8"), ("block_bytes", "uint8")):
        array = getattr(encoded, name)
        assert array.dtype == dtype
        assert array.tolist() == [i for piece in pieces for i in getattr(piece, name).tolist()]
    assert encoded.document_blocks.dtype == encoded.prompt_blocks.dtype == np.uint32
    assert encoded.document_blocks.tolist() == [len(piece.block_bytes) for piece in pieces]
    assert encoded.prompt_blocks.tolist() == [piece.supervised_from for piece in pieces]
    assert encoded.one_token_blocks == sum((piece.block_tokens == 1).sum() for piece in pieces)


def changed(tokenizer: MixedTokenizer, folder: Path, change: Callable[[Tokenizer], object]) -> MixedTokenizer:
    """The tokeniser with a change of its tokenizer.json."""
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    bpe = Tokenizer.from_file(str(path))
    change(bpe)
    bpe.save(str(path))
    return MixedTokenizer.load(path, tokenizer.segmentation)


@pytest.mark.slow
@given(batches_of_documents, st.integers(1, 100))
def test_batches_are_encoded_as_single_documents(
    tokenizer: MixedTokenizer, batches: list[list[Document]], part_bytes: int
) -> None:
    encoder = BatchEncoder(tokenizer, part_bytes)
    for batch in batches:
        assert_plain(encode(encoder, batch), batch, tokenizer)


@given(documents, st.integers(4, 255), st.integers(1, 5))
def test_every_segmentation(
    tokenizer: MixedTokenizer, batch: list[Document], max_block_bytes: int, max_unspaced_chars: int
) -> None:
    segmentation = SegmentationConfig(max_block_bytes=max_block_bytes, max_unspaced_chars=max_unspaced_chars)
    other = MixedTokenizer(tokenizer._bpe, segmentation)
    assert_plain(encode(BatchEncoder(other, 64), batch), batch, other)


@pytest.mark.slow
@given(batches_of_documents)
def test_what_is_forgotten_is_learned_again(tokenizer: MixedTokenizer, batches: list[list[Document]]) -> None:
    encoder = BatchEncoder(tokenizer, part_bytes=16, dictionary_bytes=0)
    for batch in batches:
        assert_plain(encode(encoder, batch), batch, tokenizer)


def test_each_block_is_encoded_once(tokenizer: MixedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = MixedTokenizer.encode_blocks
    monkeypatch.setattr(
        MixedTokenizer, "encode_blocks", lambda self, blocks: seen.extend(blocks) or plain(self, blocks)
    )
    encoder = BatchEncoder(tokenizer, part_bytes=50)
    batch = [("a prompt", text) for text in TEXTS]
    for _ in range(2):
        assert_plain(encode(encoder, batch * 3), batch * 3, tokenizer)
    assert len(seen) == len(set(seen)) > 100
    # With room for nothing, each part starts anew.
    encoder = BatchEncoder(tokenizer, part_bytes=50, dictionary_bytes=0)
    encode(encoder, batch * 3)
    assert len(seen) > 2 * len(set(seen))


@pytest.mark.slow
def test_memory_is_bounded(tokenizer: MixedTokenizer) -> None:
    bound = 200_000
    bounded, unbounded = BatchEncoder(tokenizer, 4000, bound), BatchEncoder(tokenizer, 4000)
    sizes = []
    for start in range(0, 60_000, 2000):
        batch = [("", " ".join(f"word{i}" for i in range(start, start + 2000)))]
        encode(unbounded, batch)
        encode(bounded, batch)
        sizes.append(bounded._known.nbytes)
    assert unbounded._known.nbytes > 10 * bound
    assert max(sizes) < 2 * bound
    assert sum(after < before for before, after in pairwise(sizes)) > 5


def test_many_documents_of_every_kind(tokenizer: MixedTokenizer) -> None:
    batch = [(TEXTS[i % 7][: i % 5], TEXTS[i % 6] * (i % 4)) for i in range(200)] + [("", ""), ("prompt", "")]
    assert_plain(encode(BatchEncoder(tokenizer, 1000), batch), batch, tokenizer)


@pytest.mark.parametrize("batch", [[], [("", "")], [("", "")] * 3, [("", ""), ("a", ""), ("", "b"), ("", "")]])
def test_no_text(tokenizer: MixedTokenizer, batch: list[Document]) -> None:
    assert_plain(encode(BatchEncoder(tokenizer), batch), batch, tokenizer)


def test_a_long_line(tokenizer: MixedTokenizer) -> None:
    batch = [("x" * 30_000, "潮汐" * 10_000), ("", "-5" * 20_000), (" " * 30_001, "é" * 30_000)]
    assert_plain(encode(BatchEncoder(tokenizer, 10_000), batch), batch, tokenizer)


def test_prompts_and_texts_come_in_pairs(tokenizer: MixedTokenizer) -> None:
    with pytest.raises(ValueError, match="zip"):
        BatchEncoder(tokenizer).encode([""], ["a", "b"])


@given(documents)
def test_blocks_that_share_a_hash(tokenizer: MixedTokenizer, batch: list[Document]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_table, "_mix", lambda hashes, _: hashes * np.uint64(0))
        encoder = BatchEncoder(tokenizer, 64)
        for _ in range(2):
            assert_plain(encode(encoder, batch), batch, tokenizer)


@given(st.lists(texts.filter(bool), max_size=10))
def test_blocks_are_encoded_together_as_alone(tokenizer: MixedTokenizer, blocks: list[str]) -> None:
    ids, counts = tokenizer.encode_blocks(blocks)
    assert ids.dtype == np.int32
    alone = [tokenizer.encode_block(block) for block in blocks]
    assert ids.tolist() == [i for each in alone for i in each]
    assert counts.tolist() == [len(each) for each in alone]


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [(normalizers.Lowercase(), "Cat"), (normalizers.NFC(), "e\u0301"), (normalizers.Strip(), " a")],
)
def test_a_tokeniser_that_changes_text(
    tokenizer: MixedTokenizer, tmp_path: Path, normalizer: normalizers.Normalizer, text: str
) -> None:
    other = changed(tokenizer, tmp_path, lambda bpe: setattr(bpe, "normalizer", normalizer))
    encoder = BatchEncoder(other)
    good = [("", "cat")]
    with pytest.raises(TokenizerError) as plain:
        piece_of_text("", f"x {text} y", other)
    for _ in range(2):
        with pytest.raises(TokenizerError) as caught:
            encode(encoder, [*good, ("", f"x {text} y")])
        assert str(caught.value) == str(plain.value)
    assert_plain(encode(encoder, good), good, other)  # what it does not change is still encoded


@pytest.mark.parametrize(
    "change",
    [
        lambda bpe: bpe.enable_padding(),
        lambda bpe: bpe.enable_truncation(max_length=40),  # more than any block has, less than all together
        lambda bpe: setattr(bpe, "post_processor", processors.ByteLevel(trim_offsets=True)),
        lambda bpe: setattr(bpe, "post_processor", processors.BertProcessing(("a", 1), ("b", 2))),
        lambda bpe: bpe.add_special_tokens(["<|endoftext|>", "[", "fox"]),
    ],
)
def test_tokenisers_with_extras(
    tokenizer: MixedTokenizer, tmp_path: Path, change: Callable[[Tokenizer], object]
) -> None:
    other = changed(tokenizer, tmp_path, change)
    batch = [(text, f"[fox] Ω <|endoftext|> {text}") for text in TEXTS]
    for part_bytes in (50, 10_000):
        assert_plain(encode(BatchEncoder(other, part_bytes), batch), batch, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda bpe: bpe.enable_padding(length=8, pad_id=3, pad_token="!"),
        lambda bpe: bpe.enable_truncation(max_length=3),
        lambda bpe: bpe.add_tokens(["Straße"]),
    ],
)
def test_tokenisers_whose_extras_change_text(
    tokenizer: MixedTokenizer, tmp_path: Path, change: Callable[[Tokenizer], object]
) -> None:
    other = changed(tokenizer, tmp_path, change)
    for encode_text in (
        lambda text: piece_of_text("", text, other),
        lambda text: BatchEncoder(other).encode([""], [text]),
    ):
        with pytest.raises(TokenizerError, match="changes the text 'Straße'"):
            encode_text("Straße und Platz")


def test_a_given_tokeniser_as_gpt2_has_it(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS * 3, trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = MixedTokenizer.load(tmp_path / "tokenizer.json", SegmentationConfig(max_block_bytes=255))
    batch = [("don't", f"{text}<|endoftext|>  {text}") for text in TEXTS]
    assert_plain(encode(BatchEncoder(tokenizer, 100), batch), batch, tokenizer)
