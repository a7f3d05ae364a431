"""What the server needs from an engine, and nothing more.

``fly_jax.AsyncEngine`` satisfies these protocols; so does the scripted engine of the tests. Everything is read-only
and positional where the name of an argument is nobody's business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fly_jax.outputs import EngineStats, RequestDelta, SwitchReport
from fly_jax.sampling_params import SamplingDefaults, SamplingParams

if TYPE_CHECKING:
    from fly_jax.async_engine import AsyncEngine


class TextStreamClient(Protocol):
    """Tokens one by one to text."""

    def push(self, token_id: int, /) -> str:
        """The text that this token completes."""
        ...


class TokenizerClient(Protocol):
    """Text to token ids and back. Called from several threads at once; can be pickled."""

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str, /, add_special_tokens: bool = True) -> Sequence[int]: ...

    def fewest_tokens(self, characters: int, /) -> int:
        """No text of so many characters has fewer tokens; 0 where that cannot be known."""
        ...

    def decode(self, token_ids: Sequence[int], /, skip_special_tokens: bool = True) -> str: ...

    def decode_prompt(self, token_ids: Sequence[int], /, skip_special_tokens: bool = True) -> str:
        """The text before that of the output: all but a character that the prompt leaves unfinished."""
        ...

    def stream(self, skip_special_tokens: bool, prompt_ids: Sequence[int] = (), /) -> TextStreamClient:
        """For the text of tokens that follow a prompt."""
        ...

    def token_text(self, token_id: int, /) -> str:
        """What one token adds in the middle of a text, special tokens written out."""
        ...

    def token_bytes(self, token_id: int, /) -> bytes: ...

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt's text, special tokens written out: encode it without adding them again.

        Raises:
            InvalidRequestError: the template refuses the messages.
        """
        ...


class EngineClient(Protocol):
    """An engine as the server sees it. All methods are called on the server's event loop."""

    @property
    def tokenizer(self) -> TokenizerClient: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def model_name(self) -> str: ...

    @property
    def sampling_defaults(self) -> SamplingDefaults: ...

    @property
    def max_num_queued_reqs(self) -> int: ...

    @property
    def max_queued_per_client(self) -> int: ...

    @property
    def is_alive(self) -> bool: ...

    @property
    def has_failed(self) -> bool:
        """It ended by itself."""
        ...

    @property
    def stuck_seconds(self) -> float | None:
        """For how long no step has finished although there is work; None: all is well. Never waits."""
        ...

    async def wait_failed(self) -> None:
        """Returns when the engine has ended by itself and has told everybody who waited for it."""
        ...

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        client: str | None = None,
    ) -> AsyncIterator[RequestDelta]:
        """An async generator of what each step adds; closing it aborts the request.

        A request that fails inside the engine ends with a delta whose finish reason is ERROR.

        Args:
            client: whose share of the waiting places it takes; None: nobody's.

        Raises:
            ContextLengthError, InvalidRequestError, QueueFullError, ClientQueueFullError, EngineDeadError: at the
                first step of the iteration, before anything is yielded.
        """
        ...

    async def abort(self, request_id: str, /) -> None: ...

    async def switch(self, layout: str, strategy: str | None, policy: str | None, /) -> SwitchReport:
        """Changes the layout while requests run and pins it; without a strategy, by the engine's default one.

        Args:
            policy: takes over from there, before any other switch begins; None: the layout stays pinned.

        Raises:
            LayoutError: the layout is malformed or does not fit the devices.
            ConfigError: there is no such strategy or policy; or the switch was made and the policy cannot take over.
        """
        ...

    async def set_policy(self, policy: str, /) -> str:
        """Says who chooses the layout from now on; returns the canonical name of what is in force.

        Raises:
            ConfigError: there is no such policy, or the engine cannot follow it.
        """
        ...

    async def stats(self) -> EngineStats:
        """The counters.

        Raises:
            EngineDeadError: they died with the engine.
        """
        ...

    def latest_stats(self) -> EngineStats:
        """The counters as of the latest step, without waiting for the engine, which may be stuck.

        Raises:
            EngineDeadError: they died with the engine.
        """
        ...

    async def shutdown(self) -> None: ...


def _is_satisfied_by(engine: AsyncEngine) -> EngineClient:
    """For the type checker: the engine and this page cannot drift apart unseen."""
    return engine
