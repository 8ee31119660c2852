"""Generation of a batch: all prompts at once, until each is done."""

from collections.abc import Callable, Sequence

import torch

from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.events import Generation
from tidal_dist.generation.request import DEFAULT_LIMITS, Limits, Request
from tidal_dist.generation.sampling import GREEDY, Sampling
from tidal_dist.model.transformer import TidalTransformer


class Decoder:
    """Generates with a model and its tokeniser. Holds no state between calls."""

    def __init__(self, model: TidalTransformer, tokenizer: MixedTokenizer, device: torch.device | str = "cpu"):
        self.model, self.tokenizer, self.device = model, tokenizer, device

    def generate(
        self,
        prompts: Sequence[str | Sequence[str]],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        limits: Limits = DEFAULT_LIMITS,
        any_unfinished: Callable[[bool], bool] | None = None,
    ) -> list[Generation]:
        """Continue every prompt, all in one batch.

        Args:
            prompts: texts, or lists of blocks for a prompt that is already segmented.
            sampling: one for all, or one for each prompt.
            any_unfinished: told whether this process has unfinished sequences, says whether to make another pass.
                Given where processes share the model's weights: they must make equally many.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        shares_weights, goes_on = any_unfinished is not None, any_unfinished or bool
        engine = Engine(self.model, self.tokenizer, self.device, max(len(prompts), 1), shares_weights=shares_weights)
        jobs = [engine.submit(Request(p, s, limits)) for p, s in zip(prompts, samplings, strict=True)]
        while goes_on(engine.has_work):
            engine.step()
        return [job.generation for job in jobs]
