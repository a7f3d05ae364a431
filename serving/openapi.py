"""The OpenAPI document, with what the framework cannot know: errors, keys, limits and media types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from fly_jax.sampling_params import MAX_PRIORITY, MAX_SEED, MAX_STOP_STRINGS
from serving.fields import MAX_PROMPTS, MAX_STOP_CHARS, MAX_STOP_TOKEN_IDS, RESERVED_TEMPLATE_NAMES
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
    "tensor_parallel_size": {"enum": [2**power for power in range(11)]},
    "stop_token_ids": {"maxItems": MAX_STOP_TOKEN_IDS},
}
STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART}, {"type": "null"}]}
# Only what an assistant said may be left out or null.
CONTENT_BY_ROLE = {
    "required": ["role"],
    "if": {"properties": {"role": {"const": "assistant"}}},
    "else": {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
}
TEMPLATE_KWARGS = {
    "type": "object",
    "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$", "not": {"enum": sorted(RESERVED_TEMPLATE_NAMES)}},
    "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
}
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "a chunk as JSON, an error as JSON, or [DONE]"}},
}
_FRAMEWORKS_OWN = ("HTTPValidationError", "ValidationError")


def openapi_of(app: FastAPI, options: ServerOptions, vocab_size: int) -> Callable[[], dict[str, Any]]:
    """What ``app.openapi`` should be; the document is made when it is first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, options, vocab_size)
        return app.openapi_schema

    return document


def _document(app: FastAPI, options: ServerOptions, vocab_size: int) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in _FRAMEWORKS_OWN:
        schemas.pop(name, None)
    schemas["Error"] = ERROR_SCHEMA
    _limit(schemas, vocab_size)
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
        responses["503"]["description"] = "the engine has stopped, or is stuck"
    if path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if path in GENERATING_PATHS:
        responses["200"]["content"]["text/event-stream"] = {"schema": EVENT}
    if path == LAYOUT and method == "post" and options.admin_key is not None:
        operation["security"] = [{"AdminKey": []}, {"AdminKeyHeader": []}]
    elif path not in OPEN_PATHS and options.api_keys:
        operation["security"] = [{"ApiKey": []}]


def _limit(schemas: dict[str, Any], vocab_size: int) -> None:
    """Says of the bodies what their checks say, where the framework cannot read it from the fields' types."""
    token_id = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        fields = schemas[name]["properties"]
        for field, limits in LIMITS.items():
            if field in fields:
                fields[field]["anyOf"][0].update(limits)
        fields["stop_token_ids"]["anyOf"][0]["items"] = token_id
        fields["stop"]["anyOf"] = [STOP_STRING, _several(STOP_STRING, 0, MAX_STOP_STRINGS), {"type": "null"}]
    token_ids = {"type": "array", "minItems": 1, "items": token_id}
    several_prompts = [_several(prompt, 1, MAX_PROMPTS) for prompt in ({"type": "string"}, token_ids)]
    schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"] = [{"type": "string"}, token_ids, *several_prompts]
    schemas["DetokenizeRequest"]["properties"]["tokens"]["items"] = token_id
    schemas["TokenizeRequest"]["properties"]["messages"]["anyOf"][0]["minItems"] = 1
    for name in ("ChatCompletionRequest", "TokenizeRequest"):
        schemas[name]["properties"]["chat_template_kwargs"]["anyOf"][0] = TEMPLATE_KWARGS
    schemas["LayoutRequest"]["properties"]["layout"]["anyOf"][0]["minLength"] = 1
    schemas["ChatMessage"]["properties"]["content"] = CONTENT
    schemas["ChatMessage"].update(CONTENT_BY_ROLE)


def _several(item: dict[str, Any], at_least: int, at_most: int) -> dict[str, Any]:
    return {"type": "array", "minItems": at_least, "maxItems": at_most, "items": item}


def _errors(path: str, method: str, options: ServerOptions) -> dict[str, str]:
    """Descriptions by status."""
    errors = {
        "408": "the request came too slowly",
        "413": f"the body is larger than {options.max_body_bytes} bytes",
        "500": "a fault of the server's",
        "503": "the queue or the server is full, it shuts down, or the engine has stopped",
    }
    if method == "post":
        errors["400"] = "the body is wrong; param names the field"
    if path.startswith("/v1/models/") or path in GENERATING_PATHS or path in ("/tokenize", "/detokenize"):
        errors["404"] = "there is no such model"
    if path in GENERATING_PATHS:
        errors["429"] = "too many requests of this client wait: see Retry-After"
    if path not in OPEN_PATHS and options.api_keys:
        errors["401"] = "the API key is missing or wrong"
    if path == LAYOUT and method == "post":
        errors["401"] = "the admin key is missing or wrong"
        errors["403"] = "there is no admin key, and the request is not from this machine"
        errors["415"] = "the body is not sent as application/json"
    return errors
