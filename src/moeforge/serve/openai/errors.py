"""Errors as OpenAI writes them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from moeforge.errors import UserError

_SHOWN = 120  # characters of something a client sent that a message repeats at most
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal: HTTP status and one sentence, which parameter is at fault, and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        return Response(json.dumps(self.body()), self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, param, code)


def unavailable(reason: str) -> ApiError:
    """503: the engine has failed or shuts down."""
    return ApiError(503, reason, code="unavailable")


def of_user_error(error: UserError) -> ApiError:
    """400 for what the engine refuses; its messages begin with the name of the value."""
    name = str(error).partition(" = ")[0].partition(":")[0]
    return bad_request(shown(str(error), 3 * _SHOWN), name if name.isidentifier() else None)


def of_validation(error: ValidationError) -> ApiError:
    """400 with the first thing that pydantic found wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    steps = [str(step) for step in first["loc"] if not str(step).startswith(("function-", "list[", "constrained-"))]
    where = shown(".".join(steps)) or "body"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return bad_request(f"{where}: {shown(message, 2 * _SHOWN)}", where)


def shown(text: str, most: int = _SHOWN) -> str:
    """`text` if it is short, its beginning otherwise: a reply is never as long as a hostile request."""
    return text if len(text) <= most else text[:most] + "..."
