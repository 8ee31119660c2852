"""Bugs planted one at a time, each in one definition at one side: the doctor must name the suspect of each."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import layout, pieces, rows
from data_pipeline.layout import IGNORED, NO_DOCUMENT, Slots
from data_pipeline.pieces import Piece
from data_pipeline.preparing import stages
from data_pipeline.segmentation import segment
from data_pipeline.tokenizer import BOB, EOB, EOS, PAD, MixedTokenizer
from tests.doctoring import (
    MORE,
    OTHER_TEXTS,
    SIZES,
    PlainEncoder,
    configuration,
    prepare_shards,
    write_corpus,
    write_random_export,
)
from tests.exporting import change_weights
from tidal_dist.config import Config
from tidal_dist.doctor.evidence import Evidence
from tidal_dist.doctor.examine import examine
from tidal_dist.doctor.report import Report
from tidal_dist.doctor.sizes import Sizes
from tidal_dist.doctor.subject import Subject, load_subject
from tidal_dist.export import package
from tidal_dist.export.package import load_export
from tidal_dist.generation import passes, sampling, sequence, utf8
from tidal_dist.generation.cache import Cache
from tidal_dist.model import positions, scores, transformer
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.training import loss

pytestmark = pytest.mark.slow

LaidOut = tuple[Slots, Slots, np.ndarray]


def one_by_one(
    change: Callable[[LaidOut], LaidOut],
    found: list[list[Piece]],
    shifts: list[list[int]],
    byte_lengths: np.ndarray,
    char_positions: layout.CharPositions,
    shape: tuple[int, int],
) -> LaidOut:
    """What `lay_out_rows` makes, with a change to each document."""
    packed = [
        layout.pack(
            [
                change(layout.lay_out(piece, byte_lengths, char_positions, shift))
                for piece, shift in zip(*row, strict=True)
            ],
            *shape,
        )
        for row in zip(found, shifts, strict=True)
    ]
    tokens, chars, labels = zip(*packed, strict=True)
    return layout.stack(tokens), layout.stack(chars), np.stack(labels)


@dataclass
class Scene:
    """One examination to be: a bug is planted by changing what is examined, or a definition by `patch`.

    Attributes:
        config: of the training, its shards included. folder: to write to. export: what is examined.
        shards: beside which. changes: made to the subject once it is loaded. sizes: of the examination.
    """

    patch: pytest.MonkeyPatch
    config: Config
    folder: Path
    export: Path
    shards: Path
    changes: dict[str, Any] = field(default_factory=dict)
    sizes: Sizes = SIZES

    def around(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Replace `owner.name` by `wrapper(original, *arguments)`."""
        original = getattr(owner, name)
        self.patch.setattr(owner, name, lambda *a, **k: wrapper(original, *a, **k))

    def on_rows(self, change: Callable[[LaidOut], LaidOut]) -> None:
        """Change what training lays out, document by document."""
        self.patch.setattr(rows, "lay_out_rows", partial(one_by_one, change))

    def on_labels(self, change: Callable[[Slots, np.ndarray], np.ndarray]) -> None:
        """Change the labels of training, by its chars and labels."""
        self.on_rows(lambda row: (row[0], row[1], change(row[1], row[2])))

    def on_chars_at_training(self, change: Callable[[Slots], Slots]) -> None:
        """Change the char slots of training."""
        self.on_rows(lambda row: (row[0], change(row[1]), row[2]))

    def on_chars_at_decoding(self, change: Callable[[Slots], Slots]) -> None:
        """Change the char slots of decoding."""
        self.around(passes, "char_slots", lambda original, *a: change(original(*a)))

    def on_visible(self, visible: Callable[[Slots, Slots], Any], query: str, key: str) -> None:
        """Another rule of who sees whom for queries and keys of these streams, within a document."""

        def may_see(original: Any, q: Slots, k: Slots, token_attention: Any) -> Any:
            if (q.stream, k.stream) != (query, key):
                return original(q, k, token_attention)
            return (q.document == k.document) & (k.document != NO_DOCUMENT) & visible(q, k)

        self.around(scores, "may_see", may_see)

    def on_documents(self, change: Callable[[Slots, Slots], tuple[Slots, Slots]]) -> None:
        """Change the slots that the rule of who sees whom is told."""
        self.around(scores, "may_see", lambda original, q, k, rule: original(*change(q, k), rule))

    def shards_made_under(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Shards made by the plain definition while `owner.name` is another, and a training on them.

        The tokeniser stays.
        """
        tokenizer = str(self.shards / "tokenizer.json")
        self.config = configuration(self.folder / "shards", self.config.corpus, tokenizer)
        original = getattr(owner, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "BatchEncoder", PlainEncoder)
            patch.setattr(owner, name, lambda *a: wrapper(original, *a))
            prepare_shards(self.config)
        self.shards = Path(self.config.data.shards)
        self.export = write_random_export(self.folder / "export", self.config)

    def other_shards(self, texts: tuple[str, ...] = (), **segmentation: int) -> None:
        """Shards beside the export that it was not trained on: of another corpus, or the same cut otherwise."""
        corpus, tokenizer = self.config.corpus, str(self.shards / "tokenizer.json")
        if texts:
            corpus, tokenizer = write_corpus(self.folder / "corpus", texts), None
        self.shards = self.folder / "shards"
        prepare_shards(configuration(self.shards, corpus, tokenizer, **segmentation))

    def on_weights(self, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        """Change the weights that generation loads; the file stays."""
        self.around(package, "model_of_weights", lambda original, *a: original(*a[:-1], change(dict(a[-1]))))

    def on_provenance(self, **changes: Any) -> None:
        """Change what the training recorded."""
        provenance = load_export(self.export).provenance
        self.changes["provenance"] = replace(provenance, **changes)

    def examined(self) -> tuple[Report, Evidence]:
        """The doctor's report."""
        subject: Subject = replace(load_subject(self.export, self.shards), **self.changes)
        return examine(subject, self.sizes)


# Positions and places, the order of bytes


def depend_on_the_length(row: LaidOut) -> LaidOut:
    """Positions counted back from the end of the document."""
    tokens, chars, labels = row
    n = len(tokens.ids)
    return replace(tokens, position=tokens.position - n), replace(chars, position=chars.position - n), labels


def depend_on_the_length_when_decoding(scene: Scene) -> None:
    """Positions of tokens counted from the end of what a pass feeds."""
    scene.around(
        sequence, "token_slots", lambda original, ids, *a, **k: _moved(original(ids, *a, **k), "position", -len(ids))
    )


def _moved(slots: Slots, name: str, by: int) -> Slots:
    """A field of the slots, by so much more; never below 0."""
    return replace(slots, **{name: np.maximum(getattr(slots, name) + by, 0)})


def forward_at_decoding(scene: Scene) -> None:
    scene.around(passes, "char_slots", lambda original, *a: original(*a[:-1], "forward"))


def by_characters(data: bytes) -> bytes:
    """A text's characters in the other order, each character's bytes as they are."""
    return data.decode(errors="replace")[::-1].encode()


# Attention, encodings, cache


def other_slopes(scene: Scene) -> None:
    scene.around(positions, "alibi_slopes", lambda original, n_heads, *device: original(2 * n_heads, *device)[:n_heads])


def rope_of_another_base_at_decoding(scene: Scene) -> None:
    def prepare(original: Any, model: Any, tokens: Slots, chars: Slots, dtype: torch.dtype, past: Any) -> Any:
        biases, angles = original(model, tokens, chars, dtype, past)
        if past is None:
            return biases, angles
        position = torch.cat([tokens.position, chars.position], dim=1)
        return biases, positions.rope_angles(position, angles[0].shape[-1] * 2, 5000.0, dtype)

    scene.around(TidalTransformer, "prepare", prepare)


def cache_keeps_chars(scene: Scene) -> None:
    """What earlier blocks left in the cache counts as chars of the block at hand."""

    def extend_slots(original: Any, cache: Cache) -> tuple[Slots, Slots, Slots, Slots]:
        tokens, chars, key_tokens, key_chars = original(cache)
        zero = key_chars.index * 0
        return tokens, chars, key_tokens, replace(key_chars, document=zero + 1, block=zero + chars.block, index=zero)

    scene.around(Cache, "extend_slots", extend_slots)


def cache_in_half_precision(scene: Scene, of: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> None:
    """Keys and values are rounded before they are kept, where they come in one of the precisions `of`."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().to(x.dtype) if x.dtype in of else x

    def extend(original: Any, cache: Cache, layer: int, k: torch.Tensor, v: torch.Tensor) -> Any:
        return original(cache, layer, rounded(k), rounded(v))

    scene.around(Cache, "extend", extend)


def cache_shared_by_a_batch(scene: Scene) -> None:
    """All sequences of a batch keep the keys and values of the first."""
    scene.around(
        Cache, "extend", lambda original, cache, layer, *new: original(cache, layer, *(x[:1].expand_as(x) for x in new))
    )


def logits_in_half_precision(scene: Scene) -> None:
    """In float32 logits, not the loss, are rounded to 11 bits."""

    def forward(original: Any, model: Any, tokens: Slots, chars: Slots, labels: Any = None, past: Any = None) -> Any:
        found = original(model, tokens, chars, labels, past)
        return found.half().float() if labels is None and found.dtype == torch.float32 else found

    scene.around(TidalTransformer, "forward", forward)


def handoff_of_the_first_token(scene: Scene) -> None:
    """Chars get the state of the first token that a pass feeds, not of the last."""
    scene.around(
        Cache,
        "extend_handoff",
        lambda original, cache, name, state, chars: original(
            cache, name, state[:, :1].expand_as(state) if state.shape[1] else state, chars
        ),
    )


# Tokens and segmentation


class _WithNeighbour:
    """A tokeniser that encodes a block together with the text before it, and leaves that text's tokens out."""

    def __init__(self, tokenizer: MixedTokenizer, before: str):
        self._tokenizer, self._before = tokenizer, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_block(self, block: str) -> tuple[int, ...]:
        n = len(self._tokenizer.encode_block(self._before))
        return self._tokenizer.encode_block(self._before + block)[n:] or self._tokenizer.encode_block(block)


def tokens_with_the_neighbour(scene: Scene) -> None:
    """Generated blocks, not those of prompts, are encoded together with the block before."""

    def take(original: Any, writing: Any, blocks: Any) -> Slots:
        plain, written = writing._tokenizer, writing.generation.blocks
        if not written:
            return original(writing, blocks)
        writing._tokenizer = _WithNeighbour(plain, written[-1])
        try:
            return original(writing, blocks)
        finally:
            writing._tokenizer = plain

    scene.around(sequence.Writing, "_take", take)
    scene.sizes = MORE  # it shows only where a sampled block would merge with its neighbour


def cut_otherwise_at_decoding(scene: Scene) -> None:
    def shorter(_original: Any, text: str, config: Any) -> list[str]:
        return segment(text, config.model_copy(update={"max_unspaced_chars": 1, "max_block_bytes": 4}))

    scene.around(sequence, "segment", shorter)


def forgets_what_it_wrote(scene: Scene) -> None:
    """Blocks that were generated do not become context."""

    def take(original: Any, writing: Any, blocks: Any) -> np.ndarray:
        tokens = original(writing, blocks)
        if not writing.generation.passes:
            return tokens
        writing._n_tokens -= len(tokens)
        return tokens[:0]

    scene.around(sequence.Writing, "_take", take)
    scene.sizes = MORE  # it shows only where a sampled block would merge with its neighbour


def shards_with_fewer_merges(scene: Scene) -> None:
    """The shards hold every block's characters encoded one by one, by the same tokeniser."""

    def encode_block(original: Any, tokenizer: MixedTokenizer, block: str) -> tuple[int, ...]:
        return tuple(i for character in block for i in original(tokenizer, character))

    scene.shards_made_under(MixedTokenizer, "encode_block", encode_block)


def shards_cut_by_another_rule(scene: Scene) -> None:
    """The shards are cut otherwise than their manifest says."""

    def by_characters(original: Any, text: str, config: Any) -> list[str]:
        return original(text, config.model_copy(update={"max_unspaced_chars": 1, "max_block_bytes": 4}))

    scene.shards_made_under(pieces, "segment", by_characters)


def another_tokenizer(scene: Scene) -> None:
    config = configuration(scene.folder / "shards", write_corpus(scene.folder / "corpus", OTHER_TEXTS))
    scene.changes["tokenizer"] = prepare_shards(config).tokenizer()


# Control flow


def second_best(_original: Any, logits: np.ndarray, *_: Any) -> int:
    return int(np.argsort(-logits)[1])


def never_eos(original: Any, *arguments: Any) -> int:
    chosen = original(*arguments)
    return EOB if chosen == EOS else chosen


def second_best_when_alone(scene: Scene) -> None:
    """A choice that is wrong only where the best two are close: what is dictated is still written."""

    def choose(_original: Any, logits: np.ndarray, *_: Any) -> int:
        ids = np.argsort(-logits)
        return int(ids[int(logits[ids[0]] - logits[ids[1]] < 0.9)])

    scene.around(sequence, "choose", choose)


def only_ascii(scene: Scene) -> None:
    scene.around(sequence, "allowed", lambda original, *a: original(*a) & ~((np.arange(261) >> 7) == 1))


def every_block_is_the_last(scene: Scene) -> None:
    scene.around(sequence.Writing, "_finish_block", lambda original, writing, _: original(writing, True))


# Labels and loss


def without_bob(row: LaidOut) -> LaidOut:
    """Runs that begin with their first byte: nothing asks for it."""
    tokens, chars, labels = row
    return tokens, chars.at(chars.index > 0), labels[chars.index > 0]


def loss_masked_with_zero(scene: Scene) -> None:
    """Logits of each block's first char are set to 0 before the loss, as if it were outside the block."""

    def forward(original: Any, model: Any, tokens: Slots, chars: Slots, labels: Any = None, past: Any = None) -> Any:
        logits = original(model, tokens, chars, None, past)
        if labels is None:
            return logits
        masked = (logits * (chars.index > 0)[..., None])[labels != IGNORED]
        return torch.nn.functional.cross_entropy(masked, labels[labels != IGNORED], reduction="sum")

    scene.around(TidalTransformer, "forward", forward)


def padding_in_the_loss(scene: Scene) -> None:
    """Padding adds to the loss, with logits of 0."""

    def forward(original: Any, model: Any, tokens: Slots, chars: Slots, labels: Any = None, past: Any = None) -> Any:
        found = original(model, tokens, chars, labels, past)
        return found if labels is None else found + (labels == IGNORED).sum() * np.log(261)

    scene.around(TidalTransformer, "forward", forward)


def no_gradient_from_chars_to_tokens(scene: Scene) -> None:
    """Chars read tokens' keys and values, but nothing flows back: layers below learn from elsewhere."""

    def attend(original: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prepared: Any) -> torch.Tensor:
        n = prepared.n_tokens
        cut = [torch.cat([x[:, :, :n].detach(), x[:, :, n:]], dim=2) for x in (k, v)]
        n_tokens_asking = q.shape[2] - (k.shape[2] - n)
        whole, of_chars = original(q, k, v, prepared), original(q, *cut, prepared)
        return torch.cat([whole[:, :, :n_tokens_asking], of_chars[:, :, n_tokens_asking:]], dim=2)

    scene.around(transformer, "attend", attend)


def loss_in_half_precision(scene: Scene) -> None:
    def forward(original: Any, model: Any, tokens: Slots, chars: Slots, labels: Any = None, past: Any = None) -> Any:
        found = original(model, tokens, chars, labels, past)
        return found if labels is None else found.bfloat16().to(found.dtype)

    scene.around(TidalTransformer, "forward", forward)


# Weights


def initial_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second layer as it was before training."""
    generator = torch.Generator().manual_seed(99)
    return {
        name: torch.randn(w.shape, generator=generator) if name.startswith("layers.1.mlp.up") else w
        for name, w in weights.items()
    }


def nan_in_the_file(scene: Scene) -> None:
    scene.export = write_random_export(scene.folder / "export", scene.config)
    gain = load_export(scene.export).model.norm.weight.detach().clone()
    gain[3] = float("nan")
    change_weights(scene.export, lambda name, w: gain if name == "norm.weight" else w)


def weights_of_another_step(scene: Scene) -> None:
    """The file holds weights that were trained on after the probe's loss was taken."""
    scene.export = write_random_export(scene.folder / "export", scene.config)
    change_weights(scene.export, lambda _, w: w * 1.01)


def another_base_in_the_export(scene: Scene) -> None:
    """Generation builds the model with a setting that the training did not have."""
    path = write_random_export(scene.folder / "export", scene.config) / package.CONFIG
    path.write_text(path.read_text().replace('"rope_base": 10000.0', '"rope_base": 5000.0'))
    scene.export = path.parent


def stays_in_training_mode(scene: Scene) -> None:
    scene.patch.setattr(TidalTransformer, "eval", lambda model: model)


# (what is planted, the suspect to be named, how, settings of the model)
Plant = tuple[str, int, Callable[[Scene], None], dict[str, Any]]
ROPE: dict[str, Any] = {}
ALIBI = {"encoding": "alibi"}
PLANTS: list[Plant] = [
    ("positions off by one at decoding", 1, lambda s: s.on_chars_at_decoding(lambda c: _moved(c, "position", 1)), ROPE),
    ("positions off by one everywhere", 1, lambda s: s.around(layout, "char_position", lambda f, *a: f(*a) + 1), ROPE),
    ("forward positions at decoding, mirrored at training", 1, forward_at_decoding, ROPE),
    ("positions depend on the length at training", 1, lambda s: s.on_rows(depend_on_the_length), ROPE),
    ("positions depend on the length at decoding", 1, depend_on_the_length_when_decoding, ROPE),
    ("places shifted at decoding", 1, lambda s: s.on_chars_at_decoding(lambda c: _moved(c, "place", -1)), ROPE),
    (
        "places beyond the table at decoding",
        1,
        lambda s: s.on_chars_at_decoding(lambda c: _moved(c, "place", 20)),
        ROPE,
    ),
    ("places wrong at training", 1, lambda s: s.on_chars_at_training(lambda c: _moved(c, "place", -1)), ROPE),
    (
        "places beyond the table at training",
        1,
        lambda s: s.on_chars_at_training(lambda c: _moved(c, "place", 20)),
        ROPE,
    ),
    ("written bytes reversed by characters", 1, lambda s: s.patch.setattr(utf8, "reverse_block", by_characters), ROPE),
    ("written bytes not reversed", 1, lambda s: s.patch.setattr(utf8, "reverse_block", bytes), ROPE),
    (
        "bytes of the shards reversed by characters",
        1,
        lambda s: s.shards_made_under(pieces, "reverse_block", lambda _, data: by_characters(data)),
        ROPE,
    ),
    (
        "bytes of the shards reversed twice",
        1,
        lambda s: s.shards_made_under(pieces, "reverse_block", lambda _, data: data),
        ROPE,
    ),
    ("generated blocks encoded with their neighbours", 2, tokens_with_the_neighbour, ROPE),
    ("generated blocks are forgotten", 2, forgets_what_it_wrote, ROPE),
    ("tokens of the shards less merged", 2, shards_with_fewer_merges, ROPE),
    ("slopes of another number of heads", 3, other_slopes, ALIBI),
    ("sign of alibi", 3, lambda s: s.around(scores, "alibi_bias", lambda f, *a: -f(*a)), ALIBI),
    ("base of rope at decoding", 3, rope_of_another_base_at_decoding, ROPE),
    (
        "base of rope everywhere",
        3,
        lambda s: s.around(transformer, "rope_angles", lambda f, p, d, base, dtype: f(p, d, base / 2, dtype)),
        ROPE,
    ),
    (
        "chars see their block's tokens",
        3,
        lambda s: s.on_visible(lambda q, k: k.block <= q.block, "char", "token"),
        ROPE,
    ),
    ("chars see earlier chars", 3, lambda s: s.on_visible(lambda q, k: k.block <= q.block, "char", "char"), ROPE),
    ("chars see later chars", 3, lambda s: s.on_visible(lambda q, k: k.block == q.block, "char", "char"), ROPE),
    (
        "tokens see a later block",
        3,
        lambda s: s.on_visible(lambda q, k: k.block <= q.block + 1, "token", "token"),
        ROPE,
    ),
    (
        "chars miss their last token",
        3,
        lambda s: s.on_visible(lambda q, k: k.index < q.start_pos - 1, "char", "token"),
        ROPE,
    ),
    ("the cache keeps chars", 3, cache_keeps_chars, ROPE),
    ("the cache in half precision", 3, cache_in_half_precision, ROPE),
    ("handoff of another token at decoding", 3, handoff_of_the_first_token, {"char_layers": 1}),
    (
        "handoff of another token at training",
        3,
        lambda s: s.around(transformer, "context_slots", lambda f, *a: (f(*a) - 1).clamp_min(0)),
        {"char_layers": 1},
    ),
    ("tokeniser of another corpus", 4, another_tokenizer, ROPE),
    ("shards of another tokeniser", 4, lambda s: s.other_shards(OTHER_TEXTS), ROPE),
    ("shards cut otherwise", 4, lambda s: s.other_shards(max_unspaced_chars=3), ROPE),
    ("prompts cut otherwise", 4, cut_otherwise_at_decoding, ROPE),
    ("shards cut by another rule than they say", 4, shards_cut_by_another_rule, ROPE),
    ("another id for <bob> at decoding", 5, lambda s: s.patch.setattr(sequence, "BOB", EOB), ROPE),
    ("the second best is written", 5, lambda s: s.around(sequence, "choose", second_best), ROPE),
    ("the second best is written where it is close", 5, second_best_when_alone, ROPE),
    ("<eos> is written as <eob>", 5, lambda s: s.around(sequence, "choose", never_eos), ROPE),
    ("every end mark ends the document", 5, every_block_is_the_last, ROPE),
    ("only ASCII may be written", 5, only_ascii, ROPE),
    (
        "sampled instead of the best",
        5,
        lambda s: s.around(sequence, "choose", lambda f, logits, _, *a: f(logits, sampling.Sampling(1.0), *a)),
        ROPE,
    ),
    ("the recorded figure is another", 6, lambda s: s.on_provenance(metrics={"validation/bits_per_byte": 9.0}), ROPE),
    ("initial weights in one layer", 7, lambda s: s.on_weights(initial_weights), ROPE),
    ("NaN in a weight", 7, nan_in_the_file, ROPE),
    ("weights of another step", 7, weights_of_another_step, ROPE),
    ("another base of rope in the export", 7, another_base_in_the_export, ROPE),
    ("the recorded probe loss is another", 7, lambda s: s.on_provenance(probe_loss=5.0), ROPE),
    ("dropout left on", 8, stays_in_training_mode, {"dropout": 0.1}),
    (
        "dropout whatever the mode",
        8,
        lambda s: s.patch.setattr(transformer.Layer, "_drop", lambda _, x: torch.nn.functional.dropout(x, 0.1, True)),
        ROPE,
    ),
    ("the cache in half precision in float32", 8, lambda s: cache_in_half_precision(s, (torch.float32,)), ROPE),
    ("logits in half precision in float32", 8, logits_in_half_precision, ROPE),
    ("one cache for a batch", 9, cache_shared_by_a_batch, ROPE),
    (
        "packed neighbours see each other",
        9,
        lambda s: s.on_documents(lambda q, k: tuple(replace(x, document=x.document.clip(max=1)) for x in (q, k))),  # type: ignore[arg-type,return-value]
        ROPE,
    ),
    (
        "padding is visible",
        9,
        lambda s: s.on_documents(
            lambda q, k: (q, replace(k, document=k.document + (k.document == NO_DOCUMENT) * q.document))
        ),
        ROPE,
    ),
    (
        "loss averaged rank by rank",
        9,
        lambda s: s.patch.setattr(loss, "loss_scale", lambda labels, *_: (1 / labels, 0)),
        ROPE,
    ),
    ("padding adds to the loss", 9, padding_in_the_loss, ROPE),
    ("no <bob> at training", 10, lambda s: s.on_rows(without_bob), ROPE),
    (
        "another id for <bob> at training",
        10,
        lambda s: s.on_chars_at_training(lambda c: replace(c, ids=np.where(c.ids == BOB, PAD, c.ids))),
        ROPE,
    ),
    ("first chars not supervised", 10, lambda s: s.on_labels(lambda c, y: np.where(c.index == 0, IGNORED, y)), ROPE),
    ("<eob> not supervised", 10, lambda s: s.on_labels(lambda _, y: np.where(y == EOB, IGNORED, y)), ROPE),
    ("<eos> where <eob> belongs", 10, lambda s: s.on_labels(lambda _, y: np.where(y == EOB, EOS, y)), ROPE),
    (
        "a cut document ends in <eos>",
        10,
        lambda s: s.around(
            rows,
            "lay_out_rows",
            lambda f, found, *a: f([[replace(piece, ends_document=True) for piece in row] for row in found], *a),
        ),
        ROPE,
    ),
    ("logits masked with 0 before the loss", 10, loss_masked_with_zero, ROPE),
    ("labels shifted by one", 10, lambda s: s.on_labels(lambda _, y: np.roll(y, 1)), ROPE),
    ("the loss in half precision", 10, loss_in_half_precision, ROPE),
    (
        "no gradient into the embedding",
        10,
        lambda s: s.around(TidalTransformer, "_embed", lambda f, *a: f(*a).detach()),
        ROPE,
    ),
    ("no gradient from chars to tokens", 10, no_gradient_from_chars_to_tokens, ROPE),
]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The configuration of a training whose shards are prepared."""
    folder = tmp_path_factory.mktemp("healthy")
    config = configuration(folder / "shards", write_corpus(folder / "corpus"))
    prepare_shards(config)
    return config


Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export_of(healthy: Config, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`export_of(**settings)`: an export over the healthy shards, made once."""
    made: dict[str, Path] = {}

    def export(**settings: Any) -> Path:
        key = repr(settings)
        if key not in made:
            made[key] = write_random_export(tmp_path_factory.mktemp("model") / "export", healthy, **settings)
        return made[key]

    return export


@pytest.fixture
def scene(
    healthy: Config, export_of: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Scene:
    """A scene over an export of the settings that the test is parametrised with."""
    return Scene(monkeypatch, healthy, tmp_path, export_of(**request.param), Path(healthy.data.shards))


SETTINGS: list[dict[str, Any]] = [
    {"encoding": encoding, **others}
    for encoding in ("rope", "alibi", "none")
    for others in (
        {},
        {"char_positions": "forward", "token_attention": "causal", "n_heads": 4},
        {"places": False, "char_layers": 1},
        {"char_layers": 2, "handoff": True, "mlp": "gelu", "n_layers": 3, "draft_layers": 1},
        {"char_layers": 1, "handoff": False, "place_shift": 4, "dropout": 0.1},
    )
]


@pytest.mark.parametrize("scene", [SETTINGS[s % len(SETTINGS)] | {"seed": s} for s in range(15)], indirect=True)
def test_a_healthy_model_raises_no_alarm(scene: Scene) -> None:
    report, _ = scene.examined()
    assert report.holds, report.as_text()


# Does not show in every document, or not in its first blocks.
RARE = {
    "the cache keeps chars",
    "chars see their block's tokens",
    "a cut document ends in <eos>",
    "<eob> not supervised",
    "<eos> where <eob> belongs",
}


@pytest.mark.parametrize(
    ("scene", "plant", "suspect", "is_rare"),
    [pytest.param(settings, plant, suspect, name in RARE, id=name) for name, suspect, plant, settings in PLANTS],
    indirect=["scene"],
)
def test_a_planted_bug_is_named(scene: Scene, plant: Callable[[Scene], None], suspect: int, is_rare: bool) -> None:
    if is_rare:
        scene.sizes = Sizes(documents=8, blocks=3, rows=8)
    plant(scene)
    report, _ = scene.examined()
    culprit = report.culprit
    assert culprit is not None
    assert culprit.suspect == suspect, report.as_text()
    assert culprit.where
    assert culprit.remedy


def test_every_suspect_has_a_planted_bug() -> None:
    assert {suspect for _, suspect, _, _ in PLANTS} == set(range(1, 11))
