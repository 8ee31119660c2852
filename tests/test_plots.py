import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data_pipeline.layout import IGNORED, NO_DOCUMENT, Slots, lay_out, pack, padding
from data_pipeline.pieces import piece_of_text
from data_pipeline.reading import block_starts
from data_pipeline.stream import batch_of_rows, to_torch
from data_pipeline.tokenizer import BOB
from tests.builders import small_model, small_tokenizer
from tidal_dist.errors import UserError
from tidal_dist.model.maps import CharScores, attention_maps, char_scores
from tidal_dist.plots import loss
from tidal_dist.plots.attention import attention_figure
from tidal_dist.plots.canvas import WIDTH, box_width, lines_of_boxes, save, shown, to_png
from tidal_dist.plots.layout import Matrix, layout_figure
from tidal_dist.plots.loss import loss_figure
from tidal_dist.plots.window import window_of

TOKENIZER = small_tokenizer()
name = TOKENIZER.name
Row = tuple[Slots, Slots, np.ndarray]


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"IEND" in png[-12:]
    return struct.unpack(">II", png[16:24])


def row_of(text: str, prompt: str = "") -> Row:
    return lay_out(piece_of_text(prompt, text, TOKENIZER), TOKENIZER.byte_lengths, "mirrored")


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "text"), [("12 + 34 =", " 46"), ("", "The tide 来了 -22 $x$ \t\n")])
def test_a_layout_is_as_wide_as_a_readme(prompt: str, text: str) -> None:
    width, height = size_of(to_png(layout_figure(*row_of(text, prompt), name, "block")))
    assert 900 <= width <= 1500
    assert 500 <= height <= 3000


def test_the_layout_of_packed_rows_with_padding_as_tensors() -> None:
    tokens, chars, labels = pack([row_of(" 46", "12 + 34 ="), row_of(" -22", "7 - 29 =")], 20, 12)
    assert min(size_of(to_png(layout_figure(to_torch(tokens), to_torch(chars), labels, name, "causal")))) > 900


@pytest.mark.slow
def test_the_layout_of_a_long_row_has_a_bounded_size_and_says_so() -> None:
    row = row_of("the tide runs out " * 100, "12 + 34 = 46; " * 10)
    figure = layout_figure(*row, name, "block")
    width, height = size_of(to_png(figure))
    assert 900 <= width <= 1500
    assert 500 <= height <= 4500
    assert any(f"of {len(row[1].ids):,}" in text and f"of {len(row[0].ids):,}" in text for text in texts_of(figure))


def test_the_layout_of_a_long_row_that_is_mostly_padding() -> None:
    tokens, chars, labels = pack([row_of(" 46", "12 + 34 =")], 300, 300)
    assert "<bob>" in texts_of(layout_figure(tokens, chars, labels, name, "block"))


def test_the_layout_of_tokens_alone() -> None:
    tokens, _, _ = row_of("12 + 34 =")
    figure = layout_figure(tokens, padding("char", 0), np.zeros(0, np.int64), name, "block")
    assert min(size_of(to_png(figure))) > 500


def test_the_layout_of_a_batch_is_refused() -> None:
    tokens, chars, labels = row_of("12")
    with pytest.raises(ValueError, match="one row"):
        layout_figure(tokens.map(lambda a: a[None]), chars, labels, name, "block")


def test_what_is_not_supervised_predicts_nothing() -> None:
    tokens, chars, labels = row_of("12")
    asked: list[int] = []

    def remember(i: int) -> str:
        asked.append(i)
        return name(i)

    layout_figure(tokens, chars, np.full_like(labels, IGNORED), remember, "block")
    assert IGNORED not in asked


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    figure = layout_figure(*row_of("12"), name, "block")
    save(figure, tmp_path / "layout.png")
    assert (tmp_path / "layout.png").read_bytes() == to_png(figure)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError):
        save(figure, tmp_path / "folder.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.png", "layout.png"]


def test_the_matrix_is_may_see() -> None:
    tokens, chars, _ = row_of(" 46", "12")
    matrix = Matrix.of(tokens, chars, [""] * 7, "block")
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


def test_lines_of_boxes_hold_every_box_once_within_the_width() -> None:
    tokens, _, _ = row_of("the tide 12 + 34 = 46 " * 10)
    widths = [box_width(name(int(i))) for i in tokens.ids]
    lines = lines_of_boxes(widths, set(block_starts(tokens).tolist()), 0.7, breaks={2})
    assert len(lines[0]) == 3
    assert len(lines) > 2
    assert [i for line in lines for i, _, _ in line] == list(range(len(tokens.ids)))
    for line in lines:
        ends = [x + width for _, x, width in line]
        assert all(x >= end - 1e-9 for (_, x, _), end in zip(line[1:], ends, strict=False))
        assert ends[-1] <= WIDTH


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (" +", "␣+"),
        ("\n\t", "↵⇥"),
        ("\\xe6", "E6"),
        ("é", "é"),
        ("\x00", "00"),
        ("<bob>", "<bob>"),
        ("\ue000", "EE8080"),
    ],
)
def test_every_name_can_be_drawn(given: str, seen: str) -> None:
    assert shown(given) == seen


def attention_of(row: Row, **settings: Any) -> Figure:
    model = small_model(TOKENIZER, dtype=torch.float32, **settings)
    batch = batch_of_rows([row])
    return attention_figure(attention_maps(model, batch.tokens, batch.chars), to_torch(row[0]), row[1], name)


def test_attention_has_a_panel_for_each_layer_and_head() -> None:
    figure = attention_of(row_of(" 46", "12 + 34 ="), n_layers=3, n_heads=2, char_layers=1)
    assert len(figure.axes[0].images) == 3 * 2 + 1  # and the scale
    assert {"layer 0", "layer 1", "layer 2", "head 0", "head 1", "<bob>", "<bos>"} <= set(texts_of(figure))
    shapes = [image.get_array().shape[:2] for image in figure.axes[0].images[:6]]
    n_tokens = len(row_of(" 46", "12 + 34 =")[0].ids)
    assert shapes == [(n_tokens, n_tokens)] * 4 + [(4, n_tokens + 4)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("text", ["潮水又来。潮汐模型从右往左写。" * 15, "the tide runs out " * 30])
def test_a_long_document_has_a_picture_of_bounded_size_that_says_so(text: str) -> None:
    row = row_of(text)
    figure = attention_of(row, n_layers=12, n_heads=8, char_layers=6)
    width, height = size_of(to_png(figure))
    assert 1000 <= width <= 3000
    assert 500 <= height <= 4000
    assert any(f"of {len(row[1].ids):,}" in text and "8 of 12 layers" in text for text in texts_of(figure))


def test_a_window_has_the_first_blocks_and_the_last_tokens_that_they_see() -> None:
    tokens, chars, _ = row_of("12345678 tides, naïve " * 10, prompt="the tide runs out " * 5)
    window = window_of(tokens, chars, 20, 30)
    shown_tokens, shown_chars = tokens.at(window.tokens), chars.at(window.chars)
    assert len(shown_tokens.ids) == 20
    assert len(shown_chars.ids) <= 30
    assert chars.ids[window.chars.stop] == BOB  # whole blocks
    assert shown_tokens.index[-1] == shown_chars.start_pos[-1] - 1
    assert window_of(tokens, chars, len(tokens.ids), len(chars.ids)).note == ""


def scores_of(row: Row) -> CharScores:
    """Scores of a random model."""
    batch = batch_of_rows([row])
    with torch.no_grad():
        logits = small_model(TOKENIZER)(batch.tokens, batch.chars)
    return char_scores(logits[0], batch.labels[0])


def boxes_of(figure: Figure) -> list[tuple[float, ...]]:
    """Colours of the boxes in the order they were drawn in."""
    return [to_rgb(patch.get_facecolor()) for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def test_a_character_of_many_bytes_is_one_box_with_the_sum_of_their_nats() -> None:
    row = row_of("a潮é")
    n = len(row[2])
    nats = torch.linspace(0.01, 0.9, n)
    ids = torch.from_numpy(row[2])[:, None].expand(-1, 3)
    scores = CharScores(nats, (-nats).exp(), ids, torch.full((n, 3), 0.5))
    figure = loss_figure(scores, row[1], row[2], name)
    byte_of = {(int(row[1].block[i]), int(label)): float(nats[i]) for i, label in enumerate(row[2])}
    blocks = sorted({block for block, _ in byte_of})
    expected = []
    for block in blocks:
        end = next(label for b, label in byte_of if b == block and label > 255)
        expected.append(byte_of[block, end])
        data = bytes(int(label) for b, label in reversed(byte_of) if b == block and label < 256)
        expected += [sum(byte_of[block, byte] for byte in c.encode()) for c in data.decode()]
    assert len(expected) == 3 + len(blocks)
    np.testing.assert_allclose(boxes_of(figure), loss._SCALE.colours(np.array(expected)), atol=1e-6)
    assert {"a", shown("潮"), "é", "<eos>"} <= set(texts_of(figure))
    assert not any("%" in text for text in texts_of(figure)[2:])  # all first choices are the labels
    assert any(f"{float(nats.sum()):.2f} nats over {n} labels" in text for text in texts_of(figure))


def test_a_first_choice_that_is_not_the_label_stands_below_with_its_probability() -> None:
    row = row_of("a潮")
    n = len(row[2])
    ids = torch.from_numpy(row[2].copy())[:, None].repeat(1, 3)
    first_byte_written = row[2].tolist().index("潮".encode()[-1])
    ids[first_byte_written : first_byte_written + 2, 0] = torch.tensor([ord("x"), ord("y")])
    scores = CharScores(torch.ones(n), torch.ones(n), ids, torch.full((n, 3), 0.42))
    texts = texts_of(loss_figure(scores, row[1], row[2], name))
    assert texts.count("42%") == 1
    assert "x" in texts
    assert "y" not in texts


def test_slots_without_a_label_have_no_box_and_no_loss() -> None:
    tokens, chars, labels = pack([row_of(" 46", "12 + 34 ="), row_of(" -22")], 20, 16)
    assert (chars.document == NO_DOCUMENT).any()
    figure = loss_figure(scores_of((tokens, chars, labels)), to_torch(chars), torch.from_numpy(labels), name)
    supervised = int((labels != IGNORED).sum())
    assert len(boxes_of(figure)) == supervised
    assert any(f"over {supervised} labels" in text and "nan" not in text for text in texts_of(figure))


@pytest.mark.slow
def test_a_long_text_has_a_picture_of_bounded_size_that_says_so() -> None:
    row = row_of("潮水又来。潮汐模型从右往左写。" * 40)
    figure = loss_figure(scores_of(row), row[1], row[2], name)
    width, height = size_of(to_png(figure))
    assert width == int(WIDTH * 160)
    assert height <= 5000
    assert any("the first 40 of" in text for text in texts_of(figure))


def test_a_line_of_the_text_ends_with_the_block_of_a_line_break() -> None:
    row = row_of("the\ntide\nruns")
    rows_of_boxes = {
        round(patch.get_y(), 6)
        for patch in loss_figure(scores_of(row), row[1], row[2], name).axes[0].patches
        if isinstance(patch, Rectangle)
    }
    assert len(rows_of_boxes) == 3
