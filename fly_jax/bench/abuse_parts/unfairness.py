"""Phases of requests that are each allowed and together take what belongs to others."""

from __future__ import annotations

import asyncio
import statistics
import time

import aiohttp

from fly_jax.bench.abuse_parts.abuser import Abuser
from fly_jax.bench.abuse_parts.records import Figures
from fly_jax.bench.abuse_parts.watch import milliseconds

PROMPT = "Once upon a time"
LONG_TOKENS = 256
URGENT = -1_000_000
# Of a server that does not say how many devices it has.
USUAL_WIDTH = 4


async def wide_requests(abuser: Abuser) -> Figures:
    """Requests for a wide group at a steady rate."""
    sizes = abuser.sizes
    width = sizes.wide_size or await widest(abuser)
    body = abuser.body(
        prompt=PROMPT, max_tokens=sizes.wide_tokens, tensor_parallel_size=width, stream=True, ignore_eos=True
    )
    started = time.monotonic()
    sent = []
    for turn in range(max(1, round(sizes.wide_rate * sizes.wide_seconds))):
        await asyncio.sleep(max(started + turn / sizes.wide_rate - time.monotonic(), 0.0))
        sent.append(asyncio.create_task(abuser.seconds_to_start(body)))
    starts = [start for start in await asyncio.gather(*sent) if start is not None]
    return {
        "width": width,
        "sent": len(sent),
        "started": len(starts),
        "worst_start_ms": milliseconds(max(starts)) if starts else None,
        "median_start_ms": milliseconds(statistics.median(starts)) if starts else None,
    }


async def widest(abuser: Abuser) -> int:
    """Devices of the server: the widest group that there can be."""
    try:
        async with abuser.session.get(f"{abuser.url}/layout") as response:
            return sum(map(int, (await response.json())["layout"].split("+")))
    except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError):
        return USUAL_WIDTH


async def waiting_places(abuser: Abuser) -> Figures:
    """One client fills all places in the queue; the short prompts of the probes are the other client's."""
    body = abuser.body(prompt=PROMPT, max_tokens=LONG_TOKENS, ignore_eos=True)
    await abuser.flood(body, abuser.sizes.waiting_requests, abuser.sizes.waiting_seconds, again=False)
    return {"sent": abuser.sizes.waiting_requests}


async def plain_flood(abuser: Abuser) -> Figures:
    """Many requests at once without priority: what the next phase is to be compared with."""
    return await _flood(abuser)


async def priority_flood(abuser: Abuser) -> Figures:
    """Many requests at once, each of them said to go before all others."""
    return await _flood(abuser, priority=URGENT)


async def _flood(abuser: Abuser, **fields: int) -> Figures:
    body = abuser.body(prompt=PROMPT, max_tokens=LONG_TOKENS, ignore_eos=True, **fields)
    await abuser.flood(body, abuser.sizes.flood_requests, abuser.sizes.flood_seconds, again=True)
    return {"at_once": abuser.sizes.flood_requests}
