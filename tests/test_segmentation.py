import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.segmentation import SegmentationConfig, off_canonical_joins, segment, segmentation_hash

DEFAULT = SegmentationConfig()

# Pieces whose borders interact: signs, leading spaces, scripts without spaces, marks that join, white space.
PIECES = (
    *("-", "--", " -", "->", "3", "22", "٣", "½", "Ⅷ", "a", "Word", "foo_bar", "don't", "e\u0301", "\u0301", "ß", "Ω"),
    *(
        "中",
        "文字",
        "〇",
        "ひら",
        "カナ",
        "ー",
        "ｰ",
        "々",
        "ไท",
        "ย",
        "\u0e49",
        "ລາວ",
        "ខ្មែរ",
        "មាន",
        "မြန်မာ",
        "𠀋",
        "한국어",
    ),
    *("👩‍👩‍👧", "🇩🇪", "\u200d", "\ufe0f", "𝒳", "\U0010ffff", "\ufffd", "\x00", "\u00ad"),
    *(" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2028", "\u3000", "\x85", "\ufeff"),
    *(
        "(",
        ")",
        ".",
        "...",
        "#",
        "{",
        "}",
        "==",
        "+",
        "«",
        "。",
        "、",
        "x" * 40,
        "9" * 40,
        "é" * 20,
        "🙂" * 9,
        " " * 40,
    ),
)
texts = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
configs = st.builds(SegmentationConfig, max_block_bytes=st.integers(4, 40), max_unspaced_chars=st.integers(1, 5))


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("12 + 34 = 46", ["12", " +", " 34", " =", " 46"]),
        ("a -22", ["a", " -22"]),
        ("= -22", ["=", " -22"]),
        ("-22", ["-22"]),
        ("3-2", ["3", "-", "2"]),
        ("3--2", ["3", "-", "-2"]),
        ("(-2)", ["(", "-2", ")"]),
        ("x=-5", ["x", "=", "-5"]),
        ("a-5", ["a", "-", "5"]),
        ("e\u0301-5", ["e\u0301", "-", "5"]),
        ("3 - 2", ["3", " -", " 2"]),
        (" --5", [" -", "-5"]),
        ("-x", ["-", "x"]),
        ("٣-٤ -٤", ["٣", "-", "٤", " -٤"]),
    ],
)
def test_a_number_takes_its_sign_with_it(text: str, blocks: list[str]) -> None:
    assert segment(text, DEFAULT) == blocks


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", []),
        (" a  b", [" a", " ", " b"]),
        ("a, b...", ["a", ",", " b", "..."]),
        ("if x:\n    y", ["if", " x", ":", "\n   ", " y"]),
        ("a\t\tb\n", ["a", "\t\t", "b", "\n"]),
        ("a \n", ["a", " \n"]),
        ("foo_bar(x1) -> y", ["foo", "_", "bar", "(", "x", "1", ")", " ->", " y"]),
        ("e\u0301te\u0301 Straße", ["e\u0301te\u0301", " Straße"]),
        ("👩‍👩‍👧 hi", ["👩‍👩‍👧", " hi"]),
    ],
)
def test_words_and_punctuation_take_one_leading_space(text: str, blocks: list[str]) -> None:
    assert segment(text, DEFAULT) == blocks


@pytest.mark.parametrize(
    "text", ["潮汐变换器", "𠀋𠀋𠀋", "ひらがな", "カタカナー", "ﾊﾝｶｸｰ", "ภาษาไทย", "ພາສາລາວ", "ភាសាខ្មែរ", "မြန်မာဘာသာ"]
)
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_scripts_without_spaces_are_cut_by_characters(text: str, limit: int) -> None:
    config = SegmentationConfig(max_unspaced_chars=limit)
    assert segment(text, config) == [text[i : i + limit] for i in range(0, len(text), limit)]


def test_scripts_without_spaces_end_at_other_scripts() -> None:
    assert segment("是2024年May中 文", DEFAULT) == ["是", "2024", "年", "May", "中", " ", "文"]
    assert segment("한국어 русский", DEFAULT) == ["한국어", " русский"]  # written with spaces


@pytest.mark.parametrize(
    ("text", "limit", "blocks"),
    [
        ("x" * 70, 32, ["x" * 32, "x" * 32, "x" * 6]),
        (" " + "9" * 32, 32, [" " + "9" * 31, "9"]),
        ("é" * 20, 32, ["é" * 16, "é" * 4]),
        ("xé" + "é" * 20, 32, ["x" + "é" * 15, "é" * 6]),  # 31 bytes: the next character would not fit
        ("🙂" * 3, 7, ["🙂", "🙂", "🙂"]),
        ("文字", 4, ["文", "字"]),
        ("x" * 32, 32, ["x" * 32]),
    ],
)
def test_long_blocks_are_cut_between_characters(text: str, limit: int, blocks: list[str]) -> None:
    assert segment(text, SegmentationConfig(max_block_bytes=limit)) == blocks


@given(texts, configs)
@example("\u0301", DEFAULT)
@example(" " * 33, DEFAULT)
def test_blocks_are_the_text_and_within_the_limit(text: str, config: SegmentationConfig) -> None:
    blocks = segment(text, config)
    assert "".join(blocks) == text
    assert all(blocks)
    assert all(len(block.encode()) <= config.max_block_bytes for block in blocks)
    # Every block is UTF-8 by itself: joined as bytes and decoded one by one, nothing is lost.
    assert "".join(block.encode().decode("utf-8", "strict") for block in blocks) == text


@given(texts, configs)
def test_segmentation_is_a_function(text: str, config: SegmentationConfig) -> None:
    first = segment(text, config)
    segment(text[::-1] + "x", config)  # whatever is cut in between leaves no trace
    assert segment(text, SegmentationConfig(**config.model_dump())) == first


@given(texts, st.integers(5, 40), st.integers(1, 3))
def test_what_ends_with_a_block_is_cut_alike(text: str, max_block_bytes: int, max_unspaced_chars: int) -> None:
    """A prompt that ends where a block ends has the blocks of the longer text: 5 bytes hold a space and any letter."""
    config = SegmentationConfig(max_block_bytes=max_block_bytes, max_unspaced_chars=max_unspaced_chars)
    blocks = segment(text, config)
    for n in range(len(blocks)):
        assert segment("".join(blocks[:n]), config) == blocks[:n]


@given(texts)
def test_no_number_is_torn_from_its_sign(text: str) -> None:
    """A block that starts with a digit never follows a lone sign."""
    blocks = segment(text, SegmentationConfig(max_block_bytes=255))
    for i in range(1, len(blocks)):
        sign, number = blocks[i - 1], blocks[i]
        if sign.endswith("-") and number[0].isnumeric():
            before = "".join(blocks[:i])[:-1]
            # A sign after a letter, a mark or a digit is a minus or a hyphen: there the cut is right.
            assert before
            assert segment(before[-1] + "-1", DEFAULT) == [before[-1], "-", "1"]


@given(texts, configs)
def test_training_text_has_no_off_canonical_joins(text: str, config: SegmentationConfig) -> None:
    assert off_canonical_joins(segment(text, config), config) == 0


@pytest.mark.parametrize(
    ("blocks", "count"),
    [
        ([" ab", "cd"], 1),
        ([" ab", "c", "d"], 2),
        (["3-2"], 2),
        (["-", "2"], 1),
        (["文字", "文", "字"], 1),
        (["x" * 31, "x" * 2], 2),  # a border where none belongs, and one missing where one does
        (["ab cd"], 1),
        ([], 0),
    ],
)
def test_off_canonical_joins_are_counted(blocks: list[str], count: int) -> None:
    assert off_canonical_joins(blocks, DEFAULT) == count


def test_the_hash_is_of_the_settings() -> None:
    hashes = {
        segmentation_hash(config)
        for config in (
            SegmentationConfig(),
            SegmentationConfig(max_block_bytes=31),
            SegmentationConfig(max_unspaced_chars=3),
            SegmentationConfig(max_block_bytes=31, max_unspaced_chars=3),
        )
    }
    assert len(hashes) == 4
    assert segmentation_hash(DEFAULT) == segmentation_hash(SegmentationConfig(max_block_bytes=32, max_unspaced_chars=2))


def test_the_hash_covers_every_setting() -> None:
    """A setting added later must enter the hash: what cuts differently must hash differently."""
    changed = {"max_block_bytes": 31, "max_unspaced_chars": 3}
    assert set(SegmentationConfig.model_fields) == set(changed)
