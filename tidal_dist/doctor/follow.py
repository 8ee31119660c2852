"""The decoder that users get, watched, and told what to write: what it feeds to the model, and what that answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from data_pipeline.layout import NO_DOCUMENT, Slots
from data_pipeline.tokenizer import EOS, OUTPUT_VOCABULARY, MixedTokenizer
from tidal_dist.generation.decoder import Decoder, Generation, Limits
from tidal_dist.generation.sampling import GREEDY
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
class _Tap:
    """Stands for the model in a decoder: passes everything on, keeps a record, and may dictate the choice.

    What is dictated is fed to its end, also where the model cannot take it: what was fed says why.
    """

    model: TidalTransformer
    dictation: list[list[int]] | None
    passes: list[tuple[Slots, Slots, torch.Tensor]] = field(default_factory=list)
    modules_in_training: int = 0
    error: str = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, tokens: Slots, chars: Slots, past: Any) -> torch.Tensor:
        logits = self._answer(tokens, chars, past)
        self.modules_in_training = max(self.modules_in_training, sum(m.training for m in self.model.modules()))
        record = (tokens.map(torch.Tensor.cpu), chars.map(torch.Tensor.cpu), logits[:, -1].double().cpu())
        self.passes.append(record)
        if self.dictation is None:
            return logits
        choice = torch.zeros_like(logits)
        for i, ids in enumerate(self.dictation):
            choice[i, -1, ids[len(self.passes) - 1] if len(self.passes) <= len(ids) else EOS] = 1.0
        return choice

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
        prompts: texts or lists of blocks, as `Decoder.generate` takes them.
        dictation: for each prompt the ids (bytes and end marks) to write instead of the model's own choice.
    """
    tap = _Tap(model, dictation)
    results = Decoder(cast(TidalTransformer, tap), tokenizer, device).generate(prompts, GREEDY, limits)
    return [_sequence(tap, i, result) for i, result in enumerate(results)]


def _sequence(tap: _Tap, i: int, result: Generation) -> Followed:
    """What sequence `i` of the batch was fed and answered, padding left out."""
    tokens = [_own(fed, i) for fed, _, _ in tap.passes]
    chars = [_own(fed, i) for _, fed, _ in tap.passes]
    logits = [answer[i][None][: len(c.ids)] for c, (_, _, answer) in zip(chars, tap.passes, strict=True)]
    return Followed(_joined(tokens), _joined(chars), torch.cat(logits), result, tap.modules_in_training, tap.error)


def _own(slots: Slots, i: int) -> Slots:
    """The slots of row `i` that are no padding."""
    return slots.at((i, slots.document[i] != NO_DOCUMENT))


def _joined(parts: list[Slots]) -> Slots:
    arrays = {name: torch.cat([getattr(part, name) for part in parts]).numpy() for name in parts[0].arrays()}
    return Slots(parts[0].stream, **arrays)
