import struct
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.layout import IGNORED, pack, padding
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.stream import to_torch
from data_pipeline.tokenizer import MixedTokenizer, TokenizerConfig, train_tokenizer
from tidal_dist import plot
from tidal_dist.errors import UserError
from tidal_dist.inspect import streams


@pytest.fixture(scope="module")
def tokenizer() -> MixedTokenizer:
    return train_tokenizer(["12 + 34 = 46 the tide"], TokenizerConfig(vocab_size=280), SegmentationConfig())


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"IEND" in data[-12:]
    return struct.unpack(">II", data[16:24])


def laid_out(tokenizer: MixedTokenizer, prompt: str, text: str) -> tuple:
    return streams(prompt, text, tokenizer, "mirrored")


@pytest.mark.parametrize(("prompt", "text"), [("12 + 34 =", " 46"), ("", "The tide 来了 -22 $x$ \t\n")])
def test_a_document_is_a_png_as_wide_as_a_readme(
    tokenizer: MixedTokenizer, tmp_path: Path, prompt: str, text: str
) -> None:
    path = tmp_path / "layout.png"
    plot.plot_layout(*laid_out(tokenizer, prompt, text), tokenizer.name, "block", path)
    width, height = png_size(path)
    assert 900 <= width <= 1500
    assert 500 <= height <= 3000
    assert [p.name for p in tmp_path.iterdir()] == ["layout.png"]


def test_packed_rows_with_padding_as_tensors(tokenizer: MixedTokenizer, tmp_path: Path) -> None:
    documents = [laid_out(tokenizer, "12 + 34 =", " 46"), laid_out(tokenizer, "7 - 29 =", " -22")]
    tokens, chars, labels = pack(documents, 20, 12)
    plot.plot_layout(to_torch(tokens), to_torch(chars), labels, tokenizer.name, "causal", tmp_path / "row.png")
    assert min(png_size(tmp_path / "row.png")) > 900


def test_tokens_alone(tokenizer: MixedTokenizer, tmp_path: Path) -> None:
    tokens, _, _ = laid_out(tokenizer, "", "12 + 34 =")
    path = tmp_path / "tokens.png"
    plot.plot_layout(tokens, padding("char", 0), np.zeros(0, np.int64), tokenizer.name, "block", path)
    assert min(png_size(path)) > 500


def test_a_batch_is_refused(tokenizer: MixedTokenizer, tmp_path: Path) -> None:
    tokens, chars, labels = laid_out(tokenizer, "", "12")
    batch = tokens.map(lambda a: a[None])
    with pytest.raises(ValueError, match="one row"):
        plot.plot_layout(batch, chars, labels, tokenizer.name, "block", tmp_path / "batch.png")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_what_was_there(tokenizer: MixedTokenizer, tmp_path: Path) -> None:
    (tmp_path / "layout.png").mkdir()
    with pytest.raises(UserError):
        plot.plot_layout(*laid_out(tokenizer, "", "12"), tokenizer.name, "block", tmp_path / "layout.png")
    assert [p.name for p in tmp_path.iterdir()] == ["layout.png"]


def test_the_matrix_is_may_see(tokenizer: MixedTokenizer) -> None:
    tokens, chars, _ = laid_out(tokenizer, "12", " 46")
    matrix = plot._Matrix.of(tokens, chars, [""] * 7, "block")
    assert matrix.n_tokens == 3
    assert matrix.visible.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0],  # <bos>
        [1, 1, 1, 0, 0, 0, 0],  # 1
        [1, 1, 1, 0, 0, 0, 0],  # 2
        [1, 1, 1, 1, 0, 0, 0],  # <bob>
        [1, 1, 1, 1, 1, 0, 0],  # 6
        [1, 1, 1, 1, 1, 1, 0],  # 4
        [1, 1, 1, 1, 1, 1, 1],  # space
    ]
    assert matrix.borders.tolist() == [0, 1, 3]


def test_lines_of_boxes_hold_every_slot_once_within_the_width(tokenizer: MixedTokenizer) -> None:
    tokens, _, _ = laid_out(tokenizer, "", "the tide 12 + 34 = 46 " * 10)
    lines = plot._lines_of_boxes([tokenizer.name(i) for i in tokens.ids], tokens)
    assert len(lines) > 1
    assert [i for line in lines for i, _, _ in line] == list(range(len(tokens.ids)))
    for line in lines:
        ends = [x + width for _, x, width in line]
        assert all(x >= end - 1e-9 for (_, x, _), end in zip(line[1:], ends, strict=False))
        assert ends[-1] <= plot._WIDTH


@pytest.mark.parametrize(
    ("name", "shown"),
    [(" +", "␣+"), ("\n\t", "↵⇥"), ("\\xe6", "E6"), ("来", "E69DA5"), ("é", "é"), ("\x00", "00"), ("<bob>", "<bob>")],
)
def test_every_name_can_be_drawn(name: str, shown: str) -> None:
    assert plot._shown(name) == shown


def test_what_is_not_supervised_predicts_nothing(tokenizer: MixedTokenizer, tmp_path: Path) -> None:
    tokens, chars, labels = laid_out(tokenizer, "", "12")
    asked: list[int] = []

    def name(i: int) -> str:
        asked.append(i)
        return tokenizer.name(i)

    plot.plot_layout(tokens, chars, np.full_like(labels, IGNORED), name, "block", tmp_path / "x.png")
    assert IGNORED not in asked
