"""What a server allows, and its key."""

import os
from dataclasses import dataclass
from pathlib import Path

from tidal_dist.errors import UserError

API_KEY_VARIABLE = "TIDAL_API_KEY"


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows.

    Attributes:
        model: the name that clients ask for.
        batch_size: texts written at a time. queue: texts that may wait beside them.
        max_request_bytes: of a request's body. max_prompt_bytes: of each prompt. max_bytes_limit: of `max_tokens`.
        timeout_seconds: from a request's acceptance to its last byte. header_seconds: for its header to arrive.
        body_seconds: for its body.
        grace_seconds: what is being written when the server is told to stop has so long to finish.
        api_key: what `/v1` asks for, if anything.
        draft: how to guess what comes next, by name; see generation/draft.py.
    """

    model: str
    batch_size: int = 16
    queue: int = 256
    max_request_bytes: int = 2 * 2**20
    max_prompt_bytes: int = 16 * 2**10
    max_bytes_limit: int = 4096
    timeout_seconds: float = 300.0
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    grace_seconds: float = 3.0
    api_key: str | None = None
    draft: str | None = None

    @property
    def max_texts(self) -> int:
        """Texts that may be under way: written and waiting."""
        return self.batch_size + self.queue


def read_api_key(file: Path | None) -> str | None:
    """The key in `file`, else the one in the environment, else None.

    Raises:
        UserError: the file cannot be read, or there is no usable key where one is named.
    """
    if file is None:
        key, where = os.environ.get(API_KEY_VARIABLE), API_KEY_VARIABLE
        if key is None:
            return None
    else:
        where = f"--api-key-file {file}"
        try:
            key = file.read_text("ascii")
        except OSError as error:
            raise UserError(f"{where}: cannot read ({error.strerror}); check the path") from None
        except UnicodeDecodeError:
            raise UserError(f"{where}: not one line of ASCII; write the key alone into it") from None
    key = key.strip()
    if not key or len(key.split()) != 1 or not (key.isascii() and key.isprintable()):
        raise UserError(f"{where}: holds no key; it needs one word of printable ASCII")
    return key
