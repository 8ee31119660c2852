"""The pictures of docs/doctor.md that `tidal inspect` does not draw.

`python benchmarks/doctor_figures.py runs/demo/export docs` writes two PNG files and prints a Markdown table.

`doctor-loss.png`: mistakes planted one at a time in the decoding of a model trained by `make demo`. The teacher-forced
loss is that of the training's pass and cannot show them; the share of right answers does. `doctor-mask.png`: who sees
whom in a small document, healthy and with two mistakes.
"""

import argparse
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

from data_pipeline import layout
from data_pipeline.arithmetic import held_out_problems
from data_pipeline.errors import UserError
from data_pipeline.layout import NO_DOCUMENT, Slots, lay_out, may_see, pack
from data_pipeline.pieces import piece_of_text
from data_pipeline.stream import batch_of_rows
from data_pipeline.tokenizer import BOS, MixedTokenizer
from tidal_dist.export.package import Exported, load_export
from tidal_dist.generation import decoder
from tidal_dist.generation.decoder import Decoder
from tidal_dist.generation.request import Limits
from tidal_dist.generation.sampling import GREEDY
from tidal_dist.model import transformer
from tidal_dist.model.attention import Scoring
from tidal_dist.model.likelihood import bits_per_byte
from tidal_dist.plots.canvas import DOTS_PER_INCH, INK, PALE_INK, WIDTH, block_colours, save, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEAK_COLOUR = "#cf222e"
_FORCED_COLOUR, _FREE_COLOUR = "#9aa5b1", "#1a7f37"
_BROKEN_COLOUR = _LEAK_COLOUR


# --- mistakes of decoding -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """A mistake, the suspect that it belongs to (none: no mistake), and what plants it."""

    name: str
    suspect: int | None
    plant: Callable[[], AbstractContextManager[Any]]


def _chars_otherwise(change: Callable[[Slots], Slots]) -> AbstractContextManager[Any]:
    return mock.patch.object(decoder, "char_slots", lambda *given: change(layout.char_slots(*given)))


def _positions_run_forward() -> AbstractContextManager[Any]:
    """Training counts a block's chars downwards from its start; decoding counts up, as in any other decoder."""
    return _chars_otherwise(lambda slots: replace(slots, position=slots.start_pos + slots.index))


def _positions_count_the_sequence() -> AbstractContextManager[Any]:
    """As in the model that this one comes from: positions depend on how long the sequence has become."""
    return _chars_otherwise(lambda slots: replace(slots, position=slots.position + slots.index + 1))


def _places_from_zero() -> AbstractContextManager[Any]:
    return _chars_otherwise(lambda slots: replace(slots, place=slots.place - 1))


def _blocks_not_turned_round() -> AbstractContextManager[Any]:
    return mock.patch.object(decoder, "block_text", lambda written: written.decode(errors="replace"))


def _context_byte_by_byte() -> AbstractContextManager[Any]:
    """Every char is given its own token, instead of a block's text being encoded."""
    take = decoder._Sequence._take
    encode = MixedTokenizer.encode_block

    def apart(tokenizer: MixedTokenizer, block: str) -> tuple[int, ...]:
        return tuple(i for c in block for i in encode(tokenizer, c))

    def take_apart(sequence: Any, blocks: Any) -> Slots:
        with mock.patch.object(MixedTokenizer, "encode_block", apart):
            return take(sequence, blocks)

    return mock.patch.object(decoder._Sequence, "_take", take_apart)


def _spaces_behind_the_words() -> AbstractContextManager[Any]:
    """A prompt is cut as `12 |+ |34 |=`; training cut it as `12| +| 34| =`."""
    return mock.patch.object(decoder, "segment", lambda text, _: re.findall(r"\S+\s*", text))


def _tokens_causal() -> AbstractContextManager[Any]:
    """With a cache, tokens see only what came before; in training they see the whole of their block."""
    cached = transformer.cached_bias

    def causal(tokens: Slots, chars: Slots, key_tokens: Slots, key_chars: Slots, how: Scoring) -> torch.Tensor:
        return cached(tokens, chars, key_tokens, key_chars, replace(how, token_attention="causal"))

    return mock.patch.object(transformer, "cached_bias", causal)


def _bos_begins_a_block() -> AbstractContextManager[Any]:
    return mock.patch.object(decoder, "BOB", BOS)


MISTAKES = [
    Mistake("no mistake", None, nullcontext),
    Mistake("positions of chars run forward", 1, _positions_run_forward),
    Mistake("positions count the sequence", 1, _positions_count_the_sequence),
    Mistake("places start at 0", 1, _places_from_zero),
    Mistake("blocks are not turned round", 1, _blocks_not_turned_round),
    Mistake("context encoded byte by byte", 2, _context_byte_by_byte),
    Mistake("tokens see causally in the cache", 3, _tokens_causal),
    Mistake("prompt cut with spaces behind words", 4, _spaces_behind_the_words),
    Mistake("<bos> instead of <bob>", 5, _bos_begins_a_block),
]


@dataclass(frozen=True)
class Measured:
    """What one mistake does: bits per byte, teacher-forced, and the share of answers that are right."""

    mistake: Mistake
    bits_per_byte: float
    exact_match: float


def measure(exported: Exported, problems: list[tuple[str, str]]) -> list[Measured]:
    """Loss and exact match of the problems, under each mistake in turn."""
    found = []
    for mistake in MISTAKES:
        with mistake.plant():
            found.append(Measured(mistake, _teacher_forced(exported, problems), _exact_match(exported, problems)))
    return found


def _teacher_forced(exported: Exported, problems: list[tuple[str, str]]) -> float:
    """Bits per byte of the answers by the training's one pass, each problem a row."""
    tokenizer, model = exported.tokenizer, exported.model
    laid_out = [
        lay_out(piece_of_text(prompt, answer, tokenizer), tokenizer.byte_lengths, model.config.char_positions)
        for prompt, answer in problems
    ]
    shape = (max(len(tokens.ids) for tokens, _, _ in laid_out), max(len(chars.ids) for _, chars, _ in laid_out))
    batch = batch_of_rows([pack([document], *shape) for document in laid_out])
    model.eval()
    with torch.no_grad():
        nats = float(model(batch.tokens, batch.chars, batch.labels))
    return bits_per_byte(nats, sum(len(answer.encode()) for _, answer in problems))


def _exact_match(exported: Exported, problems: list[tuple[str, str]]) -> float:
    """Share of problems whose whole answer and end mark are right, by the decoder that users get."""
    prompts = [prompt for prompt, _ in problems]
    results = Decoder(exported.model, exported.tokenizer).generate(prompts, GREEDY, Limits(max_bytes=16))
    right = [r.text == answer and r.finish == "eos" for r, (_, answer) in zip(results, problems, strict=True)]
    return sum(right) / len(right)


def loss_figure(measured: list[Measured], count: int) -> "Figure":
    """Two columns of bars: the loss, and the share of right answers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.38 * len(measured) + 1.35), dpi=DOTS_PER_INCH, facecolor="white")
    inch = 1 / figure.get_figheight()
    low, high = 0.4 * inch, 1 - 0.95 * inch
    forced = figure.add_axes((0.3, low, 0.29, high - low))
    free = figure.add_axes((0.66, low, 0.29, high - low))
    _text(figure, 0.017, 1 - 0.22 * inch, "The loss cannot see it", 10, weight="bold", color=INK)
    explanation = (
        f"one mistake at a time in the decoding of a trained model, by suspect; {count} sums it has never seen"
    )
    _text(figure, 0.017, 1 - 0.43 * inch, explanation, 7.5)
    losses = [m.bits_per_byte for m in measured]
    _bars(forced, losses, [_FORCED_COLOUR] * len(measured), max(losses) * 1.35, "{:.4f}")
    shares = [m.exact_match for m in measured]
    colours = [_FREE_COLOUR if m.mistake.suspect is None else _BROKEN_COLOUR for m in measured]
    _bars(free, shares, colours, 1.15, "{:.3f}")
    forced.set_title("loss, teacher-forced (bits per byte)", fontsize=8, color=INK, pad=8)
    free.set_title("answers that are right (exact match)", fontsize=8, color=INK, pad=8)
    forced.set_yticks(range(len(measured)), [_label(m.mistake) for m in measured], fontsize=8, color=INK)
    return figure


def _label(mistake: Mistake) -> str:
    return mistake.name if mistake.suspect is None else f"{mistake.suspect}: {mistake.name}"


def _bars(axes: "Axes", values: list[float], colours: list[str], end: float, style: str) -> None:
    axes.barh(range(len(values)), values, height=0.62, color=colours, zorder=2)
    for i, value in enumerate(values):
        axes.text(value + 0.02 * end, i, style.format(value), va="center_baseline", fontsize=7.5, color=INK)
    axes.set(xlim=(0, end), ylim=(len(values) - 0.5, -0.5), yticks=[])
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(length=0, labelsize=7, labelcolor=PALE_INK)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6, zorder=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _text(figure: "Figure", x: float, y: float, text: str, size: float, **style: Any) -> None:
    figure.text(x, y, text, fontsize=size, **({"color": PALE_INK, "va": "center"} | style))


# --- mistakes of the mask -------------------------------------------------------------------------------------------


def _own_first_token(query: Slots, key: Slots) -> Any:
    """`<=` for `<`: a char sees the first token of the very block that it helps to write."""
    seen = may_see(query, key, "block")
    if query.stream == "char" and key.stream == "token":
        seen = seen | ((key.index == query.start_pos) & (key.document == query.document))
    return seen


def _mask_of_zero(query: Slots, key: Slots) -> Any:
    """The score of what must not be seen is set to 0, as if that meant "nothing"."""
    return (key.document != NO_DOCUMENT) & (query.document != NO_DOCUMENT)


_MASKS: list[tuple[str, str, Callable[[Slots, Slots], Any]]] = [
    ("healthy", "a block's chars see the tokens before it", lambda query, key: may_see(query, key, "block")),
    ("<= instead of <", "a char sees its own block's first token", _own_first_token),
    ("a mask of 0 instead of -inf", "everything sees everything", _mask_of_zero),
]


def mask_figure(text: str, exported: Exported) -> "Figure":
    """Who sees whom in a text, by the definition and with two mistakes, wrong pairs in red."""
    from matplotlib.figure import Figure

    piece = piece_of_text("", text, exported.tokenizer)
    tokens, chars, _ = lay_out(piece, exported.tokenizer.byte_lengths, exported.model.config.char_positions)
    tables = [_table(tokens, chars, mask) for _, _, mask in _MASKS]
    figure = Figure(figsize=(WIDTH, 3.65), dpi=DOTS_PER_INCH, facecolor="white")
    for i, ((title, explanation, _), table) in enumerate(zip(_MASKS, tables, strict=True)):
        left = 0.062 + i * 0.323
        axes = figure.add_axes((left, 0.09, 0.28, 0.28 * WIDTH / figure.get_figheight()))
        _draw_mask(axes, table, tables[0], (tokens, chars), exported.tokenizer)
        _text(figure, left, 0.945, title, 10, weight="bold", color=INK)
        _text(figure, left, 0.89, explanation, 7.5)
    wrong = "a row is a slot that looks, a column a slot that is looked at; red: is seen, and must not be"
    _text(figure, 0.062, 0.04, wrong, 7.5)
    return figure


def _table(tokens: Slots, chars: Slots, mask: Callable[[Slots, Slots], Any]) -> np.ndarray:
    streams = (tokens, chars)
    return np.block([[mask(q.queries(), k.keys()) for k in streams] for q in streams])


def _draw_mask(
    axes: "Axes", table: np.ndarray, truth: np.ndarray, streams: tuple[Slots, Slots], tokenizer: MixedTokenizer
) -> None:
    from matplotlib.colors import to_rgb

    keys = np.array([to_rgb(colour) for slots in streams for colour in block_colours(slots)])
    image = np.where(table[..., None], keys[None], np.array(to_rgb("#fafafa")))
    image[table & ~truth] = to_rgb(_LEAK_COLOUR)
    axes.imshow(image, interpolation="nearest", aspect="equal")
    names = [shown(tokenizer.name(int(i))) for slots in streams for i in slots.ids]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=6, labelcolor=INK, labelfontfamily="DejaVu Sans Mono", pad=2)
    axes.tick_params(axis="x", labelbottom=False, labeltop=True)
    border = len(streams[0].ids) - 0.5
    for i in range(len(names) + 1):
        style: dict[str, Any] = {"color": "white", "linewidth": 0.5}
        axes.axhline(i - 0.5, **style)
        axes.axvline(i - 0.5, **style)
    for line in (axes.axhline, axes.axvline):
        line(border, color=INK, linewidth=1.2)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="the export of `make demo`")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--problems", type=int, default=200, help="sums to ask (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        exported = load_export(arguments.export)
        measured = measure(exported, held_out_problems(arguments.problems, seed=1))
        save(loss_figure(measured, arguments.problems), arguments.folder / "doctor-loss.png")
        save(mask_figure("12 + 34", exported), arguments.folder / "doctor-mask.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        "| mistake in the decoding | suspect | bits per byte, teacher-forced | exact match |\n| --- | --- | --- | --- |"
    )
    for m in measured:
        name = re.sub(r"<\w+>", r"`\g<0>`", m.mistake.name)  # a special, not HTML
        print(f"| {name} | {m.mistake.suspect or ''} | {m.bits_per_byte:.4f} | {m.exact_match:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
