"""Prompts from a file or standard input: one a line, or JSON lines."""

import json
from collections.abc import Sequence

from tidal_dist.errors import UserError


def check_prompt(prompt: str, where: str) -> str:
    """The prompt, if it is text that UTF-8 can hold.

    Raises:
        UserError: it is not.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the prompt is not UTF-8; mend it") from None
    return prompt


def read_prompts(data: bytes, where: str) -> list[str]:
    """Prompts of a file: JSON lines if the first line is an object with "prompt", else every line is a prompt.

    Raises:
        UserError: the file is not UTF-8, or a JSON line is malformed.
    """
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; mend it") from None
    if lines and _prompt_of(lines[0]) is not None:
        return _read_records(lines, where)
    return lines


def _read_records(lines: Sequence[str], where: str) -> list[str]:
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompt = _prompt_of(line)
            if prompt is None:
                raise UserError(f'{where}:{number}: needs a JSON object with a string "prompt", as the first line has')
            prompts.append(check_prompt(prompt, f"{where}:{number}"))
    return prompts


def _prompt_of(line: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    return prompt if isinstance(prompt, str) else None
