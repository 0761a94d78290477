"""The schema at ``/openapi.json``: what every route may answer, besides its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

__all__ = ["describe", "field_names"]

_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "type", "message", "hint"],
            "properties": {
                "code": {"type": "string", "pattern": "^FI[0-9]{3}$"},
                "type": {"type": "string"},
                "message": {"type": "string"},
                "hint": {"type": "string"},
                "query_id": {"type": "string"},
            },
        }
    },
}
_OPENAI_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_NUMBERS: Final = {
    "type": "array",
    "description": "Nested lists of equal length, of finite numbers; the first counts queries",
    "minItems": 1,
    "items": {
        "anyOf": [
            {"type": "number"},
            {"type": "boolean"},
            {"$ref": "#/components/schemas/Numbers"},
        ]
    },
}
_ALWAYS: Final = {
    "408": "The body did not arrive in time",
    "413": "A body that is too large",
    "422": "A request that does not fit the schema",
    "500": "A fault of the gateway",
}
_WITH_KEY: Final = {
    "401": "No valid API key",
    "403": "The API key, the model or a site does not allow it",
    "429": "A quota is used up, or too many requests",
}
_WITH_BOARD: Final = {
    "400": "A request that cannot be served as it is",
    "404": "No such model or query, or not this key's",
    "409": "Called off, or an idempotency key used for something else",
    "410": "After its time",
    "502": "A site, or what it answered, failed",
    "503": "The federation cannot be asked now",
}


def describe(app: FastAPI) -> None:
    """Make the app's schema say which errors its routes answer, and by which key it is asked."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(
                get_openapi(
                    title=app.title,
                    version=app.version,
                    description=app.description,
                    routes=app.routes,
                )
            )
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]


def _complete(schema: dict[str, Any]) -> dict[str, Any]:
    parts = schema.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas |= {"Error": _ERROR, "OpenAIError": _OPENAI_ERROR, "Numbers": _NUMBERS}
    parts["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "bearerFormat": "fik_<id>_<secret>"}
    }
    for path, operations in schema.get("paths", {}).items():
        is_openai = path in ("/v1/chat/completions", "/v1/responses")
        ref = {"$ref": f"#/components/schemas/{'OpenAIError' if is_openai else 'Error'}"}
        for operation in operations.values():
            errors = dict(_ALWAYS)
            if path.startswith("/v1"):
                errors |= _WITH_KEY | _WITH_BOARD
                operation["security"] = [{"key": []}]
            elif path == "/metrics":
                errors |= _WITH_KEY | {"501": "prometheus_client is not installed"}
                operation["security"] = [{"key": []}, {}]
            for status, words in errors.items():
                operation["responses"].pop(status, None) if status == "422" else None
                operation["responses"].setdefault(
                    status,
                    {"description": words, "content": {"application/json": {"schema": ref}}},
                )
    return schema


def field_names(app: FastAPI) -> frozenset[str]:
    """Return the names of all parameters and properties in the app's schema."""
    return frozenset(_names(app.openapi()))


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("properties"), dict):
            yield from value["properties"]
        if "in" in value and isinstance(value.get("name"), str):
            yield value["name"]
        for inner in value.values():
            yield from _names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _names(inner)
