"""Puts the application together: routes, middleware, error handlers, shared state."""

from __future__ import annotations

import time

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from fly_jax import __version__
from serving import admin, chat, completions, info, tokenization
from serving.byte_budget import ByteBudget
from serving.clients import client_of
from serving.connections import ConnectionCounts
from serving.engine_client import EngineClient
from serving.errors import install_error_handlers
from serving.large_bodies import LargeBodies, ReadingProcess
from serving.metrics import ServerMetrics
from serving.middleware import (
    MAX_HELD_BYTES,
    REQUEST_ID_HEADER,
    CountInFlight,
    ErrorBoundary,
    InFlight,
    LimitBody,
    OneByOne,
    OnlyHealth,
    RequestId,
    RequireApiKey,
)
from serving.openapi import openapi_of
from serving.options import ServerOptions
from serving.reading import Reader
from serving.reading_threads import ReadingThreads
from serving.state import ServerState


def create_app(engine: EngineClient, options: ServerOptions | None = None) -> FastAPI:
    """An application that serves one engine; it neither starts the engine nor shuts it down."""
    options = options or ServerOptions()
    in_flight = InFlight()
    connections = ConnectionCounts()
    metrics = ServerMetrics(options.model_names(engine)[0], connections)
    # The documentation pages load scripts from elsewhere; the schema itself stays at /openapi.json. A redirect would be
    # written from the Host header, which is the client's.
    app = FastAPI(title="fly-jax", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    reader = Reader(engine.tokenizer, engine.max_model_len, engine.vocab_size)
    large_bodies = LargeBodies(ReadingProcess(reader))
    app.state.server = ServerState(
        engine, options, metrics, in_flight, int(time.time()), ReadingThreads(reader), large_bodies, connections
    )
    routers = [module.router for module in (completions, chat, info, tokenization, admin)]
    for router in routers:
        app.include_router(router)
    install_error_handlers(app, [route for router in routers for route in router.routes])
    app.openapi = openapi_of(app, options, engine.vocab_size)  # type: ignore[method-assign]
    _add_middleware(app, options, in_flight, connections)
    return app


def _add_middleware(app: FastAPI, options: ServerOptions, in_flight: InFlight, connections: ConnectionCounts) -> None:
    """Innermost first: a body is read only for those who may send one, and every error carries its request's id."""
    held = ByteBudget(max(MAX_HELD_BYTES, options.max_body_bytes), "bodies are held until they have been read")
    app.add_middleware(LimitBody, max_bytes=options.max_body_bytes, held=held, client_of=client_of)
    if options.api_keys:
        app.add_middleware(RequireApiKey, api_keys=options.api_keys)
    app.add_middleware(CountInFlight, in_flight=in_flight)
    app.add_middleware(OnlyHealth, counts=connections)
    app.add_middleware(OneByOne)
    app.add_middleware(ErrorBoundary)
    if options.allowed_origins:
        # Outside the key: a browser asks with no key what it may send. Without credentials, so that any origin is safe.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
        )
    app.add_middleware(RequestId)
