"""Memory of a pass: what layers keep for the backward pass, and what works beside it. In bytes.

Follows `tidal_dist/model`: what autograd keeps of each of its operations. T token slots, C char slots, S = T + C where
chars pass, T + 2 C where those of a draft head do too, A those that ask (all, in the last layer the chars), e bytes of
an element.
"""

from dataclasses import dataclass, fields

from data_pipeline.tokenizer import OUTPUT_VOCABULARY
from tidal_dist.config import ModelConfig
from tidal_dist.model.groups import char_groups

_FP32 = 4
_FLEX_BLOCK = 128  # slots, as in tidal_dist/model/flex.py
_INDEX = 4  # bytes of an int32
_SLOT_ARRAYS = 7  # of int64: see layout.Slots


@dataclass(frozen=True)
class PassShape:
    """What a pass is made of.

    Attributes:
        rows: of the pass. row_tokens, row_chars: slots of a row. longest_run: char slots of the longest block.
        labels: supervised chars of a row. element: bytes of an element.
        fused_norms: a norm keeps its input alone, as on a GPU; else its product too, in float32.
        kernel: of attention: flex, split or dense.
    """

    model: ModelConfig
    rows: int
    row_tokens: int
    row_chars: int
    longest_run: int
    labels: int
    element: int
    fused_norms: bool
    kernel: str = "split"


@dataclass(frozen=True)
class LayerMemory:
    """What a layer keeps from its forward to its backward pass.

    Attributes:
        inputs: its input, which activation checkpointing keeps. attention: of the attention part. mlp: of the
            feed-forward part.
        working: what the backward pass needs at its largest beyond all of it.
    """

    inputs: int
    attention: int
    mlp: int
    working: int

    @property
    def kept(self) -> int:
        """Without activation checkpointing."""
        return self.inputs + self.attention + self.mlp


@dataclass(frozen=True)
class PassMemory:
    """The largest moment of a forward and backward pass, by part.

    Attributes:
        kept: by all layers to that moment, inputs of checkpointed ones and everything of the others.
        working: of the layer that is computed again and passed backward.
        biases: of attention, held through the whole pass. embeddings: of the chars that enter. logits: and their
            gradients.
    """

    kept: int
    working: int
    biases: int
    embeddings: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


def layer_memory(shape: PassShape, index: int) -> LayerMemory:
    """What layer `index` keeps."""
    model, e, rows = shape.model, shape.element, shape.rows
    drafted = shape.row_chars if model.draft_entry is not None and index >= model.draft_entry else 0
    chars = shape.row_chars + drafted if index >= model.n_layers - model.char_depth else 0
    asking = chars if index == model.n_layers - 1 else shape.row_tokens + chars
    slots = shape.row_tokens + chars
    asking_state, slots_state = rows * asking * model.width * e, rows * slots * model.width * e
    hidden = rows * asking * model.hidden_width * e
    # A composite norm keeps its product too, and in bf16 instead of its input a float32 copy of it.
    composite = _FP32 if e == _FP32 else 2 * _FP32 - e
    norms = 0 if shape.fused_norms else rows * model.width * (asking + slots) * composite
    log_sums = rows * model.n_heads * asking * _FP32
    dropped = 2 * rows * asking * model.width if model.dropout else 0
    # The keys, if rotated, and the buffer of keys and values. Where only the chars of several rows ask, their states
    # lie apart, and are copied for the queries.
    is_last = index == model.n_layers - 1
    shared = slots_state * (3 if model.encoding == "rope" else 2) + asking_state * (rows > 1 and is_last)
    # The keys and values that the draft head's chars see, put together.
    shared += 2 * rows * (shape.row_tokens + drafted) * model.width * e if drafted else 0
    # Normed input, queries and outputs, which `out` takes as split leaves them; other kernels' are put together for it,
    # and so are those of the chars and of the draft head's.
    outputs = 1 if shape.kernel == "split" and not drafted else 2
    attention = slots_state + (1 + outputs) * asking_state + shared + log_sums + norms + dropped
    mlp = 2 * asking_state + (4 if model.mlp == "swiglu" else 2) * hidden
    # Either the gradients inside the feed-forward part, or, when what that kept is free again, those of attention.
    working = max((2 if model.mlp == "swiglu" else 1) * hidden + 2 * asking_state, 8 * slots_state - mlp)
    return LayerMemory(inputs=slots_state, attention=attention, mlp=mlp, working=working)


def pass_memory(shape: PassShape, recomputed: frozenset[int], inputs_on_host: bool) -> PassMemory:
    """The largest moment of a pass.

    Args:
        recomputed: layers of which only the input is kept. inputs_on_host: those inputs lie in host memory.
    """
    layers = [layer_memory(shape, i) for i in range(shape.model.n_layers)]
    at_loss = [0 if inputs_on_host else m.inputs if i in recomputed else m.kept for i, m in enumerate(layers)]
    at_loss = [m.kept if i not in recomputed else kept for i, (m, kept) in enumerate(zip(layers, at_loss, strict=True))]
    moments = [(sum(at_loss), 0, logits_memory(shape))]
    for i, layer in enumerate(layers):
        again = layer.kept - at_loss[i] if i in recomputed else 0
        moments.append((sum(at_loss[: i + 1]), again + layer.working, 0))
    kept, working, logits = max(moments, key=sum)
    return PassMemory(kept, working, biases_memory(shape), embeddings_memory(shape), logits)


def biases_memory(shape: PassShape) -> int:
    """What attention knows of the rows, and rotary angles: biases of all pairs that are computed, or flex's blocks."""
    model = shape.model
    has_angles = model.encoding == "rope"
    chars = shape.row_chars * _char_streams(model)
    angles = (shape.row_tokens + chars) * (model.width // model.n_heads) if has_angles else 0
    if shape.kernel == "flex":
        return shape.rows * (angles * shape.element + _flex_memory(shape))
    heads = model.n_heads if model.encoding == "alibi" else 1
    return shape.rows * (_pairs(shape) * heads + angles) * shape.element


def _pairs(shape: PassShape) -> int:
    """Pairs of a row that have a bias."""
    on_tokens = (shape.row_tokens + shape.row_chars) * shape.row_tokens
    if shape.kernel == "dense":
        return on_tokens + shape.row_chars**2
    return on_tokens + sum(asking * asked for asking, asked in char_groups(shape.row_chars, shape.longest_run))


def _flex_memory(shape: PassShape) -> int:
    """Of a row: the numbers of blocks, seen in part or whole, by queries and by keys; the slots that it asks about."""
    tokens, chars = (-(-n // _FLEX_BLOCK) for n in (shape.row_tokens, shape.row_chars))
    slots = -(-(shape.row_tokens + shape.row_chars) // _FLEX_BLOCK)
    of_blocks = 4 * _INDEX * (tokens * tokens + chars * slots)
    return of_blocks + _SLOT_ARRAYS * 2 * _INDEX * (shape.row_tokens + shape.row_chars)


def embeddings_memory(shape: PassShape) -> int:
    """The chars that enter, and what the handoff keeps."""
    model = shape.model
    norms = 0 if shape.fused_norms else _FP32 // shape.element
    handoff = (2 + norms) * shape.row_tokens * (model.has_handoff + (model.draft_layers is not None))
    return shape.rows * model.width * handoff * shape.element


def logits_memory(shape: PassShape) -> int:
    """The last norm, the supervised states, logits, their logarithms and the gradient of those."""
    rows = shape.rows * _char_streams(shape.model)
    labels = rows * shape.labels
    states = rows * shape.row_chars * shape.model.width * shape.element * (2 if shape.fused_norms else 3)
    each = shape.element + 3 * _FP32 if shape.element < _FP32 else 3 * _FP32
    return states + labels * (shape.model.width * shape.element + OUTPUT_VOCABULARY * each)


def _char_streams(model: ModelConfig) -> int:
    """How many times the chars come out at the top: a draft head's do too."""
    return 1 if model.draft_layers is None else 2
