"""The decoder that users get, watched, and told what to write: what it feeds to the model, and what that answers."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from data_pipeline.layout import NO_DOCUMENT, Slots
from data_pipeline.tokenizer import EOS, OUTPUT_VOCABULARY, MixedTokenizer
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.events import Generation
from tidal_dist.generation.job import Job
from tidal_dist.generation.request import Limits, Request
from tidal_dist.model.transformer import TidalTransformer


@dataclass(frozen=True)
class Followed:
    """One sequence of a decoding, pass after pass.

    Attributes:
        tokens: Slots (t,) that were fed, prompt first. chars: Slots (n,), one a pass.
        logits: (n, V) float64 on the CPU, the model's answer to each char.
        result: what the decoder made of it. modules_in_training: modules that were in training mode meanwhile.
        error: of the first pass that the model could not make; its logits are NaN.
    """

    tokens: Slots
    chars: Slots
    logits: torch.Tensor
    result: Generation
    modules_in_training: int
    error: str


@dataclass
class _Record:
    """What one sequence was fed and answered so far."""

    tokens: list[Slots] = field(default_factory=list)
    chars: list[Slots] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def dictated(self, ids: list[int]) -> int:
        """The id to write next; the document ends behind the last."""
        return ids[len(self.logits) - 1] if len(self.logits) <= len(ids) else EOS


@dataclass
class _Tap:
    """Stands for the model in an engine: passes everything on, keeps a record, and may dictate the choice.

    What is dictated is fed to its end, also where the model cannot take it: what was fed says why.

    Attributes:
        jobs: the requests in the order of the prompts. rows: says which jobs the rows of the pass at hand are.
    """

    model: TidalTransformer
    dictation: list[list[int]] | None
    jobs: list[Job] = field(default_factory=list)
    rows: Callable[[], list[Job]] = list
    records: dict[int, _Record] = field(default_factory=lambda: defaultdict(_Record))
    modules_in_training: int = 0
    error: str = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, tokens: Slots, chars: Slots, past: Any) -> torch.Tensor:
        logits = self._answer(tokens, chars, past)
        self.modules_in_training = max(self.modules_in_training, sum(m.training for m in self.model.modules()))
        choice = torch.zeros_like(logits)
        for row, job in enumerate(self.rows()):
            i = self.jobs.index(job)
            record, fed = self.records[i], _own(chars, row)
            record.tokens.append(_own(tokens, row))
            record.chars.append(fed)
            record.logits.append(logits[row, -1:].double().cpu()[: len(fed.ids)])
            if self.dictation is not None:
                choice[row, -1, record.dictated(self.dictation[i])] = 1.0
        return logits if self.dictation is None else choice

    def _answer(self, tokens: Slots, chars: Slots, past: Any) -> torch.Tensor:
        try:
            return self.model(tokens, chars, past=past)
        except (IndexError, RuntimeError) as error:
            if self.dictation is None:
                raise
            self.error = self.error or f"{type(error).__name__}: {' '.join(str(error).split())}"
            return torch.full((*chars.ids.shape, OUTPUT_VOCABULARY), torch.nan, device=chars.ids.device)


def follow(
    model: TidalTransformer,
    tokenizer: MixedTokenizer,
    device: str,
    prompts: Sequence[str | Sequence[str]],
    limits: Limits,
    dictation: list[list[int]] | None = None,
) -> list[Followed]:
    """Decode a batch of prompts greedily.

    Args:
        prompts: texts or lists of blocks.
        dictation: for each prompt the ids (bytes and end marks) to write instead of the model's own choice.
    """
    tap = _Tap(model, dictation)
    watched = cast(TidalTransformer, tap)
    engine = Engine(watched, tokenizer, device, max(len(prompts), 1), records_passes=False)
    tap.jobs = [engine.submit(Request(prompt, limits=limits)) for prompt in prompts]
    tap.rows = lambda: engine.jobs_of_pass
    while engine.has_work:
        engine.step()
    return [_followed(tap, i) for i in range(len(prompts))]


def _followed(tap: _Tap, i: int) -> Followed:
    record, result = tap.records[i], tap.jobs[i].generation
    logits = torch.cat(record.logits)
    return Followed(_joined(record.tokens), _joined(record.chars), logits, result, tap.modules_in_training, tap.error)


def _own(slots: Slots, row: int) -> Slots:
    """The slots of a row that are no padding, on the CPU."""
    return slots.at((row, slots.document[row] != NO_DOCUMENT)).map(torch.Tensor.cpu)


def _joined(parts: list[Slots]) -> Slots:
    arrays = {name: torch.cat([getattr(part, name) for part in parts]).numpy() for name in parts[0].arrays()}
    return Slots(parts[0].stream, **arrays)
