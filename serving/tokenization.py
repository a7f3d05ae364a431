"""``POST /tokenize`` and ``POST /detokenize``, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from serving.protocol import DetokenizeRequest, TokenizeRequest
from serving.responses import Detokenized, Tokenized
from serving.routes import BodyRoute, result_of
from serving.state import state_of

router = APIRouter(route_class=BodyRoute)


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    state_of(request).check_model(body.model)
    return Response(await result_of(request, body), media_type="application/json")


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    state_of(request).check_model(body.model)
    return Response(await result_of(request, body), media_type="application/json")
