import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_pipeline.errors import TokenizerError
from data_pipeline.segmentation import SegmentationConfig, segment
from data_pipeline.tokenizer import (
    BOB,
    BOS,
    EOB,
    EOS,
    FIRST_TOKEN,
    OUTPUT_VOCABULARY,
    PAD,
    MixedTokenizer,
    TokenizerConfig,
    train_tokenizer,
)

SEGMENTATION = SegmentationConfig()
TEXTS = ["the cat sat on the mat 123 123 123 times", "le chat était là, là, là"]


def error_of(call: Callable[[], object]) -> str:
    """The message of the one-line TokenizerError that `call` raises."""
    with pytest.raises(TokenizerError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@given(text=st.text(max_size=60))
def test_encoding_is_that_of_the_blocks(tokenizer: MixedTokenizer, text: str) -> None:
    blocks = segment(text, tokenizer.segmentation)
    assert tokenizer.encode(text) == [i for block in blocks for i in tokenizer.encode_block(block)]
    # A block alone is encoded as it is inside a text.
    assert all(tuple(tokenizer.encode(block)) == tokenizer.encode_block(block) for block in blocks)


@given(text=st.text(max_size=60))
def test_every_text_comes_back(tokenizer: MixedTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([BOS, *ids, EOS, PAD]) == text
    assert tokenizer.decode(list(text.encode())) == text
    assert all(FIRST_TOKEN <= i < tokenizer.vocab_size for i in ids)
    assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("text", ["ꙮ", "\U0010ffff", "\x00\x01", "𓀀𓀁", "ᚠᛇᚻ", "\ufffd"])
def test_characters_never_seen_in_training_are_known(tokenizer: MixedTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_layout_of_ids(tokenizer: MixedTokenizer) -> None:
    assert [PAD, BOS, EOS, BOB, EOB] == [256, 257, 258, 259, 260]
    assert OUTPUT_VOCABULARY == FIRST_TOKEN == 261
    assert tokenizer.vocab_size == 261 + 320
    assert [tokenizer.name(i) for i in range(256, 261)] == ["<pad>", "<bos>", "<eos>", "<bob>", "<eob>"]
    assert tokenizer.name(ord("a")) == "a"
    assert {tokenizer.token_bytes(i) for i in range(261, tokenizer.vocab_size)} >= {bytes([b]) for b in range(256)}


def test_byte_lengths(tokenizer: MixedTokenizer) -> None:
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.byte_lengths[:256].tolist() == [1] * 256
    assert tokenizer.byte_lengths[256:261].tolist() == [0] * 5
    for i in range(FIRST_TOKEN, tokenizer.vocab_size):
        assert tokenizer.byte_lengths[i] == len(tokenizer.token_bytes(i))
    assert max(tokenizer.byte_lengths) > 2  # some were merged


def test_digits_are_single_tokens_by_default() -> None:
    texts = ["2024 2024 2024 2024"] * 20
    single = train_tokenizer(texts, TokenizerConfig(vocab_size=300), SEGMENTATION)
    joined = train_tokenizer(texts, TokenizerConfig(vocab_size=300, single_digits=False), SEGMENTATION)
    assert [single.token_bytes(i) for i in single.encode(" 2024")] == [b" ", b"2", b"0", b"2", b"4"]
    assert len(joined.encode(" 2024")) == 1
    for i in range(FIRST_TOKEN, single.vocab_size):
        assert sum(byte in b"0123456789" for byte in single.token_bytes(i)) <= 1


def test_save_and_load(tokenizer: MixedTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = MixedTokenizer.load(path, tokenizer.segmentation)
    assert loaded.hash == tokenizer.hash
    assert loaded.vocab_size == tokenizer.vocab_size
    for text in (*TEXTS, "潮汐 -22 👩‍👩‍👧"):
        assert loaded.encode(text) == tokenizer.encode(text)
    assert list(tmp_path.iterdir()) == [path]


def test_training_twice_gives_the_same_tokeniser() -> None:
    config = TokenizerConfig(vocab_size=290)
    first, second = (train_tokenizer(TEXTS, config, SEGMENTATION) for _ in range(2))
    assert first.hash == second.hash
    assert first.hash != train_tokenizer(TEXTS[:1], config, SEGMENTATION).hash


def test_training_reads_no_more_than_the_sample() -> None:
    def texts():
        yield "aaaa bbbb"
        yield "cccc dddd"
        raise AssertionError("read beyond sample_bytes")

    train_tokenizer(texts(), TokenizerConfig(vocab_size=260, sample_bytes=15), SEGMENTATION)


def test_no_token_crosses_blocks() -> None:
    trained = train_tokenizer(["ab cd, ef"] * 50, TokenizerConfig(vocab_size=300), SEGMENTATION)
    for i in range(FIRST_TOKEN, trained.vocab_size):
        data = trained.token_bytes(i)
        if len(data) > 1:
            assert len(segment(data.decode(), SEGMENTATION)) == 1


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "no.json"
    message = error_of(lambda: MixedTokenizer.load(path, SEGMENTATION))
    assert str(path) in message
    assert "check the path" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": "1.0"}', "\x00\n\n"])
def test_broken_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    assert str(path) in error_of(lambda: MixedTokenizer.load(path, SEGMENTATION))


def test_torn_file(tokenizer: MixedTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in error_of(lambda: MixedTokenizer.load(path, SEGMENTATION))


def test_a_bpe_that_is_not_byte_level(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"], show_progress=False))
    bpe.save(str(tmp_path / "words.json"))
    message = error_of(lambda: MixedTokenizer.load(tmp_path / "words.json", SEGMENTATION))
    assert "not a byte-level BPE" in message
    assert str(tmp_path / "words.json") in message


def test_a_vocabulary_with_gaps(tokenizer: MixedTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_text("utf-8"))
    content["model"]["vocab"] = {token: i + (i > 300) for token, i in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content), "utf-8")
    assert "ids must be 0..n-1" in error_of(lambda: MixedTokenizer.load(path, SEGMENTATION))


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [(normalizers.Lowercase(), "Cat"), (normalizers.NFC(), "e\u0301"), (normalizers.Strip(), " a")],
)
def test_a_normaliser_that_changes_text(
    tokenizer: MixedTokenizer, tmp_path: Path, normalizer: normalizers.Normalizer, text: str
) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    bpe = Tokenizer.from_file(str(path))
    bpe.normalizer = normalizer
    changed = MixedTokenizer(bpe, SEGMENTATION)
    assert changed.hash != tokenizer.hash
    assert "normaliser" in error_of(lambda: changed.encode(text + " x"))
