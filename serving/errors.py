"""Every error leaves the server in OpenAI's shape, with one line and no traceback."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Match, Route

from fly_jax.errors import (
    ClientQueueFullError,
    ContextLengthError,
    EngineDeadError,
    FlyJaxError,
    InvalidRequestError,
    LayoutError,
    QueueFullError,
    RequestFailedError,
)

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
AUTHENTICATION = "authentication_error"
PERMISSION = "permission_error"
SERVER = "server_error"
RATE_LIMIT = "rate_limit_error"
MAX_MESSAGE_CHARS = 1000
RETRY_AFTER_SECONDS = 1


class ApiError(Exception):
    """An answer other than success, ready to be written."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        param = None if self.param is None else _printable(self.param)
        return {"error": {"message": _printable(self.message), "type": self.type, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def to_api_error(exc: BaseException) -> ApiError:
    """Maps any exception to what the client may know about it; the unexpected ones are logged here."""
    match exc:
        case ApiError():
            return exc
        case ContextLengthError():
            return ApiError(400, str(exc), param=exc.param, code="context_length_exceeded")
        case InvalidRequestError():
            return ApiError(400, str(exc), param=exc.param)
        case LayoutError():
            return ApiError(400, str(exc), param="layout", code="invalid_layout")
        case ClientQueueFullError():
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            return ApiError(429, str(exc), type=RATE_LIMIT, code="rate_limit_exceeded", headers=headers)
        case QueueFullError():
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            return ApiError(503, str(exc), type=SERVER, code="queue_full", headers=headers)
        case EngineDeadError():
            return ApiError(503, str(exc), type=SERVER, code="engine_dead")
        case RequestFailedError():
            return ApiError(500, str(exc), type=SERVER, code="request_failed")
        case RequestValidationError():
            return _from_validation(exc)
        case HTTPException():
            return _from_http(exc)
    logger.error("unexpected error while answering a request", exc_info=exc)
    return ApiError(500, "internal error; the server's log says more", type=SERVER, code="internal_error")


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", type=SERVER, code="shutting_down")


def install_error_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Makes the framework's own errors (404, 405, validation) and ours leave in one shape."""

    async def handle(request: Request, exc: Exception) -> JSONResponse:
        error = to_api_error(exc)
        if error.status == 405:
            # The framework knows the methods of one route, a path may have several.
            error.headers["Allow"] = ", ".join(sorted(_methods_of(request, routes)))
        return error.response()

    for kind in (ApiError, FlyJaxError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def _methods_of(request: Request, routes: Sequence[BaseRoute]) -> set[str]:
    found = (
        route for route in routes if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
    )
    return {method for route in found for method in route.methods or ()}


def _from_http(exc: HTTPException) -> ApiError:
    kind = SERVER if exc.status_code >= 500 else INVALID_REQUEST
    return ApiError(exc.status_code, str(exc.detail), type=kind, headers=exc.headers)


def _from_validation(exc: RequestValidationError) -> ApiError:
    """The first problem only: the client fixes one field at a time, and the first is named exactly."""
    problem = exc.errors()[0]
    param = ".".join(str(part) for part in _field_path(problem["loc"])) or None
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem['ctx']['error']}")
    if param is None:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    return ApiError(400, f"{param}: {problem['msg']}", param=param)


def _field_path(location: Sequence[str | int]) -> Sequence[str | int]:
    return location[1:] if location and location[0] in ("body", "query", "path") else location


def _printable(text: str) -> str:
    """Bounded and encodable: what a client sent may come back in a message, half surrogate pairs included."""
    return text[:MAX_MESSAGE_CHARS].encode("utf-8", "backslashreplace").decode("utf-8")
