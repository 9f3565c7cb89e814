"""Errors as clients of OpenAI's API read them: a status, and JSON that names the field and the rule."""

from __future__ import annotations

from typing import Any

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
KINDS |= {408: "timeout_error", 429: "rate_limit_error", 499: "client_closed_request", 504: "timeout_error"}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: names what was given and the rule.
        param: the field of the request.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": dict(message=self.message, type=kind, param=self.param, code=self.code)}
