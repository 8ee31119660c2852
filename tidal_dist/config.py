"""One typed configuration for the whole program: a YAML file, strict, with overrides as `section.key=value`."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

from data_pipeline.corpus import CorpusConfig
from data_pipeline.preparing.executors import PrepareConfig
from data_pipeline.section import Section
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.shards import DataConfig
from data_pipeline.tokenizer import TokenizerConfig
from tidal_dist.errors import ConfigError
from tidal_dist.settings import GuardConfig, ModelConfig, MonitorConfig, TrainingConfig, ValidationConfig

SectionT = TypeVar("SectionT", bound=Section)


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
    guard: GuardConfig = GuardConfig()
    validation: ValidationConfig = ValidationConfig()
    monitor: MonitorConfig = MonitorConfig()
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
    content = read_yaml(path)
    for override in overrides:
        _apply_override(content, override)
    return parse_config(content, str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, as it stands there.

    Raises:
        ConfigError: the file is missing, not YAML, or no mapping.
    """
    try:
        content = _load_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a configuration is a YAML mapping of sections, this is {type(content).__name__}")
    return content


def parse_config(content: dict[str, Any], where: str) -> Config:
    """The configuration that `content` describes; as `parse_section`."""
    return parse_section(Config, content, where)


def parse_section(section: type[SectionT], content: dict[str, Any], where: str) -> SectionT:
    """The section that `content` describes; `where` names its source in errors.

    Raises:
        ConfigError: a key or value is wrong.
    """
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, where, section) for e in error.errors())) from None


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


def _explain(error: Any, where: str, section: type[Section]) -> str:
    """One error of pydantic as: where, dotted path, value, rule, nearest valid key."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(section, error["loc"][:-1])
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


__all__ = [
    "Config",
    "GuardConfig",
    "ModelConfig",
    "MonitorConfig",
    "TrainingConfig",
    "ValidationConfig",
    "load_config",
    "parse_config",
    "parse_section",
    "read_yaml",
]
