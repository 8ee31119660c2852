"""uvicorn's connections, with a limit on the time that a request's header takes, for which uvicorn has none."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tidal_dist.generation.server.errors import ApiError


class BoundedProtocol(H11Protocol):
    """A connection that is closed where a header is not there in time.

    uvicorn's own timer ends with the first byte of the next request. This one runs from there, and from a connection's
    beginning, to the end of the header, however often a byte comes. So long may take, too, what a client still sends of
    a body after the answer.
    """

    def __init__(self, *arguments: Any, header_seconds: float, **more: Any):
        super().__init__(*arguments, **more)
        self._header_seconds = header_seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the loop, once."""
        super().connection_made(transport)
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        super().data_received(data)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop, last."""
        self._stop_timer()
        super().connection_lost(exc)

    def _set_timer(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._header_seconds, self._cut_off)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut_off(self) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:  # it waits for an answer
            error = ApiError(408, f"the header did not arrive within {self._header_seconds:g} s", code="timeout")
            body = json.dumps(error.as_object()).encode()
            headers = error.headers() | {"Content-Type": "application/json", "Content-Length": str(len(body))}
            answer = h11.Response(status_code=error.status, headers=list(headers.items()), reason="Request Timeout")
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
