"""``POST /tokenize`` and ``POST /detokenize``, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from serving.prompts import check_token_ids, encode_chat, encode_prompts
from serving.protocol import DetokenizeRequest, TokenizeRequest
from serving.state import state_of

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    state = state_of(request)
    state.check_model(body.model)
    if body.messages:
        encoded = await encode_chat(
            state.engine,
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            template_kwargs=body.chat_template_kwargs,
        )
    else:
        add_special_tokens = body.add_special_tokens is not False
        [encoded] = await encode_prompts(state.engine, [body.prompt or ""], add_special_tokens=add_special_tokens)
    tokens = list(encoded.token_ids)
    return {"count": len(tokens), "max_model_len": state.engine.max_model_len, "tokens": tokens}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    state = state_of(request)
    state.check_model(body.model)
    check_token_ids(body.tokens, state.engine.vocab_size, "tokens")
    text = await asyncio.to_thread(state.engine.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text}
