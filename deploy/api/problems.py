"""FleetError → HTTP: the one table. The status and code stand on the error's class, the sentence in its message.

Anything that is not an expected error is logged with its traceback and answered as an anonymous 500.
"""

import logging
import re
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from actors.errors import (
    BadImage,
    BadRequest,
    DeadlineExceeded,
    EngineOutOfMemory,
    FleetError,
    ImageTooLarge,
    ModelError,
    Overloaded,
    PoisonedImage,
    ReplicaUnavailable,
    UnknownModel,
)
from deploy.api.tracing import trace_headers, trace_id

SENTENCE_ONLY = ("/api/", "/v2/")  # Ultralytics Platform's and Triton's clients want the sentence itself under "error"
RETRY_AFTER_S = {429: 1, 503: 2}  # what the client is told to wait, by status

ROBOFLOW_PATH = re.compile(r"/(infer|model)/.*|/[^/]+/[^/]+")  # its client shows the top level's ``message``

log = logging.getLogger(__name__)


class BodyTooLarge(FleetError):
    """A request body beyond the limit."""

    status = 413
    code = "body_too_large"


class BodyTooSlow(FleetError):
    """A request body that did not arrive in time."""

    status = 408
    code = "body_too_slow"


class Unauthorized(FleetError):
    """A request without a valid API key."""

    status = 401
    code = "unauthorized"


class RateLimited(FleetError):
    """A key that asks more often than it may."""

    status = 429
    code = "rate_limited"


class BadUrl(FleetError):
    """A URL that is not fetched, or that gave no answer that could be an image."""

    status = 422
    code = "bad_url"


ANY_PATH = (
    *(BadImage, ImageTooLarge, BadRequest, PoisonedImage, BadUrl, BodyTooLarge, BodyTooSlow, Unauthorized, UnknownModel),
    *(Overloaded, RateLimited, FleetError, ModelError, ReplicaUnavailable, EngineOutOfMemory, DeadlineExceeded),
)


class ProblemDetail(BaseModel):
    """What went wrong."""

    code: str
    message: str
    request_id: str


class Problem(BaseModel):
    """A failure's body; ``message`` stands beside it where Roboflow's client looks for it."""

    error: ProblemDetail
    message: str | None = None


class SentenceProblem(BaseModel):
    """A failure's body as Ultralytics Platform's and Triton's clients read it."""

    error: str
    code: str
    request_id: str


def problem_response(request: Request, error: FleetError, retry_after_s: int | None = None) -> JSONResponse:
    """The answer for an expected error.

    Args:
        request: what it answers.
        error: what went wrong.
        retry_after_s: seconds that the client is told to wait; the status's own if None.
    """
    return _respond(request, error.status, error.code, error.message, retry_after_s)


def documented(router: APIRouter, more: tuple[type[FleetError], ...] = ()) -> dict[int | str, dict[str, Any]]:
    """The errors that any path of ``router`` may answer with, and ``more``, for its schema: status → codes and shape."""
    model = SentenceProblem if f"{router.prefix}/".startswith(SENTENCE_ONLY) else Problem
    codes: dict[int, list[str]] = {}
    for error in ANY_PATH + more:
        codes.setdefault(error.status, []).append(error.code)
    return {status: {"model": model, "description": ", ".join(codes[status])} for status in sorted(codes)}


def problem(request: HTTPConnection, error: Exception) -> dict[str, str]:
    """``error`` for a place inside an answer that has begun already, such as a line of NDJSON or a message."""
    known = error if isinstance(error, FleetError) else _anonymous(request, error)
    return {"code": known.code, "message": _sayable(known.message), "request_id": _request_id(request)}


def install(app: FastAPI) -> None:
    """Make ``app`` answer every failure in one shape."""

    @app.exception_handler(FleetError)
    async def expected(request: Request, error: FleetError) -> JSONResponse:
        return problem_response(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(request, BadRequest(validation_sentence(error)))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, FleetError):  # raised while the body was read, wrapped by FastAPI
            return problem_response(request, error.__cause__)
        code = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        hint = {404: "; see /docs for what there is", 405: "; see /docs for the methods of this path"}
        return _respond(request, error.status_code, code, f"{error.detail}{hint.get(error.status_code, '')}")

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return problem_response(request, _anonymous(request, error))


def validation_sentence(error: RequestValidationError | ValidationError) -> str:
    """What is wrong with the first field that is wrong."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    if first["type"] == "extra_forbidden":
        return f"Unknown field '{field}': see /docs for the fields that this path takes"
    return f"Field '{field}': {first['msg']}" if field else f"The request cannot be read: {first['msg']}"


def _anonymous(request: HTTPConnection, error: Exception) -> FleetError:
    """What the client is told of a defect, whose traceback the log has."""
    log.error("request %s (trace %s) failed unexpectedly", _request_id(request), trace_id(request.scope), exc_info=error)
    return FleetError("Internal error; the server's log has the details under this request id")


def _respond(request: Request, status: int, code: str, message: str, retry_after_s: int | None = None) -> JSONResponse:
    message = _sayable(message)
    request_id = _request_id(request)
    headers = {"x-request-id": request_id, **trace_headers(request.scope)}
    if wait_s := retry_after_s or RETRY_AFTER_S.get(status):
        headers["retry-after"] = str(wait_s)
    if status == Unauthorized.status:
        headers["www-authenticate"] = "Bearer"
    if f"{request.scope['path']}/".startswith(SENTENCE_ONLY):
        return JSONResponse({"error": message, "code": code, "request_id": request_id}, status_code=status, headers=headers)
    body: dict[str, Any] = {"error": {"code": code, "message": message, "request_id": request_id}}
    if ROBOFLOW_PATH.fullmatch(request.scope["path"]):
        body["message"] = message
    return JSONResponse(body, status_code=status, headers=headers)


def _sayable(message: str) -> str:
    """Without halves of surrogate pairs, which JSON can smuggle in and UTF-8 cannot say."""
    return message.encode(errors="replace").decode()


def _request_id(request: HTTPConnection) -> str:
    return str(request.scope.get("state", {}).get("request_id", ""))
