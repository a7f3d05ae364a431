"""The OpenAPI document, with what the framework cannot know: errors, keys, limits and media types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from fly_jax.sampling_params import MAX_PRIORITY, MAX_SEED, MAX_STOP_STRINGS
from serving.fields import MAX_STOP_CHARS, MAX_STOP_TOKEN_IDS
from serving.middleware import GENERATING_PATHS, OPEN_PATHS
from serving.options import ServerOptions

LAYOUT = "/layout"
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the field that is wrong"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
SECURITY_SCHEMES = {
    "ApiKey": {"type": "http", "scheme": "bearer", "description": "--api-key"},
    "AdminKey": {"type": "http", "scheme": "bearer", "description": "--admin-key"},
    "AdminKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "--admin-key"},
}
# Of the fields of generating bodies; null is always allowed. Their checks are in SamplingParams.
LIMITS: dict[str, dict[str, Any]] = {
    "max_tokens": {"minimum": 0},
    "max_completion_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "temperature": {"minimum": 0, "maximum": 100},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": 2**31 - 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "seed": {"minimum": -1, "maximum": MAX_SEED},
    "priority": {"minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY},
    "tensor_parallel_size": {"minimum": 1},
    "stop_token_ids": {"maxItems": MAX_STOP_TOKEN_IDS},
}
STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_FRAMEWORKS_OWN = ("HTTPValidationError", "ValidationError")


def openapi_of(app: FastAPI, options: ServerOptions) -> Callable[[], dict[str, Any]]:
    """What ``app.openapi`` should be; the document is made when it is first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, options)
        return app.openapi_schema

    return document


def _document(app: FastAPI, options: ServerOptions) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in _FRAMEWORKS_OWN:
        schemas.pop(name, None)
    schemas["Error"] = ERROR_SCHEMA
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        _limit(schemas[name]["properties"])
    schemas["ChatMessage"]["properties"]["content"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART}, {"type": "null"}]
    }
    components["securitySchemes"] = SECURITY_SCHEMES
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete(path, method, operation, options)
    return document


def _complete(path: str, method: str, operation: dict[str, Any], options: ServerOptions) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    for status, description in _errors(path, method, options).items():
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        responses[status] = {"description": description, "content": content}
    if path == "/health":
        responses["200"] = {"description": "alive"}
        responses["503"] = {"description": "the engine has stopped"}
    if path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if path in GENERATING_PATHS:
        responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    if path == LAYOUT and method == "post" and options.admin_key is not None:
        operation["security"] = [{"AdminKey": []}, {"AdminKeyHeader": []}]
    elif path not in OPEN_PATHS and options.api_key is not None:
        operation["security"] = [{"ApiKey": []}]


def _limit(properties: dict[str, Any]) -> None:
    for name, limits in LIMITS.items():
        if name in properties:
            properties[name]["anyOf"][0].update(limits)
    properties["stop"]["anyOf"] = [
        STOP_STRING,
        {"type": "array", "maxItems": MAX_STOP_STRINGS, "items": STOP_STRING},
        {"type": "null"},
    ]


def _errors(path: str, method: str, options: ServerOptions) -> dict[str, str]:
    """Descriptions by status."""
    errors = {
        "413": f"the body is larger than {options.max_body_bytes} bytes",
        "500": "a fault of the server's",
        "503": "the queue is full, the server shuts down, or the engine has stopped",
    }
    if method == "post":
        errors["400"] = "the body is wrong; param names the field"
    if path.startswith("/v1/models/") or path in GENERATING_PATHS or path in ("/tokenize", "/detokenize"):
        errors["404"] = "there is no such model"
    if path not in OPEN_PATHS and options.api_key is not None:
        errors["401"] = "the API key is missing or wrong"
    if path == LAYOUT and method == "post":
        errors["401"] = "the admin key is missing or wrong"
        errors["403"] = "there is no admin key, and the request is not from this machine"
        errors["415"] = "the body is not sent as application/json"
    return errors
