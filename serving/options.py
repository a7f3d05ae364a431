"""Options of the HTTP server, with vLLM's names where the thing is the same."""

from __future__ import annotations

from dataclasses import dataclass, field

from fly_jax.errors import ConfigError
from serving.connections import ConnectionLimits
from serving.engine_client import EngineClient

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the server listens, whom it lets in and how it ends.

    Attributes:
        host: address to bind; loopback by default, so that nothing is exposed by accident.
        port: 0 takes any free port.
        api_keys: when there are any, everything but health, version, load, metrics and layout asks for one of them.
        admin_key: when set, changing the layout asks for it; when not, only direct loopback peers may.
        served_model_names: names of the model in requests, the first also in answers; none: the engine's own.
        allowed_origins: web pages of these origins may read answers; ``*``: of any; none: only the server's own.
        shutdown_timeout: seconds that open requests get to end after a stop signal.
        max_body_bytes: a longer request body is refused with 413.
        connections: how many there may be, and how slow.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_key: str | None = field(default=None, repr=False)
    served_model_names: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    shutdown_timeout: int = 10
    max_body_bytes: int = 16 * MIB
    connections: ConnectionLimits = ConnectionLimits()

    def model_names(self, engine: EngineClient) -> tuple[str, ...]:
        return self.served_model_names or (engine.model_name,)

    def __post_init__(self) -> None:
        if not all(self.served_model_names):
            raise ConfigError("served_model_name must not be empty: give a name or leave it out")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}")
        if self.shutdown_timeout < 0:
            raise ConfigError(f"shutdown_timeout must be at least 0 seconds, got {self.shutdown_timeout}")
        if self.max_body_bytes < 1:
            raise ConfigError(f"max_body_bytes must be at least 1, got {self.max_body_bytes}")
        for name, keys in (("api_keys", self.api_keys), ("admin_key", (self.admin_key,))):
            # An empty key would look like protection and let in everyone who sends an empty header.
            if "" in keys:
                raise ConfigError(f"{name} must not be empty: leave it out or give a key")
