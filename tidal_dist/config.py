"""One typed configuration for the whole program: a YAML file, strict, with overrides as `section.key=value`."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from data_pipeline.corpus import CorpusConfig
from data_pipeline.preparing.executors import PrepareConfig
from data_pipeline.section import Section
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.shards import DataConfig
from data_pipeline.tokenizer import TokenizerConfig
from tidal_dist.errors import ConfigError


class ModelConfig(Section):
    """The shape of the model and the semantics of its positions, places and attention."""

    n_layers: int = Field(ge=1)
    char_layers: int | None = Field(None, ge=1, description="top layers that chars pass; none: all of them")
    handoff: bool | None = Field(
        None,
        description="chars get the state of their last context token; none: if char_layers < n_layers",
    )
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

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.width % self.n_heads:
            raise ValueError(f"width {self.width} is not a multiple of n_heads {self.n_heads}")
        if self.encoding == "rope" and self.width // self.n_heads % 2:
            raise ValueError(f"rope needs an even head width, not {self.width // self.n_heads}")
        if self.char_depth > self.n_layers:
            raise ValueError(f"char_layers {self.char_layers} is more than n_layers {self.n_layers}")
        return self

    @property
    def char_depth(self) -> int:
        """Number of top layers that chars pass."""
        return self.n_layers if self.char_layers is None else self.char_layers

    @property
    def has_handoff(self) -> bool:
        """Whether chars get the state of their last context token."""
        return self.char_depth < self.n_layers if self.handoff is None else self.handoff

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
    zero_stage: Literal[1, 2, 3] = 3
    activation_checkpointing: bool = True
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU")
    threads_per_rank: int | None = Field(
        None, ge=1, description="CPU threads; none: the cores divided by the local ranks"
    )
    seed: int = Field(1, ge=0, description="seed of the initial weights and of dropout")
    log_every_steps: int = Field(10, ge=1)
    save_every_steps: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept, beside the best")


class ValidationConfig(Section):
    """What is measured on the held-out split, and when."""

    every_steps: int = Field(500, ge=1)
    rows: int = Field(64, ge=1, description="rows of the validation loss, at most")
    prompts: int = Field(64, ge=1, description="documents of the validation generation, at most")
    prompt_blocks: int = Field(64, ge=1, description="context of a document without a prompt, in blocks, at most")
    max_bytes: int = Field(64, ge=1, description="longest generated answer, in bytes")


class Config(Section):
    """A run."""

    run_dir: str = Field(description="where checkpoints and logs go")
    corpus: CorpusConfig
    segmentation: SegmentationConfig = SegmentationConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    prepare: PrepareConfig = PrepareConfig()
    model: ModelConfig
    training: TrainingConfig
    validation: ValidationConfig = ValidationConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="passed through to DeepSpeed's own config")

    def to_yaml(self) -> str:
        """The resolved configuration: every key with its value."""
        return yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string; this reads it as the number it is."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as a number."""


_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply overrides such as `training.steps=100`.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is wrong.
    """
    try:
        content = _load_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a configuration is a YAML mapping of sections, this is {type(content).__name__}")
    for override in overrides:
        _apply_override(content, override)
    return parse_config(content, str(path))


def parse_config(content: dict[str, Any], where: str) -> Config:
    """The configuration that `content` describes; `where` names its source in errors.

    Raises:
        ConfigError: a key or value is wrong.
    """
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, where) for e in error.errors())) from None


def _load_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _apply_override(content: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: write section.key=value")
    section = content
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {key} is a value, not a section")
    section[keys[-1]] = _load_yaml(value, f"override {override!r}")


def _explain(error: Any, where: str) -> str:
    """One error of pydantic as: where, dotted path, value, rule, nearest valid key."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(Config, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key {path}; {hint}"
    if error["type"] == "missing":
        return f"{where}: {path} is missing and has no default"
    rule = error["msg"].removeprefix("Value error, ")
    return f"{where}: {path + '=' if path else ''}{error['input']!r}: {rule}" if path else f"{where}: {rule}"


def _known_keys(model: Any, location: Sequence[Any]) -> list[str]:
    sections = [model]
    for part in location:
        if not isinstance(part, str):
            continue
        # Where a key tells sections of several kinds apart, a location goes through the kind.
        kinds = [
            s for s in sections if "kind" in s.model_fields and part in get_args(s.model_fields["kind"].annotation)
        ]
        sections = kinds or [t for s in sections for t in _section_types(s.model_fields[part].annotation)]
    return list(sections[0].model_fields)


def _section_types(annotation: Any) -> list[type[BaseModel]]:
    """The sections inside an annotation such as `list[SourceConfig]`."""
    if get_origin(annotation) is None:
        return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return [section for inner in get_args(annotation) for section in _section_types(inner)]
