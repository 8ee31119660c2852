from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.section import Section
from tidal_dist.config import Config, ModelConfig, load_config, parse_config
from tidal_dist.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "run_dir": "runs/x",
    "corpus": {"sources": [{"path": "a.jsonl", "format": "jsonl"}, {"path": "b", "format": "text"}]},
    "data": {"shards": "shards", "row_tokens": 64, "row_chars": 128},
    "model": {"n_layers": 4, "width": 64, "n_heads": 4},
    "training": {"steps": 10, "batch_rows": 8, "learning_rate": 0.001},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def error_of(path: Path, *overrides: str) -> str:
    """The message of the one-line ConfigError that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_minimal_file(path: Path) -> None:
    config = load_config(path)
    assert config.model.width == 64
    assert config.corpus.sources[1].format == "text"
    assert config.training.zero_stage == 3
    assert config.model.encoding == "rope"
    assert config.model.char_positions == "mirrored"
    assert config.model.token_attention == "block"
    assert config.model.places
    assert config.model.place_shift == 0
    assert config.segmentation.max_block_bytes == 32
    assert config.segmentation.max_unspaced_chars == 2


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_shipped_files(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.steps=77", lambda c: c.training.steps == 77),
        ("training.learning_rate=1e-4", lambda c: c.training.learning_rate == 1e-4),
        ("training.learning_rate=1.5E-4", lambda c: c.training.learning_rate == 1.5e-4),
        ("training.learning_rate=.5e-4", lambda c: c.training.learning_rate == 5e-5),
        ("training.learning_rate=1", lambda c: c.training.learning_rate == 1.0),
        ("tokenizer.path=null", lambda c: c.tokenizer.path is None),
        ("tokenizer.path=a=b.json", lambda c: c.tokenizer.path == "a=b.json"),
        ("segmentation.max_block_bytes=16", lambda c: c.segmentation.max_block_bytes == 16),
        ("model.places=false", lambda c: c.model.places is False),
        ("run_dir=other", lambda c: c.run_dir == "other"),
        ("corpus.sources=[{path: c, format: text}]", lambda c: [s.path for s in c.corpus.sources] == ["c"]),
        ("deepspeed.zero_optimization.reduce_bucket_size=5e8", lambda c: c.deepspeed == BUCKET),
    ],
)
def test_overrides(path: Path, override: str, read: Any) -> None:
    assert read(load_config(path, [override]))


BUCKET = {"zero_optimization": {"reduce_bucket_size": 5e8}}


def test_later_overrides_win(path: Path) -> None:
    assert load_config(path, ["training.steps=1", "training.steps=2"]).training.steps == 2


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "1E-4", "+1e-4", "0.0001", ".0001", "1.e-4"])
def test_yaml_reads_exponents_as_numbers(path: Path, number: str) -> None:
    path.write_text(path.read_text().replace("learning_rate: 0.001", f"learning_rate: {number}"))
    assert load_config(path).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trainig={}", ["unknown key trainig", "did you mean training?"]),
        ("model.widht=3", ["unknown key model.widht", "did you mean width?"]),
        ("training.learning_rat=3", ["unknown key training.learning_rat", "did you mean learning_rate?"]),
        ("segmentation.max_block_byte=3", ["unknown key segmentation.max_block_byte", "did you mean max_block_bytes?"]),
        ("model.zzz=3", ["unknown key model.zzz", "known keys: n_layers, ", "dropout"]),
        (
            "corpus.sources=[{path: a, format: text}, {path: a, format: text, exclud: []}]",
            ["unknown key corpus.sources.1.exclud", "did you mean exclude?"],
        ),
        (
            "corpus.filters=[{kind: length, min_bites: 3}]",
            ["unknown key corpus.filters.0.length.min_bites", "did you mean min_bytes?"],
        ),
        ("corpus.filters=[{kind: url, max_bytes: 3}]", ["known keys: kind, soft_word_threshold, "]),
    ],
)
def test_unknown_keys_name_the_nearest(path: Path, override: str, parts: list[str]) -> None:
    message = error_of(path, override)
    assert message.startswith(f"{path}: ")
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.steps=many", ["training.steps='many'", "integer"]),
        ("training.steps='10'", ["training.steps='10'", "integer"]),
        ("training.steps=1.5", ["training.steps=1.5", "integer"]),
        ("training.steps=true", ["training.steps=True", "integer"]),
        ("training.steps=0", ["training.steps=0", "greater than or equal to 1"]),
        ("training.learning_rate='1e-4'", ["training.learning_rate='1e-4'", "number"]),
        ("training.learning_rate=.nan", ["training.learning_rate=nan"]),
        ("training.steps=", ["training.steps=None", "integer"]),
        ("model.places=1", ["model.places=1", "boolean"]),
        ("model.encoding=sinus", ["model.encoding='sinus'", "'rope', 'alibi' or 'none'"]),
        ("training.zero_stage=4", ["training.zero_stage=4"]),
        ("segmentation.max_block_bytes=256", ["segmentation.max_block_bytes=256", "255"]),
        ("segmentation.max_block_bytes=3", ["segmentation.max_block_bytes=3", "4"]),
        ("run_dir=1", ["run_dir=1", "string"]),
        ("model=3", ["model=3"]),
        ("corpus.sources=[]", ["corpus.sources=[]", "at least 1"]),
        ("corpus.sources=[{path: 3, format: text}]", ["corpus.sources.0.path=3", "string"]),
        ("corpus.sources=[{path: a, format: xml}]", ["corpus.sources.0.format='xml'", "'jsonl', 'text', "]),
        ("corpus.filters=[{kind: length, min_bytes: x}]", ["corpus.filters.0.length.min_bytes='x'", "integer"]),
        ("corpus.filters=[{kind: lenght}]", ["corpus.filters.0=", "'lenght'", "'length'"]),
        ("corpus.filters=[{min_bytes: 3}]", ["corpus.filters.0=", "'kind'"]),
        ("corpus.validation_fraction=1", ["corpus.validation_fraction=1", "less than 1"]),
    ],
)
def test_wrong_values_name_the_path_the_value_and_the_rule(path: Path, override: str, parts: list[str]) -> None:
    message = error_of(path, override)
    assert message.startswith(f"{path}: ")
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    "missing", ["run_dir", "corpus", "corpus.sources", "data.shards", "model.width", "training.steps"]
)
def test_missing_keys(missing: str) -> None:
    content = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *sections, key = missing.split(".")
    section = content
    for name in sections:
        section = section[name]
    del section[key]
    with pytest.raises(ConfigError) as caught:
        parse_config(content, "there")
    assert str(caught.value) == f"there: {missing} is missing and has no default"


def test_all_errors_are_told_at_once(path: Path) -> None:
    message = error_of(path, "model.widht=3", "training.steps=0", "nonsense=1")
    assert all(part in message for part in ("model.widht", "training.steps=0", "nonsense"))


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.width=66"], "width 66 is not a multiple of n_heads 4"),
        (["model.width=12"], "rope needs an even head width, not 3"),
        (["model.char_layers=5"], "char_layers 5 is more than n_layers 4"),
    ],
)
def test_settings_that_contradict_each_other(path: Path, overrides: list[str], part: str) -> None:
    assert part in error_of(path, *overrides)


def test_an_odd_head_width_is_fine_without_rope(path: Path) -> None:
    assert load_config(path, ["model.width=12", "model.encoding=alibi"]).model.width == 12


@pytest.mark.parametrize(
    ("settings", "depth", "handoff"),
    [
        ({}, 4, False),
        ({"char_layers": 4}, 4, False),
        ({"char_layers": 1}, 1, True),
        ({"char_layers": 1, "handoff": False}, 1, False),
        ({"handoff": True}, 4, True),
    ],
)
def test_chars_of_two_depths(settings: dict[str, Any], depth: int, handoff: bool) -> None:
    model = ModelConfig(n_layers=4, width=64, n_heads=4, **settings)
    assert (model.char_depth, model.has_handoff) == (depth, handoff)


def test_the_hidden_width() -> None:
    shape = {"n_layers": 1, "width": 100, "n_heads": 2}
    assert ModelConfig(**shape).hidden_width == 272  # 8/3 of 100 is 266.7, up to a multiple of 8
    assert ModelConfig(**shape, mlp="gelu").hidden_width == 400
    assert ModelConfig(**shape, mlp_width=50).hidden_width == 50


def test_a_missing_file(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such configuration file"


def test_a_folder(tmp_path: Path) -> None:
    assert f"{tmp_path}: cannot read" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a: [1, 2", "not YAML"),
        (b"a: b: c", "not YAML"),
        (b"\tx: 1", "not YAML"),
        (b"a: \x00", "not YAML"),
        (b"!!python/object:os.system {}", "not YAML"),
        (b"\xff\xfe\xfd", "cannot read"),
        (b"", "this is NoneType"),
        (b"just words", "this is str"),
        (b"- a\n- b", "this is list"),
        (b"1: 2", "1"),
    ],
)
def test_a_file_that_is_no_configuration(path: Path, content: bytes, part: str) -> None:
    path.write_bytes(content)
    message = error_of(path)
    assert str(path) in message
    assert part in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.steps", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("training.=3", "write section.key=value"),
        ("training..steps=3", "write section.key=value"),
        ("", "write section.key=value"),
        ("run_dir.x=3", "run_dir is a value, not a section"),
        ("training.steps.x=3", "steps is a value, not a section"),
        ("training.steps=[1", "not YAML"),
    ],
)
def test_bad_overrides(path: Path, override: str, part: str) -> None:
    message = error_of(path, override)
    assert repr(override) in message
    assert part in message


def test_to_yaml_states_every_key(path: Path) -> None:
    content = yaml.safe_load(load_config(path).to_yaml())

    def check(section: Section, values: dict[str, Any]) -> None:
        assert list(values) == list(type(section).model_fields)
        for name, value in values.items():
            if isinstance(getattr(section, name), Section):
                check(getattr(section, name), value)

    check(load_config(path), content)


@pytest.mark.parametrize(
    "text",
    ["1e-4", "5E3", "1.5e+3", ".5e1", "1", "1.0", "null", "~", "yes", "2024-05-17", "- a", "#x", "a: b", "潮", ""],
)
def test_to_yaml_keeps_text_as_text(path: Path, text: str) -> None:
    config = Config.model_validate(MINIMAL | {"run_dir": text})
    path.write_text(config.to_yaml(), "utf-8")
    assert load_config(path).run_dir == text


# Nobody's paths hold control characters, and PyYAML does not keep all of them.
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=12)


@settings(max_examples=50)
@given(
    learning_rate=st.floats(1e-12, 1e3),
    rope_base=st.floats(1.5, 1e300),
    char_layers=st.none() | st.integers(1, 4),
    text=texts,
    exclude=st.lists(texts, max_size=3),
)
def test_to_yaml_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    learning_rate: float,
    rope_base: float,
    char_layers: int | None,
    text: str,
    exclude: list[str],
) -> None:
    config = Config.model_validate(
        MINIMAL
        | {
            "run_dir": text,
            "corpus": {"sources": [{"path": text, "format": "text", "exclude": exclude}]},
            "model": MINIMAL["model"] | {"rope_base": rope_base, "char_layers": char_layers},
            "training": MINIMAL["training"] | {"learning_rate": learning_rate},
            "deepspeed": {"a": [1, 1e-5, None, {"b": True}]},
        }
    )
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(config.to_yaml(), "utf-8", newline="\n")
    assert load_config(path) == config


def test_a_config_is_immutable(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(path).training.steps = 3  # type: ignore[misc]
