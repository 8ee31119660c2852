"""The body of `/v1/completions`: OpenAI's fields and our own, each strictly of its type."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tidal_dist.generation.server.errors import ApiError

MAX_SEED = 2**62
_MAX_STOPS = 16
_REFUSED = "not supported; leave it out"

StopString = Annotated[str, Field(max_length=1000)]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionRequest(BaseModel):
    """A request; null means the default. `prompt` and `stop` are lists from here on."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    prompt: list[str] = Field(default_factory=lambda: [""], min_length=1)
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_p: Probability = 1.0
    n: int = Field(default=1, ge=1)
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(default=None, ge=0, le=5)
    stop: list[StopString] = Field(default_factory=list, max_length=_MAX_STOPS)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    echo: bool = False
    presence_penalty: float = Field(default=0.0, ge=0.0, le=0.0)
    frequency_penalty: float = Field(default=0.0, ge=0.0, le=0.0)
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=0)
    suffix: str = Field(default="", max_length=0)
    user: str | None = None
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, ge=1.0, le=100.0)
    regex: str | None = Field(default=None, min_length=1, max_length=1000)
    choice: list[str] | None = Field(default=None, min_length=1, max_length=1000)
    trace: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(v, int | list) for v in value):
            raise ValueError("must be text; token ids are not taken, since the server cuts prompts into blocks itself")
        return [value] if isinstance(value, str) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop", "choice")
    @classmethod
    def _not_empty(cls, value: list[str] | None) -> list[str] | None:
        if "" in (value or []):
            raise ValueError("must not hold an empty string")
        return value

    @model_validator(mode="after")
    def _together(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: must equal n, since all texts that are written are returned")
        if self.regex is not None and self.choice is not None:
            raise ValueError("regex: goes without choice")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: goes with stream only")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 goes with echo only, since there is nothing else to answer")
        return self

    @property
    def judges_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are asked for."""
        return self.echo and self.logprobs is not None


def parse_request(data: Any) -> CompletionRequest:
    """The request in a decoded body.

    Raises:
        ApiError: 422, which names the field.
    """
    _check_text(data)
    try:
        return CompletionRequest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(str(part) for part in first["loc"])[:100]  # it may be a field's name, of any length
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "no such field; leave it out"
    elif path in ("presence_penalty", "frequency_penalty", "logit_bias", "suffix") and "type" not in first["type"]:
        message = _REFUSED
    elif not path and ": " in message:
        path, message = message.split(": ", 1)
    raise ApiError(422, f"{path}: {message}" if path else message, param=path.split(".")[0] or None)


def _check_text(data: Any) -> None:
    """JSON can escape half a surrogate pair, which is no text and which pydantic lets pass."""
    for name, value in data.items() if isinstance(data, dict) else ():
        if not _is_text(name):
            raise ApiError(422, "the name of a field has half a surrogate pair, which is no text; mend it")
        if not _is_text(json.dumps(value, ensure_ascii=False)):
            raise ApiError(422, f"{name[:100]}: has half a surrogate pair, which is no text; mend it", name)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
