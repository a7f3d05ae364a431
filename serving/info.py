"""What a client, a probe or a scraper asks about the server: models, health, version, load, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from fly_jax import __version__
from fly_jax.errors import EngineDeadError
from serving.errors import SERVER, ApiError
from serving.responses import ModelCard, ModelList
from serving.state import ServerState, state_of

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    engine = state_of(request).engine
    if not engine.is_alive:
        raise ApiError(503, "the engine has stopped; its log says why", type=SERVER, code="engine_dead")
    if (seconds := engine.stuck_seconds) is not None:
        message = (
            f"the engine has finished no step for {seconds:.0f} s although there is work; its log says where it is"
        )
        raise ApiError(503, message, type=SERVER, code="engine_stuck")
    return Response(status_code=200)


@router.head("/version", include_in_schema=False)
@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.head("/load", include_in_schema=False)
@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    return {"server_load": state_of(request).in_flight.count}


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics")
async def metrics(request: Request) -> Response:
    state = state_of(request)
    try:
        stats = state.engine.latest_stats()
    except EngineDeadError:
        # The latencies measured so far stay readable; /health says that the engine is gone.
        stats = None
    return Response(state.metrics.render(stats), headers={"Content-Type": state.metrics.content_type})


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    state = state_of(request)
    return ModelList(object="list", data=[_card(state, name) for name in state.model_names])


@router.head("/v1/models/{name:path}", include_in_schema=False)
@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, request: Request) -> ModelCard:
    """Names may hold slashes, as those of the Hugging Face hub do."""
    state = state_of(request)
    state.check_model(name)
    return _card(state, name)


def _card(state: ServerState, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        object="model",
        created=state.started,
        owned_by="fly-jax",
        root=state.engine.model_name,
        max_model_len=state.engine.max_model_len,
    )
