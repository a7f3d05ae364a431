"""A streaming client of any OpenAI-compatible server that costs little CPU time a token.

aiohttp, because httpx's time for a request grows with the number of open connections: ARCHITECTURE.md has the figures.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from fly_jax.bench.requests import PlannedRequest, RequestRecord
from fly_jax.errors import ConfigError

COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"
ENDPOINTS = (COMPLETIONS, CHAT_COMPLETIONS)
INTERRUPTED = "the run was interrupted"
CONNECT_SECONDS = 60
# As in ``vllm bench serve``: longer than any answer takes, so that a server that hangs does not hold a run for ever.
REQUEST_SECONDS = 6 * 3600
# Servers close idle connections, uvicorn after 5 s; one that is closed just when it is used again fails the request.
KEEP_ALIVE_SECONDS = 2
LONGEST_MESSAGE = 500
_COUNTS = {"prompt_tokens", "completion_tokens"}


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and what all of them say.

    Attributes:
        base_url: of the server; a path in it goes before those of the endpoints.
        model: name of the model in the requests.
        endpoint: one of ``ENDPOINTS``, or another path that ends like one of them.
        api_key: sent as a bearer token.
        ignore_eos: generate on after an end token; an extra of vLLM and of fly-jax.
        temperature: 0 is greedy.
        extra_headers: of every request; they go before those of this client.
        extra_body: fields of every request; they go before those of this client.
    """

    base_url: str
    model: str
    endpoint: str = COMPLETIONS
    api_key: str | None = field(default=None, repr=False)
    ignore_eos: bool = False
    temperature: float = 0.0
    extra_headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"--base-url must start with http:// or https://, got {self.base_url!r}")
        if not self.endpoint.startswith("/") or not self.endpoint.endswith("completions"):
            raise ConfigError(f"--endpoint must be {' or '.join(ENDPOINTS)}, got {self.endpoint!r}")

    def url(self, path: str) -> str:
        return self.base_url.rstrip("/") + path

    @property
    def is_chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        authorization = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return {**headers, **authorization, **self.extra_headers}


class StreamFailed(Exception):
    """The server said or did something that ends this request alone."""


@dataclass(slots=True)
class StreamedAnswer:
    """What came of one answer so far.

    As in ``vllm bench serve``, every chunk with a choice counts as output, the one that ends it too. One that only
    says who will speak, which servers of chats send first, does not.
    """

    token_times: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    _rest: bytes = b""

    def feed(self, data: bytes, now: float) -> None:
        """Takes bytes as they came, cut anywhere.

        Raises:
            StreamFailed: an error travelled in the stream, or what came is not a completion's.
        """
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)

    def _take(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self.complete = True
            return
        try:
            event = json.loads(payload)
            if (error := event.get("error")) is not None:
                raise StreamFailed(_message_of(error))
            if usage := event.get("usage"):
                self.usage = dict(usage)
            if choices := event.get("choices"):
                self._take_choice(choices[0], now)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise StreamFailed(f"not a chunk of a completion: {_shortened(payload)}") from error

    def _take_choice(self, choice: dict[str, Any], now: float) -> None:
        ends = choice.get("finish_reason") is not None
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else delta.get("content")
        if not isinstance(text, str | None):
            raise TypeError(f"text is a {type(text).__name__}")
        if not (text or ends) and delta is not None and delta.get("role"):
            return
        self.complete = self.complete or ends
        self.token_times.append(now)
        if text:
            self.pieces.append(text)


class StreamingClient:
    """Sends requests over as many connections as there are requests in flight.

    Args:
        clock: seconds from the start of the run.
    """

    def __init__(self, target: Target, clock: Callable[[], float]) -> None:
        self._target = target
        self._clock = clock
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=target.headers,
            timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS),
        )

    async def __aenter__(self) -> StreamingClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def encode(self, planned: PlannedRequest) -> bytes:
        """The body of a request.

        Raises:
            ConfigError: a chat cannot be made from token ids.
        """
        target = self._target
        body: dict[str, Any] = {
            "model": target.model,
            "temperature": target.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if target.is_chat:
            if not isinstance(planned.prompt, str):
                raise ConfigError(f"{target.endpoint} takes text, not token ids: use --endpoint {COMPLETIONS}")
            body["messages"] = [{"role": "user", "content": planned.prompt}]
            body["max_completion_tokens"] = planned.max_tokens
        else:
            body["prompt"] = planned.prompt
            body["max_tokens"] = planned.max_tokens
        # Servers that do not know these fields may refuse them, so they are sent only where they say something.
        if target.ignore_eos:
            body["ignore_eos"] = True
        if planned.priority:
            body["priority"] = planned.priority
        if planned.tensor_parallel_size is not None:
            body["tensor_parallel_size"] = planned.tensor_parallel_size
        return json.dumps({**body, **target.extra_body}, separators=(",", ":")).encode()

    async def send(self, planned: PlannedRequest, body: bytes) -> RequestRecord:
        """Sends a body and reads the answer; whatever goes wrong, a cancellation too, becomes the record's error."""
        answer = StreamedAnswer()
        error = ""
        sent_at = self._clock()
        try:
            await self._read(body, answer)
        except asyncio.CancelledError:
            error = INTERRUPTED
        except StreamFailed as failure:
            error = str(failure)
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        ended_at = self._clock()
        pieces = max(len(answer.pieces), 1 if answer.token_times else 0)
        return RequestRecord(
            planned=planned,
            sent_at=sent_at,
            token_times=tuple(answer.token_times),
            ended_at=ended_at,
            prompt_tokens=_count(answer.usage, "prompt_tokens", planned.prompt_tokens),
            output_tokens=_count(answer.usage, "completion_tokens", pieces),
            text="".join(answer.pieces),
            error=error,
            has_usage=answer.usage.keys() >= _COUNTS,
        )

    async def _read(self, body: bytes, answer: StreamedAnswer) -> None:
        async with self._session.post(self._target.url(self._target.endpoint), data=body) as response:
            if response.status != 200:
                raise StreamFailed(f"HTTP {response.status}: {_shortened(await response.read())}")
            async for data in response.content.iter_any():
                answer.feed(data, self._clock())
        if not answer.token_times:
            raise StreamFailed("the answer held no output")
        if not answer.complete:
            raise StreamFailed("the stream ended before the answer did")

    async def get_json(self, path: str, timeout: float) -> dict[str, Any] | None:
        """An object that the server serves; None if it serves none there, or not in time (seconds)."""
        try:
            url, limit = self._target.url(path), aiohttp.ClientTimeout(total=timeout)
            async with self._session.get(url, timeout=limit) as response:
                answer = await response.json() if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None
        return answer if isinstance(answer, dict) else None


def _message_of(error: object) -> str:
    """Never empty, which would say that there was none."""
    said = error.get("message") if isinstance(error, dict) else error
    return _shortened(str(said or error or "an error without a message").encode())


def _count(usage: dict[str, Any], name: str, otherwise: int) -> int:
    count = usage.get(name)
    return count if isinstance(count, int) else otherwise


def _shortened(data: bytes) -> str:
    text = " ".join(data.decode(errors="replace").split())
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."
