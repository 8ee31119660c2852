"""What `tidal bench generate` says about drafts."""

import pytest

from tests.test_generation import TOKENIZER, lively_model
from tidal_dist.bench import speculation
from tidal_dist.errors import UserError
from tidal_dist.generation.events import Generation


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "_PROMPT_BYTES", 400)


def test_a_draft_saves_more_than_half_of_the_passes() -> None:
    result = speculation.bench_speculation(lively_model(), TOKENIZER, "cpu", 60)
    assert list(result) == ["json lines", *speculation.SOURCES]
    assert result["json lines"]["share_of_passes"] < 0.5
    for found in result.values():
        assert 1.0 < found["passes_per_byte"] < 2.0
        assert 0 < found["accepted"] < found["drafted"]
    assert len(speculation.format_speculation(result)) == len(result)


def test_a_draft_that_changes_the_text_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(["one", "other"])
    monkeypatch.setattr(speculation, "_written", lambda *_: (Generation(text=next(texts)), 1.0))
    with pytest.raises(UserError, match="a draft changed what was written"):
        speculation.bench_speculation(lively_model(), TOKENIZER, "cpu", 60)
