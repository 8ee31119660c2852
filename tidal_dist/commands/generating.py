"""The commands that write text with an exported model. Heavy imports happen inside."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError
from tidal_dist.commands.output import check_range, log

if TYPE_CHECKING:
    from tidal_dist.generation.engine import Engine
    from tidal_dist.generation.request import Constraint, Request

_INFINITY = float("inf")
_SERVE_SECONDS = ("timeout_seconds", "header_seconds", "body_seconds")


def add_generate(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal generate`."""
    sub.add_argument("export", type=Path, help="an exported folder")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="a prompt; may be given again")
    source.add_argument("--input", metavar="FILE", help="prompts, one a line or JSON lines; - for standard input")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    sub.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest; 0: all")
    sub.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest of this total probability")
    sub.add_argument("--min-p", type=float, default=0.0, help="leave out what is less likely than this times the best")
    sub.add_argument("--repetition-penalty", type=float, default=1.0, help="of repeating blocks; 1 (default): none")
    sub.add_argument("--seed", type=int, default=0, help="of the first text; the next ones count on")
    sub.add_argument("--max-bytes", type=int, default=256, help="longest continuation (default: %(default)s)")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be given again")
    held = sub.add_mutually_exclusive_group()
    held.add_argument("--regex", metavar="PATTERN", help="the whole continuation matches it")
    held.add_argument("--choice", action="append", metavar="TEXT", help="it is one of these; give several")
    sub.add_argument("--n", type=int, default=1, help="texts for each prompt (default: %(default)s)")
    sub.add_argument("--batch-size", type=int, default=64, help="texts at a time (default: %(default)s)")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    sub.add_argument("--trace", action="store_true", help="show each block: chars, turned text, tokens, positions")
    sub.add_argument("--logprobs", type=int, metavar="K", help="with --json: also the K likeliest chars at each place")
    _add_draft(sub, "lookup")


def _add_draft(sub: argparse.ArgumentParser, plain: str | None = None) -> None:
    """`--draft WAY`; the word may be left out where there is a plain one."""
    sub.add_argument(
        "--draft",
        nargs="?" if plain else None,
        const=plain,
        choices=["lookup", "model"],
        help="the same text in fewer passes: lookup guesses the next blocks from the text so far, model lets the "
        "model's draft head write, if it has one" + (f"; alone: {plain}" if plain else ""),
    )


def add_serve(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal serve`."""
    from tidal_dist.generation.server.settings import ServerSettings as Default

    sub.add_argument("export", type=Path, help="an exported folder")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    sub.add_argument("--port", type=int, default=8000, help="0: a free one (default: %(default)s)")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    sub.add_argument("--model-name", metavar="NAME", help="what clients ask for (default: the folder's name)")
    sub.add_argument(
        "--batch-size", type=int, default=Default.batch_size, help="texts written at a time (default: %(default)s)"
    )
    sub.add_argument("--queue", type=int, default=Default.queue, help="texts that may wait (default: %(default)s)")
    sub.add_argument(
        "--max-request-bytes", type=int, default=Default.max_request_bytes, help="of a body (default: %(default)s)"
    )
    sub.add_argument(
        "--max-prompt-bytes", type=int, default=Default.max_prompt_bytes, help="of a prompt (default: %(default)s)"
    )
    sub.add_argument(
        "--max-bytes-limit",
        type=int,
        default=Default.max_bytes_limit,
        help="most for max_tokens (default: %(default)s)",
    )
    sub.add_argument(
        "--timeout-seconds", type=float, default=Default.timeout_seconds, help="of a request (default: %(default)s)"
    )
    sub.add_argument(
        "--header-seconds", type=float, default=Default.header_seconds, help="of a header (default: %(default)s)"
    )
    sub.add_argument(
        "--body-seconds", type=float, default=Default.body_seconds, help="of a body (default: %(default)s)"
    )
    sub.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="holds the key that /v1 asks for (or TIDAL_API_KEY does)"
    )
    _add_draft(sub)


def generate(arguments: argparse.Namespace) -> int:
    """`tidal generate`."""
    _check_generate(arguments)
    asks = arguments.prompt is None and arguments.input is None and sys.stdin.isatty()
    if asks and (arguments.json or not sys.stdout.isatty()):
        raise UserError("no prompt: give --prompt, --input FILE, or prompts on standard input")
    prompts = [] if asks else _prompts(arguments)
    from tidal_dist.devices import available_device
    from tidal_dist.export.package import load_export
    from tidal_dist.generation.draft import draft_named
    from tidal_dist.generation.engine import Engine

    exported = load_export(arguments.export)
    constraint = _constraint(arguments, exported.tokenizer.segmentation.max_block_bytes)
    device = available_device(arguments.device, "--device")
    draft = draft_named(arguments.draft, exported.model.config)
    make_engine = partial(Engine, exported.model.to(device), exported.tokenizer, device, arguments.batch_size, draft)
    request = _request(arguments, constraint)
    if asks:
        _ask(make_engine, request, arguments)
    else:
        _print_all(make_engine(), request, prompts, arguments)
    return 0


def _check_generate(arguments: argparse.Namespace) -> None:
    check_range("--temperature", arguments.temperature, 0.0, _INFINITY)
    check_range("--top-k", arguments.top_k, 0, _INFINITY)
    check_range("--top-p", arguments.top_p, 1e-9, 1.0)
    check_range("--min-p", arguments.min_p, 0.0, 1.0)
    check_range("--repetition-penalty", arguments.repetition_penalty, 1.0, _INFINITY)
    check_range("--max-bytes", arguments.max_bytes, 1, _INFINITY)
    check_range("--batch-size", arguments.batch_size, 1, _INFINITY)
    check_range("--n", arguments.n, 1, _INFINITY)
    check_range("--seed", arguments.seed, 0, 2**62)
    check_range("--logprobs", arguments.logprobs or 0, 0, 256)
    if arguments.logprobs is not None and not arguments.json:
        raise UserError("--logprobs goes with --json; add it, or leave --logprobs out")


def _constraint(arguments: argparse.Namespace, max_block_bytes: int) -> "Constraint | None":
    if arguments.regex is None and arguments.choice is None:
        return None
    from tidal_dist.generation.constraint import constraint_of

    return constraint_of(arguments.regex, arguments.choice, max_block_bytes)


def _request(arguments: argparse.Namespace, constraint: "Constraint | None") -> "Request":
    """What all prompts have alike."""
    from tidal_dist.generation.request import Limits, Request
    from tidal_dist.generation.sampling import SAMPLING_NAMES, Sampling

    sampling = Sampling(**{name: getattr(arguments, name) for name in SAMPLING_NAMES})
    limits = Limits(arguments.max_bytes, stop=tuple(arguments.stop))
    return Request("", sampling, limits, constraint, arguments.logprobs or 0)


def _print_all(engine: "Engine", request: "Request", prompts: Sequence[str], arguments: argparse.Namespace) -> None:
    from tidal_dist.generation.report import as_object, as_text
    from tidal_dist.generation.request import requests_of

    texts = [prompt for prompt in prompts for _ in range(arguments.n)]
    for prompt, result in zip(texts, engine.run(requests_of(texts, request)), strict=True):
        if arguments.json:
            found = as_object(prompt, result, arguments.trace, arguments.logprobs is not None)
            print(json.dumps(found, ensure_ascii=False), flush=True)
        else:
            print(as_text(prompt, result, arguments.trace), flush=True)


def _ask(make_engine: "Callable[[], Engine]", request: "Request", arguments: argparse.Namespace) -> None:
    from tidal_dist.generation.prompt_loop import PromptLoop

    has_colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    PromptLoop(make_engine, request, arguments.n, arguments.trace, sys.stdout, has_colour).run()


def _prompts(arguments: argparse.Namespace) -> list[str]:
    from tidal_dist.generation.prompts import check_prompt, read_prompts

    if arguments.prompt is not None:
        return [check_prompt(prompt, "--prompt") for prompt in arguments.prompt]
    if arguments.input in (None, "-"):
        return read_prompts(sys.stdin.buffer.read(), "standard input")
    try:
        return read_prompts(Path(arguments.input).read_bytes(), arguments.input)
    except OSError as error:
        raise UserError(f"{arguments.input}: cannot read ({error.strerror}); check --input") from None


def serve(arguments: argparse.Namespace) -> int:
    """`tidal serve`."""
    for name, low, high in (
        ("port", 0, 65535),
        ("batch_size", 1, _INFINITY),
        ("queue", 0, _INFINITY),
        ("max_request_bytes", 1, _INFINITY),
        ("max_prompt_bytes", 1, _INFINITY),
        ("max_bytes_limit", 1, _INFINITY),
        *((name, 1e-3, _INFINITY) for name in _SERVE_SECONDS),
    ):
        check_range(f"--{name.replace('_', '-')}", getattr(arguments, name), low, high)
    from tidal_dist.devices import available_device
    from tidal_dist.generation.server.settings import ServerSettings, read_api_key

    settings = ServerSettings(
        model=arguments.model_name or arguments.export.resolve().name,
        api_key=read_api_key(arguments.api_key_file),
        **{name: getattr(arguments, name) for name in ("batch_size", "queue", "draft", *_SERVE_SECONDS)},
        **{name: getattr(arguments, name) for name in ("max_request_bytes", "max_prompt_bytes", "max_bytes_limit")},
    )
    try:
        from tidal_dist.generation.server.run import serve as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise UserError(f"tidal serve needs {error.name}, which is missing: pip install 'tidal-dist[serve]'") from None
    if (
        settings.api_key is None
        and not arguments.host.startswith("127.")
        and arguments.host not in ("localhost", "::1")
    ):
        log(f"warning: --host {arguments.host} without a key: whoever reaches it may use it; see --api-key-file")

    def announce(url: str) -> None:
        if arguments.json:
            print(json.dumps({"url": url, "model": settings.model}), flush=True)
        log(f"serving {settings.model} at {url}: a page at /, OpenAI's API at /v1; Ctrl-C ends it")

    device = available_device(arguments.device, "--device")
    run(arguments.export, settings, arguments.host, arguments.port, device, announce)
    return 0
