"""What all routes of one application share."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from serving.connections import ConnectionCounts
from serving.engine_client import EngineClient
from serving.errors import ApiError
from serving.large_bodies import LargeBodies
from serving.metrics import ServerMetrics
from serving.middleware import InFlight
from serving.options import ServerOptions
from serving.reading_threads import ReadingThreads


@dataclass(frozen=True, slots=True)
class ServerState:
    """One application's engine and its surroundings; ``started`` is in seconds since the epoch."""

    engine: EngineClient
    options: ServerOptions
    metrics: ServerMetrics
    in_flight: InFlight
    started: int
    reading_threads: ReadingThreads
    large_bodies: LargeBodies
    connections: ConnectionCounts

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that the one model is asked for by."""
        return self.options.model_names(self.engine)

    @property
    def model_name(self) -> str:
        """The name in answers."""
        return self.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Without a name, or with an empty one, a request means the one model there is.

        Raises:
            ApiError: 404, another model is asked for.
        """
        if name and name not in self.model_names:
            message = f"the model {name!r} does not exist; this server has {', '.join(map(repr, self.model_names))}"
            raise ApiError(404, message, param="model", code="model_not_found")


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
