"""The sections of a configuration that concern model and training; the others stand beside what they configure."""

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.baselines import CharOrder, Writes
from data_pipeline.section import Section

# What a property of `ModelConfig` that a plain decoder has not is set by.
_SPELT = {"char_depth": "no char_layers", "draft_layers": "no draft_layers", "has_handoff": "handoff: false"}


class ModelConfig(Section):
    """The shape of the model and the semantics of its positions, places and attention."""

    n_layers: int = Field(ge=1)
    char_layers: int | None = Field(None, ge=1, description="top layers that chars pass; none: all of them")
    handoff: bool | None = Field(
        None,
        description="chars get the state of their last context token; none: if char_layers < n_layers",
    )
    draft_layers: int | None = Field(
        None, ge=1, description="top layers that learn to draft alone what all of them write; none: no drafts"
    )
    draft_weight: float = Field(0.3, gt=0.0, description="of the drafts' loss in training")
    width: int = Field(ge=2)
    n_heads: int = Field(ge=1)
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    mlp_width: int | None = Field(None, ge=1, description="hidden width; none: 4 x width, for swiglu 8/3 x width")
    encoding: Literal["rope", "alibi", "none"] = "rope"
    rope_base: float = Field(10_000.0, gt=1.0)
    char_positions: Literal["mirrored", "forward"] = "mirrored"
    token_attention: Literal["block", "causal"] = "block"
    places: bool = True
    place_shift: int = Field(0, ge=0, description="training adds a random 0..place_shift to a document's places")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    char_order: CharOrder = Field("reversed", description="forward: blocks from their start, to compare with")
    writes: Writes = Field("blocks", description="tokens, bytes: a plain decoder, to compare with")

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.width % self.n_heads:
            raise ValueError(f"width {self.width} is not a multiple of n_heads {self.n_heads}")
        if self.encoding == "rope" and self.width // self.n_heads % 2:
            raise ValueError(f"rope needs an even head width, not {self.width // self.n_heads}")
        if self.char_depth > self.n_layers:
            raise ValueError(f"char_layers {self.char_layers} is more than n_layers {self.n_layers}")
        if self.draft_layers is not None and self.draft_layers >= self.char_depth:
            raise ValueError(
                f"draft_layers {self.draft_layers} is not less than the layers that chars pass, {self.char_depth}"
            )
        if self.writes != "blocks":
            plain = {"places": False, "char_positions": "forward", "char_order": "reversed", "has_handoff": False}
            needed = {"char_depth": self.n_layers, "draft_layers": None, **plain}
            wrong = [
                _SPELT.get(name, f"{name}: {value}".lower())
                for name, value in needed.items()
                if getattr(self, name) != value
            ]
            if wrong:
                raise ValueError(f"a plain decoder (writes: {self.writes}) needs {', '.join(wrong)}")
        return self

    @property
    def is_baseline(self) -> bool:
        """Whether it is what the TidalTransformer is compared with: trained and measured, but neither exported nor
        asked to generate."""
        return self.writes != "blocks" or self.char_order != "reversed"

    @property
    def char_depth(self) -> int:
        """Number of top layers that chars pass."""
        return self.n_layers if self.char_layers is None else self.char_layers

    @property
    def has_handoff(self) -> bool:
        """Whether chars get the state of their last context token."""
        return self.char_depth < self.n_layers if self.handoff is None else self.handoff

    @property
    def draft_entry(self) -> int | None:
        """The layer at which chars enter for a draft, with a handoff of their own; None: there is no draft head."""
        return None if self.draft_layers is None else self.n_layers - self.draft_layers

    @property
    def hidden_width(self) -> int:
        """Hidden width of the feed-forward layers; for swiglu rounded up to a multiple of 8."""
        if self.mlp_width is not None:
            return self.mlp_width
        return 4 * self.width if self.mlp == "gelu" else -(-(8 * self.width // 3) // 8) * 8


class TrainingConfig(Section):
    """Optimisation and checkpoints."""

    steps: int = Field(ge=1)
    batch_rows: int = Field(ge=1, description="rows of one step over all ranks")
    accumulation_steps: int = Field(1, ge=1, description="micro-batches of a step on each rank")
    learning_rate: float = Field(gt=0.0)
    final_learning_rate: float = Field(0.0, ge=0.0, description="at the last step")
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["cosine", "linear"] = Field("cosine", description="shape of the decay after the warm-up")
    decay_steps: int | None = Field(
        None, ge=1, description="length of the decay at the end; none: all after the warm-up"
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    weight_decay: float = Field(0.1, ge=0.0, description="on matrices only, embeddings excluded")
    max_gradient_norm: float = Field(1.0, gt=0.0)
    zero_stage: Literal[0, 1, 2, 3] = 3
    activation_checkpointing: bool = Field(True, description="keep only the inputs of layers, compute the rest again")
    activation_checkpoint_every_layers: int = Field(1, ge=1, description="of every k layers one is computed again")
    activation_checkpoints_on_cpu: bool = Field(False, description="what is kept lies in host memory")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU")
    compile: bool = Field(
        False, description="PyTorch's compiler makes few kernels of each layer; a minute at each start"
    )
    attention: Literal["auto", "flex", "split", "dense"] = Field(
        "auto", description="kernel; auto: flex on a GPU, else split; dense: all pairs, to compare with"
    )
    threads_per_rank: int | None = Field(
        None, ge=1, description="CPU threads; none: the cores divided by the local ranks"
    )
    seed: int = Field(1, ge=0, description="seed of the initial weights and of dropout")
    log_every_steps: int = Field(10, ge=1)
    save_every_steps: int = Field(500, ge=1)
    save_in_background: bool = Field(True, description="train on while a copy in host memory is written")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept, beside the best")
    keep_every_steps: int | None = Field(None, ge=1, description="checkpoints of its multiples are kept for good")
    time_limit_minutes: float | None = Field(None, gt=0.0, description="save and end in time; none: no limit")
    collective_timeout_minutes: float = Field(30.0, gt=0.0, description="a rank that waits longer for others ends")


class GuardConfig(Section):
    """What is done about a step whose loss or gradients are not finite, or whose gradients are far too large."""

    on_bad_step: Literal["skip", "stop"] = Field("skip", description="skip: leave its rows out and go on")
    spike_factor: float | None = Field(
        10.0, gt=0.0, description="of the robust spread of recent gradient norms above their median; none: no bound"
    )
    window_steps: int = Field(128, ge=8, description="steps whose gradient norms are compared with")
    max_skipped_in_a_row: int = Field(5, ge=1, description="so many bad steps in a row roll back to a checkpoint")
    max_rollbacks: int = Field(2, ge=0, description="the run stops with a report when it would need one more")


class ValidationConfig(Section):
    """What is measured on the held-out split, and when."""

    every_steps: int = Field(500, ge=1)
    rows: int = Field(64, ge=1, description="rows of the validation loss, at most")
    prompts: int = Field(64, ge=1, description="documents of the validation generation, at most")
    prompt_blocks: int = Field(64, ge=1, description="context of a document without a prompt, in blocks, at most")
    max_bytes: int = Field(64, ge=1, description="longest generated answer, in bytes")
    continuations: int = Field(8, ge=0, description="held-out texts that are continued and shown, at most")
    continuation_bytes: int = Field(200, ge=1, description="length of a continuation")
    early_stop_patience: int | None = Field(None, ge=1, description="end after so many validations without a gain")
    early_stop_metric: Literal["bits_per_byte", "exact_match"] = "bits_per_byte"


class MonitorConfig(Section):
    """What is watched."""

    peak_tflops: float | None = Field(
        None, gt=0.0, description="of one device, for the utilisation; none: as known of the GPU, else measured"
    )
    pictures: bool = Field(True, description="rank 0 draws a held-out document at every validation; the others wait")
    report: bool = Field(True, description="RUN/report.html at the end; `tidal report` writes it at any time")
