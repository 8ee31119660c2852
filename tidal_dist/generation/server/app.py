"""The server's paths."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tidal_dist.generation.server.completions import Completion
from tidal_dist.generation.server.errors import ApiError, broken
from tidal_dist.generation.server.metrics import Metrics
from tidal_dist.generation.server.reading import check_key, read_object, until_hung_up
from tidal_dist.generation.server.schema import CompletionRequest, parse_request
from tidal_dist.generation.server.service import Service

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_PAGE_RULES = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
_HUNG_UP = 499  # nginx's; nobody receives it
_STOP_SECONDS = 5.0  # for the pass at hand, at the end


class _EventStream(StreamingResponse):
    """Server-sent events of a completion, whose texts end when its client hangs up."""

    def __init__(self, completion: Completion):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(completion.pieces(), media_type="text/event-stream", headers=headers)
        self._stream = completion.stream

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.cancel("disconnect")


def create_app(service: Service) -> FastAPI:
    """The application; its lifespan is that of the service's generation thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop(_STOP_SECONDS)

    app = FastAPI(title="tidal serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_Counted, metrics=service.metrics)
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=_HUNG_UP))
    _add_api(app, service)
    _add_rest(app, service)
    return app


def _tell(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail))
    assert isinstance(error, ApiError)
    return JSONResponse(error.as_object(), error.status, error.headers())


def _add_api(app: FastAPI, service: Service) -> None:
    body = {"content": {"application/json": {"schema": CompletionRequest.model_json_schema()}}, "required": True}

    @app.post("/v1/completions", response_model=None, openapi_extra={"requestBody": body})
    async def completions(request: Request) -> Response:
        check_key(request, service.settings.api_key)
        asked = parse_request(await read_object(request, service.settings))
        completion = await service.complete(asked)
        if asked.stream:
            return _EventStream(completion)
        return await _whole(request, completion)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request, service.settings.api_key)
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        check_key(request, service.settings.api_key)
        if name != service.settings.model:
            raise ApiError(404, f"no such model here; this server has {service.settings.model!r}", "model")
        return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.settings.model, "object": "model", "created": service.started, "owned_by": "tidal"}


async def _whole(request: Request, completion: Completion) -> Response:
    """The answer, unless the client hangs up before it is there."""
    answer = asyncio.ensure_future(completion.whole())
    hung_up = asyncio.ensure_future(until_hung_up(request))
    try:
        await asyncio.wait({answer, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(answer.result()) if answer.done() else Response(status_code=_HUNG_UP)
    finally:
        completion.stream.cancel("disconnect")
        for task in (answer, hung_up):
            task.cancel()


def _add_rest(app: FastAPI, service: Service) -> None:
    page = files(__package__).joinpath("page.html").read_text("utf-8")
    page = page.replace('data-key=""', f'data-key="{"" if service.settings.api_key is None else "needed"}"')

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_RULES, "Cache-Control": "no-cache"})

    @app.get("/health")
    async def health() -> JSONResponse:
        is_well = service.worker.is_alive
        status = "ok" if is_well else str(broken())
        return JSONResponse({"status": status}, 200 if is_well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


class _Counted:
    """Counts answers by path and status."""

    _PATHS = frozenset(["/", "/v1/completions", "/v1/models", "/health", "/metrics"])

    def __init__(self, app: Callable[..., Awaitable[None]], metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        async def counting(message: _Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._PATHS else "other"
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counting)
