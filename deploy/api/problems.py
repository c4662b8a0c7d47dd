"""FleetError → HTTP: the one table. The status and code stand on the error's class, the sentence in its message.

Anything that is not an expected error is logged with its traceback and answered as an anonymous 500.
"""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from actors.errors import BadRequest, FleetError

log = logging.getLogger(__name__)


class BodyTooLarge(FleetError):
    """A request body beyond the limit."""

    status = 413
    code = "body_too_large"


def problem_response(request: Request, error: FleetError) -> JSONResponse:
    """The answer for an expected error."""
    return _respond(request, error.status, error.code, error.message)


def install(app: FastAPI) -> None:
    """Make ``app`` answer every failure in one shape."""

    @app.exception_handler(FleetError)
    async def expected(request: Request, error: FleetError) -> JSONResponse:
        return problem_response(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(request, BadRequest(_sentence(error)))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, FleetError):  # raised while the body was read, wrapped by FastAPI
            return problem_response(request, error.__cause__)
        code = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        hint = {404: "; see /docs for what there is", 405: "; see /docs for the methods of this path"}
        return _respond(request, error.status_code, code, f"{error.detail}{hint.get(error.status_code, '')}")

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("request %s failed unexpectedly", _request_id(request), exc_info=error)
        message = "Internal error; the server's log has the details under this request id"
        return _respond(request, FleetError.status, FleetError.code, message)


def _sentence(error: RequestValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    if first["type"] == "extra_forbidden":
        return f"Unknown field '{field}': see /docs for the fields that this path takes"
    return f"Field '{field}': {first['msg']}" if field else f"The request cannot be read: {first['msg']}"


def _respond(request: Request, status: int, code: str, message: str) -> JSONResponse:
    error = {"code": code, "message": message, "request_id": _request_id(request)}
    return JSONResponse({"error": error}, status_code=status, headers={"x-request-id": error["request_id"]})


def _request_id(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id", ""))
