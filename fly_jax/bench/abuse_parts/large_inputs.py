"""Phases of inputs that cost the server much more than their sender."""

from __future__ import annotations

import asyncio
import random
import time
from functools import lru_cache

from fly_jax.bench.abuse_parts.abuser import Abuser
from fly_jax.bench.abuse_parts.records import Figures
from fly_jax.bench.abuse_parts.watch import milliseconds
from fly_jax.bench.client import CHAT_COMPLETIONS, COMPLETIONS

WORDS = 20_000
# Single digits, so that lists of millions stay under the limit of a body; every vocabulary has them.
FEW_IDS = "1,2,3,4,5,6,7,8,9,"


async def large_texts(abuser: Abuser) -> Figures:
    """Several prompts of megabytes at once."""
    body = abuser.body(prompt=text(abuser.sizes.large_bytes), max_tokens=1)
    return await _all_at_once(abuser, COMPLETIONS, body, abuser.sizes.large_prompts)


async def largest_text(abuser: Abuser) -> Figures:
    """One prompt just under the limit of a body."""
    return await _all_at_once(
        abuser, COMPLETIONS, abuser.body(prompt=text(abuser.sizes.largest_bytes), max_tokens=1), 1
    )


async def large_tokenize(abuser: Abuser) -> Figures:
    """The large texts for ``/tokenize``."""
    body = abuser.body(prompt=text(abuser.sizes.large_bytes))
    return await _all_at_once(abuser, "/tokenize", body, abuser.sizes.large_prompts)


async def large_detokenize(abuser: Abuser) -> Figures:
    """Millions of token ids for ``/detokenize``."""
    body = _with_ids(abuser.body(tokens=[]), abuser.sizes.ids)
    return await _all_at_once(abuser, "/detokenize", body, 1)


async def large_ids(abuser: Abuser) -> Figures:
    """A prompt of millions of token ids."""
    body = _with_ids(abuser.body(max_tokens=1, prompt=[]), abuser.sizes.ids)
    return await _all_at_once(abuser, COMPLETIONS, body, 1)


async def large_chat(abuser: Abuser) -> Figures:
    """A chat of very many messages."""
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": "hi"} for turn in range(abuser.sizes.chat_messages)]
    return await _all_at_once(abuser, CHAT_COMPLETIONS, abuser.body(messages=messages, max_tokens=1), 1)


async def _all_at_once(abuser: Abuser, path: str, body: bytes, count: int) -> Figures:
    started = time.monotonic()
    await asyncio.gather(*(abuser.post(path, body) for _ in range(count)))
    return {"body_bytes": len(body), "sent": count, "all_answered_ms": milliseconds(time.monotonic() - started)}


@lru_cache(maxsize=2)
def text(size: int) -> str:
    """So many bytes of words drawn from many, since tokenizers remember words that they have seen."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 10))) for _ in range(WORDS)]
    chosen = " ".join(draw.choices(words, k=size // 3 + 1))
    return chosen[:size]


def _with_ids(body: bytes, count: int) -> bytes:
    """The body with this many ids in its empty list."""
    ids = (FEW_IDS * (count // 9 + 1))[: 2 * count].rstrip(",")
    return body.replace(b"[]", f"[{ids}]".encode())
