"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}` and a status."""

from typing import Any

INVALID = "invalid_request_error"


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.kind, self.retry_after = status, param, code, kind, retry_after

    def as_object(self) -> dict[str, Any]:
        """The body."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Headers beside the body."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        # Else what a slow client still sends would keep its connection (RFC 9110, 15.5.9).
        return headers | {"Connection": "close"} if self.status == 408 else headers


def stopping() -> ApiError:
    """The server is about to end."""
    return ApiError(503, "the server is stopping", code="stopping", kind="server_error", retry_after=5)


def broken() -> ApiError:
    """The generation thread has ended, since no pass can be made any more."""
    return ApiError(503, "generation has failed; restart the server", code="generation_failed", kind="server_error")


def pass_failed(kind: str) -> ApiError:
    """The model failed while it wrote a request's texts. kind: of the exception."""
    message = f"a pass of the model has failed ({kind}), and this request with it; try again"
    return ApiError(500, message, code="pass_failed", kind="server_error")


def text_failed(kind: str) -> ApiError:
    """Something of a request's own failed while one of its texts was written. kind: of the exception."""
    message = f"writing a text of this request has failed ({kind}); the server's log says where"
    return ApiError(500, message, code="text_failed", kind="server_error")


def queue_full(texts: int, room: int) -> ApiError:
    """No room for more texts."""
    message = f"{texts} of {room} texts are under way, which leaves no room for this; try again later"
    return ApiError(429, message, code="queue_full", kind="rate_limit_error", retry_after=1)


def timed_out(seconds: float) -> ApiError:
    """A request's time was over before anything was written for it."""
    message = f"nothing was written within {seconds:g} s, the time of a request; try again later"
    return ApiError(408, message, code="timeout", kind="timeout_error", retry_after=1)
