"""Bodies of requests as options: JSON, or a query, against a schema, with one error at a time."""

from __future__ import annotations

import json
from typing import Any

import orjson
from pydantic import BaseModel, ValidationError

from fastprior.server.errors import ApiError

SHOWN = 100  # characters of a value that a message quotes
MOST_LISTS = 50_000  # lists and objects of a body: of millions Python's garbage collector would take seconds


def parsed(body: bytes, kind: type[BaseModel]) -> Any:
    """The JSON of a body as `kind`. Raises ApiError that names the field."""
    if body.count(b"[") + body.count(b"{") > MOST_LISTS:
        raise ApiError(400, f"the body holds more than {MOST_LISTS:,} lists and objects", "body", "too_many_lists")
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error}", "body", "json_invalid") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"the body is a JSON {type(given).__name__}; it must be an object", "body", "json_type")
    return validated(given, kind)


def validated(given: dict[str, Any], kind: type[BaseModel]) -> Any:
    """Fields as `kind`. Raises ApiError that names the first that is wrong."""
    for name in given:  # found here, as pydantic would list each of millions of unknown ones
        if name not in kind.model_fields:
            rule = f"Extra inputs are not permitted; it must be one of {', '.join(sorted(kind.model_fields))}"
            raise ApiError(400, f"{name[:SHOWN]}: {rule}", name[:SHOWN], "extra_forbidden")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False)) from None


def invalid(errors: list[dict[str, Any]]) -> ApiError:
    """The first of pydantic's errors in OpenAI's shape."""
    first = errors[0]
    param = str(first["loc"][0])[:SHOWN] if first["loc"] else "body"  # what follows are names of our alternatives
    value = _brief(first["input"]) if "input" in first else ""
    return ApiError(400, f"{param}={value}: {first['msg']}", param, first["type"])


def _brief(value: Any) -> str:
    """The beginning of a value, without writing all of it."""
    if isinstance(value, str):
        value = value[:SHOWN]
    elif isinstance(value, (list, dict)):
        return f"{type(value).__name__} of {len(value)}"
    return json.dumps(value, default=str)[:SHOWN]
