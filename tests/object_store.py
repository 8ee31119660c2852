"""A real S3-compatible server in this process, which at times is busy."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class Store:
    """A server in this process. `refuses` says which of its requests, by number, are answered with 503."""

    app: Any = field(default_factory=lambda: DomainDispatcherApplication(create_backend_app))
    refuses: Callable[[int], bool] = lambda _: False
    requests: int = 0
    refused: int = 0
    port: int = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        self.requests += 1
        if self.refuses(self.requests):
            self.refused += 1
            # Stores say so in their own words, proxies before them in none.
            body = SLOW_DOWN if self.refused % 2 and environ["REQUEST_METHOD"] == "GET" else b""
            start_response("503 Service Unavailable", [("Content-Length", str(len(body)))])
            return [body]
        return self.app(environ, start_response)

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": f"http://127.0.0.1:{self.port}", "key": "k", "secret": "s"}


@contextmanager
def serving() -> Iterator[Store]:
    """A store that answers on a free port of this machine."""
    store = Store()
    server = make_server("127.0.0.1", 0, store, threaded=True)
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield store
    server.shutdown()
    thread.join()
