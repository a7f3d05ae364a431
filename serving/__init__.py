"""The OpenAI-compatible HTTP server in front of an engine.

``create_app`` makes the application for any :class:`~serving.engine_client.EngineClient`; ``serve`` runs it on a
bound socket inside an event loop; ``run`` does everything from binding the port to shutting the engine down.
"""

from __future__ import annotations

from serving.app import create_app
from serving.connections import ConnectionLimits
from serving.engine_client import EngineClient
from serving.options import ServerOptions
from serving.server import bind, run, serve

__all__ = ["ConnectionLimits", "EngineClient", "ServerOptions", "bind", "create_app", "run", "serve"]
