"""Starts the server: its socket, its engine, its signals."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import cast

import uvicorn

from tidal_dist.errors import UserError
from tidal_dist.export.package import load_export
from tidal_dist.generation.draft import draft_named
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.server.app import create_app
from tidal_dist.generation.server.protocol import BoundedProtocol
from tidal_dist.generation.server.service import Service
from tidal_dist.generation.server.settings import ServerSettings

_BACKLOG = 2048
_ANSWERS_SECONDS = 2.0  # for the last bytes of what was ended, after the grace


class Server(uvicorn.Server):
    """uvicorn's server, which ends with 0 after a signal, and lets what is being written finish within the grace."""

    def __init__(self, service: Service):
        self._service = service
        grace = service.settings.grace_seconds
        protocol = partial(BoundedProtocol, header_seconds=service.settings.header_seconds)
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=cast(type[asyncio.Protocol], protocol),
                log_config=None,
                access_log=False,
                backlog=_BACKLOG,
                server_header=False,
                timeout_graceful_shutdown=int(grace + _ANSWERS_SECONDS),
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """A first signal ends the server gracefully, a second one at once."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        self._service.close_soon()


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address; port 0 takes a free one.

    Raises:
        UserError: the address is in use or is none of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror}; use an address of this machine") from None
    listening = socket.socket(family, kind)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}; choose another with --port") from None
    return listening


def serve(
    export: Path, settings: ServerSettings, host: str, port: int, device: str, announce: Callable[[str], None]
) -> None:
    """Serve an export until a signal comes.

    Args:
        announce: told the server's address when it is about to answer.

    Raises:
        UserError: the export or the address cannot be used, or the model cannot draft.
    """
    with contextlib.closing(listen(host, port)) as listening:
        exported = load_export(export)
        model = exported.model.to(device)
        draft = draft_named(settings.draft, model.config)
        make_engine = partial(Engine, model, exported.tokenizer, device, settings.batch_size, draft)
        server = Server(Service(make_engine, exported.tokenizer, settings))
        announce(_url(listening))
        with _all_files():
            server.run(sockets=[listening])


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def _all_files() -> Iterator[None]:
    """As many open files, and so connections, as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
