"""The model as lm-evaluation-harness asks it: `--model tidal --model_args pretrained=EXPORT`."""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from tidal_dist.errors import UserError
from tidal_dist.generation.request import Request
from tidal_dist.generation.scores import Score
from tidal_dist.generation.scoring import Window, check_window, score
from tidal_dist.loaded import Options, Tidal
from tidal_dist.loading import load

_BATCH_SIZE = 16
_SLOTS_PER_TEXT = 1024  # tokens and chars together that a pass of scoring has room for, for each text of a batch
_KEPT_EVERY = 64  # times the batch size: after so many requests the harness may keep their answers
_BYTES_PER_TOKEN = 4  # tasks count tokens, of which English text has about one in four bytes
_OF_OTHERS = ("until", "max_gen_toks", "do_sample")  # said in other words, or by the temperature

log = logging.getLogger(__name__)


@register_model("tidal")
class TidalLM(LM):
    """An exported model. What its likelihoods mean is in docs/evaluation.md."""

    def __init__(
        self,
        pretrained: str | Tidal = "",
        device: str = "auto",
        dtype: str | None = None,
        batch_size: int | str = _BATCH_SIZE,
        ends: bool = False,
        window_tokens: int = Window.tokens,
        window_chars: int = Window.chars,
        max_bytes: int | None = None,
    ):
        """Open an export.

        Args:
            pretrained: its folder, or what `tidal_dist.load` made of it. device, dtype: as there.
            batch_size: texts that are written side by side; a pass of scoring takes 1,024 slots for each. "auto": 16.
            ends: the text that `loglikelihood` judges ends there: its last end mark is `<eos>`.
            window_tokens, window_chars: the most that one pass of scoring sees.
            max_bytes: of a generated text; none: 4 for each token that the task allows.

        Raises:
            UserError: an argument is wrong, or the export cannot be loaded.
        """
        super().__init__()
        if not pretrained:
            raise UserError("model_args: no pretrained; give the folder of an export: --model_args pretrained=EXPORT")
        self.batch_size = _batch_size(batch_size)
        self.ends, self.max_bytes, self.window = ends, max_bytes, Window(window_tokens, window_chars)
        self.tidal = pretrained if isinstance(pretrained, Tidal) else load(str(pretrained), device, dtype)
        check_window(self.window, self.tidal.tokenizer)
        self._device = torch.device(self.tidal.device)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "TidalLM":
        """The model by `model_args`, which win over what the command line says besides.

        Raises:
            UserError: an argument is unknown or wrong, or the export cannot be loaded.
        """
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        if unknown := sorted(set(arg_dict) - set(known)):
            raise UserError(f"model_args: no {unknown[0]}; there are {', '.join(known)}")
        given = {k: v for k, v in (additional_config or {}).items() if v is not None and k in known}
        if given.get("device") == "cuda:0" and not torch.cuda.is_available():
            del given["device"]  # the harness's default, whatever the machine
        return cls(**given | dict(arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> "TidalLM":
        """As `create_from_arg_obj`, from "key=value,key=value"."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells its caches apart by."""
        return f"tidal-{self.tidal.tokenizer.hash[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        made = self.tidal.provenance
        count = sum(p.numel() for p in self.tidal.model.parameters())
        return {"model_num_parameters": count, "model_step": made.step, "model_rolling_hash": made.rolling_hash}

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding writes it) of each continuation after its context.

        White space at a context's end goes to the continuation, as in the harness's other models: a word's block has
        its leading space.
        """
        answers = []
        for number, found in enumerate(self._scores([_split(*r.args) for r in requests], self.ends)):
            answers.append((found.logprob, found.is_greedy))
            self.cache_hook.add_partial("loglikelihood", requests[number].args, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Nats of each text as a whole document, `<eos>` included."""
        answers = []
        for number, found in enumerate(self._scores([("", r.args[0]) for r in requests], ends=True)):
            answers.append(found.logprob)
            self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, answers[-1])
        return answers

    def _scores(self, pairs: Sequence[tuple[str, str]], ends: bool) -> Iterator[Score]:
        """Scores in the order of the pairs."""
        model, tokenizer, device = self.tidal.model, self.tidal.tokenizer, self.tidal.device
        slots, at_a_time = self.batch_size * _SLOTS_PER_TEXT, self.batch_size * _KEPT_EVERY
        with tqdm(total=len(pairs), desc="tidal: scoring", disable=None) as progress:
            for start in range(0, len(pairs), at_a_time):
                now = pairs[start : start + at_a_time]
                yield from score(model, tokenizer, device, now, ends, self.window, slots)
                progress.update(len(now))

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The text after each context, up to the first of its stop strings; sampled text i draws with seed + i."""
        answers = []
        written = self.tidal.engine(self.batch_size).run(self._request(i, *r.args) for i, r in enumerate(requests))
        for request, generation in zip(
            requests, tqdm(written, "tidal: writing", len(requests), disable=None), strict=True
        ):
            answers.append(generation.text)
            self.cache_hook.add_partial("generate_until", request.args, generation.text)
        return answers

    def _request(self, number: int, context: str, gen_kwargs: dict[str, Any]) -> Request:
        given = normalize_gen_kwargs(gen_kwargs)
        options = {name: value for name, value in given.items() if name in Options.__annotations__}
        if others := sorted(set(given) - set(options) - set(_OF_OTHERS)):
            log.warning("generation argument %s: not known here, left out", others[0])
        options.setdefault("max_bytes", self.max_bytes or given["max_gen_toks"] * _BYTES_PER_TOKEN)
        options["stop"] = [stop for stop in given["until"] if stop]
        options["seed"] = int(options.get("seed", 0)) + number
        (request,) = self.tidal.requests([context], **options)
        return request


def _split(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def _batch_size(given: int | str) -> int:
    if str(given).startswith("auto"):
        return _BATCH_SIZE
    if not str(given).isdecimal() or int(given) < 1:
        raise UserError(f"batch_size {given}: must be a whole number from 1 on, or auto")
    return int(given)
