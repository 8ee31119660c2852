"""A request's body: bounded in size and in time, then decoded."""

import asyncio
import hmac
import json
from typing import Any

from starlette.requests import Request

from tidal_dist.generation.server.errors import ApiError
from tidal_dist.generation.server.settings import ServerSettings

_DISCARDED = 32  # times the limit: what is read and dropped of a longer body, so that its sender hears why


def check_key(request: Request, key: str | None) -> None:
    """Compare a request's key with the server's, in constant time.

    Raises:
        ApiError: 401.
    """
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise ApiError(401, "needs the server's key: Authorization: Bearer KEY", code="invalid_api_key")


async def read_object(request: Request, settings: ServerSettings) -> Any:
    """A request's body, decoded from JSON.

    Raises:
        ApiError: it is too long, too slow, not UTF-8, not JSON, or not said to be JSON.
        starlette.requests.ClientDisconnect: the client hung up before its end.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "needs Content-Type: application/json")
    try:
        async with asyncio.timeout(settings.body_seconds):
            body = await _read(request, settings.max_request_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {settings.body_seconds:g} s", code="timeout") from None
    return _decoded(body)


async def _read(request: Request, limit: int) -> bytes:
    body, length = bytearray(), 0
    async for chunk in request.stream():
        length += len(chunk)
        if length <= limit:
            body += chunk
        elif length > limit * _DISCARDED:
            break
    if length > limit:
        raise ApiError(413, f"the body is longer than {limit:,} bytes; send less", code="request_too_large")
    return bytes(body)


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}", code="invalid_utf8") from None
    except (ValueError, RecursionError) as error:
        message = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {message[:200]}", code="invalid_json") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


async def until_hung_up(request: Request) -> None:
    """Return when the client has hung up. Only after the whole body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
