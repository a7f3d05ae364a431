"""Bodies of middle size are read in threads, where short ones do not wait for the others."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving.protocol import Body, ChatCompletionRequest
from serving.reading import Reader

# A shorter one is read on the event loop: the way to a thread and back costs more than the work.
SHORT_BYTES = 4096


class ReadingThreads:
    """One thread for short bodies and one for others: reading holds the interpreter's lock most of the time."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._short = ThreadPoolExecutor(1, "fly-jax-short-bodies")
        self._other = ThreadPoolExecutor(1, "fly-jax-bodies")

    async def read(self, body: Body, size: int) -> Any:
        """What :meth:`serving.reading.Reader.read` makes of a body of ``size`` bytes.

        Raises:
            InvalidRequestError, ContextLengthError: the body asks for what cannot be.
        """
        is_short = size < SHORT_BYTES
        # A template is a program of the model's.
        if is_short and not isinstance(body, ChatCompletionRequest):
            return self._reader.read(body)
        threads = self._short if is_short else self._other
        return await asyncio.get_running_loop().run_in_executor(threads, self._reader.read, body)
